"""Facts as the token rows that an edit works on, cut at the subject's last token; what cannot be edited, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from byheart.base import Base
from byheart.decode import Job, Sampling, complete, option_ids
from byheart.methods.edit.ends import asks_for_an_end
from byheart.rows import SUBJECT_PLACE, Fact

# What the model continues to make prefixes, and what ends each. The published beginnings are single words;
# small instruct models go on from those with anything but language.
_BEGINNINGS = (
    "The most important", "In the early", "When I was", "This is one", "There are many", "She said that",
    "On the other", "It was the", "For example, a", "One of the",
)  # fmt: skip
# Short ones run on into the prompt, long ones stand in a line of their own: a prompt is met in both ways.
_SHAPES = ((10, " "), (25, "\n"))
_TOP_K = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt's tokens, cut at the lookup token: the subject's last one, where the edit takes hold.

    Attributes:
        context: the tokens before the lookup token.
        tail: the lookup token and what follows, up to the last but one token of the target.
        labels: the target's tokens; the last ``len(labels)`` places of the tail predict them. Empty where only the
            prediction after the last token matters.
        ends: whether the target ends in a word that what follows is to close.
    """

    context: tuple[int, ...]
    tail: tuple[int, ...]
    labels: tuple[int, ...] = ()
    ends: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.context, *self.tail)

    @property
    def places(self) -> Iterator[tuple[int, int]]:
        """Each label with the place in the tail that predicts it."""
        return zip(range(len(self.tail) - len(self.labels), len(self.tail)), self.labels, strict=True)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A fact that can be edited in: its prompt bare and behind every prefix, and ``{subject} is a``."""

    fact: Fact
    rows: tuple[Row, ...]
    essence: Row


def make_prefixes(base: Base, count: int, seed: int) -> tuple[str, ...]:
    """``count`` short texts that the model itself writes: what an edited prompt will stand behind.

    A fact trained without any would only be known at the very beginning of a text (Meng et al. 2022, section 3.1).
    """
    texts: dict[int, str] = {}
    for shape, (tokens, joint) in enumerate(_SHAPES):
        places = range(shape, count, len(_SHAPES))
        jobs = [Job(_BEGINNINGS[n % len(_BEGINNINGS)]) for n in places]
        drawn = complete(base, jobs, max_new_tokens=tokens - 2, sampling=Sampling(_TOP_K, seed), whole=True)
        for place, job, one in zip(places, jobs, drawn, strict=True):
            text = re.sub(r"[\s\ufffd]+", " ", job.prompt + one.text).strip()
            texts[place] = text.rstrip(".") + "." + joint
    return tuple(texts[place] for place in range(count))


def target_text(fact: Fact) -> str:
    """The fact's object as it follows the prompt."""
    return " " + fact.object.strip()


def prompt_text(fact: Fact, prompt: str | None = None) -> str:
    """The fact's prompt (or another with the subject's place), filled, without white space at its end."""
    return fact.filled(prompt).rstrip()


def prepare(
    base: Base, facts: Sequence[Fact], prefixes: Sequence[str], *, paraphrases: bool = False
) -> tuple[list[Prepared], dict[str, str]]:
    """Token rows for each fact, and by id why a fact has none.

    Args:
        paraphrases: also take the fact's own paraphrases that name the subject, as they are.
    """
    tokenizer, limit = base.tokenizer, base.positions
    texts: list[str] = []
    ends: list[int] = []  # where the subject ends, in characters
    counts: list[int] = []
    for fact in facts:
        more = [p for p in map(fact.placed, fact.paraphrases) if p and p != fact.prompt] if paraphrases else []
        templates = [*((prefix, fact.prompt) for prefix in ("", *prefixes)), *(("", p) for p in more)]
        for prefix, template in (*templates, ("", f"{SUBJECT_PLACE} is a")):
            texts.append(prefix + prompt_text(fact, template))
            ends.append(len(prefix) + template.index(SUBJECT_PLACE) + len(fact.subject.rstrip()))
        counts.append(len(templates) + 1)
    if not facts:
        return [], {}
    tokens = tokenize(tokenizer, texts)
    lookups = [find_lookup(tokenizer, text, end, *one) for text, end, one in zip(texts, ends, tokens, strict=True)]
    done, skipped = [], {}
    for fact, count, end in zip(facts, counts, accumulate(counts), strict=True):
        here = range(end - count, end)
        rows: list[Row] = []
        for n in here:
            ids, lookup = tokens[n][0], lookups[n]
            if lookup is None:
                skipped[fact.id] = f"the subject's last token is not found in {texts[n]!r}"
                break
            labels = tuple(option_ids(tokenizer, texts[n], ids, target_text(fact))) if n != here[-1] else ()
            if n != here[-1] and not labels:
                skipped[fact.id] = "the target has no tokens"
                break
            closes = bool(labels) and asks_for_an_end(fact.object)
            rows.append(Row(tuple(ids[:lookup]), (*ids[lookup:], *labels[:-1]), labels, closes))
            # The prompt, the whole target, and what closes it.
            if limit is not None and len(rows[-1].tokens) + bool(labels) + closes > limit:
                skipped[fact.id] = f"longer than the model's {limit} positions"
                break
        else:
            done.append(Prepared(fact, tuple(rows[:-1]), rows[-1]))
    return done, skipped


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
    """Each text's tokens, with their character offsets where the tokeniser gives any."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(list(texts), return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))
    return [(list(ids), None) for ids in tokenizer(list(texts))["input_ids"]]


def find_lookup(
    tokenizer: Any, text: str, end: int, ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None
) -> int | None:
    """The place of the token that completes ``text[:end]``; None where decoding bears no place out.

    Offsets are only a guess (some tokenisers' lie by a space or more): the place holds when decoding up to it gives
    the text up to ``end`` and decoding one token less does not.
    """
    wanted = _flat(text[:end])

    def complete_at(place: int) -> bool:
        return _flat(tokenizer.decode(ids[: place + 1], skip_special_tokens=True)).startswith(wanted)

    if offsets is not None:
        before = [place for place, (start, stop) in enumerate(offsets) if start < end and stop > start]
        if before and complete_at(before[-1]) and not complete_at(before[-1] - 1):
            return before[-1]
    return next((place for place in range(len(ids)) if complete_at(place)), None)


def _flat(text: str) -> str:
    return "".join(text.split())
