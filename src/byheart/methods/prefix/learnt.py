"""What of the method ``prefix`` is trained: columns before questions, encoders of passages, the questions' turn."""

from __future__ import annotations

import random
import time
from collections.abc import Container, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from byheart import __version__, kv
from byheart.attention import replaceable
from byheart.base import Base, digest_of
from byheart.decode import token_ids
from byheart.errors import DataError, UsageError
from byheart.kv import KV
from byheart.ledger import Ledger
from byheart.methods.contract import LearnReport, Settings, parse_options
from byheart.methods.controls import Context
from byheart.methods.facts import as_measured, to_measure
from byheart.methods.prefix.behind import Sample, shared, side_by_side
from byheart.methods.prefix.blend import BLENDED
from byheart.methods.prefix.cache import Block, Cache
from byheart.methods.prefix.compress import Compressed
from byheart.methods.prefix.heads import ATTENTION_HEADS, Emitted, Heads, looked_up
from byheart.methods.prefix.instances import NEAREST, Instances, hardness
from byheart.methods.prefix.marginal import Turn, learn_turn
from byheart.methods.prefix.select import Likely, Selected, fit_likely
from byheart.methods.prefix.slots import Slots, chosen_columns
from byheart.methods.prefix.store import Precision, Store
from byheart.methods.prefix.tokens import Imitated, TokenHeads, fit_heads
from byheart.methods.prefix.tuning import (
    KIND,
    Batch,
    Beside,
    Lesson,
    Pairs,
    Terms,
    holds,
    lesson,
    lessons,
    likelihoods,
    to_learn_from,
    tune,
)
from byheart.methods.study import ask_itself
from byheart.parts import slides
from byheart.progress import Progress, scaled
from byheart.prompt import FORM_EXAMPLES, Example, PromptFormat
from byheart.retrieve import embedded, searchable
from byheart.rows import Question
from byheart.segment import Passage
from byheart.storage import fingerprint, resumed
from byheart.training import Orders, Recipe, steps_done

# Options that only some encoders of passages know.
_ONLY = {
    "columns": ("selected", "compressed", "text"), "fit": ("tokens",), "rank": ("tokens",), "width": ("text",),
    "tune_encoder": ("text",), "vicreg": ("text",), "demonstrations": ("cache", "selected", "compressed", "tokens"),
}  # fmt: skip
# What only training asks for.
_TRAINING = (
    "distil", "vicreg", "fair", "wrong", "study", "hard", "rank",
    "begin", "epochs", "batch", "lr", "warmup", "decay", "clip",
)  # fmt: skip
# Tokens of pages that learnt columns are chosen among.
_BEGIN = 2_048
# Passages, or questions, whose answers are on disk before the next ones are worked at.
_AT_ONCE = 64


