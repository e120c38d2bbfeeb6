"""MEND: a small network that learns to turn a fact's gradient into an edit that generalises and stays put."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.blocks import Stretch
from byheart.decode import option_ids
from byheart.errors import DataError, UsageError
from byheart.formats import read_objects
from byheart.methods.contract import Settings, parse_options
from byheart.methods.edit.baselines import Baseline
from byheart.methods.edit.common_facts import common_facts
from byheart.methods.edit.prompts import Prepared, prompt_text, target_text
from byheart.methods.edit.weights import Deltas
from byheart.padding import right_padded
from byheart.progress import Progress
from byheart.storage import CARD
from byheart.surgery import observed

_AT_ONCE = 16


@dataclass(frozen=True)
class MendOptions:
    """What ``--set mend.NAME=VALUE`` takes.

    Attributes:
        train: JSON lines of zsRE's form (src, alt, rephrase, loc) to learn editing from; without it, common facts with
            objects exchanged. Never the rows that are measured.
        blocks: how many of the last blocks are edited.
        steps, batch, lr: of Adam on the editor.
        rank: width of the editor's hidden layer.
        edit_weight: of the edit's loss beside the loss for staying put (0.1, as published).
    """

    train: str = ""
    blocks: int = 3
    steps: int = 200
    batch: int = 8
    lr: float = 1e-3
    rank: int = 64
    edit_weight: float = 0.1


@dataclass(frozen=True)
class _Text:
    """A prompt with its continuation; where that is empty, only the next token's distribution counts."""

    prompt: str
    target: str


class Mend(Baseline):
    """Model editor networks with gradient decomposition (Mitchell et al., ICLR 2022), on MLP output projections."""

    name = "mend"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        super().__init__(base, settings, work)
        self.options = parse_options(MendOptions, self.name, settings.options)
        depth = len(base.parts.blocks)
        self.layers = range(max(0, depth - self.options.blocks), depth)
        for name in ("blocks", "batch"):
            if getattr(self.options, name) < 1:
                raise UsageError(f"--set mend.{name}={getattr(self.options, name)}: must be at least 1")
        if self.options.train and not (work / CARD).is_file():
            _check_train(Path(self.options.train))
        self._editor: _Editor | None = None

    def _solve(self, prepared: Sequence[Prepared], progress: Progress) -> Deltas:
        with fast_attention(self.base.model):
            self._editor = editor = self._editor or self._train()  # whatever the facts
            total: dict[int, Tensor] = {}
            texts = [_Text(prompt_text(one.fact), target_text(one.fact)) for one in prepared]
            for start in range(0, len(texts), _AT_ONCE):
                some = texts[start : start + _AT_ONCE]
                with torch.no_grad():
                    deltas = editor.edit(_gradients(self._read(some), self.layers, self.base))
                for layer, delta in deltas.items():
                    # The published edit of many facts is the sum of their edits.
                    total[layer] = total.get(layer, torch.zeros_like(delta)) + delta
                progress(len(some))
        return {layer: (None, delta.detach().cpu()) for layer, delta in total.items()}

    def _read(self, texts: Sequence[_Text]) -> _Lesson:
        return _Lesson(self.base, texts, self.layers)

    def _train(self) -> _Editor:
        """An editor trained to edit rows of its own."""
        options, base = self.options, self.base
        rows = _zsre_rows(Path(options.train)) if options.train else _common_rows(self.settings.seed)
        draw = random.Random(self.settings.seed)
        sample = _gradients(self._read([edit for edit, _, _ in rows[: 4 * _AT_ONCE]]), self.layers, base)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.settings.seed)
            editor = _Editor(self.layers, sample, options.rank).to(base.device)
        adam = torch.optim.Adam(editor.parameters(), lr=options.lr)
        for _ in range(options.steps):
            some = draw.sample(rows, min(options.batch, len(rows)))
            edits, rephrased, elsewhere = ([row[n] for row in some] for n in range(3))
            deltas = editor.edit(_gradients(self._read(edits), self.layers, base))
            loss = options.edit_weight * self._read([*edits, *rephrased]).loss(deltas)
            loss = loss + self._read(elsewhere).divergence(deltas)
            adam.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(editor.parameters(), 1.0)
            adam.step()
        return editor


