"""The known right passages of a question, cut from its documents as retrieval would cut them."""

from __future__ import annotations

from typing import cast

from tokenizers import Tokenizer

from byheart.ledger import Ledger
from byheart.rows import Document, Fact, Question
from byheart.score import contains
from byheart.segment import Passage, segment


def gold_passages(ledger: Ledger, question: Question, tokenizer: Tokenizer, preset: str) -> list[Passage]:
    """One window for each of the question's documents that the ledger holds: the one that states what is asked.

    That is the window around the span of one of the question's facts, else the first that contains an answer, else
    the first. Empty where the question names no document.
    """
    facts = [cast(Fact | None, ledger.get("fact", id)) for id in question.facts]
    spans = {fact.document: fact.span for fact in facts if fact is not None and fact.document and fact.span}
    documents = [ledger.document(id) for id in question.documents]
    return [_window(d, spans.get(d.id), question, tokenizer, preset) for d in documents if d is not None]


def _window(
    document: Document, span: tuple[int, int] | None, question: Question, tokenizer: Tokenizer, preset: str
) -> Passage:
    windows = list(segment([document], tokenizer, preset))
    if span is not None:
        around = [w for w in windows if w.start <= span[0] and span[1] <= w.end]
        # Of several overlapping windows, the one with the fact nearest its middle.
        if around:
            return min(around, key=lambda w: abs((w.start + w.end) - (span[0] + span[1])))
    return next((w for w in windows if contains(w.text, question.answers)), windows[0])
