"""Learnt keys and values that stand before everything a question sees (prefix-tuning; Li and Liang 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.blocks import Frozen
from byheart.errors import DataError
from byheart.kv import KV, length
from byheart.losses import token_loss
from byheart.padding import right_padded


class Slots(nn.Module):
    """``n`` columns of keys and values for every block, in fp32, at the positions from 0 on.

    They begin as keys and values that the model itself made of a text: random ones take far longer, and some never
    recover (Li and Liang 2021, section 7.4; Eyuboglu et al. 2025).
    """

    def __init__(self, begin: KV) -> None:
        super().__init__()
        self.keys = nn.ParameterList(one.detach().float().clone() for one in begin.keys)
        self.values = nn.ParameterList(one.detach().float().clone() for one in begin.values)

    def __len__(self) -> int:
        """How many columns there are."""
        return int(self.keys[0].shape[1])

    def kv(self, dtype: torch.dtype) -> KV:
        """As the model takes them; gradients reach the parameters."""
        return KV(tuple(one.to(dtype) for one in self.keys), tuple(one.to(dtype) for one in self.values), 0, len(self))


def chosen_columns(source: KV, count: int) -> KV:
    """``count`` of a text's columns: the first, which models use as a sink, and others evenly through the rest.

    Raises:
        DataError: where the text has fewer.
    """
    if count > source.columns:
        raise DataError(f"prefix.slots={count}: the text that they begin as has only {source.columns} tokens")
    places = torch.linspace(0, source.columns - 1, count).round().long()
    places = places.to(source.keys[0].device)
    return KV(tuple(k[:, places] for k in source.keys), tuple(v[:, places] for v in source.values), 0, len(places))


@dataclass(frozen=True)
class Sample:
    """A question behind its passage: ``past`` without the slots, the question's tokens, the answer's tokens."""

    past: tuple[KV, ...]
    asked: tuple[int, ...]
    answer: tuple[int, ...]


def answer_loss(base: Base, slots: Slots, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """-log p of every answer token (labels) behind the slots, and whether it is the likeliest.

    Gradients reach the slots.
    """
    first = slots.kv(base.dtype)
    rows = [(*sample.asked, *sample.answer[:-1]) for sample in samples]
    ids, mask, places = right_padded(rows, base.device)
    columns = [length(sample.past) for sample in samples]
    widest = max(columns)
    before = torch.tensor(
        [[1] * first.columns + [0] * (widest - n) + [1] * n for n in columns], device=base.device, dtype=mask.dtype
    )
    starts = torch.tensor([(sample.past or (first,))[-1].end for sample in samples], device=base.device)
    layers = []
    for number, (key, value) in enumerate(zip(first.keys, first.values, strict=True)):
        both = []
        for own, name in ((key, "keys"), (value, "values")):
            shape = (len(samples), own.shape[0], widest, own.shape[2])
            there = torch.zeros(shape, dtype=base.dtype, device=base.device)
            for n, sample in enumerate(samples):
                column = widest - columns[n]
                for one in sample.past:
                    there[n, :, column : column + one.columns] = getattr(one, name)[number]
                    column += one.columns
            both.append(torch.cat([own[None].expand(len(samples), -1, -1, -1), there], 2))
        layers.append(Frozen(*both))
    at = [(n, len(s.asked) - 1 + place) for n, s in enumerate(samples) for place in range(len(s.answer))]
    row, column = torch.tensor(at, device=base.device).T
    kept, where = column.unique(return_inverse=True)
    with fast_attention(base.model):
        logits = base.model(
            input_ids=ids,
            attention_mask=torch.cat([before, mask], 1),
            position_ids=places + starts[:, None],
            past_key_values=Cache(layers=layers),
            use_cache=True,
            logits_to_keep=kept,
        ).logits
    label = torch.tensor([one for sample in samples for one in sample.answer], device=base.device)
    return token_loss(logits[row, where], label, base.wide)
