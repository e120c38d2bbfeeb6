"""The controls: closed book, retrieved passages in the prompt, the known right passage, a wrong passage."""

from __future__ import annotations

import datetime as dt
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from byheart import __version__
from byheart.base import Base
from byheart.encoder import Encoder, EncoderCard, load_encoder
from byheart.errors import DataError, UsageError
from byheart.gold import gold_passages
from byheart.index import Index
from byheart.ledger import Change, Ledger
from byheart.methods.contract import Answer, LearnReport, Settings
from byheart.methods.reading import read
from byheart.progress import Progress, untold
from byheart.prompt import Example, PromptFormat, choose_examples
from byheart.retrieve import Retriever, follow, index_ledger, searchable
from byheart.rows import Document, Kind, Question
from byheart.score import contains, normalize
from byheart.segment import Passage
from byheart.storage import CARD, check_replaceable, new_folder, read_card, write_json

# How far down retrieval is looked at for recall, whatever the prompt holds.
RECALL_DEPTH = 10
_DRAWS = 100


class _Control:
    """What the controls share: the prompt format with its examples, and nothing changed in the model."""

    name: ClassVar[str]
    learns: Kind = "document"
    # Why it cannot be written to a folder; empty where it can.
    not_kept: ClassVar[str] = ""
    # Whether documents are cut or passages found, whatever the settings.
    cuts: ClassVar[bool] = False

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        self.base, self.settings, self.work = base, settings, work
        self.form = PromptFormat(base.tokenizer, chat=settings.chat)
        self.stand: list[Any] = [0, ""]  # in its ledger's history, as Ledger.stand gives it
        self.day = ""
        if self.cuts or settings.shots:
            _ = self.encoder  # what is wrong with it is said before any work

    @cached_property
    def encoder(self) -> Encoder:
        """What documents are cut and passages found with; loaded only where that is done."""
        dtype = self.base.dtype_name
        return load_encoder(self.settings.encoder, device=str(self.base.device), dtype=dtype)

    @property
    def used_encoder(self) -> EncoderCard | None:
        """The card of the encoder, where something was cut or found with it."""
        return self.encoder.card if "encoder" in vars(self) else None

    def estimate(self, ledger: Ledger) -> str | None:
        """Nothing worth a word."""
        return None

    def learn(self, ledger: Ledger, progress: Progress = untold) -> LearnReport:
        """Draw the examples; nothing is written into the model."""
        # Before any fact is chosen: should midnight pass, the new day is yet to be looked at.
        stand, self.day = ledger.stand, dt.date.today().isoformat()
        self.form, self.stand = self._draw(ledger), stand
        return LearnReport()

    def _draw(self, ledger: Ledger) -> PromptFormat:
        """The form of prompts, with examples drawn from the ledger."""
        shots = self.settings.shots
        chosen = choose_examples(ledger, shots, self.settings.seed, self.encoder.splitter) if shots else []
        return PromptFormat(self.base.tokenizer, chosen, chat=self.settings.chat)

    def revise(self, *changes: Change) -> LearnReport:
        """Follow changes of the ledger, one after the other."""
        reports = [self._changed(change) for change in changes]
        return replace(
            reports[-1] if reports else LearnReport(),
            seconds=sum(report.seconds for report in reports),
            documents=sum(report.documents for report in reports),
            notes=tuple(note for report in reports for note in report.notes),
        )

    def _changed(self, change: Change) -> LearnReport:
        """Show no example any more that the change took back; the rest of a prompt is looked up when it is asked."""
        kept = [example for example in self.form.examples if not _taken_back(example, change)]
        if len(kept) < len(self.form.examples):
            self.form = PromptFormat(self.base.tokenizer, kept, chat=self.settings.chat)
        self.stand = change.stand
        return LearnReport()

    def renew(self) -> LearnReport:
        """Nothing here goes by dates."""
        return LearnReport()

    @property
    def knows_questions(self) -> bool:
        """Whether it learns from the ledger's training questions."""
        return False

    def attached(self) -> AbstractContextManager[None]:
        """The model as it is."""
        return nullcontext()

    def answer(self, questions: Sequence[Question], progress: Progress = untold) -> list[Answer]:
        """Answers in the questions' order."""
        given = self.passages(questions)
        kept = [n for n, passages in enumerate(given) if not isinstance(passages, str)]
        found = self.read([questions[n] for n in kept], [given[n] for n in kept], progress)  # type: ignore[misc]
        answers = dict(zip(kept, found, strict=True))
        return [
            answers.get(n) or Answer(question=question.id, skipped=str(given[n]))
            for n, question in enumerate(questions)
        ]

    def read(
        self, questions: Sequence[Question], passages: Sequence[Sequence[Passage] | None], progress: Progress
    ) -> list[Answer]:
        """Answers from the given passages, in the prompt."""
        new = self.settings.max_new_tokens
        return read(self.base, self.form, questions, passages, max_new_tokens=new, progress=progress)

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str | None]:
        """What the prompt shows for each question: passages, None (closed book), or why the question is skipped."""
        raise NotImplementedError

    def save_pretrained(self, path: Path) -> None:
        """Write settings, examples and the hash of the base to a folder."""
        check_replaceable(path, CARD)
        with new_folder(path) as made:
            self._save_into(made)

    def _save_into(self, folder: Path) -> None:
        examples = [
            {"question": e.question, "answer": e.answer, "passage": None if e.passage is None else asdict(e.passage)}
            for e in self.form.examples
        ]
        write_json(
            folder / CARD,
            {
                "byheart": __version__,
                "method": self.name,
                "base": {
                    "name": self.base.name,
                    "hash": self.base.hash,
                    "packed": self.base.packed,
                    "dtype": self.base.dtype_name,
                },
                "encoder": None if self.used_encoder is None else self.used_encoder.to_dict(),
                "settings": self.settings.to_dict(),
                "examples": examples,
                "ledger": self.stand,
                "day": self.day,
            },
        )

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """What ``save_pretrained`` wrote, on the base that it was made for."""
        card = read_card(path / CARD, "method", "base", "encoder", "settings", "examples", "ledger")
        if card["method"] != cls.name:
            raise DataError(f"{path}: holds {card['method']}, not {cls.name}")
        try:
            made_for, settings = (card["base"]["name"], card["base"]["hash"]), Settings(**card["settings"])
            encoder = None if card["encoder"] is None else card["encoder"]["hash"]
            examples = [
                Example(e["question"], e["answer"], None if e["passage"] is None else Passage(**e["passage"]))
                for e in card["examples"]
            ]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path / CARD}: not what byheart writes there ({error!r})") from None
        if made_for[1] != base.hash:
            raise DataError(f"{path}: was made for another base ({made_for[0]}) than {base.name}")
        method = cls(base, settings, path)
        if encoder is not None and encoder != method.encoder.card.hash:
            raise DataError(f"{path}: was made with another encoder than the {method.encoder.card.name} that is here")
        method.form = PromptFormat(base.tokenizer, examples, chat=method.settings.chat)
        method.stand, method.day = card["ledger"], card.get("day", "")
        return method


