"""Prompts about others: the facts' own, asked about whatever ordinary text names; an edit is to leave them alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import ceil

from byheart.methods.edit.common_facts import common_facts
from byheart.prompt import is_question
from byheart.rows import Fact

# Words of a name, at most.
_WORDS = 4
# Prompts about others in all, as long as that leaves each fact one.
_ALL = 4096


def names_in(texts: Iterable[str], most: int, seed: int) -> list[str]:
    """Up to ``most`` names, drawn from those that stand within the sentences of some texts.

    A name is a run of capitalised words that no sentence begins with. Of a script without capitals there are none.
    """
    found: set[str] = set()
    for text in texts:
        run: list[str] = []
        for before, written in pairwise(text.split()):
            word = written.rstrip(".,;:!?")
            named = word.isalpha() and word.istitle() and len(word) > 1
            # What begins a sentence is capitalised, too, and may not be a name.
            inside = before.rstrip(",")[-1:].isalnum()
            if named and (run or inside):
                run.append(word)
            if run and (not named or word != written):
                if len(run) <= _WORDS:
                    found.add(" ".join(run))
                run = []
        # What a text ends in is left out: it may be half a name.
    names = sorted(found)
    return sorted(random.Random(seed).sample(names, min(most, len(names))))


def about_others(
    facts: Sequence[Fact], edited: Iterable[str], names: Sequence[str], seed: str, most: int, least: int = 0
) -> list[list[Fact]]:
    """Each fact about subjects not edited, some of ``names`` and well-known ones; about none where it asks a question.

    Behind questions about others nothing is to be held: it costs facts that are asked their paraphrases
    (docs/trials.md). Whom a fact is put about depends on it and on who is edited, not on the order of facts.

    Args:
        edited: subjects; one that is part of such a name, or the other way round, may well be the same thing, and is no
            other.
        most: others that a fact is put about, fewer where there are very many facts.
        least: so many in all, where there are few.
    """
    stated = max(1, sum(not is_question(fact.prompt) for fact in facts))
    taken = [_words(name) for name in edited]
    known = {name: _words(name) for name in sorted({*names, *(fact.subject for fact in common_facts())})}
    subjects = [name for name, words in known.items() if not any(words in one or one in words for one in taken)]
    each = min(len(subjects), max(1, min(most, _ALL // stated), ceil(least / stated)))
    found: list[list[Fact]] = []
    for fact in facts:
        draw = random.Random(f"{seed}/{fact.filled()}")
        drawn = [] if is_question(fact.prompt) else draw.sample(subjects, each)
        found.append([fact.model_copy(update={"subject": name}) for name in drawn])
    return found


def _words(name: str) -> str:
    return f" {name.casefold().strip()} "
