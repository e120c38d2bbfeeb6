"""Keys and values of a stretch of text: read from a model, moved to another place, proved before they are trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.errors import DataError
from byheart.padding import right_padded
from byheart.surgery import observed

_PROBE = 12


@dataclass(frozen=True)
class KV:
    """Keys and values of one stretch of text (or of what stands for one), for every block of a decoder.

    Shapes are those that the model's own cache has, layer by layer: models group heads, choose odd head sizes, and
    differ from layer to layer.

    Attributes:
        keys, values: one (kv_heads, n, head_dim) a layer.
        start: the position of the first column.
        end: the position of what comes next; ``end - start`` may differ from n where columns stand for a longer text.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    start: int
    end: int

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.keys[0].shape[1]

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(one.numel() * one.element_size() for one in (*self.keys, *self.values))


def length(past: Sequence[KV]) -> int:
    """How many columns some stretches have together."""
    return sum(one.columns for one in past)


def joined(blocks: Sequence[KV]) -> KV:
    """Stretches that stand behind each other as one."""
    return KV(
        tuple(torch.cat(some, 1) for some in zip(*(one.keys for one in blocks), strict=True)),
        tuple(torch.cat(some, 1) for some in zip(*(one.values for one in blocks), strict=True)),
        blocks[0].start,
        blocks[-1].end,
    )


def begun(base: Base, head: KV | None, rows: int = 1) -> Cache:
    """A cache for so many rows that begins with ``head``, and grows."""
    # Plain layers, not the model's own choice: those of sliding windows would drop columns.
    cache = Cache(layers=[DynamicLayer() for _ in base.parts.blocks])
    if head is not None:
        for number, (key, value) in enumerate(zip(head.keys, head.values, strict=True)):
            cache.update(*(one[None].expand(rows, -1, -1, -1) for one in (key, value)), number)
    return cache


def read(base: Base, rows: Sequence[Sequence[int]], head: KV | None = None, start: int | None = None) -> list[KV]:
    """Keys and values of each row of tokens, read behind ``head`` and without the other rows.

    Args:
        head: what all rows look back at.
        start: the position of their first tokens; by default right behind the head.

    Raises:
        DataError: where the model has fewer positions.
    """
    if not rows:
        return []
    start = (0 if head is None else head.end) if start is None else start
    longest = max(map(len, rows))
    base.check_positions(start + longest, f"{longest} tokens from position {start} on need")
    ids, mask, places = right_padded(rows, base.device)
    before = 0 if head is None else head.columns
    cache = begun(base, head, len(rows))
    with torch.inference_mode(), fast_attention(base.model):
        base.model(
            input_ids=ids,
            attention_mask=torch.cat([mask.new_ones(len(rows), before), mask], 1),
            position_ids=places + start,
            **base.behind(cache),
            logits_to_keep=torch.tensor([0], device=ids.device),
        )
    return [
        KV(
            tuple(layer.keys[n, :, before : before + len(row)].clone() for layer in cache.layers),
            tuple(layer.values[n, :, before : before + len(row)].clone() for layer in cache.layers),
            start,
            start + len(row),
        )
        for n, row in enumerate(rows)
    ]


class Rotation:
    """Moves keys to other positions, in models that turn them by angles that grow with the position (RoPE).

    Nothing is taken from the configuration: the module that gives the model its cosines and sines is found in one
    forward, by what the blocks are handed, and asked again. Whether the result is right is for :func:`check` to say.
    """

    def __init__(self, base: Base) -> None:
        """Find the angles.

        Raises:
            DataError: where the blocks are handed none: the model keeps positions elsewhere.
        """
        self._calls = _rotary_calls(base)
        if any(call is None for call in self._calls):
            raise DataError(f"{base.name}: its attention is handed no rotary angles, so that keys cannot be moved")

    def moved(self, kv: KV, start: int) -> KV:
        """The same stretch as if it began at position ``start``."""
        by = start - kv.start
        if by == 0:
            return kv
        return replace(kv, keys=self.turned(kv.keys, torch.tensor([by])), start=start, end=kv.end + by)

    def turned(self, keys: Sequence[Tensor], by: Tensor) -> tuple[Tensor, ...]:
        """Keys (kv_heads, n, head_dim) of every block, turned by so many positions: one number for all, or (n)."""
        turns: dict[int, tuple[Tensor, Tensor]] = {}
        found = []
        for key, call in zip(keys, self._calls, strict=True):
            assert call is not None
            if id(call) not in turns:
                turns[id(call)] = call.turn(by.to(key.device))
            found.append(_turned(key, *turns[id(call)]))
        return tuple(found)


