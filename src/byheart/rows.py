"""The three kinds of ledger row - document, fact, question - and how a JSON object becomes one."""

from __future__ import annotations

import datetime as dt
import hashlib
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Kind = Literal["document", "fact", "question"]
Action = Literal["insert", "revise", "retract"]
Split = Literal["train", "validation", "test"]
SUBJECT_PLACE = "{}"
RowT = TypeVar("RowT")


def content_id(prefix: str, *parts: str) -> str:
    """A stable id made from content, for rows that bring none: the same row always gets the same id."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8)
    return f"{prefix}-{digest.hexdigest()}"


def told_apart(id: str, seen: Counter[str]) -> str:
    """An id that rows of a benchmark may share, with a number behind it from the second time on."""
    seen[id] += 1
    return f"{id}#{seen[id]}" if seen[id] > 1 else id


def whole_words(text: str) -> str:
    """The pattern of a text that stands somewhere as whole words."""
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def with_place(text: str, subject: str) -> str | None:
    """A text with ``{}`` where the subject stands first, as whole words where it stands so anywhere; None: nowhere."""
    whole = re.search(whole_words(subject), text)
    start = whole.start() if whole else text.find(subject)
    return None if start < 0 else text[:start] + SUBJECT_PLACE + text[start + len(subject) :]


class _Row(BaseModel):
    # Unknown fields are refused: a misspelt "answer" would otherwise vanish without a word.
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=False)


class Document(_Row):
    """A page of text. Spans elsewhere are character offsets into ``text``."""

    id: str = Field(min_length=1)
    title: str = ""
    text: str
    metadata: dict[str, Any] = {}

    @field_validator("text")
    @classmethod
    def _has_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("the text is empty")
        return text


class Neighbour(_Row):
    """A prompt near a fact (same relation, another subject) whose answer must not move when the fact is learnt."""

    prompt: str = Field(min_length=1)
    object: str | None = None


class Fact(_Row):
    """One fact: ``prompt`` with the subject put at ``{}`` is continued by ``object``.

    ``span`` holds the character offsets [start, end) of the sentence in ``document`` that states the fact;
    ``valid_from`` and ``valid_to`` are ISO dates, the second exclusive.
    """

    id: str = Field(min_length=1)
    subject: str = Field(min_length=1)
    prompt: str
    object: str = Field(min_length=1)
    former_object: str | None = None
    paraphrases: list[str] = []
    neighbours: list[Neighbour] = []
    document: str | None = None
    span: tuple[int, int] | None = None
    valid_from: dt.date | None = None
    valid_to: dt.date | None = None

    @field_validator("prompt")
    @classmethod
    def _one_place(cls, prompt: str) -> str:
        if prompt.count(SUBJECT_PLACE) != 1:
            raise ValueError('the prompt must hold "{}" exactly once, where the subject goes')
        return prompt

    @field_validator("paraphrases")
    @classmethod
    def _at_most_one_place(cls, paraphrases: list[str]) -> list[str]:
        if any(p.count(SUBJECT_PLACE) > 1 for p in paraphrases):
            raise ValueError('a paraphrase may hold "{}" once at most')
        return paraphrases

    @model_validator(mode="after")
    def _ordered(self) -> Fact:
        if self.span and not 0 <= self.span[0] < self.span[1]:
            raise ValueError("the span must be [start, end) with 0 <= start < end")
        if self.valid_from and self.valid_to and self.valid_from >= self.valid_to:
            raise ValueError("valid_from must come before valid_to")
        return self

    def filled(self, prompt: str | None = None) -> str:
        """The fact's prompt (or one of its paraphrases) with the subject in its place."""
        return (self.prompt if prompt is None else prompt).replace(SUBJECT_PLACE, self.subject)

    def placed(self, paraphrase: str) -> str | None:
        """One of the fact's paraphrases with the subject's place in it, also where it spells the subject out."""
        return paraphrase if SUBJECT_PLACE in paraphrase else with_place(paraphrase, self.subject)