@dataclass(frozen=True)
class PrefixOptions:
    """What ``--set prefix.NAME=VALUE`` takes.

    Attributes:
        store: ``none`` encodes what was retrieved when a question comes; ``disk`` encodes all passages beforehand.
        precision: of what is on disk: ``model`` (as the model computes) or ``int8`` (about half of bf16).
        blend: with several passages, the share of their tokens that is read again with all passages in sight.
        encoder: ``cache``: all of a passage's keys and values; ``selected``: those of a few words that answers are
            likely to stand in; ``compressed``: a few that are fitted to all; ``tokens``: as many as it has tokens, made
            by heads on the text encoder that are fitted to the model's own; ``text``: a few that learnt heads on the
            text encoder emit.
        columns: of a passage, with ``selected``, ``compressed`` and ``text``.
        fit: passages of the ledger that the heads of ``tokens`` are fitted to, drawn by the seed.
        rank: of what training, with ``slots``, changes in these heads; 0: they stay as they are fitted.
        width: with ``text``, of what its heads make keys and values from.
        tune_encoder: with ``text``, train a copy of the text encoder along, in steps a hundred times smaller.
        distil, vicreg, fair, wrong: weights of what training adds to cross-entropy, see
            :class:`byheart.methods.prefix.tuning.Terms`.
        fair_by: what ``fair`` tells questions apart by: their ``kind``, or one of their ``attributes`` by its name.
        study: of each window of a page, questions that the model asks itself and learns from, too (self-study).
        realm: of each training question, passages from whose likelihoods of the answer the retriever learns; 0: it does
            not (:mod:`byheart.methods.prefix.marginal`).
        hard, demonstrations, interpolate: from a store of training instances (RetroPrompt; Chen et al. 2022): training
            counts a question 1 + ``hard`` · -log p_kNN(its answer) times; so many of the nearest instances are shown
            before the passages; and answers are those that are best under ``interpolate`` · p_kNN + (1 - it) · p_LM.
        passages: ``retrieved`` for each question, or ``none``: the learnt columns are all there is, for every question
            the same (prefix-tuning; Li and Liang 2021), or a corpus in one cache (Cartridges; Eyuboglu et al. 2025).
        slots: columns that are learnt from the ledger's training questions and stand before everything; 0: none.
        begin: what they begin as: the model's keys and values of the ``examples``, or of the ledger's ``pages``.
        epochs: how often these questions are seen.
        batch: questions a step.
        lr, warmup, decay, clip: see :class:`byheart.training.Recipe`.
    """

    store: Literal["none", "disk"] = "none"
    precision: Precision = "model"
    blend: float = 0.0
    encoder: Literal["cache", "selected", "compressed", "tokens", "text"] = "cache"
    columns: int = 16
    fit: int = 1000
    rank: int = 64
    width: int = 256
    tune_encoder: bool = False
    distil: float = 0.0
    vicreg: float = 0.0
    fair: float = 0.0
    fair_by: str = KIND
    wrong: float = 0.0
    study: int = 0
    realm: int = 0
    hard: float = 0.0
    demonstrations: int = 0
    interpolate: float = 0.0
    passages: Literal["retrieved", "none"] = "retrieved"
    slots: int = 0
    begin: Literal["examples", "pages"] = "examples"
    epochs: int = 4
    batch: int = 16
    lr: float = 0.01
    warmup: int = 10
    decay: float = 0.0
    clip: float = 1.0


