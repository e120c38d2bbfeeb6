"""What is wrong in a ledger: contradictions, ids that lead nowhere, facts and questions their documents do not back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import combinations

from byheart.ledger import Ledger
from byheart.rows import Fact, Kind
from byheart.score import contains


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with one row: ``problem`` is one of contradiction, dangling, span, unanswerable, not-stated."""

    problem: str
    kind: Kind
    id: str
    message: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.kind} {self.id}: {self.message}"


def check(ledger: Ledger) -> Iterator[Finding]:
    """Everything wrong in the ledger, streamed: contradictions first, then fact by fact and question by question."""
    yield from _contradictions(ledger)
    yield from _facts(ledger)
    yield from _questions(ledger)


def _contradictions(ledger: Ledger) -> Iterator[Finding]:
    groups = ledger.sql(
        "SELECT group_concat(id, char(31)) FROM facts WHERE NOT retracted"
        " GROUP BY lower(trim(subject)), lower(trim(prompt)) HAVING count(DISTINCT lower(trim(object))) > 1"
    )
    for (ids,) in list(groups):
        facts = [f for f in (ledger.get("fact", id) for id in ids.split(chr(31))) if isinstance(f, Fact)]
        for one, two in combinations(facts, 2):
            if one.object.strip().lower() != two.object.strip().lower() and _overlap(one, two):
                prompt = one.filled()
                message = f'"{prompt}" is "{two.object}" here and "{one.object}" in {one.id}'
                yield Finding("contradiction", "fact", two.id, message)


def _overlap(one: Fact, two: Fact) -> bool:
    start = max(one.valid_from or date.min, two.valid_from or date.min)
    return start < min(one.valid_to or date.max, two.valid_to or date.max)


def _facts(ledger: Ledger) -> Iterator[Finding]:
    for fact in ledger.facts():
        if fact.document is None:
            if fact.span is not None:
                yield Finding("dangling", "fact", fact.id, "has a span but names no document")
            continue
        document = ledger.document(fact.document)
        if document is None:
            yield Finding("dangling", "fact", fact.id, f"document {fact.document} is not in the ledger")
        elif fact.span is not None and fact.span[1] > len(document.text):
            yield Finding(
                "span", "fact", fact.id, f"ends at {fact.span[1]}, document {document.id} at {len(document.text)}"
            )
        elif fact.span is not None and not contains(document.text[slice(*fact.span)], [fact.object]):
            yield Finding("span", "fact", fact.id, f'does not hold "{fact.object}" in document {document.id}')


def _questions(ledger: Ledger) -> Iterator[Finding]:
    for question in ledger.questions():
        missing: list[tuple[Kind, str]] = [("fact", id) for id in question.facts if ledger.get("fact", id) is None]
        missing += [("document", id) for id in question.documents if ledger.document(id) is None]
        for kind, id in missing:
            yield Finding("dangling", "question", question.id, f"{kind} {id} is not in the ledger")
        if not question.answerable or missing:
            continue
        if not question.answers:
            yield Finding("unanswerable", "question", question.id, "counts as answerable but has no answers")
            continue
        documents = [d for d in map(ledger.document, question.documents) if d is not None]
        if documents and not question.choices and not any(contains(d.text, question.answers) for d in documents):
            yield Finding("not-stated", "question", question.id, "none of its documents holds one of its answers")
