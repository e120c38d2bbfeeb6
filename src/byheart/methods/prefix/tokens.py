"""A column for each token of a passage, made of what a text encoder says of it; the model itself does not read it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from byheart import kv
from byheart.base import digest_of
from byheart.encoder import Encoder
from byheart.kv import KV, Rotation
from byheart.methods.prefix.cache import Block, Cache, Made
from byheart.methods.prefix.known import Sums, known_of
from byheart.progress import Progress, untold
from byheart.storage import SAVE_EVERY, replacing

# Passages that are fitted to at once.
_AT_ONCE = 16
# Keeps the map from going by what two things that are known share.
_RIDGE = 1e-3


class TokenHeads(nn.Module):
    """One linear map from what is known of a token to its keys and values in every block.

    Known are the model's own embeddings of it and of the token before it, and the encoder's states in its middle and at
    its top, where it stands. Keys are those that the token would have at position 0, where keys can be moved. The map
    stays as it is fitted; what training changes in it is of low rank.
    """

    def __init__(self, scale: Tensor, weight: Tensor, like: KV) -> None:
        """Take the size of each thing that is known, the map (known, keys and values of all blocks) and any column."""
        super().__init__()
        pairs = zip(like.keys, like.values, strict=True)
        self._heads = [(key.shape[0], key.shape[2], value.shape[2]) for key, value in pairs]
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None

    def loosen(self, rank: int, seed: int) -> None:
        """Let training change the map, by what is none at first (LoRA; Hu et al. 2022)."""
        known, out = self.weight.shape
        drawn = torch.randn(known, rank, generator=torch.Generator().manual_seed(seed)) / known**0.5
        self.down = nn.Parameter(drawn.to(self.scale.device))
        self.up = nn.Parameter(torch.zeros(rank, out, device=self.scale.device))

    def columns(self, known: Tensor, start: int, rotation: Rotation | None, dtype: torch.dtype) -> KV:
        """The columns of tokens of which ``known`` (n, known) is known, the first of them at position ``start``."""
        known = known / self.scale
        flat = known @ self.weight.to(known)
        if self.down is not None and self.up is not None:
            flat = flat + known @ self.down @ self.up
        keys: list[Tensor] = []
        values: list[Tensor] = []
        at = 0
        for heads, *sizes in self._heads:
            for into, size in zip((keys, values), sizes, strict=True):
                into.append(flat[:, at : at + heads * size].reshape(-1, heads, size).transpose(0, 1).contiguous())
                at += heads * size
        end = start + len(known)
        there = keys if rotation is None else rotation.turned(keys, torch.arange(start, end))
        return KV(tuple(one.to(dtype) for one in there), tuple(one.to(dtype) for one in values), start, end)


class Imitated(Made):
    """Passages in the columns that heads make for their tokens, at the place of the first passage."""

    def __init__(self, whole: Cache, heads: TokenHeads, encoder: Encoder) -> None:
        super().__init__(whole, digest_of(heads.state_dict().values()))
        self._heads, self._encoder = heads, encoder

    def fresh(self, passages: Sequence[Block]) -> list[KV]:
        """Columns of passages that are not on disk."""
        known = known_of(self.whole, self._encoder, passages)
        return [self._heads.columns(one, self.start, self.rotation, self.base.dtype) for one in known]


def fit_heads(
    whole: Cache,
    encoder: Encoder,
    passages: Sequence[Block],
    store: Path,
    progress: Progress = untold,
) -> TokenHeads:
    """Heads whose columns are, over the tokens of some passages, nearest to the model's own (least squares).

    Resumes from ``store``; its name must tell this fit from any other. ``progress`` is told of passages.
    """
    sums, done = _resume(store, whole.base.device)
    progress(done)
    saved = time.perf_counter()
    while some := passages[done : done + _AT_ONCE]:
        blocks = whole.encode(some, kept=False)
        sums.add(
            torch.cat(known_of(whole, encoder, some)), torch.cat([_flat(block, whole.rotation) for block in blocks])
        )
        done += len(some)
        progress(len(some))
        if time.perf_counter() - saved > SAVE_EVERY or done == len(passages):
            with replacing(store) as path:
                save_file({"known": sums.known, "wanted": sums.wanted}, path, {"passages": str(done)})
            saved = time.perf_counter()
    scale, weight = sums.solved(_RIDGE)
    return TokenHeads(scale.float(), weight.to(whole.base.dtype).contiguous(), kv.read(whole.base, [[0]])[0])


def _resume(store: Path, device: torch.device) -> tuple[Sums, int]:
    """What was summed, and over how many passages; nothing over 0 where there is no such file."""
    try:
        with safe_open(store, "pt", device=str(device)) as file:
            return Sums(file.get_tensor("known"), file.get_tensor("wanted")), int(file.metadata()["passages"])
    except (OSError, SafetensorError):
        return Sums(), 0


def _flat(block: KV, rotation: Rotation | None) -> Tensor:
    """A stretch's keys, turned back to position 0, and values, of all blocks (n, out), in fp32."""
    keys: Sequence[Tensor] = [key.float() for key in block.keys]
    if rotation is not None:
        keys = rotation.turned(keys, -torch.arange(block.start, block.end))
    both = zip(keys, block.values, strict=True)
    return torch.cat([one.float().transpose(0, 1).flatten(1) for pair in both for one in pair], 1)