class Learnt(Context):
    """Passages' columns, made by the model or by what is learnt, and how that is learnt."""

    name = "prefix"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        # By the name of the method, also in its controls.
        self.options = options = parse_options(PrefixOptions, Learnt.name, settings.options)
        for name in ("blend", "interpolate"):
            if getattr(options, name) > 1:
                raise UsageError(f"--set prefix.{name}={getattr(options, name)}: must be a share, at most 1")
        for name in ("epochs", "batch", "columns", "fit", "width"):
            if getattr(options, name) < 1:
                raise UsageError(f"--set prefix.{name}={getattr(options, name)}: must be at least 1")
        if not options.lr:
            raise UsageError("--set prefix.lr=0: must be above 0")
        if options.width % ATTENTION_HEADS:
            raise UsageError(f"--set prefix.width={options.width}: must be a multiple of {ATTENTION_HEADS}")
        if options.passages == "none" and not options.slots:
            raise UsageError("--set prefix.passages=none: leaves nothing to answer from; learn some with prefix.slots")
        if options.encoder != "cache" and (options.blend or options.passages == "none"):
            raise UsageError(
                f"--set prefix.encoder={options.encoder}: needs retrieved passages, and none of them can be blended"
            )
        self._check_options(settings)
        if options.passages == "none" and (options.wrong or options.realm):
            raise UsageError("--set prefix.passages=none: there are no passages for prefix.wrong or prefix.realm")
        if options.realm == 1:
            raise UsageError("--set prefix.realm=1: passages are held against each other; use 2 or more")
        if self._fits and not getattr(base.tokenizer, "is_fast", False):
            raise DataError(
                f"{self.name}: the tokeniser of {base.name} does not say where its tokens stand; "
                f"prefix.encoder={options.encoder} needs to know"
            )
        try:
            self._rotation = kv.check(base)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        if options.encoder == "compressed" and not replaceable(base.model):
            raise DataError(
                f"{self.name}: the attention of {base.name} cannot be replaced, so that no passage can be compressed"
            )
        if options.blend and slides(base.model.config):
            raise DataError(f"{self.name}: {base.name} has sliding windows; use prefix.blend=0")
        if options.blend and len(base.parts.blocks) < BLENDED:
            raise DataError(
                f"{self.name}: prefix.blend looks at the second of {BLENDED} blocks or more; {base.name} has "
                f"{len(base.parts.blocks)}"
            )
        if self._several(settings) and self._rotation is None:
            raise DataError(
                f"{self.name}: {base.name} cannot have keys moved to another position, so that several passages cannot "
                "stand behind each other; use --k 1 and no prefix.demonstrations"
            )
        super().__init__(base, settings, work)
        self._files = Store(work / "prefix", options.precision)
        self._whole: Cache | None = None
        self._made: Cache | None = None
        self.slots: Slots | None = None
        self.heads: Heads | None = None
        self.tokens: TokenHeads | None = None
        self.likely: Likely | None = None
        self.turn: Turn | None = None
        self.instances: Instances | None = None

    def _several(self, settings: Settings) -> bool:
        """Whether several blocks can stand before a question."""
        options = self.options
        return (settings.k > 1 and options.passages == "retrieved") or options.demonstrations > 0

    def _check_options(self, settings: Settings) -> None:
        """What would silently do nothing is refused."""
        options = self.options
        for key in settings.options:
            if key.startswith(f"{Learnt.name}-"):
                raise UsageError(f"--set {key}: controls take the options of {Learnt.name}")
        for name, encoders in _ONLY.items():
            if getattr(options, name) != getattr(PrefixOptions, name) and options.encoder not in encoders:
                needed = " or ".join(f"prefix.encoder={encoder}" for encoder in encoders)
                raise UsageError(f"--set prefix.{name}={settings.options[f'prefix.{name}']}: needs {needed}")
        if options.blend and not self._several(settings):
            instead = "use --k 2 or more" if options.passages == "retrieved" else "there are none here"
            raise UsageError(f"--set prefix.blend={options.blend}: blends several passages; {instead}")
        if options.precision != "model" and not self._keeps and not self._trains:
            raise UsageError(f"--set prefix.precision={options.precision}: nothing is on disk; use prefix.store=disk")
        for name in () if self._trains else _TRAINING:
            alone = name == "epochs" and options.realm  # a retriever that learns from the reader sees them as often
            if getattr(options, name) != getattr(PrefixOptions, name) and not alone:
                raise UsageError(
                    f"--set prefix.{name}={getattr(options, name)}: nothing is trained; learn prefix.slots, or a "
                    "prefix.encoder"
                )
        if options.fair_by != KIND and not options.fair:
            raise UsageError(f"--set prefix.fair_by={options.fair_by}: nothing goes by it; give prefix.fair a weight")
        if self._keeps and options.passages == "none":
            raise UsageError("--set prefix.store=disk: with prefix.passages=none there are no passages to keep")
        for name in ("fair", "wrong", "vicreg"):
            if getattr(options, name) and options.batch == 1:
                raise UsageError(
                    f"--set prefix.{name}={getattr(options, name)}: holds questions of a batch against "
                    "each other; use a prefix.batch of 2 or more"
                )
        if options.realm and settings.retriever == "bm25":
            raise UsageError(
                f"--set prefix.realm={options.realm}: turns question vectors, which --retriever bm25 has not"
            )

    @property
    def whole(self) -> Cache:
        """Passages behind this prompt form's examples."""
        if self._whole is None or self._whole.form is not self.form:
            self._whole = Cache(self.base, self.form, self._files, self._rotation, self.options.slots)
        return self._whole

    @property
    def cache(self) -> Cache:
        """The same as questions see them: with columns that are made in another way, where they are to be."""
        if self._made is None or self._made.form is not self.form:
            if self.options.encoder == "compressed":
                self._made = Compressed(self.whole, self.options.columns)
            elif self.likely is not None:
                self._made = Selected(self.whole, self.options.columns, self.likely, self.encoder)
            elif self.tokens is not None:
                self._made = Imitated(self.whole, self.tokens, self.encoder)
            elif self.heads is not None:
                self._made = Emitted(self.whole, self.heads, self.encoder)
            else:
                return self.whole
        return self._made

    def _past(self, passages: Sequence[Block], blocks: Sequence[KV]) -> tuple[KV, ...]:
        return self.cache.past(passages, blocks, self.options.blend)

    @property
    def _trained_by(self) -> PrefixOptions:
        """The options but for those that training does not ask: with others of these, what is trained stays."""
        return replace(self.options, store="none", realm=0, interpolate=0.0)

    @property
    def digest(self) -> str:
        """A hash of what is learnt, and of how columns are made: what answers depend on besides the options."""
        return fingerprint(digest_of(self._learnt.state_dict().values()), self.cache.mark) if self._learns else ""

    @property
    def _keeps(self) -> bool:
        return self.options.store == "disk"

    @property
    def _trains(self) -> bool:
        return bool(self.options.slots) or self.options.encoder == "text"

    @property
    def _asks(self) -> bool:
        """Whether what is fitted or trained is learnt from training questions."""
        return self._trains or self.options.encoder == "selected"

    @property
    def _fits(self) -> bool:
        """Whether something is fitted to passages before anything is trained."""
        return self.options.encoder in ("selected", "tokens")

    @property
    def _moves(self) -> bool:
        """Whether passages' columns change while training goes on."""
        options = self.options
        return options.encoder == "text" or (options.encoder == "tokens" and options.slots > 0 and options.rank > 0)

    @property
    def _learns(self) -> bool:
        """Whether anything is learnt that is kept beside the index."""
        return self._trains or self._fits or self.options.realm > 0

    @property
    def _learnt(self) -> nn.ModuleDict:
        """All that is learnt, under the names that it has on disk."""
        there = {
            "slots": self.slots, "heads": self.heads, "tokens": self.tokens, "likely": self.likely, "turn": self.turn,
        }  # fmt: skip
        return nn.ModuleDict({name: one for name, one in there.items() if one is not None})

    def _check_room(self, cache: Cache, passages: Iterable[Block], columns: int | None = None) -> tuple[int, int]:
        """How many passages a cache is to keep, and about how many bytes each.

        Raises:
            DataError: where they would fill the disk.
        """
        count, each, there = cache.size(passages, columns)
        self._files.check_room(each * count - there)
        return count, each

    def _learnt_bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self._learnt.parameters())

    def learnt(self) -> tuple[KV, ...]:
        """The learnt columns that stand before everything, where there are any."""
        if self.slots is None:
            return ()
        with torch.no_grad():
            return (self.slots.kv(self.base.dtype),)

    def _fit_likely(self, pairs: Pairs) -> str:
        """Fit what tells tokens of answers from others to passages that hold answers of training questions."""
        holding = ((question, next((one for one in some if holds(one, question)), None)) for question, some in pairs)
        some = [(passage, question.answers) for question, passage in holding if passage is not None]
        if not some:
            raise DataError(
                f"{self.name}: prefix.encoder=selected learns where answers stand, and the ledger has no training "
                "question whose document holds its answer"
            )
        self.likely = fit_likely(self.whole, self.encoder, some)
        return f"where answers stand learnt from {len(some)} questions"

    def _fit_heads(self, report: LearnReport, progress: Progress) -> str:
        """Fit heads to what the model makes of some of the indexed passages itself."""
        index, seed = self._retriever.index, self.settings.seed
        drawn = set(random.Random(seed).sample(range(len(index)), min(self.options.fit, len(index))))
        some = [passage for n, (_, passage) in enumerate(index.all_passages()) if n in drawn]
        if not some:
            raise DataError(f"{self.name}: the ledger has no document to fit heads to")
        beginning = (self.form.pieces("", ()), self.whole.first, self.encoder.card.hash)
        mark = fingerprint(__version__, self.base.hash, str(self.base.dtype), beginning, some)
        tell = scaled(progress, len(some), report.documents)
        self.tokens = fit_heads(self.whole, self.encoder, some, self.work / f"fit-{mark}.safetensors", tell)
        return f"heads fitted to {len(some)} passages"

    def _tune(self, ledger: Ledger, pairs: Pairs, report: LearnReport, progress: Progress) -> LearnReport:
        options, base, seed = self.options, self.base, self.settings.seed
        began = time.perf_counter()
        # Without passages none is needed, but to be told from.
        needed = options.passages == "retrieved" or options.distil > 0
        found, skipped = lessons(pairs, base, self.form, self.beside, needed=needed, by=options.fair_by)
        if options.study:
            progress = scaled(progress, 2, 1)  # half of it to study, half to train
            found += self._studied(to_measure(ledger), progress, report.documents)
        if not found:
            why = "whose document holds its answer" if needed else "with an answer"
            raise DataError(f"prefix: there is something to learn, and the ledger has no training question {why}")
        if not needed:
            found = [replace(one, passages=()) for one in found]
        groups = {one.group for one in found if one.group}
        if options.fair and len(groups) < 2:
            there = f'is of {options.fair_by} "{groups.pop()}"' if groups else f"has no attribute {options.fair_by}"
            raise DataError(
                f"prefix: prefix.fair={options.fair} holds groups of questions against each other, and every question "
                f"to learn from {there}"
            )
        blocks = list(dict.fromkeys(block for lesson in found for block in lesson.blocks))
        orders = Orders([len(found)], options.batch, options.epochs, seed)
        if options.slots:
            self.slots = Slots(chosen_columns(self._begin(), options.slots))
        heads = self._fresh()
        if self.tokens is not None and options.rank:
            self.tokens.loosen(options.rank, seed)
        learnt = nn.ModuleDict(dict(self._learnt) | ({} if heads is None else {"heads": heads}))
        # What is learnt begins as text of the ledger, so that another ledger gives another beginning.
        begin = digest_of(learnt.state_dict().values())
        made_with = (__version__, base.hash, str(base.dtype), self.encoder.card.hash, asdict(self._trained_by), seed)
        mark = fingerprint(made_with, self.form.pieces("", ()), found, begin, self.cache.mark)
        recipe = Recipe(orders.steps, options.lr, options.warmup, options.decay, options.clip)
        store = self.work / f"learnt-{mark}.safetensors"
        read = self._read(blocks, distilled=options.distil > 0)
        if steps_done(store) < orders.steps:
            for cache, some in read:
                self._check_room(cache, some)
                cache.keep(some)
        ready = time.perf_counter() - began

        terms = Terms(options.distil, options.vicreg, options.fair, options.wrong)
        tell = scaled(progress, orders.steps, report.documents)
        trained = tune(base, learnt, found, lambda some: self._batch(some, heads), orders, recipe, terms, store, tell)
        self.heads = heads  # from here on passages are what they make of them
        if self.tokens is not None:
            self.tokens.requires_grad_(False)
            self._made = None
        stay = {self.cache.path(block) for block in blocks if isinstance(block, Passage)} if self._keeps else set()
        for path in {cache.path(block) for cache, some in read for block in some} - stay:
            path.unlink(missing_ok=True)
        note = f"{len(found)} questions to learn from, {orders.steps} steps; {trained.course(options.epochs)}"
        return replace(report, seconds=ready + trained.seconds, skipped=report.skipped | skipped, notes=(note,))

    def _studied(self, measured: Container[str], progress: Progress, documents: int) -> list[Lesson]:
        """Lessons that the model makes of the indexed passages itself; none in words that are measured.

        ``progress`` shall have been told of so many ``documents`` in the end.
        """
        passages = [passage for _, passage in self._retriever.index.all_passages()]
        count, seed = self.options.study, self.settings.seed
        form = (self.form.examples, self.settings.chat)
        mark = fingerprint(__version__, self.base.hash, str(self.base.dtype), form, passages, count, seed)

        def make(numbers: Sequence[int]) -> list[list[tuple[int, str, str]]]:
            some = {passages[n]: n for n in numbers}
            found = ask_itself(self.base, self.form, list(some), count, seed)
            asked: dict[int, list[tuple[int, str, str]]] = {n: [] for n in numbers}
            for passage, question, answer in found:
                asked[some[passage]].append((some[passage], question, answer))
            return list(asked.values())

        tell = scaled(progress, max(len(passages), 1), documents)
        rows = resumed(self.work / f"study-{mark}.json", mark, range(len(passages)), _AT_ONCE, make, tell)
        asked = [
            (Question(id=f"study-{n}", question=question, answers=[answer], kind="study"), passages[n])
            for found in rows
            for n, question, answer in found
            if as_measured(question) not in measured
        ]
        return [
            replace(
                lesson(self.base, self.form, question, question.answers[0], [passage]),
                group="",  # the model's own questions are no group of the ledger's
                shown=shown,
                weight=weight,
            )
            for (question, passage), (shown, weight) in zip(
                asked, self.beside([question for question, _ in asked]), strict=True
            )
        ]

    def _follow_reader(self, ledger: Ledger, report: LearnReport) -> LearnReport:
        """Turn questions towards passages from which the model, with what it learnt, can tell the answer."""
        began = time.perf_counter()
        k, seed = self.options.realm, self.settings.seed
        self.turn = self._retriever.turn = None  # learnt anew, from passages found without it, by a reader without it
        asked, left_out = to_learn_from(ledger, self.form)
        ranked = self._retriever.retrieve([question.question for question in asked], k)
        pairs = [(question, hits) for question, hits in zip(asked, ranked, strict=True) if len(hits) == k]
        if few := len(asked) - len(pairs):
            left_out[f"fewer than {k} passages are found"] = few
        if not pairs:
            raise DataError(f"prefix.realm: the ledger has no training question for which {k} passages are found")
        found = [
            [replace(lesson(self.base, self.form, question, question.answers[0], [hit]), shown=shown) for hit in hits]
            for (question, hits), (shown, _) in zip(pairs, self.beside([one for one, _ in pairs]), strict=True)
        ]
        reader = (self.base.hash, str(self.base.dtype), digest_of(self._learnt.state_dict().values()))
        mark = fingerprint(__version__, reader, self.form.pieces("", ()), asdict(self._trained_by), seed, found)

        def read(some: Sequence[list[Lesson]]) -> list[list[float]]:
            with torch.no_grad():
                lessons = [one for of_question in some for one in of_question]
                each = likelihoods(self.base, lessons, lambda some: self._batch(some, self.heads))
            return [each[n : n + k] for n in range(0, len(each), k)]

        told = resumed(self.work / f"read-{mark}.json", mark, found, _AT_ONCE, read)
        vectors = self.encoder.encode([question.question for question, _ in pairs])
        hits = embedded(self.encoder, [hit for _, hits in pairs for hit in hits], self.settings.segment)
        self.turn, trained = learn_turn(
            vectors,
            hits.reshape(len(pairs), k, -1),
            told,
            self.options.epochs,
            seed,
            self.work / f"turn-{mark}.safetensors",
        )
        self._retriever.turn = self.turn.turned
        course = trained.course(self.options.epochs)
        note = f"the retriever learnt from {len(pairs)} questions with {k} passages each; {course}"
        seconds, skipped = time.perf_counter() - began, left_out | report.skipped
        return replace(report, seconds=seconds, skipped=skipped, notes=(note,))

    def beside(self, questions: Sequence[Question]) -> list[Beside]:
        """Of each question the nearest instances to show, the nearest last, and how much it counts in training."""
        options, texts = self.options, [question.question for question in questions]
        if self.instances is None:
            return [((), 1.0)] * len(questions)
        shown = self.instances.nearest(texts, options.demonstrations, shown=True)
        weights = [1.0] * len(questions)
        if options.hard:
            near = self.instances.nearest(texts, NEAREST)
            weights = [1 + options.hard * hardness(n, q.answers) for n, q in zip(near, questions, strict=True)]
        return [
            (tuple(one.example for one, _ in reversed(some)), weight)
            for some, weight in zip(shown, weights, strict=True)
        ]

    def _read(self, blocks: Sequence[Block], *, distilled: bool) -> list[tuple[Cache, Sequence[Block]]]:
        """What training reads from disk; heads that are learnt read no passages, but to be told from whole ones."""
        shown = [block for block in blocks if isinstance(block, Example)]
        used = (self.whole, shown) if self._moves else (self.cache, blocks)
        return [used, (self.whole, blocks)] if distilled and used != (self.whole, blocks) else [used]

    def _fresh(self) -> Heads | None:
        """Heads, before training."""
        options = self.options
        if options.encoder != "text":
            return None
        begin = chosen_columns(self._begin(), options.columns)
        own = deepcopy(self.encoder.model).float().requires_grad_(True) if options.tune_encoder else None
        return Heads(begin, self.encoder.card.dim, options.width, self.settings.seed, own)

    def _batch(self, some: Sequence[Lesson], heads: Heads | None) -> Batch:
        """Lessons behind what is being learnt: slots before all, and columns in the place of the passages."""
        base, whole = self.base, self.whole

        def behind(cache: Cache, stand: Sequence[Sequence[Block]]) -> list[Sample]:
            kept = cache is whole or not self._moves
            made = iter(cache.encode([block for blocks in stand for block in blocks], kept=kept))
            pasts = [cache.past(blocks, [next(made) for _ in blocks], self.options.blend) for blocks in stand]
            ends = [past[-1].end if past else self.options.slots for past in pasts]
            return [Sample(past, one.asked, one.answer, end) for past, one, end in zip(pasts, some, ends, strict=True)]

        slots = [] if self.slots is None else shared(self.slots.kv(base.dtype), len(some))
        told = behind(whole, [one.blocks for one in some]) if self.options.distil else []
        if heads is None:
            alone = self.options.passages == "none"
            return Batch(slots, behind(self.cache, [one.shown if alone else one.blocks for one in some]), told)
        head = [] if whole.head is None else shared(whole.head, len(some))
        seen = looked_up(heads, self.encoder, [passage for one in some for passage in one.passages])
        columns = side_by_side(slots, head, heads.columns(seen, base.dtype))
        start = whole.start + len(heads)
        return Batch(columns, [Sample((), one.asked, one.answer, start) for one in some], told, seen)

    def _begin(self) -> KV:
        """What learnt columns are chosen among: the model's own keys and values of real text."""
        tokenizer = self.base.tokenizer
        if self.options.begin == "pages":
            ids = token_ids(tokenizer, "", beginning=True)
            for _, passage in self._retriever.index.all_passages():
                if len(ids) < _BEGIN:
                    ids += token_ids(tokenizer, searchable(passage) + "\n\n", beginning=False)
            if not len(self._retriever.index):
                raise DataError(f"{self.name}: prefix.begin=pages, and the ledger has no document")
        else:
            shown, _, _ = PromptFormat(tokenizer, self.form.examples or FORM_EXAMPLES).pieces("", ())
            ids = token_ids(tokenizer, shown, beginning=True)
        return kv.read(self.base, [ids[: min(_BEGIN, self.base.positions or _BEGIN)]])[0]
