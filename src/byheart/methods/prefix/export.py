"""Columns that stand before every question, as a PEFT adapter of the kind CARTRIDGE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from byheart.errors import DataError, UsageError
from byheart.kv import joined
from byheart.methods.prefix.method import Prefix
from byheart.peft_layout import CONFIG, EXPORTED, TENSORS
from byheart.storage import check_replaceable, new_folder, write_json


def export_cartridge(method: Prefix, out: Path) -> dict[str, Any]:
    """An adapter that ``PeftModel.from_pretrained`` puts before every prompt of the same base.

    The learnt columns, and behind them those of the examples: what follows stands at the position behind the last.

    Raises:
        UsageError: where what stands before a question depends on the question.
        DataError: where the model's layers have heads of different number or size, which that kind does not hold.
    """
    if method.options.demonstrations or method.options.interpolate:
        raise UsageError("--to peft: other questions are shown, or vote, anew for each question; learn without them")
    if method.options.passages != "none":
        raise UsageError("--to peft: passages are found anew for each question; learn with prefix.passages=none")
    head = method.cache.head
    whole = joined([*method.learnt(), *([] if head is None else [head])])
    shapes = {tuple(one.shape) for one in (*whole.keys, *whole.values)}
    if len(shapes) > 1:
        raise DataError(f"--to peft: the layers of {method.base.name} have heads of different number or size")
    ((heads, columns, size),) = shapes
    # (n, layers, key or value, heads, head_dim), flattened behind n.
    pairs = zip(whole.keys, whole.values, strict=True)
    flat = torch.stack([one for pair in pairs for one in pair]).permute(2, 0, 1, 3).reshape(columns, -1)
    check_replaceable(out, EXPORTED)
    with new_folder(out) as folder:
        write_json(folder / EXPORTED, {"base": method.base.hash})
        save_file({"prompt_embeddings": flat.float().cpu().contiguous()}, folder / TENSORS, metadata={"format": "pt"})
        config = {
            "peft_type": "CARTRIDGE",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(method.base.folder or method.base.name),
            "num_virtual_tokens": columns,
            "num_layers": len(whole.keys),
            "token_dim": heads * size,
            "num_attention_heads": heads,
            "num_transformer_submodules": 1,
            "num_frozen_tokens": 1,
            "inference_mode": True,
        }
        write_json(folder / CONFIG, config)
    return {"columns": columns, "out": str(out)}
