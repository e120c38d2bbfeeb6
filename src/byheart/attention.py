"""Attention for inference on processors: plain matrix products over tiles that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_TILED, _REPLACED = "byheart_tiled", "byheart_replaced"
# Queries, keys, values, mask and scaling to what comes of them; see tiled_attention.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
# Score entries of a product done for all rows at once; above it, a row and head at a time.
_SMALL = 1 << 18


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None
) -> Tensor:
    """Softmax attention with grouped key/value heads, never repeating them.

    PyTorch's fused kernel takes up to twice as long (benchmarks/attention.py): it wants the keys repeated for every
    query head, and works in small blocks that leave the processor's bf16 units idle. The query heads of a group are
    stacked instead, and the products are as large as the cache allows.

    Args:
        query: (batch, heads, n, head_dim).
        key: (batch, kv_heads, m, head_dim); m >= n, the queries being its last positions.
        value: like ``key``.
        attention_mask: bool (batch or 1, 1, n, m), True where a query may look; None means causal.
        scaling: of the scores; by default head_dim ** -0.5.

    Returns:
        (batch, n, heads, head_dim).
    """
    batch, heads, n, dim = query.shape
    groups, m = key.shape[1], key.shape[2]
    stacked = query.reshape(batch, groups, heads // groups * n, dim) * (dim**-0.5 if scaling is None else scaling)
    if attention_mask is None:
        attention_mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)[None, None]
    blocked = ~attention_mask[..., :m]
    low = torch.finfo(query.dtype).min  # not -inf: a padded row that may look nowhere would become NaN and spread
    out = torch.empty_like(stacked)
    rows = max(1, _SMALL // (groups * stacked.shape[2] * m))  # that are done at once
    if torch.is_grad_enabled():  # writing into a given output has no gradient
        rows = batch
    if rows == 1 < batch:
        out = torch.empty_like(stacked)
        for row in range(batch):
            hidden = blocked[row if len(blocked) > 1 else 0]
            for group in range(groups):
                scores = stacked[row, group] @ key[row, group].T
                scores.view(-1, n, m).masked_fill_(hidden, low)
                torch.mm(scores.softmax(-1), value[row, group], out=out[row, group])
    else:
        parts = []
        for start in range(0, batch, rows):
            part = slice(start, start + rows)
            scores = (stacked[part] @ key[part].transpose(-1, -2)).view(-1, groups, heads // groups, n, m)
            scores.masked_fill_((blocked[part] if len(blocked) > 1 else blocked)[:, :, None], low)
            parts.append(scores.softmax(-1).flatten(2, 3) @ value[part])
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out.view(batch, heads, n, dim).transpose(1, 2).contiguous()


@contextmanager
def fast_attention(model: Any) -> Iterator[None]:
    """Let a model attend by :func:`tiled_attention` inside the block, where it runs on a CPU and would use sdpa."""
    if not replaceable(model) or model.device.type != "cpu":
        yield
        return
    with _attending(model, _TILED, tiled_attention):
        yield


@contextmanager
def replaced_attention(model: Any, attend: Attend) -> Iterator[None]:
    """Inside the block, let every layer attend by ``attend``: queries, keys, values, mask and scaling as above.

    A model that attends in a way of its own (capped scores, biases) is left alone: ``attend`` is never called.
    """
    if not replaceable(model):
        yield
        return
    with _attending(model, _REPLACED, attend):
        yield


def replaceable(model: Any) -> bool:
    """Whether a model attends in a way that another can stand in for."""
    return model.config._attn_implementation == "sdpa" and not model.config.is_encoder_decoder


@contextmanager
def _attending(model: Any, name: str, attend: Attend) -> Iterator[None]:
    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        return attend(query, key, value, mask, scaling), None

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
