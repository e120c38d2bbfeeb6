"""Which facts and questions may be learnt, and why others may not: the same for every method that learns from them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from byheart.ledger import Ledger
from byheart.prompt import as_sentence
from byheart.rows import Fact
from byheart.score import normalize


def choose_facts(facts: Iterable[Fact], today: dt.date | None = None) -> tuple[list[Fact], dict[str, str]]:
    """The facts that can be learnt, and by id why the others cannot.

    Left out: empty parts, duplicates, contradictions, and, where ``today`` is given, facts that do not hold then.
    """
    chosen: dict[tuple[str, str], list[Fact]] = {}
    skipped: dict[str, str] = {}
    for fact in facts:
        if not fact.subject.strip():
            skipped[fact.id] = "the subject is blank"
        elif not fact.object.strip():
            skipped[fact.id] = "the target is empty"
        elif today and fact.valid_to and fact.valid_to <= today:
            skipped[fact.id] = f"held until {fact.valid_to}"
        elif today and fact.valid_from and fact.valid_from > today:
            skipped[fact.id] = f"holds from {fact.valid_from} on"
        else:
            chosen.setdefault((fact.subject.strip(), fact.prompt.strip()), []).append(fact)
    kept = []
    for same in chosen.values():
        targets = {fact.object.strip() for fact in same}
        if len(targets) > 1:
            others = {fact.id: ", ".join(other.id for other in same if other is not fact) for fact in same}
            skipped |= {id: f"another target for the same subject and prompt ({more})" for id, more in others.items()}
            continue
        kept.append(same[0])
        skipped |= {fact.id: f"the same as {same[0].id}" for fact in same[1:]}
    return kept, skipped


def as_measured(question: str) -> str:
    """A question's words, without case and marks: what tells whether two are the same."""
    return normalize(as_sentence(question))


def to_measure(ledger: Ledger) -> set[str]:
    """The words of the questions that answers are measured on, as :func:`as_measured` gives them."""
    return {as_measured(question.question) for question in ledger.questions(["validation", "test"])}
