"""Model surgery as context managers: what they change while open is exactly as before once they close."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from byheart.errors import DataError

_FLOAT = torch.float32
# Rows of a matrix that are in float32 at once.
_OUTPUTS = 16_384
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


class _Enough(Exception):  # noqa: N818 (no error: it ends a forward that has done what it should)
    """Ends a forward from inside."""


@contextmanager
def stopped_at(module: nn.Module) -> Iterator[None]:
    """End the block quietly as soon as ``module`` is called: what comes after it in a forward is not wanted."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Enough

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


@contextmanager
def changed(deltas: Iterable[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Add to the matrices of linear modules for the length of the block.

    The old weights are put aside and put back, never subtracted from: bf16 would not give the same bits again.

    Args:
        deltas: modules with what is added, (out features, in features) each, whichever way a module keeps its own.
    """
    with ExitStack() as stack:
        for module, delta in deltas:
            add_to(module, delta, stack)
        yield


def add_to(module: nn.Module, delta: Tensor, stack: ExitStack) -> None:
    """Add ``delta`` (out, in) to a linear module's matrix until ``stack`` closes; see :func:`changed`."""
    weight: Any = module.weight
    old = weight.data
    added = delta if out_first(module) else delta.T
    wide = torch.float64 if old.dtype == torch.float64 else torch.float32
    weight.data = (old.to(wide) + added.to(old.device, wide)).to(old.dtype)

    def restore() -> None:
        weight.data = old

    stack.callback(restore)


def matrix(module: nn.Module) -> Tensor:
    """A linear module's matrix as (out features, in features), a view of its weights."""
    weight: Any = module.weight
    return weight.data if out_first(module) else weight.data.T  # type: ignore[no-any-return]


def out_first(module: nn.Module) -> bool:
    """Whether a linear module keeps its matrix as (out, in), like ``nn.Linear``, or as (in, out), like GPT-2's.

    Raises:
        DataError: where it is neither.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return True
    if isinstance(module, Conv1D):
        return False
    raise DataError(f"byheart cannot change a matrix kept as {type(module).__name__}")


@contextmanager
def altered(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``change`` replace what ``module`` gives (the first of several, where it gives a tuple)."""
    with _hooked(module, lambda given, output: change(output)):
        yield


@contextmanager
def exact(module: nn.Module) -> Iterator[None]:
    """Let a linear module of a model in half precision give its products in float32.

    bf16 has a step of 1/16 at 8 and more, where logits lie, so that the likelihoods of two answers would often tie.
    """

    def wide(given: Tensor, output: Tensor) -> Tensor:
        if output.dtype.itemsize >= _FLOAT.itemsize:
            return output
        given, bias = given.to(_FLOAT), getattr(module, "bias", None)
        found = torch.cat([given @ some.to(_FLOAT).T for some in torch.split(matrix(module), _OUTPUTS)], -1)
        return found if bias is None else found + bias.to(_FLOAT)

    with _hooked(module, wide):
        yield


@contextmanager
def widened(module: nn.Module, more: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Add ``more(input, output)`` to what ``module`` gives (to the first of several, where it gives a tuple)."""
    with _hooked(module, lambda given, output: output + more(given, output)):
        yield


@contextmanager
def _hooked(module: nn.Module, change: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(output, (tuple, list)):
            return (change(given, output[0]), *output[1:])
        return change(given, output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def idle(modules: Iterable[nn.Module], tuples: bool) -> Iterator[None]:
    """Let modules pass on their first argument instead of computing; in a tuple where that is what callers unpack."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if tuples else hidden_states

    some: list[Any] = list(modules)
    for module in some:
        module.forward = forward
    try:
        yield
    finally:
        for module in some:
            del module.forward
