"""The method ``memory``: networks in the residual stream, trained on a ledger's pages, questions and facts."""

from __future__ import annotations

import datetime as dt
import math
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from byheart import __version__
from byheart.base import Base, digest_of
from byheart.errors import DataError, UsageError, first_line
from byheart.formats import read_objects
from byheart.ledger import Change, Ledger
from byheart.methods.contract import LearnReport, Settings, parse_options
from byheart.methods.controls import Closed
from byheart.methods.facts import as_measured, choose_facts, to_measure
from byheart.methods.memory.adapter import Place, attached, make_adapters
from byheart.methods.memory.examples import (
    PACK,
    PLAIN,
    ROW_TOKENS,
    Frame,
    Piece,
    What,
    owner_of,
    packed,
    pieces_of,
    taken_out,
    to_learn,
    why_nothing,
)
from byheart.methods.memory.states import Row, States, Upper, keep_states, states_bytes
from byheart.methods.memory.study import study
from byheart.ordinary import check_text, ordinary_text, text_rows
from byheart.peft_layout import CONFIG, PREFIX, TENSORS, lora_config, path_of
from byheart.progress import Progress, scaled, untold
from byheart.prompt import CHOICES, PromptFormat
from byheart.rows import Document, Fact, Kind, Question
from byheart.rows import Row as LedgerRow
from byheart.segment import Passage, segment
from byheart.storage import CARD, check_room, fingerprint, read_json, resumed, write_json, write_text
from byheart.training import Orders, Recipe, Trained, train

_PIECES = "pieces.jsonl"
# In the place of a question, to see what stands around one; no text has it.
_PLACE = "\ue000"
_FACTS = "facts.jsonl"
# Passages whose study is on disk before the next ones are studied.
_AT_ONCE = 64
# Tokens of ordinary text that training keeps still, as a multiple of d_ff: as many as an edit lets the model write.
_ORDINARY = 10


@dataclass(frozen=True)
class MemoryOptions:
    """What ``--set memory.NAME=VALUE`` takes; the defaults are those of "Does adaptation of neural memory help factual
    prediction?" (2024).

    Attributes:
        blocks: a share of the depth as ``FROM-TO%``, ``FIRST-LAST``, several numbers with ``+`` between them, or
            ``auto``: 70 to 80 % of the depth.
        place: ``block`` adds to a block's output, ``mlp`` behind the MLP, ``parallel`` beside it; ``lora`` is a
            low-rank change of the MLP's last matrix with as many parameters.
        width: of the networks.
        learn: ``doc`` (pages), ``temp`` (questions and facts in the form in which they are asked), ``doctemp`` (both).
        wordings: of each fact, how many of its wordings are learnt; 0: all.
        study: of each window of a page, questions that the model asks itself and rewritings that it makes (self-study).
        epochs: how often everything is seen.
        pages: how often in an epoch pages are: text takes more turns to learn than answers do.
        batch: sequences a step.
        lr, warmup, decay, clip: see :class:`byheart.training.Recipe`.
        keep: weight of KL(base || memory) on a row of ordinary text each step: what holds the rest of the model still.
            0 is the published way, and lets perplexity on other text rise as it will.
        text: that ordinary text: ``own`` (the model writes it) or a file.
        packings: in how many ways questions are put together to sequences, in turn; each is kept on disk.
        revise_epochs: after a change, how often the changed rows are seen, each beside as many others.
    """

    blocks: str = "auto"
    place: Place = "block"
    width: int = 128
    learn: What = "doctemp"
    wordings: int = 0
    study: int = 0
    pages: int = 1
    epochs: int = 25
    batch: int = 4
    lr: float = 1e-3
    warmup: int = 10
    decay: float = 0.05
    clip: float = 10.0
    keep: float = 0.0
    text: str = "own"
    packings: int = 3
    revise_epochs: int = 12