class Closed(_Control):
    """Closed book: the question alone. What the model knows already."""

    name = "closed"

    def passages(self, questions: Sequence[Question]) -> Sequence[None]:
        """No passages."""
        return [None for _ in questions]


class Context(_Control):
    """Retrieved passages in the prompt: what any gain of another way has to be held against."""

    name = "context"
    cuts = True
    _retriever: Retriever

    def learn(self, ledger: Ledger, progress: Progress = untold) -> LearnReport:
        """Index the ledger's documents."""
        super().learn(ledger)
        index = index_ledger(ledger, self.work / "index", self.encoder, self.settings.segment, on_done=progress)
        self._retriever = Retriever(index, self.encoder, self.settings.retriever)
        self._retriever.prepare()
        return LearnReport(seconds=index.state("seconds", 0.0), bytes=index.bytes, documents=index.documents)

    def _changed(self, change: Change) -> LearnReport:
        """Replace or remove the changed document's passages in the index."""
        index = self._retriever.index
        seconds = follow(index, self.encoder, self.settings.segment, change)
        self._retriever = Retriever(index, self.encoder, self.settings.retriever, self._retriever.turn)
        super()._changed(change)
        return LearnReport(seconds=seconds, bytes=index.bytes, documents=int(change.kind == "document"))

    def answer(self, questions: Sequence[Question], progress: Progress = untold) -> list[Answer]:
        """Answers with the passages that were found for them; their time counts the search."""
        began = time.perf_counter()
        ranked = self._retriever.retrieve([q.question for q in questions], max(self.settings.k, RECALL_DEPTH))
        self._found = {q.id: hits for q, hits in zip(questions, ranked, strict=True)}
        share = (time.perf_counter() - began) / max(len(questions), 1)
        return [
            replace(
                answer,
                seconds=answer.seconds + share,
                ranked=tuple(hit.document for hit in self._found[answer.question]),
            )
            for answer in super().answer(questions, progress)
        ]

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str]:
        """The best ``k`` hits, best first."""
        if not len(self._retriever.index):
            return ["the ledger has no documents"] * len(questions)
        return [self._found[q.id][: self.settings.k] for q in questions]

    def _save_into(self, folder: Path) -> None:
        super()._save_into(folder)
        self._retriever.prepare()
        self._retriever.index.checkpoint()
        shutil.copytree(self._retriever.index.path, folder / "index")

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """Settings, examples and the index."""
        method = super().from_pretrained(path, base)
        index = Index(path / "index", method.encoder.card, method.settings.segment)
        method._retriever = Retriever(index, method.encoder, method.settings.retriever)
        return method


