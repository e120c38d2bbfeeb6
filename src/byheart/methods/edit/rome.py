"""ROME: one fact after the other, each an exact rank-one change of one layer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from byheart import __version__
from byheart.base import Base, digest_of
from byheart.ledger import Ledger
from byheart.methods.contract import LearnReport, Settings, parse_options
from byheart.methods.edit.baselines import Baseline
from byheart.methods.edit.covariance import moment_rows, second_moments
from byheart.methods.edit.layers import choose_layers
from byheart.methods.edit.prompts import Prepared
from byheart.methods.edit.targets import TargetOptions, find_targets
from byheart.methods.edit.weights import Deltas, changed_by, stacked
from byheart.methods.edit.write import WriteOptions, Writer
from byheart.ordinary import check_text, ordinary_text, text_rows_of, text_tensor
from byheart.progress import Progress, untold
from byheart.storage import CARD, SAVE_EVERY, fingerprint, replacing


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
        self.layers = (layers[len(layers) // 2],)
        self.rows: list[list[int]] = []

    def learn(self, ledger: Ledger, progress: Progress = untold) -> LearnReport:
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
        (layer,) = self.layers
        moments = second_moments(self.base, [layer], self.rows)
        writer = Writer(self.base, moments, WriteOptions(constraint="equality"))
        made_with = [__version__, self.base.hash, str(self.base.dtype), layer, digest_of([text_tensor(self.rows)])]
        mark = fingerprint(*made_with, self.settings.seed, [one.fact.model_dump_json() for one in prepared])
        store = self.work / "rome" / f"{mark}.safetensors"
        done, deltas, self._earlier = _begun(store, layer)
        progress(done)
        began = saved = time.perf_counter()
        for number, one in enumerate(prepared[done:], done + 1):
            with changed_by(self.base, deltas):
                z = find_targets(self.base, [one], layer, TargetOptions()).z
                deltas = stacked(deltas, writer.write([one], z).deltas)
            progress(1)
            now = time.perf_counter()
            if now - saved > SAVE_EVERY or number == len(prepared):
                with replacing(store) as path:
                    factors = zip(("left", "right"), deltas[layer], strict=True)
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
