"""The trained part: a small network a block, added to the residual stream, and where it is put."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from byheart.base import Base
from byheart.errors import UsageError
from byheart.surgery import out_first, widened

Place = Literal["block", "mlp", "parallel", "lora"]


class Memory(nn.Module):
    """``gate · LayerNorm(down(GELU(up(h))))`` for hidden states h (..., d_model).

    Kept and computed in fp32 whatever the base computes in; its output has the input's type.
    """

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, width)
        self.down = nn.Linear(width, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added, of the shape of ``hidden``."""
        found: Tensor = self.gate * self.norm(self.down(functional.gelu(self.up(hidden.to(self.up.weight.dtype)))))
        return found.to(hidden.dtype)


class LowRank(nn.Module):
    """``B A x`` beside a linear module (LoRA; Hu et al. 2021), zero at the start; named as PEFT names them."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(d_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added to the linear module's output."""
        found: Tensor = self.lora_B(self.lora_A(hidden.to(self.lora_A.weight.dtype)))
        return found.to(hidden.dtype)


def make_adapters(base: Base, blocks: Sequence[int], place: Place, width: int, seed: int) -> nn.ModuleDict:
    """Fresh networks, by block number; ``lora`` gets the rank at which it has about as many parameters as the others.

    The same seed gives the same ones, and nothing else random is touched.

    Raises:
        UsageError, DataError: where the model has no such place.
    """
    for block in blocks:
        _module(base, block, place)
    d_model, d_ff = base.parts.d_model, base.parts.d_ff
    rank = max(1, round(2 * width * d_model / (d_model + d_ff)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.ModuleDict(
            {
                str(block): LowRank(d_ff, d_model, rank) if place == "lora" else Memory(d_model, width)
                for block in blocks
            }
        )
    return made.to(base.device, base.wide)


@contextmanager
def attached(base: Base, adapters: nn.ModuleDict, place: Place) -> Iterator[None]:
    """The base with the networks' outputs added; its own weights are never touched."""
    with ExitStack() as stack:
        for number, adapter in adapters.items():
            module, of_input = _module(base, int(number), place)
            stack.enter_context(widened(module, _addition(adapter, of_input)))
        yield


def _addition(adapter: nn.Module, of_input: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda given, output: adapter(given if of_input else output)


def _module(base: Base, number: int, place: Place) -> tuple[nn.Module, bool]:
    """The module whose output is added to, and whether the network reads its input (or its output)."""
    block = base.parts.blocks[number]
    if place == "block":
        return block.module, False
    if place == "mlp":
        return block.mlp_norm or block.mlp_out, False
    if place == "lora":
        out_first(block.mlp_out)  # refuses what is no linear module
        return block.mlp_out, True
    for module in block.module.modules():
        if module is not block.module and any(child is block.mlp_out for child in module.children()):
            return module, True
    raise UsageError(f"memory.place=parallel: the MLP of {base.name} is not a module of its own; use block or mlp")
