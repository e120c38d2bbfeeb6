"""Of a passage the few tokens that answers are most likely to stand in, as the model itself made them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byheart.base import digest_of
from byheart.encoder import Encoder
from byheart.kv import KV
from byheart.methods.prefix.cache import Block, Cache, Few
from byheart.methods.prefix.known import Sums, known_of, places_of
from byheart.segment import Passage

# Passages whose tokens are described at once.
_AT_ONCE = 16


class Likely(nn.Module):
    """Of what is known of a token (see :func:`known_of`), how likely it is part of an answer: a linear form."""

    def __init__(self, weight: Tensor) -> None:
        """Take the form (known,)."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, known: Tensor) -> Tensor:
        """The likelihoods (n,) of tokens of which ``known`` (n, known) is known; only their order means anything."""
        return known @ self.weight


class Selected(Few):
    """Passages in a few of their own columns, those of the tokens that answers are most likely to stand in.

    A token that stands there already says no more: of each the likeliest place is taken.
    """

    def __init__(self, whole: Cache, count: int, likely: Likely, encoder: Encoder) -> None:
        super().__init__(whole, count, f"selected, {digest_of(likely.state_dict().values())}")
        self._likely, self._encoder = likely, encoder

    def fresh(self, passages: Sequence[Block]) -> list[KV]:
        """Columns of passages that are not on disk."""
        known = known_of(self.whole, self._encoder, passages)
        blocks = self.whole.encode(passages, kept=True)
        return [self._of(*one) for one in zip(passages, blocks, known, strict=True)]

    def _of(self, passage: Block, block: KV, known: Tensor) -> KV:
        ids = self.whole.ids(passage)
        likeliest: dict[int, int] = {}
        for place in self._likely(known).argsort(descending=True, stable=True).tolist():
            likeliest.setdefault(ids[place], place)
        places = torch.tensor(sorted(list(likeliest.values())[: self._count]), device=block.keys[0].device)
        keys, values = (tuple(one[:, places] for one in kept) for kept in (block.keys, block.values))
        return KV(keys, values, block.start, block.end)


def fit_likely(whole: Cache, encoder: Encoder, answered: Sequence[tuple[Passage, Sequence[str]]]) -> Likely:
    """What tells the tokens of answers from others in passages that hold some (least squares on 1 and 0)."""
    sums = Sums()
    for n in range(0, len(answered), _AT_ONCE):
        some = answered[n : n + _AT_ONCE]
        known = torch.cat(known_of(whole, encoder, [passage for passage, _ in some]))
        inside = np.concatenate([_answered(whole, passage, answers) for passage, answers in some])
        sums.add(known, torch.from_numpy(inside).to(known)[:, None])
    scale, weight = sums.solved()
    return Likely((weight[:, 0] / scale).float().contiguous())


def _answered(whole: Cache, passage: Passage, answers: Sequence[str]) -> NDArray[np.bool_]:
    """Of each of a passage's tokens, whether it lies over an answer that stands there in whole words (n,)."""
    text, given = whole.form.block(passage), [re.escape(answer.strip()) for answer in answers if answer.strip()]
    found = [one.span() for text_of in given for one in re.finditer(rf"(?<!\w){text_of}(?!\w)", text, re.IGNORECASE)]
    places = places_of(whole, [text])[0][1]
    over = np.zeros(len(places), dtype=bool)
    for start, end in found:
        over |= (places[:, 0] < end) & (places[:, 1] > start)
    return over
