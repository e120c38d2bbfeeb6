"""The controls of ``prefix``: the same learnt columns with the known right passage, and with a wrong one."""

from __future__ import annotations

from collections.abc import Sequence

from byheart.errors import UsageError
from byheart.methods.controls import Gold, Shuffled
from byheart.methods.prefix.method import Prefix
from byheart.rows import Question
from byheart.segment import Passage


class PrefixGold(Prefix, Gold):
    """``prefix`` with the passages of :class:`Gold`; takes its options, and finds its training done."""

    name = "prefix-gold"

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str]:
        """A window of each of the question's documents."""
        return self._but_shown(questions, _of(self, Gold, questions))


class PrefixShuffled(Prefix, Shuffled):
    """``prefix`` with the passages of :class:`Shuffled`: what columns change by being there."""

    name = "prefix-shuffled"

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str]:
        """A window of a wrong document."""
        return self._but_shown(questions, _of(self, Shuffled, questions))


def _of(
    method: PrefixGold | PrefixShuffled, kind: type[Gold], questions: Sequence[Question]
) -> Sequence[Sequence[Passage] | str]:
    if method.options.passages == "none":
        raise UsageError(f"--set prefix.passages=none: leaves no passages for {method.name}")
    return kind.passages(method, questions)
