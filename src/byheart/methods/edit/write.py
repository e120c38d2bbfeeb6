"""Targets into weights: layer after layer, each taking its share of what is still missing at the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.blocks import Stretch
from byheart.decode import READ_TOKENS, batches
from byheart.methods.edit import solve
from byheart.methods.edit.prompts import Prepared, Row
from byheart.methods.edit.weights import Deltas, product
from byheart.padding import left_padded
from byheart.surgery import add_to, observed

Constraint = Literal["none", "equality", "nullspace"]


@dataclass(frozen=True)
class WriteOptions:
    """How targets become weights.

    Attributes:
        weight: λ of the second moment, as a multiple of d_k (:func:`solve.regularizer`).
        spread: which share of the residual each layer takes.
        constraint: ``none`` is MEMIT's least squares; ``equality`` meets every target exactly (EMMET); ``nullspace``
            writes only where text does not look (AlphaEdit).
        energy: for ``nullspace``, the share of C's trace that stays untouched.
    """

    weight: float = 1.0
    spread: solve.Spread = "even"
    constraint: Constraint = "none"
    energy: float = 0.98


@dataclass(frozen=True)
class Written:
    """What writing came to.

    Attributes:
        deltas: by layer, in factors while there are fewer facts than d_model.
        keys: by layer, K (facts, d_ff), fp64.
    """

    deltas: Deltas
    keys: dict[int, Tensor]


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
    ) -> Written:
        """The changes after which the last layer's output at each fact's lookup token is near its target.

        The base is as before when this returns.

        Args:
            z: (facts, d_model), the targets.
            groups: facts of one group are written as one, with their mean key and mean residual (MEMIT-Merge).
            past: by layer, keys (facts, d_ff) whose values shall stay as they are.
        """
        merge = _merger(groups, len(prepared))
        deltas: Deltas = {}
        keys: dict[int, Tensor] = {}
        with fast_attention(self.base.model), torch.no_grad(), ExitStack() as attached:
            reader = Reader(self.base, prepared, self.layers[0], self.layers[-1])
            for place, layer in enumerate(self.layers):
                part = solve.share(self.options.spread, place, len(self.layers))
                keys[layer], values, reached = reader.read(layer)
                residuals = part * (z.double().cpu() - reached)
                norm = self.base.parts.blocks[layer].mlp_norm
                if norm is not None:
                    residuals = solve.before_norm(values, residuals, self._in_double(norm))
                before = past[layer].double() if past else keys[layer][:0]
                deltas[layer] = self._solve(layer, merge @ keys[layer], merge @ residuals, before)
                add_to(self.base.parts.blocks[layer].mlp_out, product(deltas[layer]), attached)
        return Written(deltas, keys)

    def _in_double(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        base = self.base
        return lambda values: norm(values.to(base.device, base.dtype)).double().cpu()

    def _solve(self, layer: int, keys: Tensor, residuals: Tensor, past: Tensor) -> tuple[Tensor | None, Tensor]:
        options = self.options
        if options.constraint == "nullspace":
            if layer not in self._projectors:
                self._projectors[layer] = solve.null_space(self.moments[layer], options.energy)
            return None, solve.projected(self._projectors[layer], past, keys, residuals, options.weight)
        if len(past):
            moment = solve.regularizer(self.moments[layer], options.weight) + past.T @ past
            if options.constraint == "equality":
                return _short(solve.equality(solve.cholesky(moment), keys, residuals))
            return None, solve.dense(moment, keys, residuals)
        how = solve.equality if options.constraint == "equality" else solve.woodbury
        return _short(how(self.factor(layer), keys, residuals))

    def factor(self, layer: int) -> Tensor:
        """The Cholesky factor of λC of a layer; made once."""
        if layer not in self._factors:
            self._factors[layer] = solve.cholesky(solve.regularizer(self.moments[layer], self.options.weight))
        return self._factors[layer]


def _short(factors: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Tensor]:
    left, right = factors
    return (None, left @ right) if left.shape[1] >= left.shape[0] else factors


def _merger(groups: Sequence[int] | None, facts: int) -> Tensor:
    """The matrix (groups, facts) that takes the mean over each group's facts."""
    if groups is None:
        return torch.eye(facts, dtype=torch.float64)
    numbers = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    merge = torch.zeros(len(numbers), facts, dtype=torch.float64)
    for fact, group in enumerate(groups):
        merge[numbers[group], fact] = 1
    return merge / merge.sum(1, keepdim=True)


class Reader:
    """Reads keys and states at lookup tokens from what the blocks below the first edited layer gave, once."""

    def __init__(self, base: Base, prepared: Sequence[Prepared], first: int, last: int) -> None:
        self.base, self.first, self.last, self.facts = base, first, last, len(prepared)
        # What follows the lookup token cannot reach it, so the rows end there.
        bare = [(fact, _until_lookup(one.rows[0])) for fact, one in enumerate(prepared)]
        behind = [(fact, _until_lookup(row)) for fact, one in enumerate(prepared) for row in one.rows[1:]]
        self.bare, self.behind = self._stretches(bare), self._stretches(behind)
        # Half for the bare prompt, half for all others; of one that stands alone, all.
        others = torch.tensor([len(one.rows) - 1 for one in prepared], dtype=torch.float64)
        self.bare_share = torch.where(others > 0, 0.5, 1.0)[:, None]
        self.other_share = (0.5 / others.clamp(min=1))[:, None]

    def _stretches(self, rows: list[tuple[int, tuple[int, ...]]]) -> list[tuple[Tensor, Stretch]]:
        limit = READ_TOKENS.get(self.base.device.type, READ_TOKENS["cuda"])
        made = []
        for batch in batches([len(ids) for _, ids in rows], lambda count, longest: count * longest <= limit):
            tokens = left_padded([rows[n][1] for n in batch], self.base.device)
            facts = torch.tensor([rows[n][0] for n in batch])
            made.append((facts, Stretch(self.base, *tokens, self.first, self.last)))
        return made

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (facts, d_ff) and values (facts, d_model) at ``layer``, and the last layer's output (facts, d_model).

        All at the lookup tokens, in fp64. A key is half that of the bare prompt and half the mean of those behind
        prefixes; values and outputs are those of the bare prompt.
        """
        parts = self.base.parts
        keys = torch.zeros(self.facts, parts.d_ff, dtype=torch.float64)
        values = torch.zeros(self.facts, parts.d_model, dtype=torch.float64)
        reached = torch.zeros_like(values)
        seen: dict[str, Tensor] = {}

        def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: object, output: Tensor) -> None:
            seen.update(key=args[0], value=output)

        def at_lookup(tensor: Tensor, rows: int) -> Tensor:
            # Some models flatten the batch on the way into their MLPs.
            return tensor.reshape(rows, -1, tensor.shape[-1])[:, -1].double().cpu()

        with observed([parts.blocks[layer].mlp_out], see):
            for facts, stretch in self.bare:
                hidden = stretch.run(stretch.hidden, self.first, self.last)
                keys[facts] = at_lookup(seen["key"], len(facts)) * self.bare_share[facts]
                values[facts] = at_lookup(seen["value"], len(facts))
                reached[facts] = at_lookup(hidden, len(facts))
            for facts, stretch in self.behind:
                stretch.run(stretch.hidden, self.first, layer)
                keys.index_add_(0, facts, at_lookup(seen["key"], len(facts)) * self.other_share[facts])
        return keys, values, reached


def _until_lookup(row: Row) -> tuple[int, ...]:
    return (*row.context, row.tail[0])
