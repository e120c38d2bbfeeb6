"""The one training loop: AdamW, warm-up and cosine, clipping; a kill costs a minute, and resuming changes nothing."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from byheart.progress import Progress, untold
from byheart.storage import SAVE_EVERY, replacing


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        steps: of the optimiser.
        lr: the highest step size, reached after ``warmup`` steps; it falls to zero along a half cosine.
        decay: weight decay, decoupled (AdamW; Loshchilov and Hutter 2019).
        clip: the longest gradient; 0: as long as it comes.
        beta2: how much of the second moment each step keeps; with less, large gradients of the start are forgotten.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 10
    decay: float = 0.05
    clip: float = 10.0
    beta2: float = 0.999

    def rate(self, step: int) -> float:
        """The step size of step number ``step``, from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        past = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(past, 1.0)))


class Orders:
    """Which rows each step sees: every epoch all of one packing, in an order that only its number and the seed give.

    Attributes:
        steps: how many there are.
    """

    def __init__(self, sizes: Sequence[int], batch: int, epochs: int, seed: int) -> None:
        """Take the number of rows of each packing; they take turns, an epoch each."""
        self._plan = [
            (epoch % len(sizes), start, epoch)
            for epoch in range(epochs)
            for start in range(0, sizes[epoch % len(sizes)], batch)
        ]
        self.steps = len(self._plan)
        self._sizes, self._batch, self._seed = sizes, batch, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, step: int) -> tuple[int, list[int]]:
        """The packing and the rows of one step."""
        packing, start, epoch = self._plan[step]
        if self._order[0] != epoch:
            order = list(range(self._sizes[packing]))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return packing, self._order[1][start : start + self._batch]


@dataclass
class Trained:
    """What training came to: the loss of every step, and seconds over all runs."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def course(self, epochs: int) -> str:
        """The loss at the start and in the last of so many epochs, in words."""
        tail = self.losses[-max(1, len(self.losses) // epochs) :]
        return f"loss {self.losses[0]:.3f} at the start, {sum(tail) / len(tail):.3f} in the last epoch"


def train(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    store: Path,
    progress: Progress = untold,
    rates: Callable[[str], float] = lambda name: 1.0,
) -> Trained:
    """Train ``module`` in place.

    Everything that a step depends on follows from its number, so a run that was killed and goes on from ``store``
    gives the weights of one that was not.

    Args:
        loss: the loss of step number n, with its graph.
        store: a safetensors file for weights, moments and losses; its name must tell this training from any other.
        rates: by a parameter's name, the share of the recipe's step size that it moves with.
    """
    named = {name: one for name, one in module.named_parameters() if one.requires_grad}
    groups = [{"params": [one], "rate": rates(name)} for name, one in named.items()]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.decay, betas=(0.9, recipe.beta2))
    done = _resume(named, optimizer, store)
    progress(len(done.losses))
    saved = time.perf_counter()
    for step in range(len(done.losses), recipe.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step) * group["rate"]
        found = loss(step)
        found.backward()  # type: ignore[no-untyped-call]
        if recipe.clip:
            nn.utils.clip_grad_norm_(named.values(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        done.losses.append(float(found.detach()))
        done.seconds += time.perf_counter() - began
        progress(1)
        if time.perf_counter() - saved > SAVE_EVERY or step + 1 == recipe.steps:
            _save(named, optimizer, store, done)
            saved = time.perf_counter()
    return done


def steps_done(store: Path) -> int:
    """How many steps the training that saves there has made."""
    try:
        with safe_open(store, "pt") as file:
            return len(json.loads(file.metadata()["losses"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return 0  # not there, or not whole


def _save(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, store: Path, done: Trained) -> None:
    kept: dict[str, Tensor] = {}
    for name, one in named.items():
        state = optimizer.state[one]  # empty where no gradient ever came
        first, second = (state.get(key, torch.zeros_like(one)) for key in ("exp_avg", "exp_avg_sq"))
        kept |= {f"weight.{name}": one.data, f"first.{name}": first, f"second.{name}": second}
    kept = {name: tensor.contiguous() for name, tensor in kept.items()}
    with replacing(store) as path:
        save_file(kept, path, {"losses": json.dumps(done.losses), "seconds": str(done.seconds)})


def _resume(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, store: Path) -> Trained:
    try:
        with safe_open(store, "pt") as file:
            metadata = file.metadata()
            losses = [float(one) for one in json.loads(metadata["losses"])]
            found = {
                (part, name): file.get_tensor(f"{part}.{name}")
                for name in named
                for part in ("weight", "first", "second")
            }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return Trained()  # not there, or not whole
    for name, one in named.items():
        one.data.copy_(found["weight", name])
        optimizer.state[one] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": found["first", name].to(one),
            "exp_avg_sq": found["second", name].to(one),
        }
    return Trained(losses, float(metadata["seconds"]))