class _Lesson:
    """Texts read up to the first edited block, once."""

    def __init__(self, base: Base, texts: Sequence[_Text], layers: Sequence[int]) -> None:
        self.base, self.layers = base, layers
        rows, entries = [], []
        for n, text in enumerate(texts):
            read = list(base.tokenizer(text.prompt)["input_ids"])
            labels = option_ids(base.tokenizer, text.prompt, read, text.target) if text.target else []
            rows.append(read + labels[:-1])
            places = range(len(read) - 1, len(read) - 1 + max(len(labels), 1))
            entries += [
                (n, place, label, max(len(labels), 1)) for place, label in zip(places, labels or [0], strict=True)
            ]
        self.stretch = Stretch(base, *right_padded(rows, base.device), layers[0], layers[-1])
        self.row, self.column, self.label, counts = torch.tensor(entries, device=base.device).T
        self.texts = len(rows)
        self.share = 1 / (counts * len(rows))

    def logprobs(self, deltas: dict[int, Tensor], see: Callable[..., None] | None = None) -> Tensor:
        """(entries, vocabulary) with ``deltas`` (d_model, d_ff) added to the edited matrices, differentiably."""
        blocks = self.base.parts.blocks
        with ExitStack() as stack:
            for layer in self.layers:
                module = blocks[layer].mlp_out
                if layer in deltas:
                    delta = deltas[layer]

                    def add(_: Any, args: tuple[Tensor, ...], output: Tensor, delta: Tensor = delta) -> Tensor:
                        return output + (args[0].float() @ delta.T).to(output.dtype)

                    stack.callback(module.register_forward_hook(add).remove)
            if see is not None:
                stack.enter_context(observed([blocks[layer].mlp_out for layer in self.layers], see))
            hidden = self.stretch.hidden.detach().requires_grad_(True)
            out = self.stretch.run(hidden, self.layers[0], self.layers[-1])
            return self.base.parts.logits(out[self.row, self.column]).float().log_softmax(-1)

    def loss(self, deltas: dict[int, Tensor], see: Callable[..., None] | None = None) -> Tensor:
        """Mean over texts of the mean loss of a target token."""
        logprobs = self.logprobs(deltas, see)
        own: Tensor = logprobs.gather(1, self.label[:, None])[:, 0] * self.share
        return -own.sum()

    def divergence(self, deltas: dict[int, Tensor]) -> Tensor:
        """Mean KL(as it is || with deltas) of the next token."""
        with torch.no_grad():
            before = self.logprobs({})
        return (before.exp() * (before - self.logprobs(deltas))).sum(1).mean()


Pairs = dict[int, tuple[Tensor, Tensor]]


def _gradients(lesson: _Lesson, layers: Sequence[int], base: Base) -> Pairs:
    """By layer u (tokens, d_ff) and δ (tokens, d_model): a matrix's gradient is the sum of their outer products."""
    blocks = base.parts.blocks
    number = {blocks[layer].mlp_out: layer for layer in layers}
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: object, output: Tensor) -> None:
        inputs[number[module]], outputs[number[module]] = args[0], output

    with torch.enable_grad():
        # The sum over texts: an edit must not depend on how many are edited beside it.
        loss = lesson.loss({}, see) * lesson.texts
        gradients = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
    pairs = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        u, d = inputs[layer].detach().flatten(0, -2).float(), gradient.flatten(0, -2).float()
        used = d.abs().sum(1) > 0
        pairs[layer] = (u[used], d[used])
    return pairs


class _Editor(nn.Module):
    """By layer a residual network over (u, δ), scaled as on the first rows; the identity at the start."""

    def __init__(self, layers: Sequence[int], pairs: Pairs, rank: int) -> None:
        super().__init__()
        self.layers = layers
        self.down, self.up, self.rate = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        self.scale: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in layers:
            u, d = pairs[layer]
            self.scale[layer] = u.square().mean().sqrt(), d.square().mean().sqrt()
            width = u.shape[1] + d.shape[1]
            up = nn.Linear(rank, width)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            self.down[str(layer)], self.up[str(layer)] = nn.Linear(width, rank), up
            self.rate[str(layer)] = nn.Parameter(torch.tensor(-4.0))

    def edit(self, pairs: Pairs) -> dict[int, Tensor]:
        """Δ (d_model, d_ff) of each layer: minus the product of the changed δ and u, at a learnt rate."""
        found = {}
        for layer in self.layers:
            u, d = pairs[layer]
            u_scale, d_scale = self.scale[layer]
            both = torch.cat([u / u_scale, d / d_scale], 1)
            both = both + self.up[str(layer)](torch.relu(self.down[str(layer)](both)))
            new_u, new_d = both.split([u.shape[1], d.shape[1]], 1)
            found[layer] = -self.rate[str(layer)].exp() * new_d.T @ new_u / u.shape[1]
        return found


def _check_train(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"--set mend.train={path}: no such file")


def _zsre_rows(path: Path) -> list[tuple[_Text, _Text, _Text]]:
    _check_train(path)
    found = []
    for number, row in read_objects(path, ("src", "alt", "rephrase", "loc")):
        texts = [row["src"], row["alt"], row["rephrase"], row["loc"]]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}:{number}: src, alt, rephrase and loc must be texts")
        if not all(text.strip() for text in texts):
            continue  # the published rows have some without a new answer: nothing to learn an edit from
        target = " " + row["alt"].strip()
        found.append((_Text(row["src"], target), _Text(row["rephrase"], target), _Text(row["loc"] + "?", "")))
    if not found:
        raise DataError(f"--set mend.train={path}: holds no rows whose src, alt, rephrase and loc are not blank")
    return found


def _common_rows(seed: int) -> list[tuple[_Text, _Text, _Text]]:
    """Common facts with another's object; rephrased by a few words in front; elsewhere: another fact as it is."""
    draw = random.Random(seed)
    facts = common_facts()
    rows = []
    for fact in facts:
        rival = draw.choice([one.object for one in facts if one.prompt == fact.prompt and one.object != fact.object])
        other = draw.choice([one for one in facts if one.subject != fact.subject])
        prompt = prompt_text(fact)
        again = f"As everybody knows, {prompt[0].lower()}{prompt[1:]}"
        rows.append((_Text(prompt, f" {rival}"), _Text(again, f" {rival}"), _Text(prompt_text(other), "")))
    return rows
