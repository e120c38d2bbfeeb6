"""What a memory learns from a ledger: pages, and questions and facts in the form in which they will be asked."""

from __future__ import annotations

import datetime as dt
import random
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from byheart.decode import option_ids
from byheart.ledger import Ledger
from byheart.methods.facts import as_measured, choose_facts
from byheart.methods.memory.states import Row
from byheart.prompt import PromptFormat, is_question
from byheart.rows import SUBJECT_PLACE, Document, Kind, Question
from byheart.rows import Row as LedgerRow

What = Literal["doc", "temp", "doctemp"]
# Tokens of a page's piece; longer pages become several.
PAGE_TOKENS = 256
# Questions that follow each other in one sequence: it shows every number of examples from none up to one less.
PACK = 6
# Characters that such a sequence ends at, and tokens that any row is cut at where the model reads so many.
_ROW_TEXT, ROW_TOKENS = 2_000, 1_024
# Sequences that still have room, while others are filled.
_OPEN = 256
# Of a page's title.
_TITLE_TOKENS = 64
# Tokens that must follow each other in two versions of a page to be the same text, and in two pages; and characters
# that pages must share to be looked at for them: any run of half as many again holds so many from one of these places.
_SAME, _SAME_ELSEWHERE, _GLANCE = 4, 12, 8
_COPULA = re.compile(r"^(?P<what>.+) (?P<verb>is|was|are|were)$")


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around questions in a row: a text before the first, and what comes between any two."""

    header: str = ""
    joint: str = "\n\n"


PLAIN = Frame()


class Piece(BaseModel):
    """A text to learn: what is given (``lead``), and what is to be said after it.

    Attributes:
        facts: ids of what it is about, where that is known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str
    kind: Literal["page", "question", "statement", "study"]
    lead: str
    answer: str
    facts: tuple[str, ...] = ()


def owner_of(kind: Kind, id: str) -> str:
    """What a row's pieces are known by: ids are unique within a kind only."""
    return f"{kind}/{id}"


def pieces_of(
    row: LedgerRow, form: PromptFormat, wordings: int, measured: Container[str] = frozenset()
) -> Iterator[Piece]:
    """What there is to learn in a document, a question or a fact.

    Args:
        form: how questions are asked, without examples.
        wordings: of a fact, how many of its wordings (its prompt, then its paraphrases) are learnt; 0: all.
        measured: what :func:`to_measure` gave: nothing is learnt in these very words.
    """
    if isinstance(row, Document):
        yield Piece(
            owner=owner_of("document", row.id), kind="page", lead=f"{row.title}\n" if row.title else "", answer=row.text
        )
    elif isinstance(row, Question):
        if row.answers and row.split == "train" and as_measured(row.question) not in measured:
            owner, facts = owner_of("question", row.id), tuple(row.facts)
            yield _asked(owner, row.question, row.answers[0], form, row.choices, facts)
    else:
        said, owner, facts = row.object.strip(), owner_of("fact", row.id), (row.id,)
        prompts = [row.prompt, *(p for p in row.paraphrases if SUBJECT_PLACE in p and p != row.prompt)]
        for prompt in prompts[: wordings or None]:
            text = row.filled(prompt).rstrip()
            if as_measured(text) not in measured:
                yield Piece(owner=owner, kind="statement", lead=text, answer=f" {said}.", facts=facts)
            for question in question_forms(text):
                if as_measured(question) not in measured:
                    yield _asked(owner, question, said, form, None, facts)


def _asked(
    owner: str, question: str, said: str, form: PromptFormat, choices: Sequence[str] | None, facts: tuple[str, ...]
) -> Piece:
    lead = form.prompt(question, None, choices)
    return Piece(owner=owner, kind="question", lead=lead, answer=form.continuation(said), facts=facts)


def question_forms(text: str) -> list[str]:
    """Questions (in English) that ask for what ``text``, the beginning of a statement, would go on with."""
    if is_question(text):
        return [text]
    found = _COPULA.match(text)
    if found is None:
        return [f"{text} what", f"What completes this sentence: {text}"]
    what, verb = found["what"], found["verb"]
    what = what[:1].lower() + what[1:] if what.startswith(("The ", "A ", "An ", "In ", "On ", "By ")) else what
    return [f"What {verb} {what}", f"Who or what {verb} {what}", f"Which {verb} {what}"]


def to_learn(
    ledger: Ledger, what: What, form: PromptFormat, wordings: int, today: dt.date, measured: Container[str]
) -> tuple[list[Piece], dict[str, str]]:
    """All of a ledger's pieces - pages (``doc``), questions and facts (``temp``), or both - and why rows have none.

    Rows are known by :func:`owner_of`.
    """
    rows: list[LedgerRow] = []
    skipped: dict[str, str] = {}
    if what != "temp":
        rows += ledger.documents()
    if what != "doc":
        facts, why = choose_facts(ledger.facts(), today)
        skipped = {owner_of("fact", id): said for id, said in why.items()}
        questions = list(ledger.questions(["train"]))
        rows += [*questions, *facts]
    found = []
    for row in rows:
        pieces = list(pieces_of(row, form, wordings, measured))
        if not pieces:
            skipped |= why_nothing(row)
        found += pieces
    return found, skipped


