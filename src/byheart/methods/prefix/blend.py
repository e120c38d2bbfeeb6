"""A small share of several passages' tokens, read again with all passages in sight (CacheBlend; Yao et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.kv import KV, begun, joined
from byheart.surgery import stopped_at

# Where a token's keys and values moved most in the second block, they do above it, too (section 4 there).
_LOOKS_AT = 1
# So many blocks a model must have: the one behind is where that reading stops.
BLENDED = _LOOKS_AT + 2


class _Scattered(DynamicLayer):  # type: ignore[misc]
    """A layer whose new keys and values take the place of old ones instead of standing behind them."""

    def __init__(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self._columns = keys[None].clone(), values[None].clone(), columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self._columns], self.values[:, :, self._columns] = key_states, value_states
        return self.keys, self.values


def blended(base: Base, head: KV | None, blocks: Sequence[KV], ids: Sequence[Sequence[int]], share: float) -> KV:
    """All blocks as one, with the tokens that the other blocks change most read again; no model with sliding windows.

    Args:
        blocks: each read alone behind ``head``, and placed one behind the other.
        ids: their tokens.
        share: of the tokens behind the first block, which needs no second reading.
    """
    whole = joined(blocks)
    first = blocks[0].columns
    count = round(share * (whole.columns - first))
    if count == 0:
        return whole
    tokens = torch.tensor([[one for row in ids for one in row]], device=base.device)
    before = 0 if head is None else head.columns
    old = whole if head is None else joined([head, whole])
    moved = _moved(base, head, tokens, whole)
    moved[:first] = 0
    chosen = moved.topk(count).indices.sort().values
    columns = chosen + before
    layers = [_Scattered(key, value, columns) for key, value in zip(old.keys, old.values, strict=True)]
    seen = (torch.arange(old.columns, device=base.device)[None] <= columns[:, None])[None, None]
    if base.model.config._attn_implementation == "eager":  # it adds its mask
        seen = torch.zeros(seen.shape, dtype=base.dtype, device=base.device).masked_fill_(
            ~seen, torch.finfo(base.dtype).min
        )
    with torch.inference_mode(), fast_attention(base.model):
        base.model(
            input_ids=tokens[:, chosen],
            attention_mask=seen,
            position_ids=(chosen + whole.start)[None],
            **base.behind(Cache(layers=layers)),
            logits_to_keep=torch.tensor([0], device=base.device),
        )
    return KV(
        tuple(layer.keys[0, :, before:] for layer in layers),
        tuple(layer.values[0, :, before:] for layer in layers),
        whole.start,
        whole.end,
    )


def _moved(base: Base, head: KV | None, tokens: Tensor, stale: KV) -> Tensor:
    """How far each token's keys and values are, in one low block, from those of a reading in one go (squared)."""
    blocks = base.parts.blocks
    cache = begun(base, head)
    before = 0 if head is None else head.columns
    places = torch.arange(stale.start, stale.start + tokens.shape[1], device=base.device)[None]
    with torch.inference_mode(), fast_attention(base.model), stopped_at(blocks[_LOOKS_AT + 1].module):
        base.model(input_ids=tokens, position_ids=places, **base.behind(cache))
    layer = cache.layers[_LOOKS_AT]
    both = ((layer.keys, stale.keys), (layer.values, stale.values))
    return sum(((new[0, :, before:] - old[_LOOKS_AT]).float() ** 2).sum((0, 2)) for new, old in both)  # type: ignore
