"""The ways to give a model knowledge, and the one contract they share."""

from __future__ import annotations

import importlib
from typing import cast

from byheart.errors import UsageError
from byheart.methods.contract import Answer, LearnReport, Method, Settings

# Every method byheart has, by the name users type. There is no other registry.
METHODS = {
    "closed": "byheart.methods.controls:Closed",
    "context": "byheart.methods.controls:Context",
    "gold": "byheart.methods.controls:Gold",
    "shuffled": "byheart.methods.controls:Shuffled",
    "memory": "byheart.methods.memory.method:Memory",
    "prefix": "byheart.methods.prefix.method:Prefix",
    "prefix-gold": "byheart.methods.prefix.controls:PrefixGold",
    "prefix-shuffled": "byheart.methods.prefix.controls:PrefixShuffled",
    "edit": "byheart.methods.edit.method:Edit",
    "ft": "byheart.methods.edit.finetune:FineTuned",
    "ft-w": "byheart.methods.edit.finetune:DecayedFineTuned",
    "rome": "byheart.methods.edit.rome:Rome",
    "mend": "byheart.methods.edit.mend:Mend",
}
# What every gain is held against; none of them has options of its own.
CONTROLS = ("closed", "context", "gold", "shuffled")
# Other ways to edit, to hold `edit` against.
BASELINES = ("ft", "ft-w", "rome", "mend")
# They take the options of `prefix`.
PREFIX_CONTROLS = ("prefix-gold", "prefix-shuffled")
# What "all" leaves out.
_ON_REQUEST = (*BASELINES, *PREFIX_CONTROLS)

__all__ = [
    "BASELINES",
    "CONTROLS",
    "METHODS",
    "PREFIX_CONTROLS",
    "Answer",
    "LearnReport",
    "Method",
    "Settings",
    "method_class",
    "parse_methods",
]


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UsageError: where there is no such method.
    """
    if name not in METHODS:
        raise UsageError(f'no method "{name}"; there are {", ".join(METHODS)}')
    module, attribute = METHODS[name].split(":")
    return cast("type[Method]", getattr(importlib.import_module(module), attribute))


def parse_methods(text: str) -> list[str]:
    """The method names in ``"a,b"``, each once, in the order given; ``"all"`` leaves out baselines and the controls of
    ``prefix``.

    Raises:
        UsageError: where one does not exist, or none is named.
    """
    every = [name for name in METHODS if name not in _ON_REQUEST]
    names = every if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods: names no method")
    for name in names:
        if name not in METHODS:
            raise UsageError(f'--methods: no method "{name}"; there are {", ".join(METHODS)}')
    return list(dict.fromkeys(names))