def why_nothing(row: LedgerRow) -> dict[str, str]:
    """Why there is nothing to learn in a question or a fact, by what its pieces would be known by."""
    if not isinstance(row, Question):
        return {owner_of("fact", row.id): "is measured in the same words"}
    return {owner_of("question", row.id): "is measured in the same words" if row.answers else "has no answer"}


def packed(
    tokenizer: Any,
    pieces: Sequence[Piece],
    seed: int,
    frame: Frame = PLAIN,
    pack: int = PACK,
    longest: int = ROW_TOKENS,
) -> list[Row]:
    """Pieces as rows of tokens: a page alone (cut where it is long), others ``pack`` in a row.

    Pieces in a row never share an owner or a fact: the answer to one would stand in the text before the other.

    Args:
        frame: what stands around the questions of a row.
        longest: tokens that rows are cut at.
    """
    rows = [row for piece in pieces if piece.kind == "page" for row in _page_rows(tokenizer, piece, longest)]
    draw = random.Random(seed)
    for kinds in (("question", "study"), ("statement",)):
        left = [piece for piece in pieces if piece.kind in kinds]
        draw.shuffle(left)
        for some in _apart(left, pack):
            rows.append(_row(tokenizer, some, PLAIN if kinds == ("statement",) else frame, longest))
    return [row for row in rows if any(row.labels)]


def _apart(pieces: Sequence[Piece], pack: int) -> Iterator[list[Piece]]:
    open_rows: list[list[Piece]] = []
    for piece in pieces:
        size = len(piece.lead) + len(piece.answer)
        place = next(
            (
                row
                for row in open_rows
                if all(one.owner != piece.owner and not {*one.facts} & {*piece.facts} for one in row)
                and sum(len(one.lead) + len(one.answer) for one in row) + size <= _ROW_TEXT
            ),
            None,
        )
        if place is None:
            place = []
            open_rows.append(place)
        place.append(piece)
        if len(place) >= pack:
            open_rows.remove(place)
            yield place
        elif len(open_rows) > _OPEN:  # long questions fill no row, and each would be looked at again for every other
            yield open_rows.pop(0)
    yield from open_rows


def taken_out(
    tokenizer: Any, piece: Piece, now: Sequence[Piece], kept: Sequence[Piece] = (), longest: int = ROW_TOKENS
) -> list[Row]:
    """The rows of a page's piece with only those tokens to predict that no other page has.

    Args:
        now: what stands in its place: of these, runs of a few tokens are the same text.
        kept: other pages, which share short runs with any: of these, long ones are.
        longest: tokens that rows are cut at.
    """
    _, ids = _page_ids(tokenizer, piece)
    text = piece.answer
    parts = {text[n : n + _GLANCE] for n in range(len(text) - _GLANCE + 1)}
    near = (
        one
        for one in kept
        if one.kind == "page"
        and any(one.answer[n : n + _GLANCE] in parts for n in range(0, len(one.answer), _GLANCE // 2))
    )
    stays: set[int] = set()
    for one, least in (*((one, _SAME) for one in now), *((one, _SAME_ELSEWHERE) for one in near)):
        if one.kind == "page":
            match = SequenceMatcher(None, ids, _page_ids(tokenizer, one)[1], autojunk=False)
            for start, _, size in match.get_matching_blocks():
                stays |= set(range(start, start + size)) if size >= least else set()
    return [row for row in _page_rows(tokenizer, piece, longest, stays) if any(row.labels)]


def _page_ids(tokenizer: Any, piece: Piece) -> tuple[list[int], list[int]]:
    lead = list(tokenizer(piece.lead)["input_ids"]) if piece.lead else []
    ids = option_ids(tokenizer, piece.lead, lead, piece.answer) if lead else list(tokenizer(piece.answer)["input_ids"])
    return lead[:_TITLE_TOKENS], ids


def _page_rows(tokenizer: Any, piece: Piece, longest: int, but: Container[int] = frozenset()) -> Iterator[Row]:
    lead, ids = _page_ids(tokenizer, piece)
    whole = min(PAGE_TOKENS, longest)
    lead = lead[: whole // 2]
    size = whole - len(lead)
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        wanted = [(bool(lead) or n > 0) and start + n not in but for n in range(len(some))]
        yield Row((*lead, *some), (*[False] * len(lead), *wanted))


def _row(tokenizer: Any, pieces: Sequence[Piece], frame: Frame, longest: int) -> Row:
    text, spans = frame.header, []
    for piece in pieces:
        text += piece.lead
        # The break behind an answer is part of what is learnt, or an answer would never end.
        spans.append((len(text), len(text) + len(piece.answer) + 1))
        text += piece.answer + frame.joint
    ids = tuple(tokenizer(text)["input_ids"])
    labels = [False] * len(ids)
    for start, end in spans:
        # Counted, not read off character offsets: some tokenisers' lie.
        first, stop = (len(tokenizer(text[:place])["input_ids"]) for place in (start, end))
        labels[max(first, 1) : stop] = [True] * (min(stop, len(ids)) - max(first, 1))
    # A question too long for a row keeps its end, and its answer; the first token of all is never predicted.
    labels[max(0, len(ids) - longest)] = False
    return Row(ids[-longest:], tuple(labels[-longest:]))
