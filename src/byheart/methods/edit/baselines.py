"""What `edit` is held against: fine-tuning under a norm or a decay constraint, and ROME."""

from __future__ import annotations

import datetime as dt
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from byheart import __version__
from byheart.attention import fast_attention
from byheart.base import Base, digest_of
from byheart.blocks import Stretch
from byheart.decode import batches
from byheart.errors import UsageError
from byheart.ledger import Ledger
from byheart.methods.contract import LearnReport, Progress, Settings, parse_options
from byheart.methods.edit.covariance import moment_rows, second_moments
from byheart.methods.edit.layers import choose_layers
from byheart.methods.edit.prompts import Prepared, make_prefixes, prepare
from byheart.methods.edit.targets import TargetOptions, find_targets
from byheart.methods.edit.weights import ChangedWeights, Deltas, changed_by, stacked
from byheart.methods.edit.write import WriteOptions, Writer
from byheart.methods.facts import choose_facts
from byheart.ordinary import check_text, ordinary_text, text_rows_of, text_tensor
from byheart.padding import right_padded
from byheart.rows import Fact
from byheart.storage import CARD, SAVE_EVERY, fingerprint, replacing
from byheart.surgery import add_to, matrix, out_first

_NOTHING: Progress = lambda count: None  # noqa: E731


class Baseline(ChangedWeights):
    """Facts in, deltas out; a change of the ledger is learnt by starting over, since nothing can be taken out."""

    prefixes: ClassVar[int] = 0
    # Seconds that earlier runs took for what this one goes on with.
    _earlier = 0.0

    def learn(self, ledger: Ledger, progress: Progress = _NOTHING) -> LearnReport:
        """Write all facts of the ledger that hold."""
        super().learn(ledger)
        return self._learn(list(ledger.facts()), progress)

    def _hold(self, facts: Sequence[Fact], changed: Collection[str]) -> LearnReport:
        return self._learn(facts, _NOTHING)

    def _learn(self, facts: Sequence[Fact], progress: Progress) -> LearnReport:
        began = time.perf_counter()
        chosen, skipped = choose_facts(facts, dt.date.today())
        texts = make_prefixes(self.base, self.prefixes, self.settings.seed) if self.prefixes else ()
        prepared, more = prepare(self.base, chosen, texts)
        self.holding, self.skipped = list(facts), skipped | more
        self.facts, self._earlier = [one.fact for one in prepared], 0.0
        self.deltas = self._solve(prepared, progress) if prepared else {}
        return LearnReport(
            seconds=time.perf_counter() - began + self._earlier,
            bytes=self.bytes,
            facts=len(self.facts),
            skipped=dict(Counter(self.skipped.values())),
        )

    @abstractmethod
    def _solve(self, prepared: Sequence[Prepared], progress: Progress) -> Deltas:
        """The change that holds the facts."""


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
        self.layer = choose_layers(base, self.options.layers, self.name)[-1]
        self.layers = (self.layer,)

    def _solve(self, prepared: Sequence[Prepared], progress: Progress) -> Deltas:
        options, base = self.options, self.base
        module: Any = base.parts.blocks[self.layer].mlp_out
        old = matrix(module).float()
        scale = float(old.square().mean().sqrt())
        delta = torch.zeros_like(old)
        adam = torch.optim.Adam([delta], lr=options.rate * scale, eps=1e-12)
        rows = [one.rows[0] for one in prepared]
        lengths = [len(row.context) + len(row.tail) for row in rows]
        parts = batches(lengths, lambda count, longest: count * longest <= self.tokens)
        generator = torch.Generator().manual_seed(self.settings.seed)
        with fast_attention(base.model):
            read = [_Lesson(base, [prepared[n] for n in part], self.layer) for part in parts]
            for epoch in range(options.epochs):
                for n in torch.randperm(len(read), generator=generator).tolist():
                    delta.grad = read[n].gradient(module, delta)
                    adam.step()
                    delta *= 1 - options.decay
                    if options.limit:
                        delta.clamp_(-options.limit * scale, options.limit * scale)
                    progress(len(parts[n]) if epoch == options.epochs - 1 else 0)
        return {self.layer: (None, delta)}


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


@dataclass(frozen=True)
class RomeOptions:
    """What ``--set rome.NAME=VALUE`` takes: as for ``edit``; the middle one of ``layers`` is edited."""

    layers: str = "auto"
    text: str = "own"
    tokens: int = 0


class Rome(Baseline):
    """One fact after the other, each an exact rank-one change of one layer (ROME; Meng et al. 2022)."""

    name = "rome"
    prefixes = 5

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        super().__init__(base, settings, work)
        self.options = parse_options(RomeOptions, self.name, settings.options)
        if not (work / CARD).is_file():  # what was learnt has its text with it
            check_text(self.options.text, self.name)
        layers = choose_layers(base, self.options.layers, self.name)
        self.layer = layers[len(layers) // 2]
        self.layers = (self.layer,)
        self.rows: list[list[int]] = []

    def learn(self, ledger: Ledger, progress: Progress = _NOTHING) -> LearnReport:
        """Write all facts of the ledger that hold; keeps the text for C."""
        texts = ordinary_text(self.options.text, self.name, (document.text for document in ledger.documents()))
        self.rows = moment_rows(self.base, texts, self.options.tokens, self.settings.seed)
        return super().learn(ledger, progress)

    def _tensors(self) -> dict[str, Tensor]:
        return super()._tensors() | {"text": text_tensor(self.rows)}

    def _load(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super()._load(record, tensors)
        self.rows = text_rows_of(tensors["text"])

    def _solve(self, prepared: Sequence[Prepared], progress: Progress) -> Deltas:
        moments = second_moments(self.base, [self.layer], self.rows)
        writer = Writer(self.base, moments, WriteOptions(constraint="equality"))
        made_with = [__version__, self.base.hash, str(self.base.dtype), self.layer, digest_of([text_tensor(self.rows)])]
        mark = fingerprint(*made_with, self.settings.seed, [one.fact.model_dump_json() for one in prepared])
        store = self.work / "rome" / f"{mark}.safetensors"
        done, deltas, self._earlier = _begun(store, self.layer)
        progress(done)
        began = saved = time.perf_counter()
        for number, one in enumerate(prepared[done:], done + 1):
            with changed_by(self.base, deltas):
                z = find_targets(self.base, [one], self.layer, TargetOptions()).z
                deltas = stacked(deltas, writer.write([one], z).deltas)
            progress(1)
            now = time.perf_counter()
            if now - saved > SAVE_EVERY or number == len(prepared):
                with replacing(store) as path:
                    factors = zip(("left", "right"), deltas[self.layer], strict=True)
                    there = {name: factor.contiguous() for name, factor in factors if factor is not None}
                    save_file(there, path, {"done": str(number), "seconds": str(self._earlier + now - began)})
                saved = now
        return deltas


def _begun(store: Path, layer: int) -> tuple[int, Deltas, float]:
    """How many facts an earlier run has written, its change, and the seconds that took."""
    try:
        with safe_open(store, "pt") as file:
            there = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            about = file.metadata()
            return int(about["done"]), {layer: (there.get("left"), there["right"])}, float(about["seconds"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return 0, {}, 0.0  # not there, or not whole
