"""What every run says of how it was made: version, command, settings, model, machine, and each method's options."""

from __future__ import annotations

import datetime as dt
import platform
import sys
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from byheart import __version__
from byheart.base import Base
from byheart.methods import Method, Settings


def encoder_record(method: Any) -> dict[str, Any]:
    """The card of the encoder that a method cuts documents and finds passages with; empty where it used none."""
    card = getattr(method, "used_encoder", None)
    return {} if card is None else dict(card.to_dict())


def run_record(base: Base, settings: Settings, origin: dict[str, Any] | None) -> dict[str, Any]:
    """What every ``run.json`` says of how it was made."""
    return {
        "byheart": __version__,
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": ["byheart", *(a.encode("utf-8", "replace").decode() for a in sys.argv[1:])],
        "origin": origin or {},
        "base": base_record(base),
        "settings": settings.to_dict(),
        "machine": machine(),
    }


def base_record(base: Base) -> dict[str, Any]:
    """What tells a model from another, for the record."""
    return {
        "name": base.name,
        "hash": base.hash,
        "kind": base.kind,
        "type": base.model.config.model_type,
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "dtype": base.dtype_name,
        "device": str(base.device),
    }


def made_with(method: Method) -> dict[str, Any]:
    """A method's options with the defaults of this version, which settings do not hold, and the layers it chose."""
    options: Any = getattr(method, "options", None)
    known = is_dataclass(options) and not isinstance(options, type)
    return {"options": asdict(options) if known else {}, "layers": list(getattr(method, "layers", []))}


def machine() -> dict[str, Any]:
    """What the numbers were made on: processor, threads, memory, versions."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "bm25s")
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
