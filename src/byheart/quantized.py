"""Linear layers with 8-bit weights that gradients pass through: half of bf16, for a model that stays frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from byheart.errors import DataError


class Int8Linear(nn.Module):
    """A linear layer whose matrix is kept as whole numbers from -127 to 127 with one scale a row of outputs.

    Absolute maximum over the row, as in LLM.int8() (Dettmers et al. 2022) without its outliers. The product is computed
    in the type of what comes in; the matrix is unpacked for it and thrown away, also on the way back.
    """

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        matrix = linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T
        scale = matrix.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight: Tensor
        self.register_buffer("weight", (matrix.float() / scale).round().to(torch.int8))
        # Parameters, so that this counts among the model's layers with weights and says what type it computes in.
        self.scale = nn.Parameter(scale.to(matrix.dtype), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (..., out) of inputs (..., in)."""
        found: Tensor = _Product.apply(inputs, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias


class _Product(torch.autograd.Function):
    """Keeps the packed matrix for the way back; autograd would keep the unpacked one of every layer."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(inputs, weight.to(inputs.dtype) * scale.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        return gradient @ (weight.to(gradient.dtype) * scale.to(gradient.dtype)), None, None


def quantize(model: nn.Module) -> None:
    """Put :class:`Int8Linear` in the place of every linear layer but the head, in place.

    Raises:
        DataError: where there is none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) in (nn.Linear, Conv1D) and child is not head
    ]
    if not found:
        raise DataError(
            "byheart cannot pack this model: it has no linear layers beside its head; leave --dtype int8 out"
        )
    for module, name, child in found:
        setattr(module, name, Int8Linear(child))