class Question(_Row):
    """A question with the answers that count as right (aliases of one answer, or the right ones of ``choices``).

    ``documents`` and ``facts`` are the ids it asks about. ``answerable=False`` says that the right reaction is to
    abstain. Only ``train`` questions may be learnt from or shown as examples; the others are for measuring.
    ``attributes`` are whatever else is known of it, by name.
    """

    id: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answers: list[str] = []
    choices: list[str] | None = None
    kind: str = "direct"
    attributes: dict[str, str] = {}
    facts: list[str] = []
    documents: list[str] = []
    answerable: bool = True
    split: Split = "test"

    @model_validator(mode="after")
    def _coherent(self) -> Question:
        if not self.answerable and self.answers:
            raise ValueError("a question that is not answerable must have no answers")
        if not all(text.strip() for text in [*self.answers, *(self.choices or [])]):
            raise ValueError("an answer or choice is blank")
        if self.choices is not None and not set(self.answers) <= set(self.choices):
            raise ValueError("every answer must be one of the choices")
        return self


Row = Document | Fact | Question
MODELS: dict[Kind, type[Document] | type[Fact] | type[Question]] = {
    "document": Document,
    "fact": Fact,
    "question": Question,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a ledger file: what to do, with which row (``row`` is None for a retraction), and who says so."""

    action: Action
    kind: Kind
    id: str
    row: Row | None
    source: str | None = None


def parse_entry(obj: Any, action: Action = "insert") -> Entry:
    """Turn one decoded JSON object into an :class:`Entry`; ``action`` holds where the object names none.

    Raises:
        ValueError: with a one-line reason, where the object is no ledger row.
    """
    if not isinstance(obj, Mapping):
        raise ValueError("not a JSON object")
    fields = dict(obj)
    kind = fields.pop("type", None) or _guess_kind(fields)
    if not isinstance(kind, str) or kind not in MODELS:
        raise ValueError(f'unknown type "{kind}" (document, fact or question)')
    chosen = fields.pop("action", action)
    if chosen not in ("insert", "revise", "retract"):
        raise ValueError(f'unknown action "{chosen}" (insert, revise or retract)')
    source = fields.pop("source", None)
    if source is not None:
        if not isinstance(source, str):
            raise ValueError('"source" must be a text')
        source.encode()
    fields.pop("note", None)
    if chosen == "retract":
        id = fields.pop("id", None)
        if id is None or id == "":
            raise ValueError("a retraction needs an id")
        if not isinstance(id, (str, int)) or isinstance(id, bool):
            raise ValueError('"id" must be a text')
        unknown = fields.keys() - MODELS[kind].model_fields.keys()
        if unknown:
            raise ValueError(f'"{min(unknown)}": unknown field')
        str(id).encode()
        return Entry("retract", kind, str(id), None, source)
    if "id" not in fields:
        if chosen == "revise":
            raise ValueError("a revision needs the id of the row it replaces")
        fields["id"] = _made_id(kind, fields)
    elif isinstance(fields["id"], int) and not isinstance(fields["id"], bool):
        fields["id"] = str(fields["id"])
    try:
        row = MODELS[kind].model_validate(fields)
    except ValidationError as error:
        raise ValueError(first_reason(error)) from None
    return Entry(chosen, kind, row.id, row, source)


def _guess_kind(fields: Mapping[str, Any]) -> str:
    if "question" in fields:
        return "question"
    if "subject" in fields:
        return "fact"
    if "text" in fields:
        return "document"
    raise ValueError('no "type", and none of "text", "subject" or "question" to tell it by')


def _made_id(kind: str, fields: Mapping[str, Any]) -> str:
    keys = {"document": ("title", "text"), "fact": ("subject", "prompt", "object"), "question": ("question",)}[kind]
    return content_id(kind[0], *(str(fields.get(key, "")) for key in keys))


def first_reason(error: ValidationError) -> str:
    """What is wrong with the first bad field of a row, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "unknown field"
    elif first["type"] == "missing":
        what = "missing"
    return f'"{where}": {what}' if where else what


def drawn(rows: list[RowT], limit: int | None, seed: int) -> list[RowT]:
    """``limit`` of the rows, drawn by the seed, in their order; all of them where there is no limit."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[n] for n in sorted(random.Random(seed).sample(range(len(rows)), limit))]
