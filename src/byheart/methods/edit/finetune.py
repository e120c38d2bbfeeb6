"""Fine-tuning of one MLP's output projection, each entry kept near its old value (FT) or drawn back to it (FT-W)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.blocks import Stretch
from byheart.decode import batches
from byheart.errors import UsageError
from byheart.methods.contract import Settings, parse_options
from byheart.methods.edit.baselines import Baseline
from byheart.methods.edit.layers import choose_layers
from byheart.methods.edit.prompts import Prepared
from byheart.methods.edit.weights import Deltas
from byheart.padding import right_padded
from byheart.progress import Progress
from byheart.surgery import add_to, matrix, out_first


@dataclass(frozen=True)
class FineTuneOptions:
    """What ``--set ft.NAME=VALUE`` takes. Lengths are shares of the matrix's own root mean square entry.

    Attributes:
        layers: as for ``edit``; the last one of the range is trained.
        epochs: passes over the facts.
        rate: Adam's step.
        limit: the largest change of an entry (FT: 'FT+L' in Meng et al. 2022).
        decay: share of the change that each step takes back (FT-W).
    """

    layers: str = "auto"
    epochs: int = 25
    rate: float = 0.02
    limit: float = 0.02
    decay: float = 0.0


class FineTuned(Baseline):
    """Fine-tuning of one MLP's output projection on prompts and targets, each entry kept near its old value."""

    name = "ft"
    tokens: ClassVar[int] = 1_024
    options_class: ClassVar[type[FineTuneOptions]] = FineTuneOptions

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        super().__init__(base, settings, work)
        self.options = parse_options(self.options_class, self.name, settings.options)
        if self.options.decay >= 1:
            raise UsageError(f"--set {self.name}.decay={self.options.decay}: must be below 1")
        self.layers = choose_layers(base, self.options.layers, self.name)[-1:]

    def _solve(self, prepared: Sequence[Prepared], progress: Progress) -> Deltas:
        options, base, (layer,) = self.options, self.base, self.layers
        module: Any = base.parts.blocks[layer].mlp_out
        old = matrix(module).float()
        scale = float(old.square().mean().sqrt())
        delta = torch.zeros_like(old)
        adam = torch.optim.Adam([delta], lr=options.rate * scale, eps=1e-12)
        rows = [one.rows[0] for one in prepared]
        lengths = [len(row.context) + len(row.tail) for row in rows]
        parts = batches(lengths, lambda count, longest: count * longest <= self.tokens)
        generator = torch.Generator().manual_seed(self.settings.seed)
        with fast_attention(base.model):
            read = [_Lesson(base, [prepared[n] for n in part], layer) for part in parts]
            for epoch in range(options.epochs):
                for n in torch.randperm(len(read), generator=generator).tolist():
                    delta.grad = read[n].gradient(module, delta)
                    adam.step()
                    delta *= 1 - options.decay
                    if options.limit:
                        delta.clamp_(-options.limit * scale, options.limit * scale)
                    progress(len(parts[n]) if epoch == options.epochs - 1 else 0)
        return {layer: (None, delta)}


@dataclass(frozen=True)
class DecayOptions(FineTuneOptions):
    """What ``--set ft-w.NAME=VALUE`` takes; see :class:`FineTuneOptions`."""

    rate: float = 0.01
    limit: float = 0.0
    decay: float = 0.05


class DecayedFineTuned(FineTuned):
    """The same with the change decaying at each step instead (FT-W in Meng et al. 2023)."""

    name = "ft-w"
    options_class = DecayOptions


class _Lesson:
    """A batch of prompts with targets, read up to the trained layer once."""

    def __init__(self, base: Base, prepared: Sequence[Prepared], layer: int) -> None:
        rows = [one.rows[0] for one in prepared]
        tokens = right_padded([row.tokens for row in rows], base.device)
        self.parts, self.layer = base.parts, layer
        self.stretch = Stretch(base, *tokens, layer, len(base.parts.blocks) - 1)
        entries = [(n, len(row.context) + at, label) for n, row in enumerate(rows) for at, label in row.places]
        self.row, self.column, self.label = torch.tensor(entries, device=base.device).T

    def gradient(self, module: Any, delta: Tensor) -> Tensor:
        """Of the mean loss a target token, in the module's matrix (out, in) with ``delta`` added."""
        with ExitStack() as stack:
            add_to(module, delta, stack)
            module.weight.requires_grad_(True)
            stack.callback(module.weight.requires_grad_, False)
            out = self.stretch.run(self.stretch.hidden, self.stretch.first, self.stretch.last)
            logprobs = self.parts.logits(out[self.row, self.column]).float().log_softmax(-1)
            loss = -logprobs.gather(1, self.label[:, None]).mean()
            (gradient,) = torch.autograd.grad(loss, module.weight)
        whole: Tensor = gradient if out_first(module) else gradient.T
        return whole.float()
