"""A passage in a few columns: the keys and values of learnt marks that the frozen model reads behind it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache as Layers

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.blocks import Frozen
from byheart.decode import batches, token_ids
from byheart.kv import KV
from byheart.methods.prefix.behind import Columns, padded_pasts, split
from byheart.methods.prefix.cache import Block, Cache, Few
from byheart.surgery import altered

# What the marks begin as: a text after which a language model says what it has read.
_BEGIN = "\n\nIn short, what the text says about who, what, when, where and how many:"
# Columns read at once.
_READ = 4_096


class _Noted(Frozen):
    """A layer that is read and never added to, and remembers what was to be added."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.noted = (key_states, value_states)
        return super().update(key_states, value_states)


class Compressor(nn.Module):
    """``n`` marks that are read behind a passage as if they were tokens (Mu et al. 2023, gist tokens).

    The model stays frozen; learnt are the marks' embeddings (n, d_model), and what is added to their hidden states
    behind every block but the last (blocks - 1, n, d_model), zero at first. At the start the columns are those of a
    real text.
    """

    def __init__(self, base: Base, count: int) -> None:
        super().__init__()
        ids = token_ids(base.tokenizer, _BEGIN, beginning=False)
        some = torch.tensor([ids[n % len(ids)] for n in range(count)], device=base.device)
        with torch.no_grad():
            embedded = base.parts.embeddings(some).float()
        self.marks = nn.Parameter(embedded.clone())
        self.steer = nn.Parameter(torch.zeros(len(base.parts.blocks) - 1, *embedded.shape, device=base.device))

    def __len__(self) -> int:
        """How many columns a passage gets."""
        return int(self.marks.shape[0])

    def read(self, base: Base, pasts: Sequence[Sequence[KV]]) -> Columns:
        """The marks' columns, (rows, kv_heads, n, head_dim) a layer, behind each past; they begin where it ends."""
        there, seen = padded_pasts(base, pasts)
        layers = [_Noted(key, value) for key, value in there]
        starts = torch.tensor([past[-1].end for past in pasts], device=base.device)
        with ExitStack() as stack:
            stack.enter_context(fast_attention(base.model))
            for block, steer in zip(base.parts.blocks, self.steer, strict=False):
                stack.enter_context(altered(block.module, steer.to(base.dtype).add))
            base.model(
                inputs_embeds=self.marks.to(base.dtype)[None].expand(len(pasts), -1, -1),
                attention_mask=torch.cat([seen, seen.new_ones(len(pasts), len(self))], 1),
                position_ids=torch.arange(len(self), device=base.device)[None] + starts[:, None],
                past_key_values=Layers(layers=layers),
                use_cache=True,
                logits_to_keep=torch.tensor([0], device=base.device),
            )
        return [layer.noted for layer in layers]


class Compressed(Few):
    """Passages in a few columns each, made from their keys and values behind the same beginning."""

    def __init__(self, whole: Cache, compressor: Compressor) -> None:
        super().__init__(whole, compressor, len(compressor))
        self._compressor = compressor

    def fresh(self, passages: Sequence[Block]) -> list[KV]:
        """Columns of passages that are not on disk."""
        found: dict[int, KV] = {}
        lengths = [self.whole.columns(passage) for passage in passages]
        head = 0 if self.head is None else self.head.columns
        for batch in batches(lengths, lambda count, longest: count * (longest + head) <= _READ):
            blocks = self.whole.encode([passages[n] for n in batch], kept=False)
            pasts = [self.whole.past([], [block]) for block in blocks]
            with torch.no_grad():
                columns = self._compressor.read(self.base, pasts)
            found |= zip(batch, split(columns, [block.end for block in blocks]), strict=True)
        return [found[n] for n in range(len(passages))]
