"""The method ``prefix``: retrieved passages enter a frozen model as keys and values that were made beforehand."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from byheart import kv
from byheart.base import Base
from byheart.decode import Job, batches, token_ids
from byheart.errors import DataError, UsageError, first_line
from byheart.kv import KV
from byheart.ledger import Change, Ledger
from byheart.methods.contract import Answer, LearnReport, Progress, Settings, parse_options
from byheart.methods.controls import Context
from byheart.methods.prefix.blend import blended
from byheart.methods.prefix.slots import Sample, Slots, chosen_columns
from byheart.methods.prefix.store import Precision, Store
from byheart.methods.prefix.tuning import lessons, tune
from byheart.methods.reading import ask, options_of
from byheart.progress import scaled
from byheart.prompt import FORM_EXAMPLES, PromptFormat
from byheart.rows import Question
from byheart.score import normalize
from byheart.segment import Passage, segment
from byheart.storage import bytes_under, fingerprint
from byheart.training import Orders, Recipe

_SLOTS = "slots.safetensors"
# Tokens read at once while passages are encoded.
_READ = 2_048
# Passages whose keys and values are in memory at once while questions are asked.
_HELD = 64
# Windows that a size estimate looks at.
_LOOKED_AT = 64


@dataclass(frozen=True)
class PrefixOptions:
    """What ``--set prefix.NAME=VALUE`` takes.

    Attributes:
        store: ``none`` encodes what was retrieved when a question comes; ``disk`` encodes all passages beforehand.
        precision: of what is on disk: ``model`` (as the model computes) or ``int8`` (about half of bf16).
        blend: with several passages, the share of their tokens that is read again with all passages in sight.
        slots: columns that are learnt from the ledger's training questions and stand before everything; 0: none.
        epochs: how often these questions are seen.
        batch: questions a step.
        lr, warmup, decay, clip: see :class:`byheart.training.Recipe`.
    """

    store: Literal["none", "disk"] = "none"
    precision: Precision = "model"
    blend: float = 0.0
    slots: int = 0
    epochs: int = 4
    batch: int = 16
    lr: float = 0.01
    warmup: int = 10
    decay: float = 0.0
    clip: float = 1.0


class Prefix(Context):
    """The model's own keys and values of each passage, made once and alone, behind the same examples for all.

    A prompt is [examples][passage] ... [passage][question]; only the question is read when it is asked. With one
    passage that gives the logits of the same text in the prompt. Several are turned to their places (Lu et al. 2024,
    TurboRAG) and do not see each other, but for a share that is read again on wish (CacheBlend).
    """

    name = "prefix"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        self.options = parse_options(PrefixOptions, self.name, settings.options)
        if self.options.blend > 1:
            raise UsageError(f"--set prefix.blend={self.options.blend}: must be a share, at most 1")
        for name in ("epochs", "batch"):
            if getattr(self.options, name) < 1:
                raise UsageError(f"--set prefix.{name}={getattr(self.options, name)}: must be at least 1")
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
        self._store = Store(work / "prefix", self.options.precision)
        self._head: tuple[str, KV | None] | None = None
        self.slots: Slots | None = None

    # -- the contract ----------------------------------------------------------------------------------------

    def estimate(self, ledger: Ledger) -> str | None:
        """What will lie on disk.

        Raises:
            DataError: where it would fill the disk.
        """
        if not self._keeps:
            return None
        count, each = self._size(segment(ledger.documents(), self.encoder.splitter, self.settings.segment))
        return f"prefix: {count:,} passages of about {each / 1e6:.2f} MB, {each * count / 1e9:.2f} GB on disk"

    def learn(self, ledger: Ledger, progress: Progress = lambda count: None) -> LearnReport:
        """Index the ledger's documents, read the examples, and, with ``store=disk``, every passage."""
        # What is told of documents is the longest part of the work.
        report = super().learn(ledger, (lambda count: None) if self.options.slots else progress)
        began = time.perf_counter()
        if self._keeps:
            self._size(passage for _, passage in self._retriever.index.all_passages())
            self._keep(passage for _, passage in self._retriever.index.all_passages())
        seconds = report.seconds + time.perf_counter() - began
        if self.options.slots:
            report = self._tune(ledger, report, progress)
            seconds += report.seconds
        kept = bytes_under(self._store.folder) if self._keeps else 0
        count = len(self._retriever.index)
        notes = (f"{kept / max(count, 1) / 1e6:.2f} MB a passage on disk",) if kept else ()
        return replace(report, seconds=seconds, bytes=report.bytes + kept, notes=(*report.notes, *notes))

    def revise(self, change: Change) -> LearnReport:
        """Follow the changed document in the index, and with ``store=disk`` in what is kept."""
        gone = self._files_of(change.id) if change.kind == "document" else set()
        report = super().revise(change)
        if change.kind != "document" or not self._keeps:
            return report
        began = time.perf_counter()
        now = [passage for _, passage in self._retriever.index.all_passages() if passage.document == change.id]
        self._keep(now)
        for path in gone - {self._path(passage) for passage in now}:
            path.unlink(missing_ok=True)
        return replace(report, seconds=report.seconds + time.perf_counter() - began)

    def answer(self, questions: Sequence[Question], progress: Progress = lambda count: None) -> list[Answer]:
        """Answers with the passages that were found; their time counts the search and what had to be encoded."""
        step = max(1, _HELD // max(self.settings.k, 1))
        parts = [questions[n : n + step] for n in range(0, len(questions), step)]
        return [answer for part in parts for answer in super(Prefix, self).answer(part, progress)]

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
        return [
            "stands among the examples" if normalize(question.question) in shown else found
            for question, found in zip(questions, super().passages(questions), strict=True)
        ]

    # -- keys and values -------------------------------------------------------------------------------------

    def head(self) -> KV | None:
        """Keys and values of what stands before every passage; None where nothing does."""
        text, _, _ = self.form.pieces("", ())
        if self._head is None or self._head[0] != text:
            ids = token_ids(self.base.tokenizer, text, beginning=True)
            self._head = (text, kv.read(self.base, [ids])[0] if ids else None)
        return self._head[1]

    def encode(self, passages: Sequence[Passage], *, kept: bool | None = None) -> list[KV]:
        """Keys and values of each passage, alone behind the head: from disk where they are kept, else read now."""
        kept = self._keeps if kept is None else kept
        like = next(self.base.model.parameters())
        paths = [self._path(passage) for passage in passages]
        known = {path: self._store.get(path, like) for path in dict.fromkeys(paths)} if kept else {}
        rows = {path: self._block_ids(one) for path, one in zip(paths, passages, strict=True) if not known.get(path)}
        missing, head = list(rows), self.head()
        lengths = [len(rows[path]) for path in missing]
        for batch in batches(lengths, lambda count, longest: count * longest <= _READ):
            found = kv.read(self.base, [rows[missing[n]] for n in batch], head)
            known |= zip((missing[n] for n in batch), found, strict=True)
        return [one for path in paths if (one := known[path]) is not None]

    def past(self, passages: Sequence[Passage], blocks: Sequence[KV]) -> tuple[KV, ...]:
        """What a question stands behind: the head, then the passages' ``blocks``, each in its place."""
        head = self.head()
        there = kv.placed(blocks, 0 if head is None else head.end, self._rotation)
        if self.options.blend and len(blocks) > 1:
            ids = [self._block_ids(passage) for passage in passages]
            there = [blended(self.base, head, there, ids, self.options.blend)]
        return (*([] if head is None else [head]), *there)

    def tuned(self, past: tuple[KV, ...]) -> tuple[KV, ...]:
        """The same behind the learnt columns, where there are any."""
        if self.slots is None:
            return past
        with torch.no_grad():
            return (self.slots.kv(self.base.dtype), *past)

    def _tune(self, ledger: Ledger, report: LearnReport, progress: Progress) -> LearnReport:
        """Learn columns from the training questions, beginning with some that the model made of the examples."""
        options, base, seed = self.options, self.base, self.settings.seed
        began = time.perf_counter()
        found, skipped = lessons(ledger, base, self.form, self._retriever, self.settings.segment)
        if not found:
            raise DataError("prefix.slots: the ledger has no training question whose document holds its answer")
        before = set(self._store.folder.rglob("*.safetensors"))
        self._keep(lesson.passage for lesson in found)
        orders = Orders([len(found)], options.batch, options.epochs, seed)
        shown, _, _ = PromptFormat(base.tokenizer, FORM_EXAMPLES).pieces("", ())
        begin = self.head() or kv.read(base, [token_ids(base.tokenizer, shown, beginning=True)])[0]
        self.slots = Slots(chosen_columns(begin, options.slots))
        mark = fingerprint(base.hash, str(base.dtype), self._path(found[0].passage).name, asdict(options), seed, found)
        recipe = Recipe(orders.steps, options.lr, options.warmup, options.decay, options.clip)
        ready = time.perf_counter() - began
        trained = tune(
            base, self.slots, found,
            lambda lesson: Sample(
                self.past([lesson.passage], self.encode([lesson.passage], kept=True)), lesson.asked, lesson.answer
            ),
            orders, recipe, self.work / f"slots-{mark}.safetensors", scaled(progress, orders.steps, report.documents),
        )  # fmt: skip
        if not self._keeps:
            for path in set(self._store.folder.rglob("*.safetensors")) - before:
                path.unlink()
        tail = trained.losses[-max(1, orders.steps // options.epochs) :]
        note = (
            f"{len(found)} training questions, {orders.steps} steps; loss {trained.losses[0]:.3f} at the start, "
            f"{sum(tail) / len(tail):.3f} in the last epoch"
        )
        return replace(report, seconds=ready + trained.seconds, skipped=skipped, notes=(note,))

    def _jobs(self, questions: Sequence[Question], passages: Sequence[Sequence[Passage] | None]) -> list[Job]:
        every = [passage for given in passages for passage in given or ()]
        blocks = iter(self.encode(every))
        return [
            Job(
                self.form.pieces(question.question, (), question.choices)[2],
                options_of(self.form, question),
                self.tuned(self.past(given or (), [next(blocks) for _ in given or ()])),
            )
            for question, given in zip(questions, passages, strict=True)
        ]

    @property
    def _keeps(self) -> bool:
        return self.options.store == "disk"

    def _block_ids(self, passage: Passage) -> list[int]:
        _, (text,), _ = self.form.pieces("", [passage])
        return token_ids(self.base.tokenizer, text, beginning=False)

    def _path(self, passage: Passage) -> Path:
        head, (block,), _ = self.form.pieces("", [passage])
        return self._store.path(self.base.hash, str(self.base.dtype), head, block)

    def _keep(self, passages: Iterable[Passage]) -> None:
        """Put what is not on disk yet there."""
        stream = (one for one in passages if not self._path(one).exists())
        while step := list(islice(stream, _HELD)):
            for passage, found in zip(step, self.encode(step), strict=True):
                self._store.put(self._path(passage), found)

    def _files_of(self, document: str) -> set[Path]:
        if not self._keeps:
            return set()
        return {self._path(one) for _, one in self._retriever.index.all_passages() if one.document == document}

    def _size(self, passages: Iterable[Passage]) -> tuple[int, int]:
        """How many passages, and about how many bytes each.

        Raises:
            DataError: where they would fill the disk.
        """
        tokens: list[int] = []
        count = 0
        for passage in passages:
            count += 1
            if len(tokens) < _LOOKED_AT:
                tokens.append(len(self._block_ids(passage)))
        each = round(sum(tokens) / max(len(tokens), 1) * self._column_bytes())
        self._store.check_room(each * count - bytes_under(self._store.folder))
        return count, each

    def _column_bytes(self) -> float:
        """Of one token, on disk."""
        (one,) = kv.read(self.base, [[0]])
        if self.options.precision == "model":
            return one.bytes
        keys, values = (sum(t.numel() for t in some) for some in (one.keys, one.values))
        heads = sum(value.shape[0] for value in one.values)
        return keys + values + 4 * heads  # a scale for each value; those of keys are few

    # -- keeping ---------------------------------------------------------------------------------------------

    def _save_into(self, folder: Path) -> None:
        super()._save_into(folder)
        if self.slots is not None:
            save_file({name: one.detach().cpu() for name, one in self.slots.named_parameters()}, folder / _SLOTS)
        if self._keeps:
            shutil.copytree(self._store.folder, folder / "prefix", copy_function=_linked)

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """Settings, examples, index, learnt columns; passages' keys and values where they were kept."""
        method = super().from_pretrained(path, base)
        if method.options.slots:
            try:
                found = load_file(path / _SLOTS)
                layers = range(len(base.parts.blocks))
                keys, values = (tuple(found[f"{part}.{n}"] for n in layers) for part in ("keys", "values"))
            except (OSError, SafetensorError, KeyError) as error:
                raise DataError(f"{path}: not what byheart writes there ({first_line(error)})") from None
            method.slots = Slots(KV(keys, values, 0, 0)).to(base.device)
        return method


def _linked(source: str, target: str) -> None:
    """The same file under two names where the disk allows it: there may be very much of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
