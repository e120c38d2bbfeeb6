"""Cross-entropy over a large vocabulary, with its gradient written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _TokenLoss(torch.autograd.Function):
    """A third of a step went into zeros that the gradients of gathering and slicing begin with, and into copies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, label: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keeps softmax minus one-hot, which is the gradient."""
        found = logits.to(wide, copy=True)
        top, likeliest = found.max(1)
        own = found.gather(1, label[:, None])[:, 0]
        found.sub_(top[:, None]).exp_()
        total = found.sum(1)
        found.div_(total[:, None])
        found[torch.arange(len(label), device=label.device), label] -= 1
        ctx.save_for_backward(found)
        ctx.dtype = logits.dtype
        hit = likeliest == label
        ctx.mark_non_differentiable(hit)
        return top + total.log() - own, hit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Softmax minus one-hot, times what comes down."""
        (found,) = ctx.saved_tensors
        return found.mul_(gradient[:, None]).to(ctx.dtype), None, None


def drift(logits: Tensor, plain: Tensor, wide: torch.dtype = torch.float32) -> Tensor:
    """KL(plain || logits) between two sets of logits (n, vocabulary), a mean over n; computed in ``wide``."""
    both = (logits.to(wide).log_softmax(-1), plain.to(wide).log_softmax(-1))
    return functional.kl_div(*both, log_target=True, reduction="batchmean")


def token_loss(logits: Tensor, label: Tensor, wide: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """-log p of each label (n) from logits (n, vocabulary), and whether the label is the likeliest.

    Computed in ``wide``. Its gradient can be taken once.
    """
    found: tuple[Tensor, Tensor] = _TokenLoss.apply(logits, label, wide)  # type: ignore[no-untyped-call]
    return found
