"""The method ``prefix``: retrieved passages enter a frozen model as keys and values that were made beforehand."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from byheart import kv
from byheart.base import Base
from byheart.decode import Job, token_ids
from byheart.errors import DataError, UsageError, first_line
from byheart.kv import KV
from byheart.ledger import Change, Ledger
from byheart.methods.contract import Answer, LearnReport, Progress, Settings, parse_options
from byheart.methods.controls import Context
from byheart.methods.prefix.behind import Sample, shared, side_by_side
from byheart.methods.prefix.cache import Cache
from byheart.methods.prefix.compress import Compressed, Compressor
from byheart.methods.prefix.heads import Emitted, Heads, emitted
from byheart.methods.prefix.slots import Slots, chosen_columns
from byheart.methods.prefix.store import Precision, Store
from byheart.methods.prefix.tuning import Batch, Lesson, lessons, tune
from byheart.methods.reading import ask, options_of
from byheart.progress import scaled
from byheart.prompt import FORM_EXAMPLES, PromptFormat
from byheart.retrieve import searchable
from byheart.rows import Question
from byheart.score import normalize
from byheart.segment import Passage, segment
from byheart.storage import bytes_under, fingerprint
from byheart.training import Orders, Recipe

_LEARNT = "learnt.safetensors"
# Passages whose keys and values are in memory at once while questions are asked.
_HELD = 64
# Tokens of pages that learnt columns are chosen among.
_BEGIN = 2_048


@dataclass(frozen=True)
class PrefixOptions:
    """What ``--set prefix.NAME=VALUE`` takes.

    Attributes:
        store: ``none`` encodes what was retrieved when a question comes; ``disk`` encodes all passages beforehand.
        precision: of what is on disk: ``model`` (as the model computes) or ``int8`` (about half of bf16).
        blend: with several passages, the share of their tokens that is read again with all passages in sight.
        encoder: ``cache``: all of a passage's keys and values; ``compressed``: those of a few learnt marks behind it;
            ``text``: a few that heads on the text encoder emit.
        columns: of a passage, where it is not the cache.
        distil: weight of KL(behind the whole passages || behind what is learnt) while that is trained.
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
    encoder: Literal["cache", "compressed", "text"] = "cache"
    columns: int = 16
    distil: float = 0.0
    passages: Literal["retrieved", "none"] = "retrieved"
    slots: int = 0
    begin: Literal["examples", "pages"] = "examples"
    epochs: int = 4
    batch: int = 16
    lr: float = 0.01
    warmup: int = 10
    decay: float = 0.0
    clip: float = 1.0


