"""The contract of every method: what it is given, what it must do, and what an answer holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, get_args, get_origin, get_type_hints

from byheart.base import Base
from byheart.errors import UsageError
from byheart.ledger import Change, Ledger
from byheart.progress import Progress
from byheart.retrieve import MODES, Mode
from byheart.rows import Kind, Question
from byheart.segment import DEFAULT, Passage

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Settings:
    """What all methods of one comparison share, so that only the method differs between them.

    Attributes:
        encoder: the text encoder's alias, folder or Hub id.
        segment: SIZE/STEP of the token windows.
        retriever: how passages are found.
        k: retrieved passages a question.
        shots: examples before the question, from the ledger's training questions.
        chat: whether the prompt goes through the model's chat template.
        max_new_tokens: the longest answer.
        seed: what everything random is drawn from.
        options: of single methods, as ``"edit.layers": "3-7"``.
    """

    encoder: str = "minilm"
    segment: str = DEFAULT
    retriever: Mode = MODES[2]
    k: int = 1
    shots: int = 5
    chat: bool = False
    max_new_tokens: int = 24
    seed: int = 0
    options: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def parse_options(kind: type[OptionsT], method: str, given: Mapping[str, str]) -> OptionsT:
    """A dataclass of a method's options from ``"method.name": "value"`` texts; what is not given keeps its default.

    Raises:
        UsageError: where an option does not exist, or its value cannot be read.
    """
    kinds = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, text in given.items():
        owner, _, name = key.partition(".")
        if owner != method:
            continue
        if name not in kinds:
            raise UsageError(f"--set {key}: {method} has no such option; it has {', '.join(kinds)}")
        values[name] = _parsed(kinds[name], key, text)
    return kind(**values)


def _parsed(kind: Any, key: str, text: str) -> Any:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise UsageError(f"--set {key}={text}: must be one of {', '.join(get_args(kind))}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise UsageError(f"--set {key}={text}: must be true or false")
        return text.lower() in ("true", "yes", "1")
    try:
        value = kind(text)
    except ValueError:
        raise UsageError(f"--set {key}={text}: must be {'a whole number' if kind is int else 'a number'}") from None
    if kind in (int, float) and not (math.isfinite(value) and value >= 0):
        raise UsageError(f"--set {key}={text}: must be a number of at least 0")
    return value


@dataclass(frozen=True)
class LearnReport:
    """What learning, or following a change, took.

    Attributes:
        seconds: wall time, over all runs where the work was resumed.
        bytes: what is stored because of it.
        documents, facts: how many were taken in.
        skipped: reasons with counts, for rows that the method cannot use.
        notes: sentences for the person: what was noticed on the way.
    """

    seconds: float = 0.0
    bytes: int = 0
    documents: int = 0
    facts: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One method's answer to one question.

    Attributes:
        text: the freely generated answer.
        score: mean log-probability of a generated token.
        reference: mean log-probability of a token of the question's first answer (of its likeliest right choice),
            written in the answer's place; None where the question has none.
        token_accuracy: the share of that answer's tokens that are the likeliest, given those before.
        choice, choice_calibrated: for a question with choices, the likeliest one (length-normalised; with the
            likelihood that it has without the question subtracted).
        evidence: the passages that the model read for it.
        ranked: the documents that were found for it, best first, further down than was read; None where none
            were searched for.
        seconds: its share of the time, retrieval included.
        skipped: why the method could not answer; all else is empty then.
    """

    question: str
    text: str = ""
    score: float = 0.0
    reference: float | None = None
    token_accuracy: float | None = None
    choice: str | None = None
    choice_calibrated: str | None = None
    evidence: tuple[Passage, ...] = ()
    ranked: tuple[str, ...] | None = None
    seconds: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    skipped: str | None = None


class Method(Protocol):
    """One way to give a model knowledge.

    Made from a base, the shared settings and a folder for its own working files, in which long work can be resumed.
    """

    name: str
    # The kind of row that learning counts.
    learns: Kind
    # Where in its ledger's history what is learnt stands, as Ledger.stand gives it.
    stand: list[Any]
    # The day (ISO) whose facts are learnt, where some hold from or to a date.
    day: str

    def __init__(self, base: Base, settings: Settings, work: Path) -> None: ...

    def estimate(self, ledger: Ledger) -> str | None:
        """What learning will put on disk, in a sentence; None where that is little.

        Raises:
            DataError: where it would fill the disk.
        """
        ...

    def learn(self, ledger: Ledger, progress: Progress = ...) -> LearnReport:
        """Take in the ledger: index, train or solve; ``progress`` is told how many documents or facts got done."""
        ...

    def revise(self, *changes: Change) -> LearnReport:
        """Follow changes of the ledger that was learnt, in their order, without learning all of it again."""
        ...

    def renew(self) -> LearnReport:
        """Let facts come and go by their dates, as of today; :meth:`revise` does so with any change of a fact."""
        ...

    def attached(self) -> AbstractContextManager[None]:
        """A block in which the base model has the knowledge; after it the model is bit for bit as before."""
        ...

    def answer(self, questions: Sequence[Question], progress: Progress = ...) -> list[Answer]:
        """Answers in the questions' order; called inside ``attached``."""
        ...

    def save_pretrained(self, path: Path) -> None:
        """Write what was learnt - the change alone, never the base model - to a folder."""
        ...

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """What ``save_pretrained`` wrote, on the base that it was made for.

        Raises:
            DataError: where the folder is something else, or was made for another base or encoder.
        """
        ...
