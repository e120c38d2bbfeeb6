"""The controls of ``prefix``: the same learnt columns with the known right passage, and with a wrong one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from byheart.base import Base
from byheart.errors import UsageError
from byheart.methods.contract import Settings
from byheart.methods.controls import Context, Gold, Shuffled
from byheart.methods.prefix.method import Prefix
from byheart.rows import Question
from byheart.segment import Passage


class PrefixGold(Prefix, Gold):
    """``prefix`` with the passages of :class:`Gold`; takes its options, and finds its training done."""

    name = "prefix-gold"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        """Make it like ``prefix``.

        Raises:
            UsageError: where that looks at no passages.
        """
        super().__init__(base, settings, work)
        if self.options.passages == "none":
            raise UsageError(f"--set prefix.passages=none: leaves no passages for {self.name}")

    @property
    def _searches(self) -> bool:
        return False  # what is shown is known without

    def passages(self, questions: Sequence[Question]) -> Sequence[Sequence[Passage] | str]:
        """A window of each of the question's documents; of the first, where several cannot stand together."""
        given = super(Context, self).passages(questions)
        some = [one if isinstance(one, str) or self._rotation is not None else one[:1] for one in given]
        return self._but_shown(questions, some)


class PrefixShuffled(PrefixGold, Shuffled):
    """``prefix`` with the passages of :class:`Shuffled`: what columns change by being there."""

    name = "prefix-shuffled"
