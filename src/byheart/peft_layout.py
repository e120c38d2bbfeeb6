"""The files of a PEFT adapter: their names, and the configuration of a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from byheart.base import Base
from byheart.surgery import out_first

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Only a folder that holds it may be written over: a model or an adapter of somebody else never.
EXPORTED = "byheart-export.json"
# PEFT wraps a model twice; its files name parameters from outside.
PREFIX = "base_model.model."


def path_of(base: Base, module: nn.Module) -> str:
    """The path of one of the model's modules."""
    return next(str(name) for name, one in base.model.named_modules() if one is module)


def lora_config(base: Base, modules: Sequence[nn.Module], rank: int) -> dict[str, Any]:
    """``adapter_config.json`` of a LoRA over some linear modules whose product is added as it is."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.folder or base.name),
        "r": rank,
        "lora_alpha": rank,  # alpha / r is the factor on the product
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [path_of(base, module) for module in modules],
        "fan_in_fan_out": not out_first(modules[0]),
        "inference_mode": True,
        "init_lora_weights": True,
    }
