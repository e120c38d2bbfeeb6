"""A passage in a few columns: those whose attention comes nearest to that over all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache as Layers

from byheart.attention import replaced_attention, tiled_attention
from byheart.base import Base
from byheart.blocks import Frozen
from byheart.decode import token_ids
from byheart.errors import DataError
from byheart.kv import KV, joined
from byheart.methods.prefix.behind import shared
from byheart.methods.prefix.cache import Block, Cache, Few
from byheart.padding import right_padded

# What reads the passage again: its own words, so many tokens at a time, as if they were answers to these questions.
_QUESTIONS = ("who is {}", "when was {}", "where is {}", "what is {}", "how many {}", "{}")
_WINDOW = 8
# Of a question, the last tokens whose queries count; most of it is the same in every row.
_LAST = 4
# Steps of the fit, the first step size (in standard deviations of the keys), and rounds of clustering before it.
_STEPS, _RATE, _ROUNDS = 40, 0.1, 5
_RIDGE = 1e-3


class Compressed(Few):
    """Passages in a few columns each, fitted to their own keys and values behind the same beginning.

    Nothing is trained that passages share: each is read again in small pieces, as if they were answers, and per layer
    and head the columns are fitted whose attention gives these queries what the whole passage gives them.
    """

    def __init__(self, whole: Cache, count: int) -> None:
        super().__init__(
            whole, count, f"fitted upwards, {(_QUESTIONS, _WINDOW, _LAST, _STEPS, _RATE, _ROUNDS, _RIDGE)}"
        )

    def fresh(self, passages: Sequence[Block]) -> list[KV]:
        """Columns of passages that are not on disk."""
        return [self._fitted(passage) for passage in passages]

    def _fitted(self, passage: Block) -> KV:
        (block,) = self.whole.encode([passage], kept=True)
        if block.columns <= self._count:
            return block
        ids = self.whole.ids(passage)
        rows, leads = [], []
        for n, start in enumerate(range(0, len(ids), _WINDOW)):
            question = _QUESTIONS[n % len(_QUESTIONS)].format(getattr(passage, "title", "") or "it")
            lead = token_ids(self.base.tokenizer, self.form.pieces(question, (), None)[2], beginning=False)
            rows.append(lead + ids[start : start + _WINDOW])
            leads.append(max(0, len(lead) - _LAST))
        return fitted(self.base, self.head, block, rows, leads, self._count)


@dataclass(frozen=True)
class Looks:
    """What queries find in a passage and beside it; a row of the first dimension is one key/value head of one layer.

    Attributes:
        queries: (heads, n, head_dim), scaled as scores are.
        rest: (heads, n, head_dim), what they would be given were the passage not there.
        toward: (heads, n, head_dim), what the passage is to change in that.
        mass: (heads, n), the logarithm of the sum of exponents of scores beside the passage.
        weight: (heads, columns), how much each column of the passage is looked at.
    """

    queries: Tensor
    rest: Tensor
    toward: Tensor
    mass: Tensor
    weight: Tensor


@torch.no_grad()
def fitted(
    base: Base, head: KV | None, block: KV, rows: Sequence[Sequence[int]], leads: Sequence[int], count: int
) -> KV:
    """``count`` columns that give rows of tokens what ``block`` gives them; of each row the tokens from ``leads`` on.

    The rows are read twice side by side, behind the whole passage and behind the columns as far as they are fitted. So
    a layer is fitted to the queries that it will get, and makes up for what the layers below it missed.

    Raises:
        DataError: where the model's attention cannot be replaced.
    """
    ids, mask, places = right_padded(rows, base.device)
    used = mask.bool() & (places >= torch.tensor(leads, device=base.device)[:, None])
    past = block if head is None else joined([head, block])
    before, there, half = past.columns - block.columns, past.columns, len(rows)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, may: Tensor | None, scaling: float | None) -> Tensor:
        n = query.shape[2]
        if may is None:
            may = torch.ones(n, there + n, dtype=torch.bool, device=query.device).tril(there)[None, None]
        may = may.expand(2 * half, 1, n, -1)
        wanted = tiled_attention(query[:half], key[:half], value[:half], may[:half], scaling)
        query, key, value, may = query[half:], key[half:], value[half:], may[half:]
        seen = look(query, key, value, may, scaling, wanted, used, before, there)
        found = fit(seen, key[0, :, before:there].float(), value[0, :, before:there].float(), count)
        for into, made in zip((keys, values), found, strict=True):
            into.append(made.to(query.dtype))
        key, value = (
            torch.cat([whole[:, :, :before], made[-1].expand(half, -1, -1, -1), whole[:, :, there:]], 2)
            for whole, made in ((key, keys), (value, values))
        )
        may = torch.cat([may[..., : before + count], may[..., there:]], -1)
        return torch.cat([wanted, tiled_attention(query, key, value, may, scaling)])

    with replaced_attention(base.model, attend):
        base.model(
            input_ids=ids.repeat(2, 1),
            attention_mask=torch.cat([mask.new_ones(half, there), mask], 1).repeat(2, 1),
            position_ids=places.repeat(2, 1) + block.end,
            **base.behind(Layers(layers=[Frozen(key, value) for key, value in shared(past, 2 * half)])),
            logits_to_keep=torch.tensor([0], device=base.device),
        )
    if len(keys) != len(base.parts.blocks):
        raise DataError(f"{base.name}: its attention cannot be replaced, so that no passage can be compressed")
    return KV(tuple(keys), tuple(values), block.start, block.end)


def look(
    query: Tensor, key: Tensor, value: Tensor, may: Tensor, scaling: float | None, wanted: Tensor, used: Tensor,
    before: int, there: int,
) -> Looks:  # fmt: skip
    """How rows look back at a passage in one layer.

    Args:
        query, key, value, may, scaling: what the layer's attention gets, see
            :func:`byheart.attention.tiled_attention`; the passage is in the columns from ``before`` to ``there``, and
            what stands before it is the same in all rows.
        wanted: (rows, n, heads, head_dim), what is to come of it.
        used: (rows, n), the tokens that count.
    """
    rows, heads, n, dim = query.shape
    groups, low = key.shape[1], torch.finfo(torch.float32).min
    stacked = query.float().reshape(rows, groups, heads // groups, n, dim) * (dim**-0.5 if scaling is None else scaling)
    may = may[:, 0]

    def picked(states: Tensor) -> Tensor:  # (rows, groups, heads of a group, n, ...) -> (groups, picked, ...)
        return states.movedim(3, 1)[used].movedim(1, 0).flatten(1, 2)

    def attended(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return scores.softmax(-1) @ values.float(), scores.logsumexp(-1)

    own = stacked @ key[:, :, None, there:].float().transpose(-1, -2)
    own = own.masked_fill(~may[:, None, None, :, there:], low)
    by_own, own_mass = map(picked, attended(own, value[:, :, None, there:]))
    queries = picked(stacked)
    scores = queries @ key[0, :, :there].float().transpose(-1, -2)
    hidden = ~may[..., :there][used].repeat_interleave(heads // groups, 0)
    scores = scores.masked_fill(hidden, low)
    by_head, head_mass = attended(scores[..., :before], value[0, :, :before])
    share = (head_mass - own_mass).sigmoid()[..., None]
    rest, mass = share * by_head + (1 - share) * by_own, torch.logaddexp(head_mass, own_mass)
    inside = scores[..., before:]
    share = (inside.logsumexp(-1) - mass).sigmoid()[..., None]
    weight = (inside.softmax(-1) * share).square().sum(1)
    toward = picked(wanted.float().movedim(1, 2).reshape(rows, groups, heads // groups, n, dim)) - rest
    return Looks(queries, rest, toward, mass, weight)


@torch.no_grad()
def fit(seen: Looks, keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` keys and values whose attention comes nearest to what a passage's own change.

    Each query's attention is one softmax over the columns and, as one more entry, all that stands beside the passage,
    so that columns have to hold the passage's share, too. For given keys the best values are a linear regression. Keys
    begin as centres of clusters, weighted by how much they are looked at, and follow the gradient with the values that
    are best for them (variable projection; Golub and Pereyra 1973, with the gradient of Kaufman 1975).

    Args:
        keys, values: (heads, columns, head_dim), in float32.
    """
    begin, chosen = _clusters(keys, values, seen.weight, count)
    spread = keys.std((1, 2), keepdim=True)
    moved = nn.Parameter(torch.zeros_like(begin))
    optimizer = torch.optim.Adam([moved], lr=_RATE)
    size = seen.toward.square().mean((1, 2), keepdim=True) + 1e-12
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        now = begin + moved * spread
        given = _given(seen, now)
        moved.grad = _slope(seen, given, _best_values(seen, given, chosen)) * spread / size
        optimizer.step()
    now = begin + moved * spread
    return now.detach(), _best_values(seen, _given(seen, now), chosen)


def error(seen: Looks, keys: Tensor, values: Tensor) -> Tensor:
    """By head, the squared length of what columns miss of what the passage changes, as a share of that."""
    given = _given(seen, keys)
    return _missed(seen, given, values).square().sum((1, 2)) / seen.toward.square().sum((1, 2)).clamp(min=1e-12)


def _given(seen: Looks, keys: Tensor) -> Tensor:
    """The attention that each query gives to each column (heads, n, columns); the rest of 1 goes elsewhere."""
    scores = seen.queries @ keys.transpose(-1, -2)
    return torch.cat([scores, seen.mass[..., None]], -1).softmax(-1)[..., :-1]


def _missed(seen: Looks, given: Tensor, values: Tensor) -> Tensor:
    return given @ values - given.sum(-1, keepdim=True) * seen.rest - seen.toward


def _slope(seen: Looks, given: Tensor, values: Tensor) -> Tensor:
    """The gradient of half the squared error in the keys, for values that stay."""
    missed = _missed(seen, given, values)
    up = missed @ values.transpose(-1, -2) - (missed * seen.rest).sum(-1, keepdim=True)
    up = given * (up - (given * up).sum(-1, keepdim=True))
    return up.transpose(-1, -2) @ seen.queries


def _best_values(seen: Looks, given: Tensor, chosen: Tensor) -> Tensor:
    """The values with the least squared error; columns that nothing looks at stay with the ``chosen`` ones."""
    across = given.transpose(-1, -2)
    wanted = across @ seen.toward + (across * given.sum(-1)[:, None]) @ seen.rest
    gram = across @ given
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-8
    gram = gram + ridge * torch.eye(given.shape[-1], device=given.device)
    best: Tensor = torch.linalg.solve(gram, wanted + ridge * chosen)
    return best


def _clusters(keys: Tensor, values: Tensor, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres of the keys (k-means from those that are looked at most), and the values of those."""
    weight = weight + 1e-12
    first = weight.topk(count, -1).indices[..., None]
    centres = keys.gather(1, first.expand(-1, -1, keys.shape[-1]))
    for _ in range(_ROUNDS):
        near = functional.one_hot(torch.cdist(keys, centres).argmin(-1), count) * weight[..., None]
        total = near.sum(1)[..., None]
        centres = torch.where(total > 0, near.transpose(-1, -2) @ keys / total.clamp(min=1e-30), centres)
    return centres, values.gather(1, first.expand(-1, -1, values.shape[-1]))