class Memory(Closed):
    """Trained memories: the base stays frozen, what is learnt sits in a few small networks."""

    name = "memory"
    learns: Kind = "document"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        if base.kind != "causal":
            raise DataError(f"{self.name}: {base.name} is an encoder-decoder model; memory needs a decoder-only one")
        super().__init__(base, settings, work)
        self.options = parse_options(MemoryOptions, self.name, settings.options)
        for name in ("width", "epochs", "batch", "packings", "pages", "revise_epochs"):
            if getattr(self.options, name) < 1:
                raise UsageError(f"--set memory.{name}={getattr(self.options, name)}: must be at least 1")
        if not self.options.lr:
            raise UsageError("--set memory.lr=0: must be above 0")
        learn = self.options.learn
        for name, alone in (("study", "temp"), ("pages", "temp"), ("wordings", "doc")):
            value = getattr(self.options, name)
            if learn == alone and value != getattr(MemoryOptions, name):
                raise UsageError(f"--set memory.{name}={value}: says nothing of what learn={learn} learns")
        if learn == "temp":
            self.learns = "question"
        self.blocks = choose_blocks(self.options.blocks, len(base.parts.blocks))
        self.adapters = self._fresh()
        self.pieces: list[Piece] = []
        self.losses: list[float] = []
        self.ordinary: list[list[int]] = []
        self.skipped: dict[str, str] = {}  # why rows are not learnt, by kind and id
        self.facts: list[Fact] = []  # all that hold, those that cannot be learnt among them
        self.measured: set[str] = set()
        if not (work / CARD).is_file():  # what was learnt has its text with it
            check_text(self.options.text, self.name, "own or")

    # -- the contract ----------------------------------------------------------------------------------------

    def learn(self, ledger: Ledger, progress: Progress = untold) -> LearnReport:
        """Train on the ledger's pages, training questions and facts; ``progress`` is told of steps as rows learnt."""
        super().learn(ledger)
        options = self.options
        if options.text != MemoryOptions.text and not options.keep:
            raise UsageError(f"--set memory.text={options.text}: says nothing while memory.keep is 0")
        self.texts()  # what is wrong with them is said before any work
        self.facts = [] if options.learn == "doc" else list(ledger.facts())
        self.measured = to_measure(ledger)
        pieces, self.skipped = to_learn(
            ledger, options.learn, self._asking(), options.wordings, dt.date.today(), self.measured
        )
        began = time.perf_counter()
        rows = ledger.count(self.learns) or len({piece.owner for piece in pieces})
        if options.study:
            progress = scaled(progress, 2, 1)  # half of it to study, half to train
        pieces += self._studied(ledger.documents(), progress, rows)
        studied = time.perf_counter() - began
        documents = len({piece.owner for piece in pieces if piece.kind == "page"})
        trained, notes = self.train(pieces, progress, rows)
        return self._report(studied + trained.seconds, documents, notes)

    def _changed(self, change: Change) -> LearnReport:
        """Go on from what is learnt (:meth:`_revised`), then in the ledger's history: all of it or nothing."""
        report = self._revised(change)
        super()._changed(change)
        return report

    def renew(self) -> LearnReport:
        """Facts come and go by their dates, as with any change of one."""
        return self._revised(Change(0, "", "revise", "fact", "", None, None, None))

    def _revised(self, change: Change) -> LearnReport:
        """The changed row is learnt, what it replaces is trained away.

        Away means towards what the base model itself would say there; where the new row answers the very same words
        otherwise, learning that is enough. Of a page, it is the text that its new version lacks. As many other rows are
        seen beside them.
        """
        began = time.perf_counter()
        facts, measured = self._after(change)
        now, owners, skipped = self._pieces_now(change, facts, measured)
        old = [piece for piece in self.pieces if piece.owner in owners]
        others = [piece for piece in self.pieces if piece.owner not in owners]
        gone = [piece for piece in old if piece not in now]
        new = [piece for piece in now if piece not in old]
        known = self._known_words(change) if measured != self.measured else ()
        if not gone and not new:
            self.facts, self.measured, self.skipped = facts, measured, skipped
            return LearnReport(skipped=dict(Counter(skipped.values())), notes=known)
        kept = [*others, *(piece for piece in old if piece in now)]
        if not kept and not new:
            self.pieces, self.adapters = [], self._fresh()
            self.facts, self.measured, self.skipped = facts, measured, skipped
            return self._report(time.perf_counter() - began, 0, ("nothing is left: the base model as it is",))
        away, told = self._away(gone, now, kept)
        before = self._likelihoods([*away, *told])
        trained = deepcopy(self.adapters) if self.pieces else self._fresh()
        # What is said elsewhere in the words of what went is made sure of; what is measured by now is not seen again.
        words = {piece.lead for piece in gone if piece.kind != "page"}
        again = [one for one, said in zip(kept, self._words(kept), strict=True) if said not in measured]
        same = [piece for piece in again if piece.lead in words]
        self._follow(trained, change, [*new, *same], away, [piece for piece in again if piece.lead not in words])
        self.adapters, self.pieces = trained, [*kept, *new]
        self.facts, self.measured, self.skipped = facts, measured, skipped
        notes = (*self._what_is_left(len(gone), [*away, *told], before), *known)
        return self._report(time.perf_counter() - began, int(change.kind == "document"), notes)

    def attached(self) -> AbstractContextManager[None]:
        """The base with the networks' outputs added; where nothing was learnt, the base."""
        return attached(self.base, self.adapters, self.options.place) if self.pieces else nullcontext()

    @property
    def knows_questions(self) -> bool:
        """Where more than pages is learnt."""
        return self.options.learn != "doc"

    # -- training --------------------------------------------------------------------------------------------

    def train(
        self,
        pieces: Sequence[Piece],
        progress: Progress = untold,
        count: int = 0,
        frame: Frame = PLAIN,
    ) -> tuple[Trained, tuple[str, ...]]:
        """Train fresh networks on pieces; what is begun in the working folder goes on.

        Args:
            count: what ``progress`` shall have been told of in the end.
            frame: what stands around questions.
        """
        options, seed = self.options, self.settings.seed
        self.adapters, self.pieces, self.losses = self._fresh(), [], []
        self.ordinary = self._ordinary_rows()
        # Text takes more turns to learn than answers do.
        seen = [*pieces, *[piece for piece in pieces if piece.kind == "page"] * (options.pages - 1)]
        packings = min(options.packings, options.epochs)  # they take turns, an epoch each
        several = [self._packed(seen, n, frame) for n in range(packings)]
        if not several[0]:
            return Trained(), (f"nothing to learn with memory.learn={options.learn}: the base model as it is",)
        upper = Upper(self.base, self.adapters, options.place)
        still = self._keeping(upper, self._folder)
        orders = Orders([len(rows) for rows in several], options.batch, options.epochs, seed)
        every = [row for rows in several for row in rows]
        before = [0, *accumulate(map(len, several))]  # of each packing, the rows of those before it
        states: States | None = None
        ready = 0.0

        def loss(step: int) -> Tensor:
            nonlocal states, ready
            if states is None:
                began = time.perf_counter()
                states = self._states(self._folder, every, upper.start)
                ready = time.perf_counter() - began
            packing, numbers = orders.batch(step)
            numbers = [before[packing] + n for n in numbers]
            return upper.mean_loss([every[n] for n in numbers], states.padded(numbers)) + still(step)

        made_with = asdict(options) | {"text": self.ordinary, "loss": "a mean of rows' means"}
        mark = fingerprint(
            __version__,
            self.base.hash,
            str(self.base.dtype),
            self.base.device.type,
            made_with,
            self.blocks,
            seed,
            several,
        )
        recipe = Recipe(orders.steps, options.lr, options.warmup, options.decay, options.clip)
        trained = train(
            self.adapters, loss, recipe, self._folder / f"{mark}.safetensors", scaled(progress, orders.steps, count)
        )
        for path in (*self._folder.glob("*.states"), *self._folder.glob(".*.states.*")):
            path.unlink()  # a training that is done needs them no more, and what a kill left half written nobody does
        self.pieces, self.losses = list(pieces), trained.losses
        note = (
            f"{orders.steps} steps, {sum(len(r.ids) for r in several[0]):,} tokens an epoch; "
            f"{trained.course(options.epochs)}; {ready:.0f} s for hidden states"
        )
        return trained, (note,)

    def _away(self, gone: Sequence[Piece], now: Sequence[Piece], kept: Sequence[Piece]) -> tuple[list[Row], list[Row]]:
        """The rows to train away, and those that are not since something answers the same words now, or still.

        One piece a row: what is unlearnt is what the model says to these very words.
        """
        answered = {piece.lead for piece in (*now, *kept) if piece.kind != "page"}
        away: list[Row] = []
        told: list[Row] = []
        for piece in gone:
            if piece.kind == "page":
                away += taken_out(self.base.tokenizer, piece, now, kept, self._longest)
            else:
                (told if piece.lead in answered else away).extend(self._rows([piece]))
        return away, told

    def _follow(
        self, trained: nn.ModuleDict, change: Change, new: Sequence[Piece], away: Sequence[Row], kept: Sequence[Piece]
    ) -> None:
        options = self.options
        upper = Upper(self.base, trained, options.place)
        draw = random.Random(f"{self.settings.seed}/{change.mark}")
        beside = draw.sample(list(kept), min(len(kept), 4 * PACK + len(new) + len(away)))
        learnt = self._packed([*new, *beside], self.settings.seed)
        if not learnt and not away:
            return
        orders = Orders([max(len(learnt), len(away))], options.batch, options.revise_epochs, self.settings.seed)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            still = self._keeping(upper, folder)
            states = self._states(folder, learnt, upper.start) if learnt else None
            away_states = self._states(folder, away, upper.start) if away else None

            def loss(step: int) -> Tensor:
                _, numbers = orders.batch(step)
                total = torch.zeros((), device=self.base.device)
                if states:
                    some = [n % len(learnt) for n in numbers]
                    total = total + upper.mean_loss([learnt[n] for n in some], states.padded(some))
                if away_states:
                    some = [n % len(away) for n in numbers]
                    total = total + upper.drift([away[n] for n in some], away_states.padded(some))
                return total + still(step)

            recipe = Recipe(orders.steps, options.lr / 2, options.warmup, options.decay, options.clip)
            train(trained, loss, recipe, folder / "revision.safetensors")

    def texts(self) -> Sequence[str] | None:
        """The ordinary text to keep still, as its file stands now; what was learnt before has its rows with it.

        Raises:
            UsageError, DataError: where ``text`` names none.
        """
        if not self.options.keep:
            return None
        if self.options.text == "ledger":
            raise UsageError("--set memory.text=ledger: the ledger is what is learnt; use own or a text file")
        return ordinary_text(self.options.text, self.name)

    def _ordinary_rows(self) -> list[list[int]]:
        if not self.options.keep:
            return []
        return list(text_rows(self.base, self.texts(), _ORDINARY * self.base.parts.d_ff, self.settings.seed))

    def _keeping(self, upper: Upper, folder: Path) -> Callable[[int], Tensor]:
        """What a step's loss has for moving what the base says about ordinary text: a row of it, drawn by the step."""
        rows = [Row(tuple(ids), (False, *[True] * (len(ids) - 1))) for ids in self.ordinary if len(ids) > 1]
        states: States | None = None

        def still(step: int) -> Tensor:
            nonlocal states
            if not rows:
                return torch.zeros((), device=self.base.device)
            states = states or self._states(folder, rows, upper.start)
            n = self._drawn(step, rows)
            return self.options.keep * upper.drift([rows[n]], states.padded([n]))

        return still

    def _drawn(self, step: int, rows: Sequence[Row]) -> int:
        return random.Random(f"{self.settings.seed}/{step}").randrange(len(rows))

    def accuracy(self, pieces: Sequence[Piece]) -> float:
        """The share of the pieces' tokens that are the likeliest where they are to be predicted."""
        found = [logits.argmax(1) == label for logits, label in self._read(self._rows(pieces))]
        return float(torch.cat(found).double().mean())

    @property
    def digest(self) -> str:
        """A hash of the networks: what answers depend on."""
        return f"{bool(self.pieces)} {digest_of(self.adapters.parameters())}"

    def _rows(self, pieces: Sequence[Piece]) -> list[Row]:
        """Each piece in rows of its own."""
        return [row for piece in pieces for row in self._packed([piece], 0)]

    def _packed(self, pieces: Sequence[Piece], seed: int, frame: Frame = PLAIN) -> list[Row]:
        pack = 1 if self.settings.chat else PACK
        return packed(self.base.tokenizer, pieces, seed, frame, pack, self._longest)

    @property
    def _longest(self) -> int:
        """Tokens of a row at most."""
        return min(ROW_TOKENS, self.base.positions or ROW_TOKENS)

    def _likelihoods(self, rows: Sequence[Row], *, plain: bool = False) -> list[float]:
        """Of each row, the geometric mean probability of a token that is to be predicted."""
        return [
            float(logits.float().log_softmax(-1).gather(1, label[:, None]).mean().exp())
            for logits, label in self._read(rows, plain=plain)
        ]

    def _read(self, rows: Sequence[Row], *, plain: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and labels of each row, one at a time."""
        if not rows:
            return
        upper = Upper(self.base, self.adapters, self.options.place)
        plain = plain or not self.pieces
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            states = self._states(Path(folder), rows, upper.start)
            for n, row in enumerate(rows):
                yield upper.labelled([row], states.padded([n]), plain=plain)

    def _what_is_left(self, texts: int, rows: Sequence[Row], before: Sequence[float]) -> tuple[str, ...]:
        if not rows:
            return ()
        after, base = self._likelihoods(rows), self._likelihoods(rows, plain=True)
        one, two, three = (sum(some) / len(some) for some in (before, after, base))
        return (
            f"what was taken back ({texts} texts): p of a token {one:.3f} before, {two:.3f} now, {three:.3f} in "
            "the base model",
        )

    def _after(self, change: Change) -> tuple[list[Fact], set[str]]:
        """The facts that hold, and the words that are measured, after a change."""
        facts, measured = self.facts, self.measured
        if change.kind == "fact" and self.options.learn != "doc":
            facts = [fact for fact in facts if fact.id != change.id]
            facts += [change.after] if isinstance(change.after, Fact) else []
        elif isinstance(change.after, Question) and change.after.split in ("validation", "test"):
            measured = measured | {as_measured(change.after.question)}
        return facts, measured

    def _words(self, pieces: Sequence[Piece]) -> list[str]:
        """The words of what is learnt, as :func:`as_measured` gives those of questions."""
        before, after = self._asking().prompt(_PLACE).split(_PLACE, 1)
        after = after.removeprefix("?")  # which only those questions get that end in no mark of their own
        asked = (piece.lead.removeprefix(before).partition(CHOICES)[0].removesuffix(after) for piece in pieces)
        return [as_measured(one) for one in asked]

    def _known_words(self, change: Change) -> tuple[str, ...]:
        """A sentence where a question that is measured from now on was learnt in its very words before."""
        if not isinstance(change.after, Question):
            return ()
        words = as_measured(change.after.question)
        count = sum(one == words for one in self._words(self.pieces))
        if not count:
            return ()
        return (
            f'{count} texts in the words of question "{change.id}" were learnt before it came: learn anew to measure',
        )

    def _pieces_now(
        self, change: Change, facts: Sequence[Fact], measured: Container[str]
    ) -> tuple[list[Piece], set[str], dict[str, str]]:
        """What there is to learn of the rows that a change touches, what these rows' pieces are known by, and why not.

        A fact that comes or goes can touch others: duplicates, and other objects for the same subject and prompt.
        """
        learn, owners = self.options.learn, {owner_of(change.kind, change.id)}
        skipped = {one: why for one, why in self.skipped.items() if one not in owners}
        rows: list[LedgerRow] = [] if change.after is None else [change.after]
        not_learnt = learn == "temp" if change.kind == "document" else learn == "doc"
        if not_learnt or (isinstance(change.after, Question) and change.after.split != "train"):
            rows = []
        elif change.kind == "fact":
            # What was learnt when, and not what would have been today: some have begun or ceased to hold since.
            there = {piece.owner for piece in self.pieces}
            was = {fact.id: fact for fact in self.facts if owner_of("fact", fact.id) in there}
            chosen, left_out = choose_facts(facts, dt.date.today())
            is_now = {fact.id: fact for fact in chosen}
            touched = {id for id in was.keys() | is_now.keys() if was.get(id) != is_now.get(id)}
            owners |= {owner_of("fact", id) for id in touched}
            rows = [is_now[id] for id in sorted(touched & is_now.keys())]
            skipped = {one: why for one, why in skipped.items() if one not in owners}
            skipped |= {owner_of("fact", id): why for id, why in left_out.items()}
        found: list[Piece] = []
        for row in rows:
            pieces = list(pieces_of(row, self._asking(), self.options.wordings, measured))
            if not pieces:
                skipped |= why_nothing(row)
            found += pieces
        if change.kind == "document" and found:
            old = [piece for piece in self.pieces if piece.owner in owners]
            # Of a page that says what it said, what it was studied by stays as well.
            found += [piece for piece in old if piece not in found] if found[0] in old else self._studied(rows)
        return found, owners, skipped

    def _studied(self, documents: Iterable[LedgerRow], progress: Progress = untold, count: int = 0) -> list[Piece]:
        """What the model makes of pages itself; ``progress`` shall have been told of ``count`` in the end."""
        options = self.options
        if not options.study:
            return []
        pages = (row for row in documents if isinstance(row, Document))
        passages = list(segment(pages, self.encoder.splitter, self.settings.segment))
        seed, asking = self.settings.seed, self._asking()
        form = (self.form.examples, asking.prompt(""), self.settings.chat)
        made_with = (options.study, seed, sorted(self.measured))
        mark = fingerprint(__version__, self.base.hash, str(self.base.dtype), form, passages, made_with)
        lots = [passages[n : n + _AT_ONCE] for n in range(0, len(passages), _AT_ONCE)]

        def make(some: Sequence[list[Passage]]) -> list[list[dict[str, Any]]]:
            found = (study(self.base, self.form, lot, options.study, seed, asking, self.measured) for lot in some)
            return [[piece.model_dump(mode="json") for piece in pieces] for pieces in found]

        tell = scaled(progress, max(len(lots), 1), count)
        rows = resumed(self._folder / f"study-{mark}.json", mark, lots, 1, make, tell)
        return [Piece.model_validate(row) for lot in rows for row in lot]

    def _states(self, folder: Path, rows: Sequence[Row], start: int) -> States:
        mark = fingerprint(self.base.hash, str(self.base.dtype), start, [row.ids for row in rows])
        path = folder / f"{mark}.states"
        if folder == self._folder and not path.exists():  # what is for a moment only is small
            check_room(folder, states_bytes(self.base, rows), "memory: hidden states", "fewer memory.packings")
        return keep_states(self.base, rows, start, path)

    @property
    def _folder(self) -> Path:
        folder = self.work / "memory"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _asking(self) -> PromptFormat:
        return PromptFormat(self.base.tokenizer, (), chat=self.settings.chat)

    def _fresh(self) -> nn.ModuleDict:
        return make_adapters(self.base, self.blocks, self.options.place, self.options.width, self.settings.seed)

    def _report(self, seconds: float, documents: int, notes: tuple[str, ...]) -> LearnReport:
        size = sum(4 * one.numel() for one in self.adapters.parameters())
        facts = len({piece.owner for piece in self.pieces if piece.kind == "statement"})
        skipped = dict(Counter(self.skipped.values()))
        return LearnReport(seconds, size, documents, facts, skipped, notes)

    # -- keeping ---------------------------------------------------------------------------------------------

    def _save_into(self, folder: Path) -> None:
        super()._save_into(folder)
        save_file(
            {self._key(name): one.detach().cpu().contiguous() for name, one in self.adapters.named_parameters()},
            folder / TENSORS,
        )
        config: dict[str, Any] = {"peft_type": "BYHEART_MEMORY", "base_model_name_or_path": self.base.name}
        if self.options.place == "lora":
            modules = [self.base.parts.blocks[number].mlp_out for number in self.blocks]
            config = lora_config(self.base, modules, len(next(self.adapters.parameters())))
        write_json(folder / CONFIG, config)
        own = {"blocks": self.blocks, "options": asdict(self.options), "losses": self.losses, "ordinary": self.ordinary}
        write_json(folder / f"{self.name}.json", own | {"measured": sorted(self.measured), "skipped": self.skipped})
        write_text(folder / _FACTS, "".join(fact.model_dump_json() + "\n" for fact in self.facts))
        write_text(folder / _PIECES, "".join(piece.model_dump_json() + "\n" for piece in self.pieces))

    def _key(self, name: str) -> str:
        """A parameter's name in the file: in a LoRA that of PEFT, else under its block."""
        number, rest = name.split(".", 1)
        block = self.base.parts.blocks[int(number)]
        if self.options.place == "lora":
            return f"{PREFIX}{path_of(self.base, block.mlp_out)}.{rest}"
        return f"{PREFIX}{path_of(self.base, block.module)}.memory.{rest}"

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """Settings, examples, networks and what they learnt."""
        method = super().from_pretrained(path, base)
        record = read_json(path / f"{cls.name}.json")
        try:
            method.options, method.blocks = MemoryOptions(**record["options"]), list(record["blocks"])
            method.adapters = method._fresh()
            tensors = load_file(path / TENSORS)
            state = {name: tensors[method._key(name)] for name, _ in method.adapters.named_parameters()}
            method.adapters.load_state_dict(state)
            method.pieces = [Piece.model_validate(row) for _, row in read_objects(path / _PIECES)]
            method.facts = [Fact.model_validate(row) for _, row in read_objects(path / _FACTS)]
            method.measured = set(map(str, record["measured"]))
            method.skipped = {str(id): str(why) for id, why in record.get("skipped", {}).items()}
            method.losses = [float(one) for one in record["losses"]]
            method.ordinary = [list(map(int, ids)) for ids in record.get("ordinary", [])]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, ValidationError) as error:
            raise DataError(f"{path}: not what byheart writes there ({first_line(error)})") from None
        return method


def choose_blocks(text: str, depth: int) -> list[int]:
    """Block numbers from ``auto``, ``FROM-TO%`` of the depth, ``FIRST-LAST`` or ``A+B+C``.

    Raises:
        UsageError: where they are none, or not in the model.
    """
    span = re.fullmatch(r"(\d+)-(\d+)(%?)", "70-80%" if text == "auto" else text)
    numbers: list[int] = []
    if span and span[3]:
        low, high = (math.ceil(int(one) * depth / 100) for one in span.group(1, 2))
        if int(span[1]) < int(span[2]) <= 100:  # at least one, where the model has few
            low = min(low, depth - 1)
            numbers = list(range(low, max(high, low + 1)))
    elif span:
        numbers = list(range(int(span[1]), int(span[2]) + 1))
    elif all(one.isdecimal() for one in text.split("+")):
        numbers = sorted(set(map(int, text.split("+"))))
    if not numbers or max(numbers) >= depth:
        raise UsageError(
            f"--set memory.blocks={text}: must be auto, FROM-TO%, FIRST-LAST or A+B with numbers below {depth}"
        )
    return numbers