class Prefix(Context):
    """The model's own keys and values of each passage, made once and alone, behind the same examples for all.

    A prompt is [learnt columns][examples][passage] ... [passage][question]; only the question is read when it is asked.
    With one passage and nothing learnt that gives the logits of the same text in the prompt. Several passages are
    turned to their places (Lu et al. 2024, TurboRAG) and do not see each other, but for a share that is read again on
    wish (CacheBlend).
    """

    name = "prefix"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        self.options = options = parse_options(PrefixOptions, self.name, settings.options)
        if options.blend > 1:
            raise UsageError(f"--set prefix.blend={options.blend}: must be a share, at most 1")
        for name in ("epochs", "batch", "columns"):
            if getattr(options, name) < 1:
                raise UsageError(f"--set prefix.{name}={getattr(options, name)}: must be at least 1")
        if options.passages == "none" and not options.slots:
            raise UsageError("--set prefix.passages=none: leaves nothing to answer from; learn some with prefix.slots")
        if options.encoder != "cache" and (options.blend or options.passages == "none"):
            raise UsageError(
                f"--set prefix.encoder={options.encoder}: needs retrieved passages, and has no tokens to blend"
            )
        try:
            self._rotation = kv.check(base)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        if settings.k > 1 and self._rotation is None:
            raise DataError(
                f"{self.name}: {base.name} cannot have keys moved to another position, so that several passages cannot "
                "stand behind each other; use --k 1"
            )
        super().__init__(base, settings, work)
        self._files = Store(work / "prefix", options.precision)
        self._whole: Cache | None = None
        self._compressed: Cache | None = None
        self.slots: Slots | None = None
        self.compressor: Compressor | Heads | None = None

    @property
    def whole(self) -> Cache:
        """Passages behind this prompt form's examples."""
        if self._whole is None or self._whole.form is not self.form:
            self._whole = Cache(self.base, self.form, self._files, self._rotation, self.options.slots)
        return self._whole

    @property
    def cache(self) -> Cache:
        """The same as questions see them: compressed where they are to be."""
        if self.compressor is None:
            return self.whole
        if self._compressed is None or self._compressed.form is not self.form:
            self._compressed = (
                Compressed(self.whole, self.compressor)
                if isinstance(self.compressor, Compressor)
                else Emitted(self.whole, self.compressor, self.encoder)
            )
        return self._compressed

    # -- the contract ----------------------------------------------------------------------------------------

    def estimate(self, ledger: Ledger) -> str | None:
        """What will lie on disk.

        Raises:
            DataError: where it would fill the disk.
        """
        if not self._keeps:
            return None
        columns = None if self.options.encoder == "cache" else self.options.columns
        passages = segment(ledger.documents(), self.encoder.splitter, self.settings.segment)
        count, each = self.whole.size(passages, columns)
        return f"prefix: {count:,} passages of about {each / 1e6:.2f} MB, {each * count / 1e9:.2f} GB on disk"

    def learn(self, ledger: Ledger, progress: Progress = lambda count: None) -> LearnReport:
        """Index the ledger's documents; train what is to be learnt; with ``store=disk`` read every passage.

        ``progress`` is told of documents, of epochs' worth of them where something is trained.
        """
        report = super().learn(ledger, (lambda count: None) if self._trains else progress)
        seconds, stored, notes = report.seconds, report.bytes, report.notes
        self._whole, self._compressed, self.slots, self.compressor = None, None, None, None
        if self._trains:
            report = self._tune(ledger, report, progress)
            seconds, stored, notes = seconds + report.seconds, stored + self._learnt_bytes(), report.notes
        if self._keeps:
            began = time.perf_counter()
            index = self._retriever.index
            self.cache.size((passage for _, passage in index.all_passages()), None)
            self.cache.keep(passage for _, passage in index.all_passages())
            kept = bytes_under(self._files.folder)
            seconds, stored = seconds + time.perf_counter() - began, stored + kept
            notes = (*notes, f"{kept / max(len(index), 1) / 1e6:.2f} MB a passage on disk")
        return replace(report, seconds=seconds, bytes=stored, notes=notes)

    def revise(self, change: Change) -> LearnReport:
        """Follow the changed document in the index, and with ``store=disk`` in what is kept."""
        gone = self._files_of(change.id) if change.kind == "document" else set()
        report = super().revise(change)
        if change.kind != "document" or not self._keeps:
            return report
        began = time.perf_counter()
        now = [passage for _, passage in self._retriever.index.all_passages() if passage.document == change.id]
        self.cache.keep(now)
        for path in gone - {self.cache.path(passage) for passage in now}:
            path.unlink(missing_ok=True)
        return replace(report, seconds=report.seconds + time.perf_counter() - began)

    def answer(self, questions: Sequence[Question], progress: Progress = lambda count: None) -> list[Answer]:
        """Answers with the passages that were found; their time counts the search and what had to be encoded."""
        # What stands before every question is the same without passages: nothing to search for.
        answered = super().answer if self.options.passages == "retrieved" else super(Context, self).answer
        step = max(1, _HELD // max(self.settings.k, 1))
        return [
            answer for n in range(0, len(questions), step) for answer in answered(questions[n : n + step], progress)
        ]

    def read(
        self, questions: Sequence[Question], passages: Sequence[Sequence[Passage] | None], progress: Progress
    ) -> list[Answer]:
        """Answers from keys and values of the given passages."""
        began = time.perf_counter()
        jobs = self._jobs(questions, passages)
        share = (time.perf_counter() - began) / max(len(jobs), 1)
        new = self.settings.max_new_tokens
        found = ask(self.base, self.form, questions, passages, jobs, max_new_tokens=new, progress=progress)
        return [replace(answer, seconds=answer.seconds + share) for answer in found]

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str]:
        """The best ``k`` hits; a question that all prompts show with its answer is not asked."""
        shown = {normalize(example.question) for example in self.form.examples}
        given = super().passages(questions) if self.options.passages == "retrieved" else [()] * len(questions)
        return [
            "stands among the examples" if normalize(question.question) in shown else found
            for question, found in zip(questions, given, strict=True)
        ]

    def _jobs(self, questions: Sequence[Question], passages: Sequence[Sequence[Passage] | None]) -> list[Job]:
        blocks = iter(self.cache.encode([one for given in passages for one in given or ()], kept=self._keeps))
        return [
            Job(
                self.form.pieces(question.question, (), question.choices)[2],
                options_of(self.form, question),
                (*self.learnt(), *self._past(given or (), [next(blocks) for _ in given or ()])),
            )
            for question, given in zip(questions, passages, strict=True)
        ]

    def _past(self, passages: Sequence[Passage], blocks: Sequence[KV]) -> tuple[KV, ...]:
        return self.cache.past(passages, blocks, self.options.blend)

    @property
    def _keeps(self) -> bool:
        return self.options.store == "disk"

    def _files_of(self, document: str) -> set[Path]:
        if not self._keeps:
            return set()
        return {self.cache.path(one) for _, one in self._retriever.index.all_passages() if one.document == document}

    # -- what is learnt --------------------------------------------------------------------------------------

    @property
    def _trains(self) -> bool:
        return bool(self.options.slots) or self.options.encoder != "cache"

    @property
    def _learnt(self) -> nn.ModuleDict:
        """All that is learnt, under the names that it has on disk."""
        there = {"slots": self.slots, "compressor": self.compressor}
        return nn.ModuleDict({name: one for name, one in there.items() if one is not None})

    def _learnt_bytes(self) -> int:
        return sum(4 * one.numel() for one in self._learnt.parameters())

    def learnt(self) -> tuple[KV, ...]:
        """The learnt columns that stand before everything, where there are any."""
        if self.slots is None:
            return ()
        with torch.no_grad():
            return (self.slots.kv(self.base.dtype),)

    def _tune(self, ledger: Ledger, report: LearnReport, progress: Progress) -> LearnReport:
        options, base, seed = self.options, self.base, self.settings.seed
        began = time.perf_counter()
        retriever = self._retriever if options.passages == "retrieved" else None
        found, skipped = lessons(ledger, base, self.form, retriever, self.settings.segment)
        if not found:
            why = "whose document holds its answer" if retriever else "with an answer"
            raise DataError(f"prefix: there is something to learn, and the ledger has no training question {why}")
        before = set(self._files.folder.rglob("*.safetensors"))
        self.whole.keep(passage for lesson in found for passage in lesson.passages)
        orders = Orders([len(found)], options.batch, options.epochs, seed)
        if options.slots:
            self.slots = Slots(chosen_columns(self._begin(), options.slots))
        compressor = self._fresh()
        learnt = nn.ModuleDict(dict(self._learnt) | ({} if compressor is None else {"compressor": compressor}))
        mark = fingerprint(base.hash, str(base.dtype), self.form.pieces("", ()), asdict(options), seed, found)
        recipe = Recipe(orders.steps, options.lr, options.warmup, options.decay, options.clip)
        ready = time.perf_counter() - began

        def batch(numbers: Sequence[int]) -> Batch:
            return self._batch([found[n] for n in numbers], compressor)

        store = self.work / f"learnt-{mark}.safetensors"
        tell = scaled(progress, orders.steps, report.documents)
        trained = tune(base, learnt, batch, orders, recipe, options.distil, store, tell)
        self.compressor = compressor  # from here on passages are compressed
        if not self._keeps or compressor is not None:
            for path in set(self._files.folder.rglob("*.safetensors")) - before:
                path.unlink()
        note = f"{len(found)} training questions, {orders.steps} steps; {trained.course(options.epochs)}"
        return replace(report, seconds=ready + trained.seconds, skipped=skipped, notes=(note,))

    def _fresh(self) -> Compressor | Heads | None:
        """What makes columns of passages, before training."""
        options = self.options
        if options.encoder == "compressed":
            return Compressor(self.base, options.columns)
        if options.encoder == "text":
            begin = chosen_columns(self._begin(), options.columns)
            return Heads(begin, self.encoder.card.dim, self.settings.seed)
        return None

    def _batch(self, some: Sequence[Lesson], compressor: Compressor | Heads | None) -> Batch:
        """Lessons behind what is being learnt: slots before all, and columns in the place of the passages."""
        base, cache = self.base, self.whole
        pasts = [self._past(one.passages, cache.encode(one.passages, kept=True)) for one in some]
        ends = [past[-1].end if past else self.options.slots for past in pasts]
        whole = [Sample(past, one.asked, one.answer, end) for past, one, end in zip(pasts, some, ends, strict=True)]
        slots = [] if self.slots is None else shared(self.slots.kv(base.dtype), len(some))
        told = whole if self.options.distil else None
        if compressor is None:
            return Batch(slots, whole, told)
        head = [] if cache.head is None else shared(cache.head, len(some))
        if isinstance(compressor, Compressor):
            made, starts = compressor.read(base, pasts), ends
        else:
            made = emitted(base, compressor, self.encoder, [passage for one in some for passage in one.passages])
            starts = [cache.start] * len(some)
        behind = [replace(one, past=(), start=at + len(compressor)) for one, at in zip(whole, starts, strict=True)]
        return Batch(side_by_side(slots, head, made), behind, told)

    def _begin(self) -> KV:
        """What learnt columns are chosen among: the model's own keys and values of real text."""
        tokenizer = self.base.tokenizer
        if self.options.begin == "pages":
            ids = token_ids(tokenizer, "", beginning=True)
            for _, passage in self._retriever.index.all_passages():
                if len(ids) < _BEGIN:
                    ids += token_ids(tokenizer, searchable(passage) + "\n\n", beginning=False)
        else:
            shown, _, _ = PromptFormat(tokenizer, self.form.examples or FORM_EXAMPLES).pieces("", ())
            ids = token_ids(tokenizer, shown, beginning=True)
        limit = getattr(self.base.model.config, "max_position_embeddings", None) or _BEGIN
        return kv.read(self.base, [ids[: min(_BEGIN, limit)]])[0]

    # -- keeping ---------------------------------------------------------------------------------------------

    def _save_into(self, folder: Path) -> None:
        super()._save_into(folder)
        if self._trains:
            save_file({name: one.detach().cpu() for name, one in self._learnt.named_parameters()}, folder / _LEARNT)
        if self._keeps:
            shutil.copytree(self._files.folder, folder / "prefix", copy_function=_linked)

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """Settings, examples, index, learnt columns; passages' keys and values where they were kept."""
        method = super().from_pretrained(path, base)
        if not method._trains:
            return method
        try:
            found = load_file(path / _LEARNT)
            if count := method.options.slots:
                layers = range(len(base.parts.blocks))
                keys, values = (tuple(found[f"slots.{part}.{n}"] for n in layers) for part in ("keys", "values"))
                method.slots = Slots(KV(keys, values, 0, count)).to(base.device)
            if (compressor := method._fresh()) is not None:
                inside = {name: one for name, one in found.items() if name.startswith("compressor.")}
                compressor.load_state_dict({name.removeprefix("compressor."): one for name, one in inside.items()})
                method.compressor = compressor
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise DataError(f"{path}: not what byheart writes there ({first_line(error)})") from None
        return method


def _linked(source: str, target: str) -> None:
    """The same file under two names where the disk allows it: there may be very much of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
