"""Questions behind columns of keys and values, in batches and with gradients: what columns are learnt through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.blocks import Frozen
from byheart.kv import KV, length
from byheart.padding import right_padded
from byheart.parts import slides

# By layer, keys and values (rows, kv_heads, columns, head_dim).
Columns = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sample:
    """A question and an answer behind a past: their tokens, and the position of the first one."""

    past: tuple[KV, ...]
    asked: tuple[int, ...]
    answer: tuple[int, ...]
    start: int


def padded_pasts(base: Base, pasts: Sequence[Sequence[KV]]) -> tuple[Columns, Tensor]:
    """Pasts of different length as columns, with the padding in front, and their mask (rows, columns)."""
    counts = [length(past) for past in pasts]
    widest = max(counts)
    mask = torch.tensor([[0] * (widest - n) + [1] * n for n in counts], device=base.device)
    if not widest:
        return [], mask
    some = next(past for past in pasts if past)[0]
    columns: Columns = []
    for number in range(len(some.keys)):
        both = []
        for name in ("keys", "values"):
            heads, _, size = getattr(some, name)[number].shape
            there = torch.zeros((len(pasts), heads, widest, size), dtype=base.dtype, device=base.device)
            for n, past in enumerate(pasts):
                column = widest - counts[n]
                for one in past:
                    there[n, :, column : column + one.columns] = getattr(one, name)[number]
                    column += one.columns
            both.append(there)
        columns.append((both[0], both[1]))
    return columns, mask


def shared(kv: KV, rows: int) -> Columns:
    """One stretch as columns of so many rows, without a copy."""
    both = zip(kv.keys, kv.values, strict=True)
    return [(key[None].expand(rows, -1, -1, -1), value[None].expand(rows, -1, -1, -1)) for key, value in both]


def side_by_side(*parts: Columns) -> Columns:
    """Columns behind each other; empty ones count for nothing."""
    there = [part for part in parts if part]
    if len(there) < 2:
        return there[0] if there else []
    return [
        (torch.cat([key for key, _ in layer], 2), torch.cat([value for _, value in layer], 2))
        for layer in zip(*there, strict=True)
    ]


def split(columns: Columns, starts: Sequence[int]) -> list[KV]:
    """Each row of columns as a stretch of its own, from position ``start`` on."""
    count = columns[0][0].shape[2]
    return [
        KV(
            tuple(key[row].clone() for key, _ in columns),
            tuple(value[row].clone() for _, value in columns),
            start,
            start + count,
        )
        for row, start in enumerate(starts)
    ]


def cache_of(columns: Columns) -> Cache:
    """Columns as a cache that a forward reads and leaves as it is."""
    return Cache(layers=[Frozen(key, value) for key, value in columns])


def answer_logits(base: Base, first: Columns, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Logits (labels, vocabulary) where each answer token is to be predicted, and these tokens, row after row.

    Args:
        first: columns before each sample's own past, with gradients where they have some.
    """
    # A sliding window would count the padding between the first columns and a shorter past.
    if slides(base.model.config) and len({length(sample.past) for sample in samples}) > 1:
        alone = [
            answer_logits(base, [(key[n : n + 1], value[n : n + 1]) for key, value in first], [sample])
            for n, sample in enumerate(samples)
        ]
        return torch.cat([logits for logits, _ in alone]), torch.cat([labels for _, labels in alone])
    rows = [(*sample.asked, *sample.answer[:-1]) for sample in samples]
    ids, mask, places = right_padded(rows, base.device)
    own, seen = padded_pasts(base, [sample.past for sample in samples])
    before = first[0][0].shape[2] if first else 0
    starts = torch.tensor([sample.start for sample in samples], device=base.device)
    needed = max(sample.start + len(row) for sample, row in zip(samples, rows, strict=True))
    base.check_positions(needed, "a question to learn from with what stands before it needs")
    places = (places + starts[:, None]).clamp(max=needed - 1)  # what pads a short row stands nowhere
    at = [(n, len(s.asked) - 1 + place) for n, s in enumerate(samples) for place in range(len(s.answer))]
    row, column = torch.tensor(at, device=base.device).T
    kept, where = column.unique(return_inverse=True)
    with fast_attention(base.model):
        logits = base.model(
            input_ids=ids,
            attention_mask=torch.cat([seen.new_ones(len(samples), before), seen, mask], 1),
            position_ids=places,
            **base.behind(cache_of(side_by_side(first, own))),
            logits_to_keep=kept,
        ).logits
    label = torch.tensor([one for sample in samples for one in sample.answer], device=base.device)
    return logits[row, where], label
