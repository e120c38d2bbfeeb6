"""Model surgery as context managers: what they change while open is exactly as before once they close."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Observer = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


@contextmanager
def observed(modules: Iterable[nn.Module], see: Observer) -> Iterator[None]:
    """Call ``see(module, args, kwargs, output)`` after each forward of ``modules``; outputs stay untouched."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        see(module, args, kwargs, output)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield
