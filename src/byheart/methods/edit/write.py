"""Targets into weights: layer after layer, each taking its share of what is still missing at the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from byheart.attention import fast_attention
from byheart.base import Base, for_device
from byheart.blocks import Stretch, read_context, repeated, shared_beginnings
from byheart.decode import batches
from byheart.methods.edit import solve
from byheart.methods.edit.prompts import Prepared, Row
from byheart.methods.edit.targets import BATCH_TOKENS
from byheart.methods.edit.weights import Deltas, product
from byheart.padding import left_padded
from byheart.surgery import add_to, observed

# Tokens that reading a beginning once must save; below it, a batch of its own costs more.
_LEAST = 256

Constraint = Literal["none", "equality", "nullspace"]


@dataclass(frozen=True)
class WriteOptions:
    """How targets become weights.

    Attributes:
        weight: λ of the second moment, as a multiple of d_k (:func:`solve.regularizer`).
        scatter: how much it counts that a fact's keys behind prefixes differ: 1 fits the residual at every one of them
            (least squares over all prompts), 0 at their mean alone (as published). Only with ``constraint=none``.
        others: how much it counts that the facts' prompts about other subjects (:func:`others.about_others`) keep what
            they have: all of a fact's together as a multiple of the fact itself. Only with ``constraint=none``.
        spread: which share of the residual each layer takes.
        constraint: ``none`` is MEMIT's least squares; ``equality`` meets every target exactly (EMMET); ``nullspace``
            writes only where text does not look (AlphaEdit).
        energy: for ``nullspace``, the share of C's trace that stays untouched.
        counted: a change that facts share counts in the solve as often as there are facts, against the same λC; else
            once. Under ``equality`` it is all the same.
    """

    weight: float = 0.7
    scatter: float = 1.0
    others: float = 1.0
    spread: solve.Spread = "even"
    constraint: Constraint = "none"
    energy: float = 0.98
    counted: bool = True


@dataclass(frozen=True)
class Written:
    """What writing came to.

    Attributes:
        deltas: by layer, in factors while there are fewer facts than d_model.
        keys: by layer, K (facts, d_ff), fp64.
        maps: by layer, A (facts, d_ff) with Δ = RᵀA for any residuals R, fp64; of groups where there are any.
        residuals: by layer, R (facts, d_model), fp64, or of groups: what is added at each key, shifts and all.
        sought: the same without shifts, as the targets say.
    """

    deltas: Deltas = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)
    residuals: dict[int, Tensor] = field(default_factory=dict)
    sought: dict[int, Tensor] = field(default_factory=dict)

    def shifted(self, shifts: Tensor, groups: Sequence[int] | None = None) -> Written:
        """The same keys and maps with residuals that are so much beyond what the targets say.

        Args:
            shifts: (facts, layers, d_model); of facts that are written as one their mean counts.
        """
        group, sizes = _numbered(groups, len(shifts))
        by_layer = dict(zip(self.sought, shifts.unbind(1), strict=True))
        residuals = {
            layer: sought + _means(by_layer[layer].to(sought), group, sizes) for layer, sought in self.sought.items()
        }
        deltas = {layer: _delta_of(one, self.maps[layer]) for layer, one in residuals.items()}
        return replace(self, residuals=residuals, deltas=deltas)


class Writer:
    """Writes facts into one base's MLPs; keeps the factors of C that do not change from one writing to the next."""

    def __init__(self, base: Base, moments: dict[int, Tensor], options: WriteOptions) -> None:
        self.base, self.options, self.moments = base, options, moments
        self.layers = sorted(moments)
        self._factors: dict[int, Tensor] = {}
        self._projectors: dict[int, Tensor] = {}

    def write(
        self,
        prepared: Sequence[Prepared],
        z: Tensor,
        groups: Sequence[int] | None = None,
        past: dict[int, Tensor] | None = None,
        others: Sequence[Sequence[Prepared]] = (),
    ) -> Written:
        """The changes after which the last layer's output at each fact's lookup token is near its target.

        The base is as before when this returns.

        Args:
            z: (facts, d_model), the targets.
            groups: facts of one group are written as one, with their mean key and mean residual (MEMIT-Merge).
            past: by layer, keys (facts, d_ff) whose values shall stay as they are.
            others: of each fact (empty: of none) others of which its prompt shall say what it says, in the measure of
                the option of that name.
        """
        group, sizes = _numbered(groups, len(prepared))
        written = Written()
        keys = written.keys
        with fast_attention(self.base.model), torch.no_grad(), ExitStack() as attached:
            reader = Reader(self.base, prepared, self.layers[0], self.layers[-1])
            # n copies of a group's key are as one key that is √n times as long.
            count = sizes if self.options.counted else torch.ones_like(sizes)
            scale = count.sqrt()[:, None]
            shares = (count / sizes)[group]
            weights = shares if self.options.scatter and self.options.constraint == "none" else None
            others = others or [()] * len(prepared)
            flat = [one for of_fact in others for one in of_fact]
            beside = Reader(self.base, flat, self.layers[0], self.layers[-1], keys_only=True) if flat else None
            each = [share / len(some) for share, some in zip(shares.tolist(), others, strict=True) for _ in some]
            held = self.options.others * torch.tensor(each, dtype=torch.float64)
            for place, layer in enumerate(self.layers):
                part = solve.share(self.options.spread, place, len(self.layers))
                keys[layer], values, reached, second = reader.read(layer, weights)
                residuals = part * (z.double().cpu() - reached)
                norm = self.base.parts.blocks[layer].mlp_norm
                if norm is not None:
                    residuals = solve.before_norm(values, residuals, self._in_double(norm))
                before = past[layer].double() if past else keys[layer][:0]
                key, residuals = scale * _means(keys[layer], group, sizes), _means(residuals, group, sizes)
                extra = [self.options.scatter * (second - key.T @ key)] if second is not None else []
                if beside and (kept := beside.read(layer, held)[3]) is not None:
                    extra.append(kept)
                into = scale * self._map(layer, key, before, extra)
                written.deltas[layer] = delta = _delta_of(residuals, into)
                add_to(self.base.parts.blocks[layer].mlp_out, product(delta), attached)
                written.residuals[layer] = written.sought[layer] = residuals
                written.maps[layer] = into
        return written

    def _in_double(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        base = self.base
        return lambda values: norm(values.to(base.device, base.dtype)).double().cpu()

    def _map(self, layer: int, keys: Tensor, past: Tensor, extra: Sequence[Tensor]) -> Tensor:
        """A (facts, d_ff) of keys, so that Δ = RᵀA: every solve is linear in R, so it is solved for the identity.

        Args:
            extra: what stands beside λC.
        """
        options = self.options
        if options.constraint == "nullspace":
            if layer not in self._projectors:
                self._projectors[layer] = solve.null_space(self.moments[layer], options.energy)
            projector = self._projectors[layer]
            return solve.projected(projector, self.moments[layer], past, keys, _one_each(keys), options.weight)
        if len(past):
            moment = solve.regularizer(self.moments[layer], options.weight) + past.T @ past
            if options.constraint == "equality":
                return _whole(solve.equality(solve.cholesky(moment), keys, _one_each(keys)))
            return solve.dense(sum(extra, moment), keys)
        if options.constraint == "equality":
            return _whole(solve.equality(self.factor(layer), keys, _one_each(keys)))
        if len(keys) > keys.shape[1]:  # a system of their width is the smaller one
            return solve.dense(sum(extra, solve.regularizer(self.moments[layer], options.weight)), keys)
        if extra:
            factor = solve.cholesky(sum(extra, solve.regularizer(self.moments[layer], options.weight)))
        else:
            factor = self.factor(layer)
        return _whole(solve.woodbury(factor, keys, _one_each(keys)))

    def factor(self, layer: int) -> Tensor:
        """The Cholesky factor of λC of a layer; made once."""
        if layer not in self._factors:
            self._factors[layer] = solve.cholesky(solve.regularizer(self.moments[layer], self.options.weight))
        return self._factors[layer]


def _one_each(keys: Tensor) -> Tensor:
    """The identity: each key's value by itself."""
    return torch.eye(len(keys), dtype=keys.dtype)


def _whole(factors: tuple[Tensor, Tensor]) -> Tensor:
    left, right = factors
    return left @ right


def _delta_of(residuals: Tensor, into: Tensor) -> tuple[Tensor | None, Tensor]:
    """Δ = RᵀA, as factors while there are fewer facts than d_model."""
    return (None, residuals.T @ into) if len(residuals) >= residuals.shape[1] else (residuals.T, into)


def _numbered(groups: Sequence[int] | None, facts: int) -> tuple[Tensor, Tensor]:
    """The number of each fact's group (facts,), in the order in which they come, and how many facts each has."""
    of = range(facts) if groups is None else groups
    numbers = {group: n for n, group in enumerate(dict.fromkeys(of))}
    group = torch.tensor([numbers[one] for one in of], dtype=torch.long)
    return group, group.bincount().double()


def _means(values: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
    """The mean over each group's rows.

    Args:
        values: (facts, width).
        groups: (facts,), the number of each fact's group.
        sizes: (groups,), how many facts each has.
    """
    return torch.zeros(len(sizes), values.shape[1], dtype=values.dtype).index_add(0, groups, values) / sizes[:, None]


class Reader:
    """Reads keys and states at lookup tokens, layer after layer upwards, each block as it is when it is first needed.

    Nothing is run twice: a layer is read from what the layers below gave, which are final by then.
    """

    def __init__(
        self, base: Base, prepared: Sequence[Prepared], first: int, last: int, *, keys_only: bool = False
    ) -> None:
        """Take blocks ``first`` to ``last``; with ``keys_only`` the last one's output is not wanted, and not right."""
        self.base, self.last, self.facts, self.keys_only = base, last, len(prepared), keys_only
        self._at = first  # the block whose inputs the stretches hold
        self.bare = self._batches([(fact, one.rows[0]) for fact, one in enumerate(prepared)])
        self.behind = self._batches([(fact, row) for fact, one in enumerate(prepared) for row in one.rows[1:]])
        # Half for the bare prompt, half for all others; of one that stands alone, all.
        others = torch.tensor([len(one.rows) - 1 for one in prepared], dtype=torch.float64)
        self.bare_share = torch.where(others > 0, 0.5, 1.0)[:, None]
        self.other_share = (0.5 / others.clamp(min=1))[:, None]

    def _batches(self, rows: list[tuple[int, Row]]) -> list[_Lookups]:
        beginnings, of_row = shared_beginnings(self.base, [row.context for _, row in rows], _LEAST)
        begun = _Beginnings(self.base, beginnings[:-1], self.last) if any(beginnings) else None
        limit = for_device(BATCH_TOKENS, self.base.device)
        made = []
        for number, beginning in enumerate(beginnings):
            # What follows the lookup token cannot reach it, so the rows end there.
            some = [
                (fact, (*row.context[len(beginning) :], row.tail[0]))
                for (fact, row), n in zip(rows, of_row, strict=True)
                if n == number
            ]
            for batch in batches([len(ids) for _, ids in some], lambda count, longest: count * longest <= limit):
                facts, ids = torch.tensor([some[n][0] for n in batch]), [some[n][1] for n in batch]
                behind = (begun, number) if begun and beginning else None
                made.append(_Lookups(self.base, facts, ids, behind, self._at, self.last))
        return made

    def read(self, layer: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys (facts, d_ff) and values (facts, d_model) at ``layer``, and the last layer's output (facts, d_model).

        Last comes, where ``weights`` (facts) are given, the sum of all prompts' k kᵀ (d_ff, d_ff), in those weights
        and the shares below. All at the lookup tokens, in fp64. A key is half that of the bare prompt and half the mean
        of those behind prefixes; values and outputs are those of the bare prompt. Layers below ``layer`` must not
        change any more.
        """
        parts = self.base.parts
        keys = torch.zeros(self.facts, parts.d_ff, dtype=torch.float64)
        values = torch.zeros(self.facts, parts.d_model, dtype=torch.float64)
        reached = torch.zeros_like(values)
        second = torch.zeros(parts.d_ff, parts.d_ff, dtype=torch.float64) if weights is not None else None
        seen: dict[str, Tensor] = {}

        def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: object, output: Tensor) -> None:
            seen.update(key=args[0], value=output)

        def at_lookup(tensor: Tensor, rows: int) -> Tensor:
            # Some models flatten the batch on the way into their MLPs.
            return tensor.reshape(rows, -1, tensor.shape[-1])[:, -1].double().cpu()

        if layer != self._at:  # nothing has changed before the first layer
            for begun in {one.begun for one in (*self.bare, *self.behind) if one.begun}:
                begun.read()
        with observed([parts.blocks[layer].mlp_out], see):
            for one in self.bare:
                hidden = one.run(self._at, layer, layer if self.keys_only else self.last)
                key, part = at_lookup(seen["key"], len(one.facts)), self.bare_share[one.facts]
                keys[one.facts] = key * part
                if second is not None and weights is not None:
                    second += (key * part * weights[one.facts, None]).T @ key
                values[one.facts] = at_lookup(seen["value"], len(one.facts))
                reached[one.facts] = at_lookup(hidden, len(one.facts))
            for one in self.behind:
                one.run(self._at, layer, layer)
                key, part = at_lookup(seen["key"], len(one.facts)), self.other_share[one.facts]
                keys.index_add_(0, one.facts, key * part)
                if second is not None and weights is not None:
                    second += (key * part * weights[one.facts, None]).T @ key
        self._at = layer
        return keys, values, reached, second


class _Beginnings:
    """What many prompts begin with: read once for all of them, and anew whenever a block has changed."""

    def __init__(self, base: Base, beginnings: Sequence[Sequence[int]], last: int) -> None:
        self._base, self._last = base, last
        self._ids, self.mask, self._places = left_padded(beginnings, base.device)
        self.read()

    def read(self) -> None:
        """Keys and values by the blocks as they are now."""
        self.cache = read_context(self._base, self._ids, self.mask, self._places, last=self._last)


class _Lookups:
    """A batch of prompts up to their lookup tokens, alone or all of them behind one beginning."""

    def __init__(
        self,
        base: Base,
        facts: Tensor,
        rows: Sequence[Sequence[int]],
        behind: tuple[_Beginnings, int] | None,
        first: int,
        last: int,
    ) -> None:
        self.facts = facts
        self.begun: _Beginnings | None = behind[0] if behind else None
        self._number = behind[1] if behind else 0
        ids, mask, places = left_padded(rows, base.device)
        self._cache = Cache(layers=[])
        if self.begun:
            before = self.begun.mask[self._number]
            mask = torch.cat([before.expand(len(mask), -1), mask], 1)
            places = places + before.sum()
            self._follow()
        self._stretch = Stretch(base, ids, mask, places, first, last, self._cache if self.begun else None)

    def _follow(self) -> None:
        if self.begun:
            self._cache.layers[:] = repeated(self.begun.cache, self._number, len(self.facts)).layers

    def run(self, at: int, layer: int, last: int) -> Tensor:
        """The output of block ``last``; what block ``layer`` is given is kept, from the inputs of block ``at``."""
        self._follow()
        stretch = self._stretch
        stretch.hidden = stretch.run(stretch.hidden, at, layer - 1)
        return stretch.run(stretch.hidden, layer, last)
