"""A change of weights in forms that others load: a PEFT LoRA adapter, or a whole model with the change in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from byheart.errors import DataError
from byheart.loading import quiet_transformers
from byheart.methods.edit.weights import ChangedWeights, product
from byheart.peft_layout import CONFIG, EXPORTED, PREFIX, TENSORS, lora_config, path_of
from byheart.storage import check_replaceable, new_folder, write_json


def export_peft(method: ChangedWeights, out: Path, rank: int | None = None) -> dict[str, Any]:
    """A LoRA adapter that ``PeftModel.from_pretrained`` adds to the same base.

    Args:
        rank: the highest rank; a change of higher rank is cut by singular value decomposition. By default nothing
            is cut.

    Returns:
        The rank, and by layer the error: what was cut, as a share of the change's Frobenius norm.
    """
    _check(method)
    check_replaceable(out, EXPORTED)
    factors, errors = {}, {}
    for layer, delta in method.deltas.items():
        factors[layer], errors[layer] = low_rank(delta, rank)
    widest = max(left.shape[1] for left, _ in factors.values())
    tensors: dict[str, Tensor] = {}
    modules = []
    for layer, (left, right) in factors.items():
        module = method.base.parts.blocks[layer].mlp_out
        modules.append(module)
        name = PREFIX + path_of(method.base, module)
        # One rank for all layers, as LoRA's configuration has it; zeros fill up the rest.
        tensors[f"{name}.lora_A.weight"] = _padded(right.T, widest).T.contiguous()
        tensors[f"{name}.lora_B.weight"] = _padded(left, widest).contiguous()
    with new_folder(out) as folder:
        write_json(folder / EXPORTED, {"base": method.base.hash, "rank": rank, "error": errors})
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        write_json(folder / CONFIG, lora_config(method.base, modules, widest))
    return {"rank": widest, "error": {str(layer): error for layer, error in errors.items()}, "out": str(out)}


def export_merged(method: ChangedWeights, out: Path) -> dict[str, Any]:
    """The whole model with the change in its weights, and its tokeniser, as transformers loads them."""
    _check(method)
    check_replaceable(out, EXPORTED)
    with new_folder(out) as folder, method.attached(), quiet_transformers():
        write_json(folder / EXPORTED, {"base": method.base.hash})
        method.base.model.save_pretrained(folder)
        method.base.tokenizer.save_pretrained(folder)
    return {"out": str(out)}


def low_rank(delta: tuple[Tensor | None, Tensor], rank: int | None) -> tuple[tuple[Tensor, Tensor], float]:
    """Factors (d_model, r) and (r, d_ff) of Δ, and what they leave out as a share of its Frobenius norm."""
    left, right = delta
    whole = product(delta)
    full = min(whole.shape)
    if left is not None and (rank is None or left.shape[1] <= rank):
        return (left.float(), right.float()), 0.0
    if rank is None or rank >= full:
        return (torch.eye(len(whole)), whole), 0.0
    u, s, v = torch.linalg.svd(whole.double(), full_matrices=False)
    root = s[:rank].sqrt()
    error = float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt().clamp(min=1e-300))
    return ((u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()), error


def _padded(factor: Tensor, rank: int) -> Tensor:
    return torch.cat([factor, factor.new_zeros(len(factor), rank - factor.shape[1])], 1)


def _check(method: ChangedWeights) -> None:
    if not method.deltas:
        raise DataError(f"{method.name}: holds no facts, so there is nothing to export")
