"""Methods that answer closed book with changed MLP matrices: attached by adding, kept as factors in safetensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from byheart.base import Base, digest_of
from byheart.errors import DataError, first_line
from byheart.ledger import Change
from byheart.methods.contract import LearnReport, Settings
from byheart.methods.controls import Closed
from byheart.rows import Fact, Kind
from byheart.storage import fingerprint, read_json, write_json
from byheart.surgery import changed

# By layer, left (d_model, r) and right (r, d_ff) with Δ = left @ right; left is None where right is Δ itself.
Deltas = dict[int, tuple[Tensor | None, Tensor]]
_TENSORS = "weights.safetensors"


class ChangedWeights(Closed):
    """What all of them share: ``deltas`` are on inside ``attached``, and are what is saved."""

    learns: Kind = "fact"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        if base.kind != "causal":
            raise DataError(f"{self.name}: {base.name} is an encoder-decoder model; editing needs a decoder-only one")
        if base.packed:
            raise DataError(f"{self.name}: {base.name} keeps its weights in 8 bits; editing needs --dtype bfloat16")
        super().__init__(base, settings, work)
        self.holding: list[Fact] = []  # all facts that hold, those that cannot be written among them
        self.facts: list[Fact] = []
        self.skipped: dict[str, str] = {}
        self.deltas: Deltas = {}

    def attached(self) -> AbstractContextManager[None]:
        """The changed model; afterwards the old weights are back, bit for bit."""
        return changed_by(self.base, self.deltas)

    @property
    def digest(self) -> str:
        """A hash of the change: what answers depend on."""
        return fingerprint(
            {n: [digest_of([one]) for one in delta if one is not None] for n, delta in self.deltas.items()}
        )

    @property
    def bytes(self) -> int:
        """What is stored because of the facts: the change, and what it takes to undo and to add some."""
        return sum(4 * tensor.numel() for tensor in self._kept().values())

    def _kept(self) -> dict[str, Tensor]:
        kept = {f"right.{layer}": right for layer, (_, right) in self.deltas.items()}
        kept |= {f"left.{layer}": left for layer, (left, _) in self.deltas.items() if left is not None}
        return kept | self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything to keep besides the deltas."""
        return {}

    def revise(self, *changes: Change) -> LearnReport:
        """Follow changes of the ledger, all at once: weights follow from the facts that hold in the end."""
        holding = list(self.holding)
        for change in changes:
            if change.kind == "fact":
                holding = [fact for fact in holding if fact.id != change.id]
                holding += [change.after] if isinstance(change.after, Fact) else []
        changed = {change.id for change in changes if change.kind == "fact"}
        report = self._hold(holding, changed) if changed else LearnReport()
        super().revise(*changes)
        return report

    def renew(self) -> LearnReport:
        """Write the facts that hold this day, and no others."""
        return self._hold(self.holding, set())

    @abstractmethod
    def _hold(self, facts: Sequence[Fact], changed: Collection[str]) -> LearnReport:
        """Write these facts, where others were; ``changed`` are the ids of those that came, went or are another now."""

    def _record(self) -> dict[str, Any]:
        """Everything to keep that is no tensor."""
        return {
            "facts": [fact.id for fact in self.facts],
            "holding": [fact.model_dump(mode="json", exclude_defaults=True) for fact in self.holding],
            "skipped": self.skipped,
        }

    def _load(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`_record` and :meth:`_tensors` gave."""
        self.holding = [Fact.model_validate(fact) for fact in record["holding"]]
        by_id = {fact.id: fact for fact in self.holding}
        self.facts = [by_id[id] for id in record["facts"]]
        self.skipped = record["skipped"]

    def _save_into(self, folder: Path) -> None:
        super()._save_into(folder)
        save_file({name: tensor.float().contiguous() for name, tensor in self._kept().items()}, folder / _TENSORS)
        write_json(folder / f"{self.name}.json", {"layers": sorted(self.deltas)} | self._record())

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """Settings, examples and the change."""
        method = super().from_pretrained(path, base)
        record = read_json(path / f"{cls.name}.json")
        try:
            tensors = load_file(path / _TENSORS)
            # The same numbers as when they were made, or an undo would not lead back to the same weights.
            method.deltas = {n: (tensors.get(f"left.{n}"), tensors[f"right.{n}"]) for n in record["layers"]}
            method._load(record, tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not what byheart writes there ({first_line(error)})") from None
        return method


def changed_by(base: Base, deltas: Deltas) -> AbstractContextManager[None]:
    """The model with the deltas added to its matrices."""
    return changed((base.parts.blocks[layer].mlp_out, product(delta)) for layer, delta in deltas.items())


def product(delta: tuple[Tensor | None, Tensor]) -> Tensor:
    """Δ (d_model, d_ff) from its factors, in fp32 as it is kept."""
    left, right = delta
    return right.float() if left is None else left.float() @ right.float()


def stacked(one: Deltas, other: Deltas) -> Deltas:
    """The sum of two changes, as factors while that is smaller."""
    found: Deltas = {}
    for layer in sorted(one.keys() | other.keys()):
        parts = [delta for delta in (one.get(layer), other.get(layer)) if delta is not None]
        rank = sum(right.shape[0] for _, right in parts)
        if any(left is None or rank >= len(left) for left, _ in parts):
            found[layer] = None, torch.stack([product(delta) for delta in parts]).sum(0)
        else:
            found[layer] = (
                torch.cat([left for left, _ in parts if left is not None], 1),
                torch.cat([r for _, r in parts]),
            )
    return found
