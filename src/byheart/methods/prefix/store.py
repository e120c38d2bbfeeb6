"""Keys and values of passages on disk: a file a passage, whole or in eight bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from byheart.kv import KV
from byheart.storage import check_room, fingerprint, replacing

Precision = Literal["model", "int8"]
# Whether they are kept for good, or while something is trained.
_INSTEAD = "prefix.precision=int8, prefix.store=none, a smaller --k or fewer training questions"


@dataclass(frozen=True)
class Store:
    """A folder of passages' keys and values.

    Attributes:
        folder: where they are.
        precision: ``model`` (as the model computes them) or ``int8`` (a scale for each head's channel in keys, whose
            channels differ much in size, and for each column in values).
    """

    folder: Path
    precision: Precision = "model"

    def path(self, *marks: str) -> Path:
        """The file of one passage, by all that its keys and values depend on."""
        name = fingerprint(self.precision, *marks)
        return self.folder / name[:2] / f"{name}.safetensors"

    def put(self, path: Path, kv: KV) -> None:
        """Write by rename."""
        kept, about = self._packed(kv)
        with replacing(path) as temporary:
            save_file(kept, temporary, about)

    def _packed(self, kv: KV) -> tuple[dict[str, Tensor], dict[str, str]]:
        kept: dict[str, Tensor] = {}
        for number, (key, value) in enumerate(zip(kv.keys, kv.values, strict=True)):
            kept |= _packed(f"k{number}", key, 1, self.precision) | _packed(f"v{number}", value, 2, self.precision)
        return kept, {"start": str(kv.start), "end": str(kv.end), "layers": str(len(kv.keys))}

    def get(self, path: Path, like: Tensor) -> KV | None:
        """What was put there, on the device and in the type of ``like``; None where nothing whole is."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError):
            return None
        layers = range(int(about["layers"]))
        return KV(
            tuple(_unpacked(f"k{number}", found, like) for number in layers),
            tuple(_unpacked(f"v{number}", found, like) for number in layers),
            int(about["start"]),
            int(about["end"]),
        )

    def sizes(self, one: KV) -> tuple[int, int]:
        """What any passage takes on disk in bytes, and what each of its columns adds.

        Args:
            one: a column of the same model's.
        """
        keys, values = (tuple(torch.cat([x, x], 1) for x in some) for some in (one.keys, one.values))
        alone, two = (len(save(*self._packed(kv))) for kv in (one, KV(keys, values, one.start, one.end + 1)))
        return 2 * alone - two, two - alone

    def holds(self) -> bool:
        """Whether there is anything."""
        return any(self.folder.rglob("*.safetensors"))

    def check_room(self, needed: int) -> None:
        """See that so many bytes find room.

        Raises:
            DataError: where they would fill the disk.
        """
        check_room(self.folder, needed, "prefix: keys and values of passages", _INSTEAD)


def _packed(name: str, tensor: Tensor, along: int, precision: Precision) -> dict[str, Tensor]:
    """``tensor`` (heads, n, head_dim), or whole numbers and a scale for each slice along dimension ``along``."""
    tensor = tensor.detach().cpu().contiguous()
    if precision == "model":
        return {name: tensor}
    scale = tensor.float().abs().amax(along, keepdim=True).clamp(min=1e-12) / 127
    return {name: (tensor.float() / scale).round().to(torch.int8), f"{name}.scale": scale}


def _unpacked(name: str, found: dict[str, Tensor], like: Tensor) -> Tensor:
    scale = found.get(f"{name}.scale")
    return found[name].to(like) if scale is None else (found[name].float() * scale).to(like)
