"""Attention while reading on a CPU: byheart's tiles against transformers' sdpa, a layer of SmolLM2, one run."""

from __future__ import annotations

from functools import partial

import torch
from common import peak_memory, race
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from byheart.attention import tiled_attention

ROWS, HEADS, GROUPS, DIM, READ, SHARED, REPEATS = 9, 9, 3, 64, 220, 600, 5


def main() -> None:
    module = nn.Module()
    module.num_key_value_groups = HEADS // GROUPS  # type: ignore[assignment]
    total = SHARED + READ
    mask = torch.ones(READ, total, dtype=torch.bool).tril(SHARED).expand(ROWS, 1, READ, total)
    for dtype in (torch.bfloat16, torch.float32):
        query = torch.randn(ROWS, HEADS, READ, DIM, dtype=dtype)
        key, value = (torch.randn(ROWS, GROUPS, total, DIM, dtype=dtype) for _ in range(2))
        given = (query, key, value, mask)
        sdpa = partial(sdpa_attention_forward, module, *given)
        seconds = race(REPEATS, byheart=partial(tiled_attention, *given), sdpa=sdpa)
        ours, theirs = 1000 * seconds["byheart"], 1000 * seconds["sdpa"]
        print(
            f"attention: {ROWS} rows of {READ} tokens behind {SHARED}, {dtype}: byheart {ours:.0f} ms, "
            f"sdpa {theirs:.0f} ms, ratio {theirs / ours:.2f}x; {peak_memory()}"
        )


if __name__ == "__main__":
    main()