@dataclass(frozen=True)
class _RotaryCall:
    """The call of a rotary module, ready to be made for other positions."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def turn(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (n, rotated dimensions), of ``by`` (n) positions; in fp32 whatever the model's type."""
        # From the lower position on, since a module need not know negative ones.
        places = torch.cat([(-by).clamp(min=0), by.clamp(min=0)])[None]

        def asked(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.float() if value.is_floating_point() else places

        with torch.no_grad():
            cos, sin = self.module(*map(asked, self.args), **{n: asked(v) for n, v in self.kwargs.items()})
        (c0, c1), (s0, s1) = cos.double()[0].chunk(2), sin.double()[0].chunk(2)
        norm = c0 * c0 + s0 * s0  # 1, but where the angles come scaled
        return (c0 * c1 + s0 * s1) / norm, (s1 * c0 - c1 * s0) / norm


def _turned(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys (heads, n, head_dim) turned; dimensions past those of the angles stay."""
    size = cos.shape[-1]
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    part = key[..., :size].to(wide)
    if torch.equal(cos[..., : size // 2], cos[..., size // 2 :]):
        first, second = part.chunk(2, -1)
        across = torch.cat([-second, first], -1)
    else:  # pairs stand side by side
        across = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
    turned = (part * cos.to(wide) + across * sin.to(wide)).to(key.dtype)
    return turned if size == key.shape[-1] else torch.cat([turned, key[..., size:]], -1)


def _rotary_calls(base: Base) -> list[_RotaryCall | None]:
    """For each block, the call whose result it was handed as angles; None where there is no such thing."""
    made: list[tuple[Tensor, _RotaryCall]] = []
    given: dict[int, _RotaryCall] = {}
    blocks = {id(block.module): n for n, block in enumerate(base.parts.blocks)}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if id(module) in blocks:
            for value in (*args, *kwargs.values()):
                for cos, call in made:
                    if isinstance(value, tuple) and len(value) == 2 and value[0] is cos:
                        given[blocks[id(module)]] = call
        elif isinstance(output, tuple) and len(output) == 2 and all(isinstance(one, Tensor) for one in output):
            made.append((output[0], _RotaryCall(module, args, kwargs)))

    with torch.no_grad(), observed(list(base.model.modules()), see):
        base.model(input_ids=_probe(base)[:, :2], use_cache=False)
    return [given.get(n) for n in range(len(blocks))]


def check(base: Base) -> Rotation | None:
    """Prove that keys and values can be kept for this model; returns what moves them, None where nothing can.

    Two tests on made-up text: read behind kept keys and values, the model gives the logits that it gives in one go; and
    kept keys that were moved are those of a fresh reading at the new place.

    Raises:
        DataError: where the first fails (nothing that is kept would be worth anything then), and for encoder-decoders.
    """
    if base.kind != "causal":
        raise DataError(f"{base.name} is an encoder-decoder model; keys and values need a decoder-only one")
    ids = _probe(base)[0].tolist()
    one, two = ids[: _PROBE // 2], ids[_PROBE // 2 :]
    with torch.inference_mode():
        whole = base.model(input_ids=torch.tensor([ids], device=base.device), use_cache=False).logits[0, len(one) :]
        kept = read(base, [one])[0]
        behind = base.model(
            input_ids=torch.tensor([two], device=base.device),
            attention_mask=torch.ones(1, len(ids), device=base.device, dtype=torch.long),
            position_ids=torch.arange(len(one), len(ids), device=base.device)[None],
            **base.behind(begun(base, kept)),
        ).logits[0]
    if not _alike(behind, whole):
        worst = float((behind.float() - whole.float()).abs().max())
        raise DataError(
            f"{base.name}: reads otherwise behind kept keys and values than in one go (logits by {worst:.2g})"
        )
    try:
        rotation = Rotation(base)
    except DataError:
        return None
    away = 1000 if _reaches(base, 1000 + len(one)) else len(one)
    fresh = read(base, [one], start=away)[0]
    turned = rotation.moved(kept, away)
    same = all(_alike(a, b) for a, b in zip((*turned.keys, *turned.values), (*fresh.keys, *fresh.values), strict=True))
    return rotation if same else None


def placed(blocks: Sequence[KV], start: int, rotation: Rotation | None) -> list[KV]:
    """Stretches that were each read at the same place, one behind the other from ``start`` on.

    Raises:
        DataError: where one must be moved and nothing can.
    """
    found: list[KV] = []
    for block in blocks:
        place = found[-1].end if found else start
        if place != block.start and rotation is None:
            raise DataError("keys and values of several passages: this model's keys cannot be moved; use one (--k 1)")
        found.append(block if rotation is None else rotation.moved(block, place))
    assert all(a.end == b.start for a, b in pairwise(found))
    return found


def _probe(base: Base) -> Tensor:
    """Tokens spread over the vocabulary: small ids are often special ones."""
    vocabulary = base.parts.embeddings.weight.shape[0]  # type: ignore[index, union-attr]
    return ((torch.arange(_PROBE, device=base.device) * 37 + 11) % vocabulary)[None]


def _reaches(base: Base, positions: int) -> bool:
    return base.positions is None or positions <= base.positions


def _alike(a: Tensor, b: Tensor) -> bool:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 4e-2)
    return bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max())
