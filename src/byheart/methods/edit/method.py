"""The method ``edit``: MEMIT from a ledger's facts, kept as facts with targets, so that any of them can go again."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from byheart.base import Base
from byheart.errors import DataError
from byheart.ledger import Change, Ledger
from byheart.methods.contract import LearnReport, Progress, Settings, parse_options
from byheart.methods.edit import guard
from byheart.methods.edit.covariance import ordinary_text, second_moments, token_count
from byheart.methods.edit.layers import choose_layers
from byheart.methods.edit.prompts import Prepared, choose_facts, make_prefixes, prepare
from byheart.methods.edit.solve import Spread
from byheart.methods.edit.targets import Stop, TargetOptions, find_targets
from byheart.methods.edit.weights import ChangedWeights, delta_bytes, stacked
from byheart.methods.edit.write import Constraint, WriteOptions, Writer
from byheart.rows import Fact
from byheart.storage import replacing

# Facts whose targets are sought before they are put on disk: what a kill can cost.
_STEP = 64


@dataclass(frozen=True)
class EditOptions:
    """What ``--set edit.NAME=VALUE`` takes.

    Attributes:
        layers: ``FIRST-LAST``, or ``auto``: what ``byheart trace`` found for this model, else a share of the depth.
        prefixes: texts of the model's own that each prompt is also edited behind.
        paraphrases: edit behind the facts' own paraphrases, too, where the ledger has any.
        text: ordinary text for the second moment: ``own`` (the model writes it), ``ledger`` (its documents) or a file.
        tokens: of that text, as a multiple of d_ff; 0: 40 of a given text, 10 where the model must write it.
        merge: write facts about one subject as one change (MEMIT-Merge).
        batch: facts to take at once; 0: all of them.
        sequence: ``joint`` solves all facts, old and new, together whenever some come or go, so that the order in
            which they came leaves no trace; ``accumulate`` adds each batch to what is there (as published).
        gate: what to do where the change drifts too far: ``off`` (do not look), ``warn``, or ``rollback``.
        max_perplexity, max_neighbours: how much perplexity on ordinary text may rise and right answers about
            neighbours may fall, as shares.
    """

    layers: str = "auto"
    prefixes: int = 5
    paraphrases: bool = True
    steps: int = TargetOptions.steps
    lr: float = TargetOptions.lr
    clamp: float = TargetOptions.clamp
    kl: float = TargetOptions.kl
    weight_decay: float = TargetOptions.weight_decay
    stop: Stop = TargetOptions.stop
    stop_loss: float = TargetOptions.stop_loss
    anchor: bool = TargetOptions.anchor
    weight: float = WriteOptions.weight
    spread: Spread = WriteOptions.spread
    constraint: Constraint = WriteOptions.constraint
    energy: float = WriteOptions.energy
    text: str = "own"
    tokens: int = 0
    merge: bool = True
    batch: int = 0
    sequence: Literal["joint", "accumulate"] = "joint"
    gate: Literal["off", "warn", "rollback"] = "off"
    max_perplexity: float = 0.10
    max_neighbours: float = 0.05

    def targets(self) -> TargetOptions:
        """The part that the search for targets takes."""
        return TargetOptions(**{name: getattr(self, name) for name in TargetOptions.__dataclass_fields__})

    def writing(self) -> WriteOptions:
        """The part that writing takes."""
        return WriteOptions(**{name: getattr(self, name) for name in WriteOptions.__dataclass_fields__})


class Edit(ChangedWeights):
    """Facts in the MLPs of a range of layers (MEMIT; Meng et al. 2023).

    What is learnt is a set of facts, each with its target z; the weights follow from the set. Adding, replacing and
    removing a fact solve anew from stored targets, so undoing a fact gives the weights that never knew it.
    """

    name = "edit"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        super().__init__(base, settings, work)
        self.options = parse_options(EditOptions, self.name, settings.options)
        self.layers = choose_layers(base, self.options.layers)
        self.facts: list[Fact] = []
        self.z = torch.zeros(0, base.parts.d_model)
        self.keys: dict[int, Tensor] = {}
        self.prefixes: tuple[str, ...] = ()
        self.skipped: dict[str, str] = {}
        self._texts: list[str] | None = None
        self._writer: Writer | None = None

    # -- the contract ----------------------------------------------------------------------------------------

    def learn(self, ledger: Ledger, progress: Progress = lambda count: None) -> LearnReport:
        """Write all facts of the ledger that hold."""
        super().learn(ledger)
        began = time.perf_counter()
        if self.options.text == "ledger":
            self._texts = [document.text for document in ledger.documents()]
        facts, self.skipped = choose_facts(ledger.facts())
        self.prefixes = make_prefixes(self.base, self.options.prefixes, self.settings.seed)
        notes: tuple[str, ...] = ()
        size = self.options.batch or max(len(facts), 1)
        for start in range(0, len(facts), size):
            notes = self._add(facts[start : start + size], progress)
        return self._report(time.perf_counter() - began, notes)

    def revise(self, change: Change) -> LearnReport:
        """Follow one change of a fact: seek a target for a new one, drop that of an old one, and solve again."""
        began = time.perf_counter()
        if change.kind != "fact":
            return LearnReport()
        if change.before is not None:
            self._drop({change.id})
        new = [change.after] if isinstance(change.after, Fact) else []
        facts, skipped = choose_facts([*self.facts, *new])
        self.skipped = {id: why for id, why in (self.skipped | skipped).items() if id != change.id or id in skipped}
        self._drop(set(skipped) - {change.id})
        notes = self._add([fact for fact in facts if fact.id == change.id], lambda count: None)
        return self._report(time.perf_counter() - began, notes)

    def undo(self, ids: Sequence[str]) -> LearnReport:
        """Take facts out again, without seeking any target anew.

        Raises:
            DataError: where one of them was not written; nothing changes then.
        """
        began = time.perf_counter()
        for id in ids:
            if id not in {fact.id for fact in self.facts}:
                why = f" (skipped when it was learnt: {self.skipped[id]})" if id in self.skipped else ""
                raise DataError(f'edit: holds no fact "{id}"{why}')
        self._drop(set(ids))
        self._solve()
        return self._report(time.perf_counter() - began, ())

    # -- adding and taking away ------------------------------------------------------------------------------

    def _add(self, facts: Sequence[Fact], progress: Progress) -> tuple[str, ...]:
        before = (self.facts, self.z, self.keys, self.deltas)
        prepared, skipped = self._prepare(facts)
        self.skipped |= skipped
        progress(len(skipped))
        if self.options.sequence == "accumulate" and self.facts:
            with self.attached():
                z = self._targets(prepared, progress)
                written = self._write(prepared, z, self.keys)
            self._take(prepared, z)
            self.deltas = stacked(self.deltas, written.deltas)
            self.keys = {layer: torch.cat([self.keys[layer], new]) for layer, new in written.keys.items()}
        else:
            self._take(prepared, self._targets(prepared, progress))
            self._solve()
        return self._guarded(before, [one.fact for one in prepared])

    def _guarded(self, before: tuple[Any, ...], new: Sequence[Fact]) -> tuple[str, ...]:
        """What the guard rails say; takes the new facts out again where the gate is to, and the edit went too far."""
        options, notes = self.options, self._collisions()
        if options.gate == "off" or not new:
            return notes
        standing = guard.measure(self.base, self.facts, self.settings.seed)
        with self.attached():
            after = guard.measure(self.base, self.facts, self.settings.seed)
        said, within = guard.drift_notes(standing, after, options.max_perplexity, options.max_neighbours)
        notes += (said,)
        if not within and options.gate == "rollback":
            self.facts, self.z, self.keys, self.deltas = before
            self.skipped |= {fact.id: "rolled back by the gate" for fact in new}
            notes += (f"past the gate's limits: {len(new)} facts rolled back",)
        elif not within:
            notes += ("warning: past the gate's limits; --gate rolls such an edit back",)
        return notes

    def _collisions(self) -> tuple[str, ...]:
        if self._writer is None or not self.keys:
            return ()
        first = self.layers[0]
        return guard.collision_notes(guard.collisions(self.facts, self.keys[first], self._writer.factor(first)))

    def _prepare(self, facts: Sequence[Fact]) -> tuple[list[Prepared], dict[str, str]]:
        return prepare(self.base.tokenizer, facts, self.prefixes, paraphrases=self.options.paraphrases)

    def _take(self, prepared: Sequence[Prepared], z: Tensor) -> None:
        self.facts = [*self.facts, *(one.fact for one in prepared)]
        self.z = torch.cat([self.z.to(z), z])

    def _drop(self, ids: set[str]) -> None:
        kept = [place for place, fact in enumerate(self.facts) if fact.id not in ids]
        self.facts = [self.facts[place] for place in kept]
        self.z = self.z[kept]

    def _solve(self) -> None:
        """The weights that follow from the facts and their targets."""
        self.deltas, self.keys = {}, {}
        if self.facts:
            prepared, _ = self._prepare(self.facts)
            written = self._write(prepared, self.z, None)
            self.deltas, self.keys = written.deltas, written.keys

    def _targets(self, prepared: Sequence[Prepared], progress: Progress) -> Tensor:
        """Targets of facts, those that an earlier run left in the working folder among them."""
        options = self.options.targets()
        groups = self._groups([one.fact for one in prepared])
        mark = [
            self.base.hash,
            str(self.base.dtype),
            asdict(options),
            self.layers[-1],
            self.prefixes,
            self.options.paraphrases,
        ]
        if self.options.sequence == "accumulate":
            mark.append([fact.model_dump_json() for fact in self.facts])
        store = self.work / "edit" / f"{_short_hash(mark)}.safetensors"
        known = _read_tensors(store)
        together: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            together.setdefault(group, []).append(place)
        names = {
            group: _short_hash([prepared[n].fact.model_dump_json() for n in places])
            for group, places in together.items()
        }
        missing = [group for group in together if names[group] not in known]
        progress(sum(len(places) for group, places in together.items() if names[group] in known))
        # Like lengths together: a batch is padded to its longest row.
        missing.sort(key=lambda group: max(len(row.tail) for n in together[group] for row in prepared[n].rows))
        for start in range(0, len(missing), _STEP):
            some = missing[start : start + _STEP]
            places = [n for group in some for n in together[group]]
            found = find_targets(
                self.base,
                [prepared[n] for n in places],
                self.layers[-1],
                options,
                [groups[n] for n in places],
                progress,
            )
            rows = iter(found.z)
            known |= {names[group]: torch.stack([next(rows) for _ in together[group]]) for group in some}
            with replacing(store) as path:
                save_file(known, path)
        z = torch.zeros(len(prepared), self.base.parts.d_model, dtype=self.z.dtype)
        for group, places in together.items():
            z[places] = known[names[group]].to(z)
        return z

    def _write(self, prepared: Sequence[Prepared], z: Tensor, past: dict[int, Tensor] | None) -> Any:
        if self._writer is None:
            texts = ordinary_text(self.options.text, self.name, self._texts)
            tokens = token_count(self.base, self.options.tokens, texts)
            moments = second_moments(self.base, self.layers, texts, tokens, self.settings.seed)
            self._writer = Writer(self.base, moments, self.options.writing())
        written = self._writer.write(prepared, z, self._groups([one.fact for one in prepared]), past)
        # As they will be kept, so that what was saved and what was not give the same weights.
        return replace(
            written,
            deltas={
                n: (None if left is None else left.float(), right.float())
                for n, (left, right) in written.deltas.items()
            },
            keys={layer: keys.float() for layer, keys in written.keys.items()},
        )

    def _groups(self, facts: Sequence[Fact]) -> list[int]:
        if not self.options.merge:
            return list(range(len(facts)))
        numbers: dict[str, int] = {}
        return [numbers.setdefault(fact.subject.strip(), len(numbers)) for fact in facts]

    def _report(self, seconds: float, notes: tuple[str, ...]) -> LearnReport:
        return LearnReport(
            seconds=seconds,
            bytes=delta_bytes(self.deltas),
            facts=len(self.facts),
            skipped=dict(Counter(self.skipped.values())),
            notes=notes,
        )

    # -- keeping ---------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        return {"z": self.z} | {f"keys.{layer}": keys for layer, keys in self.keys.items()}

    def _record(self) -> dict[str, Any]:
        return {
            "options": asdict(self.options),
            "range": list(self.layers),
            "prefixes": list(self.prefixes),
            "facts": [fact.model_dump(mode="json", exclude_defaults=True) for fact in self.facts],
            "skipped": self.skipped,
        }

    def _load(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.layers = tuple(record["range"])
        self.prefixes = tuple(record["prefixes"])
        self.facts = [Fact.model_validate(fact) for fact in record["facts"]]
        self.skipped = record["skipped"]
        self.z = tensors["z"]
        self.keys = {layer: tensors[f"keys.{layer}"] for layer in record["layers"]}


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
        return found
    except (OSError, SafetensorError):
        return {}
