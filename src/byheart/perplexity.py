"""Perplexity of rows of ordinary text: how well a model still writes, whatever was done to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.padding import right_padded

# Of ordinary text, what a run measures on.
TOKENS = 8_192
_ROWS = 8


def perplexity(base: Base, rows: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-probability of a token given those before it in its row, over all rows."""
    total, count = 0.0, 0
    with torch.inference_mode(), fast_attention(base.model):
        for start in range(0, len(rows), _ROWS):
            some = [list(row) for row in rows[start : start + _ROWS] if len(row) > 1]
            if not some:
                continue
            ids, mask, _ = right_padded(some, base.device)
            logits = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            real = mask[:, 1:].bool()
            logprobs = logits[real].float().log_softmax(-1).gather(1, ids[:, 1:][real][:, None])
            total -= logprobs.double().sum().item()
            count += int(real.sum())
    return math.exp(total / count) if count else math.nan
