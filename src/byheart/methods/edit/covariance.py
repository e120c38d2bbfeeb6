"""The second moment C = E[k kᵀ] of the keys of MLPs over ordinary text: what an edit must leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from byheart.attention import fast_attention
from byheart.base import Base, for_device
from byheart.ordinary import text_rows
from byheart.padding import right_padded
from byheart.storage import fingerprint, home, replacing
from byheart.surgery import observed, stopped_at

# Rows of text at once; each lot is added up on the CPU, in fp64.
_ROWS = {"cpu": 16, "cuda": 256}
# Tokens that a second moment takes where nothing is said, as multiples of d_ff.
_LEAST, _MOST = 10, 200


def second_moments(base: Base, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """C (d_ff, d_ff) in fp64 of each layer's MLP output projection's input, over rows of ordinary text.

    Computed once a model and text, and kept in byheart's cache folder.
    """
    folder = home() / "covariance" / base.hash
    name = f"{fingerprint(rows)}-{base.dtype_name}"
    found = {layer: _read(folder / f"{name}-{layer}.safetensors") for layer in layers}
    missing = [layer for layer, moment in found.items() if moment is None]
    for layer, moment in moments_of(base, missing, rows).items() if missing else ():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{name}-{layer}.safetensors") as path:
            save_file({"moment": moment.float()}, path)
        found[layer] = moment.float()
    return {layer: moment.double() for layer, moment in found.items() if moment is not None}


def moment_rows(base: Base, texts: Sequence[str] | None, option: int, seed: int) -> list[list[int]]:
    """The rows of tokens that second moments are over: of ``texts``, and what is short of them the model writes.

    Args:
        texts: ordinary text; None lets the model write all of it.
        option: as :func:`token_counts` takes it.
    """
    most, least = token_counts(base, option)
    return list(text_rows(base, texts, most, seed, least))


def token_counts(base: Base, option: int) -> tuple[int, int]:
    """How many tokens to take at most and at least: ``option`` times d_ff, or, where it is 0, up to 200 and 10 times.

    The more tokens, the less an edit disturbs text (300 facts: neighbours' margins by 6 % from 40 to 120 times); but
    what is short of the least the model must write, and that takes minutes.
    """
    return (option or _MOST) * base.parts.d_ff, (option or _LEAST) * base.parts.d_ff


def _read(path: Path) -> Tensor | None:
    try:
        moment: Tensor = load_file(path)["moment"]
        return moment
    except (OSError, SafetensorError, KeyError):
        return None  # not there, or cut off by a kill of an older kind of writer: made anew


def moments_of(base: Base, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """E[k kᵀ] (d_ff, d_ff) over all tokens of ``rows``, a layer."""
    blocks = base.parts.blocks
    number = {blocks[layer].mlp_out: layer for layer in layers}
    width = base.parts.d_ff
    sums = {layer: torch.zeros(width, width, dtype=torch.float64) for layer in layers}
    count = 0
    wide = base.wide
    ordered = sorted(rows, key=len)
    at_once = for_device(_ROWS, base.device)
    for start in range(0, len(ordered), at_once):
        some = ordered[start : start + at_once]
        ids, mask, _ = right_padded(some, base.device)
        real = mask.flatten().bool()
        count += int(real.sum())

        def see(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: object, output: object, real: Tensor = real
        ) -> None:
            keys = args[0].reshape(-1, width)[real].to(wide)
            sums[number[module]] += (keys.T @ keys).double().cpu()

        after = blocks[max(layers) + 1].module if max(layers) + 1 < len(blocks) else base.parts.final_norm
        with torch.no_grad(), fast_attention(base.model), observed(list(number), see), stopped_at(after):
            base.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return {layer: total / count for layer, total in sums.items()}
