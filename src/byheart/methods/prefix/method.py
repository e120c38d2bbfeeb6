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

from byheart import kv
from byheart.base import Base
from byheart.decode import Job, token_ids
from byheart.errors import DataError, UsageError, first_line
from byheart.kv import KV
from byheart.ledger import Change, Ledger
from byheart.methods.contract import Answer, LearnReport, Progress, Settings, parse_options
from byheart.methods.controls import Context
from byheart.methods.prefix.cache import Cache
from byheart.methods.prefix.slots import Sample, Slots, chosen_columns
from byheart.methods.prefix.store import Precision, Store
from byheart.methods.prefix.tuning import Lesson, lessons, tune
from byheart.methods.reading import ask, options_of
from byheart.progress import scaled
from byheart.prompt import FORM_EXAMPLES, PromptFormat
from byheart.retrieve import searchable
from byheart.rows import Question
from byheart.score import normalize
from byheart.segment import Passage, segment
from byheart.storage import bytes_under, fingerprint
from byheart.training import Orders, Recipe

_SLOTS = "slots.safetensors"
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
        for name in ("epochs", "batch"):
            if getattr(options, name) < 1:
                raise UsageError(f"--set prefix.{name}={getattr(options, name)}: must be at least 1")
        if options.passages == "none" and not options.slots:
            raise UsageError("--set prefix.passages=none: leaves nothing to answer from; learn some with prefix.slots")
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
        self._cache: Cache | None = None
        self.slots: Slots | None = None

    @property
    def cache(self) -> Cache:
        """Passages behind this prompt form's examples."""
        if self._cache is None or self._cache.form is not self.form:
            self._cache = Cache(self.base, self.form, self._files, self._rotation, self.options.slots)
        return self._cache

    # -- the contract ----------------------------------------------------------------------------------------

    def estimate(self, ledger: Ledger) -> str | None:
        """What will lie on disk.

        Raises:
            DataError: where it would fill the disk.
        """
        if not self._keeps:
            return None
        count, each = self.cache.size(segment(ledger.documents(), self.encoder.splitter, self.settings.segment))
        return f"prefix: {count:,} passages of about {each / 1e6:.2f} MB, {each * count / 1e9:.2f} GB on disk"

    def learn(self, ledger: Ledger, progress: Progress = lambda count: None) -> LearnReport:
        """Index the ledger's documents; with ``store=disk`` read every passage, with ``slots`` train them.

        ``progress`` is told of documents, of epochs' worth of them where columns are learnt.
        """
        report = super().learn(ledger, (lambda count: None) if self.options.slots else progress)
        began = time.perf_counter()
        index, kept = self._retriever.index, 0
        notes: tuple[str, ...] = ()
        if self._keeps:
            self.cache.size(passage for _, passage in index.all_passages())
            self.cache.keep(passage for _, passage in index.all_passages())
            kept = bytes_under(self._files.folder)
            notes = (f"{kept / max(len(index), 1) / 1e6:.2f} MB a passage on disk",)
        seconds = report.seconds + time.perf_counter() - began
        if self.options.slots:
            report = self._tune(ledger, report, progress)
            seconds += report.seconds
        return replace(report, seconds=seconds, bytes=report.bytes + kept, notes=(*report.notes, *notes))

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
        ask = super().answer if self.options.passages == "retrieved" else super(Context, self).answer
        step = max(1, _HELD // max(self.settings.k, 1))
        return [answer for n in range(0, len(questions), step) for answer in ask(questions[n : n + step], progress)]

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

    # -- learnt columns --------------------------------------------------------------------------------------

    def learnt(self) -> tuple[KV, ...]:
        """The learnt columns, where there are any."""
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
            why = " whose document holds its answer" if retriever else " with an answer"
            raise DataError(f"prefix.slots: the ledger has no training question{why}")
        before = set(self._files.folder.rglob("*.safetensors"))
        self.cache.keep(passage for lesson in found for passage in lesson.passages)
        orders = Orders([len(found)], options.batch, options.epochs, seed)
        self.slots = Slots(chosen_columns(self._begin(), options.slots))
        mark = fingerprint(base.hash, str(base.dtype), self.form.pieces("", ()), asdict(options), seed, found)
        recipe = Recipe(orders.steps, options.lr, options.warmup, options.decay, options.clip)
        ready = time.perf_counter() - began

        def sample(lesson: Lesson) -> Sample:
            blocks = self.cache.encode(lesson.passages, kept=True)
            return Sample(self._past(lesson.passages, blocks), lesson.asked, lesson.answer)

        store = self.work / f"slots-{mark}.safetensors"
        tell = scaled(progress, orders.steps, report.documents)
        trained = tune(base, self.slots, found, sample, orders, recipe, store, tell)
        if not self._keeps:
            for path in set(self._files.folder.rglob("*.safetensors")) - before:
                path.unlink()
        tail = trained.losses[-max(1, orders.steps // options.epochs) :]
        note = (
            f"{len(found)} training questions, {orders.steps} steps; loss {trained.losses[0]:.3f} at the start, "
            f"{sum(tail) / len(tail):.3f} in the last epoch"
        )
        return replace(report, seconds=ready + trained.seconds, skipped=skipped, notes=(note,))

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
        if self.slots is not None:
            save_file({name: one.detach().cpu() for name, one in self.slots.named_parameters()}, folder / _SLOTS)
        if self._keeps:
            shutil.copytree(self._files.folder, folder / "prefix", copy_function=_linked)

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
            method.slots = Slots(KV(keys, values, 0, method.options.slots)).to(base.device)
        return method


def _linked(source: str, target: str) -> None:
    """The same file under two names where the disk allows it: there may be very much of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
