"""The options of `edit`, and which of them have a say only beside others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from byheart.errors import UsageError
from byheart.methods.edit.settle import SettleOptions
from byheart.methods.edit.targets import TargetOptions
from byheart.methods.edit.write import WriteOptions

# Options that have a say only where another one is one of these.
_GATED, _SETTLED = ("gate", ("warn", "rollback")), ("settle", ("1 or more",))
_ONLY: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    "energy": (("constraint", ("nullspace",)),),
    "scatter": (("constraint", ("none",)),),
    "others": (("constraint", ("none",)),),
    "counted": (("merge", (True,)), ("constraint", ("none", "nullspace"))),
    "stop_loss": (("stop", ("fit", "loss")),),
    "max_perplexity": (_GATED,),
    "max_neighbours": (_GATED,),
    **{name: (_SETTLED,) for name in SettleOptions.__dataclass_fields__ if name != "settle"},
}


@dataclass(frozen=True)
class EditOptions(SettleOptions, WriteOptions, TargetOptions):
    """What ``--set edit.NAME=VALUE`` takes, with the options of the search for targets, of writing and of settling.

    Attributes:
        layers: ``FIRST-LAST``, or ``auto``: what ``byheart trace`` found for this model, else a share of the depth.
        steps: fewer than a search for single facts takes, since facts settle afterwards.
        prefixes: texts of the model's own that each prompt is also edited behind.
        paraphrases: edit behind the facts' own paraphrases, too, where the ledger has any.
        text: ordinary text for the second moment: ``own`` (the model writes it), ``ledger`` (its documents) or a file.
        tokens: of that text, as a multiple of d_ff; 0: up to 200 of what there is, and at least 10, which the model
            writes where they are not there.
        merge: seek and write one change for all facts about one subject (MEMIT-Merge).
        batch: facts to take at once; 0: all of them.
        sequence: ``joint`` solves all facts, old and new, together whenever some come or go; ``accumulate`` adds each
            batch to what is there (as published).
        gate: what to do where the change drifts too far: ``off`` (do not look), ``warn``, or ``rollback``.
        max_perplexity, max_neighbours: how much perplexity on ordinary text may rise and right answers about
            neighbours may fall, as shares.
    """

    layers: str = "auto"
    steps: int = 14
    prefixes: int = 3
    paraphrases: bool = False
    text: str = "own"
    tokens: int = 0
    merge: bool = False
    batch: int = 0
    sequence: Literal["joint", "accumulate"] = "joint"
    gate: Literal["off", "warn", "rollback"] = "off"
    max_perplexity: float = 0.10
    max_neighbours: float = 0.05

    def check(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            UsageError: names the option.
        """
        bounds = {
            "steps": (self.steps < 2, "at least 2"),
            "settle_from": (self.settle_from > 1, "at most 1"),
            "settle_held": (self.settle_held < 1, "at least 1"),
            "settle_runs": (self.settle_runs < 1, "at least 1"),
            "weight": (not self.weight, "above 0"),
            "energy": (self.energy >= 1, "below 1"),
        }
        for name, (beyond, bound) in bounds.items():
            if beyond:
                raise UsageError(f"--set edit.{name}={getattr(self, name)}: must be {bound}")

    def check_needs(self, given: Mapping[str, str]) -> None:
        """Refuse what would silently do nothing; ``given`` are the options as they were typed.

        Raises:
            UsageError: names the option, and what it needs.
        """
        for name, needs in _ONLY.items():
            for other, allowed in needs:
                value = getattr(self, other)
                fits = value > 0 if other == "settle" else value in allowed
                if getattr(self, name) != getattr(EditOptions, name) and not fits:
                    needed = " or ".join(str(one).lower() for one in allowed)
                    raise UsageError(f"--set edit.{name}={given[f'edit.{name}']}: needs edit.{other}={needed}")
