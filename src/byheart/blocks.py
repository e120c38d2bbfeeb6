"""Run a stretch of a model's blocks again and again on other hidden states, with the arguments of one real forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from byheart.base import Base
from byheart.parts import slides
from byheart.surgery import idle, stopped_at

# Tokens that contexts must begin with alike to be read together.
_SHARED = 4


class _Grown(DynamicLayer):  # type: ignore[misc]
    """A layer that begins with keys and values that are there already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values


class Frozen(_Grown):
    """A layer's keys and values that are read and never added to: a forward leaves them as they were."""

    def update(  # noqa: D102 (transformers' own)
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    def take(self, rows: Tensor) -> Frozen:
        """The same of some rows."""
        return Frozen(self.keys[rows], self.values[rows])


def read_context(
    base: Base, ids: Tensor, mask: Tensor, places: Tensor, before: Cache | None = None, last: int | None = None
) -> Cache:
    """The keys and values of all blocks over left-padded ``ids`` (rows, n), frozen.

    Args:
        before: those of the columns before, of the same rows; ``mask`` covers them too.
        last: the last block to read; by default all are.
    """
    blocks = base.parts.blocks
    end = len(blocks) if last is None else last + 1
    # Plain layers, not the model's own choice: those of sliding windows would drop columns.
    if before is None:
        cache = Cache(layers=[DynamicLayer() for _ in blocks])
    else:
        cache = Cache(layers=[_Grown(layer.keys, layer.values) for layer in before.layers])
    with torch.no_grad(), stopped_at(blocks[end].module) if end < len(blocks) else nullcontext():
        base.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            **base.behind(cache),
            logits_to_keep=torch.tensor([ids.shape[1] - 1], device=ids.device),
        )
    return Cache(layers=[Frozen(layer.keys, layer.values) for layer in cache.layers[:end]])


def take_rows(cache: Cache, rows: Tensor) -> Cache:
    """Some rows of a frozen cache, each as often as it is named."""
    return Cache(layers=[layer.take(rows) for layer in cache.layers])


def repeated(cache: Cache, row: int, count: int) -> Cache:
    """One row of a frozen cache as ``count`` alike, without a copy."""
    return Cache(
        layers=[
            Frozen(*(one[row].expand(count, -1, -1, -1) for one in (layer.keys, layer.values)))
            for layer in cache.layers
        ]
    )


def shared_beginnings(
    base: Base, contexts: Sequence[tuple[int, ...]], least: int = 0
) -> tuple[list[tuple[int, ...]], list[int]]:
    """Token sequences that several contexts begin with, and for each context which of them (an empty one, maybe).

    Args:
        least: tokens that sharing a beginning must save.
    """
    by_start: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    # A sliding window counts columns, and the padding behind a shared beginning would use it up.
    for context in () if slides(base.model.config) else contexts:
        if len(context) >= _SHARED:
            by_start.setdefault(context[:_SHARED], []).append(context)
    found = []
    for some in by_start.values():
        if len(some) > 1:
            low, high = min(some), max(some)
            common = next(
                (n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high))
            )
            if common * (len(some) - 1) >= least:
                found.append(low[:common])
    beginnings = [*sorted(found, key=len, reverse=True), ()]
    return beginnings, [
        next(n for n, one in enumerate(beginnings) if context[: len(one)] == one) for context in contexts
    ]


class Stretch:
    """The calls that one forward made to the blocks ``first`` to ``last``, ready to be made again.

    A model's forward prepares masks, positions and rotations in its own way; its blocks are called here with exactly
    what it prepared, so nothing about any architecture needs to be known.

    Attributes:
        hidden: what block ``first`` was given, (rows, n, d_model).
    """

    def __init__(
        self, base: Base, ids: Tensor, mask: Tensor, places: Tensor, first: int, last: int, cache: Cache | None = None,
        hidden: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Read ``ids`` (rows, n).

        Args:
            mask: covers the columns of ``cache`` too.
            places: position ids.
            hidden: what block ``first`` is given, where it is known: no block is computed then. Else those below are.
        """
        self.parts, self.first, self.last = base.parts, first, last
        self.heads: int = getattr(base.model.config.get_text_config(), "num_attention_heads", 0)
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        found: list[Tensor] = []
        handles = []

        def keeper(number: int) -> Any:
            def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                kwargs = dict(kwargs)
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if number == first:
                    found.append(hidden)
                self._calls[number] = (args[1:], kwargs)

            return keep

        blocks = base.parts.blocks
        # How a block is called does not depend on what the others compute.
        unused = blocks if hidden is not None else blocks[first:]
        known = idle((b.module for b in unused), base.gives_tuples)
        try:
            for number in range(first, last + 1):
                handles.append(blocks[number].module.register_forward_pre_hook(keeper(number), with_kwargs=True))
            with torch.no_grad(), known, stopped_at(blocks[last].module):
                base.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=places,
                    **base.behind(cache),
                )
        finally:
            for handle in handles:
                handle.remove()
        self.hidden = found[0] if hidden is None else hidden

    def run(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """The output of block ``last`` for ``hidden`` (rows, n, d_model) at the input of block ``first``.

        ``hidden`` itself where ``last`` is below ``first``.
        """
        for number in range(first, last + 1):
            args, kwargs = self._calls[number]
            out = self.parts.blocks[number].module(hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, (tuple, list)) else out
        return hidden

    def take(self, rows: Tensor) -> Self:
        """The same calls for some of the rows."""
        count = len(self.hidden)
        caches: dict[int, Cache] = {}

        def taken(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.ndim == 3 and value.shape[1] == 1 and len(value) == count * self.heads:  # ALiBi's biases
                    return value.reshape(count, -1, *value.shape[1:])[rows].flatten(0, 1)
                return value[rows] if value.ndim and len(value) == count else value
            if isinstance(value, tuple):
                return tuple(taken(one) for one in value)
            if isinstance(value, Cache):
                if id(value) not in caches:
                    caches[id(value)] = take_rows(value, rows)
                return caches[id(value)]
            return value

        other = object.__new__(type(self))
        other.parts, other.first, other.last, other.heads = self.parts, self.first, self.last, self.heads
        other.hidden = self.hidden[rows]
        other._calls = {
            number: (taken(args), {name: taken(value) for name, value in kwargs.items()})
            for number, (args, kwargs) in self._calls.items()
        }
        return other