class Gold(_Control):
    """The known right passages in the prompt: as good as retrieval could ever be."""

    name = "gold"
    cuts = True
    not_kept = "needs questions with known documents, so it cannot be kept; use it in compare"

    def learn(self, ledger: Ledger, progress: Progress = untold) -> LearnReport:
        """Keep the ledger at hand; the passages are looked up when they are asked for."""
        self._ledger = ledger
        return super().learn(ledger)

    def save_pretrained(self, path: Path) -> None:
        """Refused: without a ledger that names the right documents there is nothing to answer from."""
        raise UsageError(f"{self.name}: {self.not_kept}")

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str]:
        """A window of each of the question's documents."""
        return [
            gold_passages(self._ledger, q, self.encoder.splitter, self.settings.segment)
            or "names no document of the ledger"
            for q in questions
        ]


class Shuffled(Gold):
    """Wrong passages in the prompt, as many as others show: what they change by being there, whatever they say."""

    name = "shuffled"

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str]:
        """Windows of ``k`` other documents of the ledger that hold none of the question's answers.

        Drawn by the seed and the question's id, so it does not depend on which questions are asked together.
        """
        return [self._wrong(question) for question in questions]

    def _wrong(self, question: Question) -> Sequence[Passage] | str:
        draw = random.Random(f"{self.settings.seed}/{question.id}")
        found: dict[str, Passage] = {}
        for _ in range(_DRAWS * self.settings.k):
            document = self._ledger.document_from(draw.random())
            if document is None or document.id in (*question.documents, *found):
                continue
            elsewhere = question.model_copy(update={"documents": [document.id], "facts": []})
            (passage, *_) = gold_passages(self._ledger, elsewhere, self.encoder.splitter, self.settings.segment)
            if not contains(searchable(passage), question.answers):
                found[document.id] = passage
            if len(found) == self.settings.k:
                break
        return list(found.values()) or "the ledger has no passage without its answer"


def _taken_back(example: Example, change: Change) -> bool:
    """Whether a prompt's example shows what a change removed."""
    before, after = change.before, change.after
    if isinstance(before, Question):
        gone = (
            not isinstance(after, Question)
            or after.split != "train"
            or (after.question, after.answers) != (before.question, before.answers)
        )
        return gone and normalize(example.question) == normalize(before.question)
    shown = example.passage
    if not isinstance(before, Document) or shown is None or shown.document != before.id:
        return False
    return not isinstance(after, Document) or shown.text not in after.text or shown.title != after.title
