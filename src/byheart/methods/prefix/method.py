"""The method ``prefix``: retrieved passages enter a frozen model as keys and values that were made beforehand."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from byheart import kv
from byheart.base import Base
from byheart.decode import Job, complete
from byheart.errors import DataError, first_line
from byheart.kv import KV
from byheart.ledger import Change, Ledger
from byheart.methods.contract import Answer, LearnReport
from byheart.methods.controls import Context
from byheart.methods.prefix.cache import Block
from byheart.methods.prefix.instances import NEAREST, Instances, instances_of, interpolated
from byheart.methods.prefix.learnt import Learnt
from byheart.methods.prefix.marginal import Turn
from byheart.methods.prefix.select import Likely
from byheart.methods.prefix.slots import Slots
from byheart.methods.prefix.tokens import TokenHeads
from byheart.methods.prefix.tuning import Pairs, held
from byheart.methods.reading import CONTENT_FREE, ask, options_of
from byheart.progress import Progress, scaled, untold
from byheart.rows import Question
from byheart.score import normalize
from byheart.segment import Passage, segment

_LEARNT = "learnt.safetensors"
_INSTANCES = "instances.jsonl"
# Passages whose keys and values are in memory at once while questions are asked.
_HELD = 64


class Prefix(Learnt):
    """The model's own keys and values of each passage, made once and alone, behind the same examples for all.

    A prompt is [learnt columns][examples][passage] ... [passage][question]; only the question is read when it is asked.
    With one passage and nothing learnt that gives the logits of the same text in the prompt. Several passages are
    turned to their places (Lu et al. 2024, TurboRAG) and do not see each other, but for a share that is read again on
    wish (CacheBlend).
    """

    def estimate(self, ledger: Ledger) -> str | None:
        """What will lie on disk.

        Raises:
            DataError: where it would fill the disk.
        """
        columns = None if self.options.encoder in ("cache", "tokens") else self.options.columns
        passages = segment(ledger.documents(), self.encoder.splitter, self.settings.segment)
        if not self._keeps:
            return self._estimate_of_training(ledger, passages, columns)
        self.form = self._draw(ledger)  # what passages are kept behind, and so what there is of them
        if self.options.encoder in ("cache", "compressed"):
            count, each = self._check_room(self.cache, passages, columns)
        else:  # others are known by what is yet to be learnt: what is there of them will be seen then
            count, each, _ = self.cache.size(passages, columns)
            if not self._files.holds():
                self._files.check_room(each * count)
        return f"prefix: {count:,} passages of about {each / 1e6:.2f} MB, {each * count / 1e9:.2f} GB on disk"

    def _estimate_of_training(self, ledger: Ledger, passages: Iterable[Passage], columns: int | None) -> str | None:
        """What training will read from disk, at most: it goes again once training is done."""
        options, whole = self.options, self.options.distil > 0
        if not self._trains or not (whole or (self._searches and not self._moves)):
            return None
        self.form = self._draw(ledger)
        count, each, _ = self.whole.size(passages, None if whole else columns)
        named = [bool(question.documents) for question in ledger.questions(["train"])]
        asked = sum(named) or len(named)  # as they are learnt from: those that name no document where none does
        if not options.study:  # which asks about every passage
            count = min(count, asked * self.settings.k)
        count += asked if options.demonstrations else 0
        return (
            f"prefix: up to {count:,} passages of about {each / 1e6:.2f} MB, {each * count / 1e9:.2f} GB on disk while "
            "training lasts"
        )

    def learn(self, ledger: Ledger, progress: Progress = untold) -> LearnReport:
        """Index the ledger's documents; train what is to be learnt; with ``store=disk`` read every passage.

        ``progress`` is told of documents by what takes longest: fitting and training, else reading, else indexing.
        """

        def silent(count: int) -> None: ...

        long = self.options.encoder == "tokens"  # what is fitted takes as long as training
        learning = scaled(progress, 2, 1) if long and self._trains else progress  # half of it each
        report = super().learn(ledger, silent if self._trains or self._keeps or long else progress)
        seconds, stored, notes = report.seconds, report.bytes, report.notes
        self._whole = self._made = self.slots = self.heads = self.tokens = self.likely = self.turn = None
        began = time.perf_counter()
        pairs: Pairs = ()
        if self._asks:
            k = 1 if self.options.encoder == "text" else self.settings.k  # its heads make columns of one at a time
            pairs, left_out = held(ledger, self.form, self._retriever, self.settings.segment, k, self.settings.seed)
            report = replace(report, skipped=left_out)
        if self.options.encoder == "selected":
            notes = (*notes, self._fit_likely(pairs))
        elif self.options.encoder == "tokens":
            notes = (*notes, self._fit_heads(report, learning))
        seconds += time.perf_counter() - began
        if self._remembers:
            shown = {normalize(example.question) for example in self.form.examples}
            asked = [one for one in ledger.questions(["train"]) if normalize(one.question) not in shown]
            self.instances = Instances(self.encoder, instances_of(asked, self._retriever))
            self._check_instances(self.instances)
        if self._trains:
            report = self._tune(ledger, pairs, report, learning)
            seconds, notes = seconds + report.seconds, (*notes, *report.notes)
        if self.options.realm:
            report = self._follow_reader(ledger, report)
            seconds, notes = seconds + report.seconds, (*notes, *report.notes)
        stored += self._learnt_bytes()
        if self._keeps:
            began = time.perf_counter()
            index = self._retriever.index
            self._check_room(self.cache, (passage for _, passage in index.all_passages()))
            tick = silent if self._trains or long else scaled(progress, max(len(index), 1), report.documents)
            self.cache.keep((passage for _, passage in index.all_passages()), tick)
            kept = sum(path.stat().st_size for path in self._kept())
            seconds, stored = seconds + time.perf_counter() - began, stored + kept
            notes = (*notes, f"{kept / max(len(index), 1) / 1e6:.2f} MB a passage on disk")
        return replace(report, seconds=seconds, bytes=stored, notes=notes)

    def _changed(self, change: Change) -> LearnReport:
        """Follow the changed document in the index, and with ``store=disk`` in what is kept.

        Where an example goes that all passages are read behind, all are read again. What was trained stays as it is.
        """
        form, gone = self.form, {self.cache.path(one) for one in self._of_document(change)}
        report = super()._changed(change)
        self._follow_instances(change)
        if self._learns:
            report = replace(report, notes=(*report.notes, "what was learnt stays; learn again for it to follow"))
        if not self._keeps:
            return report
        began = time.perf_counter()
        now: Sequence[Passage] = self._of_document(change)
        if self.form is not form:
            gone = set(self._files.folder.rglob("*.safetensors"))
            now = [passage for _, passage in self._retriever.index.all_passages()]
        self.cache.keep(now)
        for path in gone - {self.cache.path(passage) for passage in now}:
            path.unlink(missing_ok=True)
        return replace(report, seconds=report.seconds + time.perf_counter() - began)

    @property
    def knows_questions(self) -> bool:
        """Where columns, heads, where answers stand, the questions' turn or a store of instances are learnt."""
        return self._asks or self._remembers or bool(self.options.realm)

    def answer(self, questions: Sequence[Question], progress: Progress = untold) -> list[Answer]:
        """Answers with the passages that were found; their time counts the search and what had to be encoded."""
        # What stands before every question is the same without passages: nothing to search for.
        answered = super().answer if self._searches else super(Context, self).answer
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
        free = [
            replace(job, prompt=self.form.pieces(CONTENT_FREE, (), question.choices)[2]) if question.choices else None
            for job, question in zip(jobs, questions, strict=True)
        ]
        found = ask(self.base, questions, passages, jobs, free, max_new_tokens=new, progress=progress)
        if self.options.interpolate and self.instances is not None:
            found = self._interpolated(questions, jobs, found, self.instances)
        return [replace(answer, seconds=answer.seconds + share) for answer in found]

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str]:
        """The best ``k`` hits; a question that all prompts show with its answer is not asked."""
        return self._but_shown(questions, super().passages(questions) if self._searches else [()] * len(questions))

    def _but_shown(
        self, questions: Sequence[Question], given: Sequence[Sequence[Passage] | str]
    ) -> list[Sequence[Passage] | str]:
        shown = {normalize(example.question) for example in self.form.examples}
        return [
            "stands among the examples" if normalize(question.question) in shown else found
            for question, found in zip(questions, given, strict=True)
        ]

    def _jobs(self, questions: Sequence[Question], passages: Sequence[Sequence[Passage] | None]) -> list[Job]:
        stand: list[tuple[Block, ...]] = [
            (*shown, *(given or ())) for (shown, _), given in zip(self.beside(questions), passages, strict=True)
        ]
        blocks = iter(self.cache.encode([one for given in stand for one in given], kept=self._keeps))
        return [
            Job(
                self.form.pieces(question.question, (), question.choices)[2],
                options_of(self.form, question),
                (*self.learnt(), *self._past(given, [next(blocks) for _ in given])),
            )
            for question, given in zip(questions, stand, strict=True)
        ]

    def _interpolated(
        self, questions: Sequence[Question], jobs: Sequence[Job], answers: Sequence[Answer], instances: Instances
    ) -> list[Answer]:
        """Answers, or choices, that are the best under the model and the nearest instances together."""
        near = instances.nearest([question.question for question in questions], NEAREST)
        found = list(answers)
        candidates: dict[int, list[str]] = {}
        for n, (question, answer, some) in enumerate(zip(questions, answers, near, strict=True)):
            texts = question.choices or dict.fromkeys([answer.text, *(one.example.answer for one, _ in some)])
            if there := [text for text in texts if text.strip()]:  # an answer of nothing has no likelihood
                candidates[n] = there
        asked = [replace(jobs[n], options=tuple(map(self.form.continuation, texts))) for n, texts in candidates.items()]
        done = complete(self.base, asked, max_new_tokens=0)
        for (n, texts), one in zip(candidates.items(), done, strict=True):
            best = texts[interpolated(one.options, texts, near[n], self.options.interpolate)]
            changed = replace(found[n], choice=best) if questions[n].choices else replace(found[n], text=best)
            found[n] = replace(changed, seconds=changed.seconds + one.seconds)
        return found

    def _check_instances(self, instances: Instances) -> None:
        if not instances.all:
            raise DataError(
                f"{self.name}: prefix.hard, demonstrations and interpolate go by training questions with answers, and "
                "the ledger has none"
            )
        if self.options.demonstrations and not any(one.example.passage for one in instances.all.values()):
            raise DataError(
                f"{self.name}: prefix.demonstrations shows training questions with passages that hold their answers, "
                "and none was found for any"
            )

    def _follow_instances(self, change: Change) -> None:
        if self.instances is None:
            return
        stale = []
        if change.kind == "question":
            self.instances.drop(change.id)
            stale = [change.after] if isinstance(change.after, Question) else []
        elif change.kind == "document":
            # What is shown of the page may have changed, be shown no longer, or now be there to be shown.
            stale = [
                Question(id=one.id, question=one.example.question, answers=list(one.answers), split="train")
                for one in self.instances.all.values()
                if one.example.passage is None or one.example.passage.document == change.id
            ]
        self.instances.add(instances_of(stale, self._retriever))

    @property
    def _searches(self) -> bool:
        return self.options.passages == "retrieved"

    @property
    def _remembers(self) -> bool:
        return bool(self.options.hard or self.options.demonstrations or self.options.interpolate)

    def _kept(self) -> set[Path]:
        """The files of all passages; those of other options and earlier passages may lie beside them."""
        paths = {self.cache.path(passage) for _, passage in self._retriever.index.all_passages()}
        return {path for path in paths if path.exists()}

    def _of_document(self, change: Change) -> list[Passage]:
        """The passages of the document that a change is about, as the index stands."""
        if not self._keeps or change.kind != "document":
            return []
        return [one for _, one in self._retriever.index.all_passages() if one.document == change.id]

    # -- keeping ---------------------------------------------------------------------------------------------

    def _save_into(self, folder: Path) -> None:
        super()._save_into(folder)
        if self._learns:
            save_file({name: one.detach().cpu() for name, one in self._learnt.named_parameters()}, folder / _LEARNT)
        if self.instances is not None:
            self.instances.save(folder / _INSTANCES)
        if self._keeps:
            for path in self._kept():
                target = folder / "prefix" / path.relative_to(self._files.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                _linked(path, target)

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """Settings, examples, index, learnt columns; passages' keys and values where they were kept."""
        method = super().from_pretrained(path, base)
        if method._remembers:
            method.instances = Instances.load(path / _INSTANCES, method.encoder)
        if not method._learns:
            return method
        try:
            found = load_file(path / _LEARNT)
            if count := method.options.slots:
                layers = range(len(base.parts.blocks))
                keys, values = (tuple(found[f"slots.{part}.{n}"] for n in layers) for part in ("keys", "values"))
                method.slots = Slots(KV(keys, values, 0, count)).to(base.device)
            if (heads := method._fresh()) is not None:
                heads.load_state_dict(_part(found, "heads"))
                method.heads = heads
            if method.options.encoder == "tokens":
                inside = {name: one.to(base.device) for name, one in _part(found, "tokens").items()}
                method.tokens = TokenHeads(inside["scale"], inside["weight"], kv.read(base, [[0]])[0])
                if "down" in inside:
                    method.tokens.loosen(inside["down"].shape[1], 0)
                    method.tokens.load_state_dict(inside)
                    method.tokens.requires_grad_(False)
            if method.options.encoder == "selected":
                method.likely = Likely(found["likely.weight"].to(base.device))
            if method.options.realm:
                method.turn = Turn(method.encoder.card.dim).to(base.device)
                method.turn.load_state_dict({"change": found["turn.change"]})
                method._retriever.turn = method.turn.turned
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise DataError(f"{path}: not what byheart writes there ({first_line(error)})") from None
        return method


def _part(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What of all that was learnt belongs to one module, under the names that it has there."""
    return {key.removeprefix(f"{name}."): one for key, one in found.items() if key.startswith(f"{name}.")}


def _linked(source: Path, target: Path) -> None:
    """The same file under two names where the disk allows it: there may be very much of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
