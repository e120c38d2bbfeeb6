"""A passage in a few columns that a text encoder's heads emit for every block (a knowledge encoder)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from byheart.base import Base, digest_of
from byheart.decode import batches
from byheart.encoder import Encoder
from byheart.kv import KV
from byheart.methods.prefix.behind import Columns, split
from byheart.methods.prefix.cache import Block, Cache, Few
from byheart.methods.prefix.slots import Slots
from byheart.prompt import PromptFormat
from byheart.retrieve import searchable
from byheart.segment import Passage

ATTENTION_HEADS = 4
# Tokens read at once.
_READ = 4_096


class Heads(nn.Module):
    """``n`` queries look at a passage's token states; heads make keys and values for every block of what they find.

    A column is one of real text plus, times a gate that is zero at first, what the heads say, scaled to the length of
    that real column. So training begins at the base model behind a text that it knows, and not at noise in its cache.
    """

    def __init__(self, begin: KV, dim: int, width: int, seed: int, text: nn.Module | None = None) -> None:
        """Take the columns of real text, the width of the encoder's states and what weights are drawn from.

        Args:
            width: of what all blocks' heads read: a head from the encoder's states to every block at once would be far
                larger.
            text: a copy of the encoder's model that is trained along; None where the encoder stays as it is.
        """
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.queries = nn.Parameter(torch.randn(begin.columns, width))
            self.inward = nn.Linear(dim, width)
            self.look = nn.MultiheadAttention(width, ATTENTION_HEADS, batch_first=True)
            self.norm = nn.LayerNorm(width)
            self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            pairs = zip(begin.keys, begin.values, strict=True)
            self.out = nn.ModuleList(
                nn.Linear(width, key.shape[0] * (key.shape[2] + value.shape[2])) for key, value in pairs
            )
        self.gates = nn.Parameter(torch.zeros(len(begin.keys), 2))
        self.real = Slots(begin)
        self.text = text
        self.to(begin.keys[0].device)

    def __len__(self) -> int:
        """How many columns a passage gets."""
        return int(self.queries.shape[0])

    def find(self, states: Tensor, mask: Tensor) -> Tensor:
        """What the queries find (rows, n, width) in token states (rows, tokens, dim) with their mask."""
        inside = self.inward(states.float())
        asked = self.queries[None].expand(len(states), -1, -1)
        seen, _ = self.look(asked, inside, inside, key_padding_mask=~mask.bool(), need_weights=False)
        seen = seen + asked
        found: Tensor = seen + self.mix(self.norm(seen))
        return found

    def columns(self, found: Tensor, dtype: torch.dtype) -> Columns:
        """Columns (rows, kv_heads, n, head_dim) a layer, from what was found."""
        columns: Columns = []
        for out, gate, key, value in zip(self.out, self.gates, self.real.keys, self.real.values, strict=True):
            heads, _, size = key.shape
            both = out(found).unflatten(-1, (heads, -1)).transpose(1, 2)  # (rows, heads, n, key and value)
            made = (
                real + part * _unit(said) * real.norm(dim=-1, keepdim=True)
                for real, said, part in ((key, both[..., :size], gate[0]), (value, both[..., size:], gate[1]))
            )
            one, two = (tensor.to(dtype) for tensor in made)
            columns.append((one, two))
        return columns


def _unit(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors, dim=-1)


class Emitted(Few):
    """Passages in the columns that heads emit for them, at the place of the first passage."""

    def __init__(self, whole: Cache, heads: Heads, encoder: Encoder) -> None:
        super().__init__(whole, len(heads), digest_of(heads.state_dict().values()))
        self._heads, self._encoder = heads, encoder

    def fresh(self, passages: Sequence[Block]) -> list[KV]:
        """Columns of passages that are not on disk."""
        found: dict[int, KV] = {}
        lengths = [self._encoder.tokens(_text(passage)) for passage in passages]
        for batch in batches(lengths, lambda count, longest: count * longest <= _READ):
            with torch.no_grad():
                columns = emitted(self.base, self._heads, self._encoder, [passages[n] for n in batch])
            found |= zip(batch, split(columns, [self.start] * len(batch)), strict=True)
        return [found[n] for n in range(len(passages))]


def _text(one: Block) -> str:
    return searchable(one) if isinstance(one, Passage) else PromptFormat.block(one)


def emitted(base: Base, heads: Heads, encoder: Encoder, passages: Sequence[Block]) -> Columns:
    """The heads' columns for passages, with gradients to the heads."""
    return heads.columns(looked_up(heads, encoder, passages), base.dtype)


def looked_up(heads: Heads, encoder: Encoder, passages: Sequence[Block]) -> Tensor:
    """What the heads' queries find in passages (rows, n, width), with gradients to the heads."""
    texts = [_text(passage) for passage in passages]
    if heads.text is not None:
        return heads.find(*replace(encoder, model=heads.text).states(texts))
    with torch.no_grad():
        states, mask = encoder.states(texts)
    return heads.find(states, mask)
