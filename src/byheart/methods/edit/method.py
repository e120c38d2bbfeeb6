"""The method ``edit``: MEMIT from a ledger's facts, kept as facts with targets, so that any of them can go again."""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from byheart.attention import fast_attention
from byheart.base import Base, digest_of
from byheart.errors import DataError, UsageError
from byheart.ledger import Ledger
from byheart.methods.contract import LearnReport, Settings, parse_options
from byheart.methods.edit import guard
from byheart.methods.edit.covariance import moment_rows, second_moments
from byheart.methods.edit.layers import choose_layers
from byheart.methods.edit.options import EditOptions
from byheart.methods.edit.others import about_others, names_in
from byheart.methods.edit.prompts import Prepared, make_prefixes, prepare
from byheart.methods.edit.settle import VERSION, settle, text_pieces
from byheart.methods.edit.targets import VERSION as TARGETS_VERSION
from byheart.methods.edit.targets import TargetOptions, find_targets
from byheart.methods.edit.weights import ChangedWeights, changed_by, stacked
from byheart.methods.edit.write import Reader, WriteOptions, Writer, Written
from byheart.methods.facts import choose_facts
from byheart.ordinary import check_text, ordinary_text, text_rows_of, text_tensor
from byheart.progress import Progress, scaled, untold
from byheart.rows import Fact
from byheart.storage import CARD, fingerprint, replacing

_REFUSED = "rolled back by the gate"
_PAST = "past the gate's limits"
_ANEW = (
    "sequence=accumulate: what comes or goes changes what is there (a change that is shared, a fact that is "
    "contradicted), so that all facts were solved anew, together"
)
# Facts whose targets are sought before they are put on disk: what a kill can cost.
_STEP = 32
# Rows of ordinary text that facts are settled beside; and names, out of so many rows.
_TEXT, _NAMES, _NAMED = 120, 4000, 4000
# What is not said once all facts have settled does so again, so often at most.
_AGAIN = 4
# Others that a fact's prompt is put about when it is written; with two, paraphrases gain nothing
# (docs/trials.md).
_OTHERS = 8
# What follows from the facts that hold; all of it changes, or nothing does.
_STATE = ("holding", "facts", "z", "shifts", "keys", "deltas", "skipped")


class Edit(ChangedWeights):
    """Facts in the MLPs of a range of layers (MEMIT; Meng et al. 2023).

    What is learnt is a set of facts, each with its target z and, once all have settled, with what it adds at every
    layer; the weights follow from these. Adding, replacing and removing a fact solve anew from what is stored. Without
    settling all of it depends on the fact alone, so that undoing a fact gives the weights that never knew it.
    """

    name = "edit"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        super().__init__(base, settings, work)
        self.options = parse_options(EditOptions, self.name, settings.options)
        self.options.check()
        if not (work / CARD).is_file():  # what was learnt is opened, whatever it was learnt with
            self.options.check_needs(settings.options)
            check_text(self.options.text, self.name)
        self.layers = choose_layers(base, self.options.layers)
        self.z = torch.zeros(0, base.parts.d_model)
        # By fact and layer, what settling added to the residuals that the targets give.
        self.shifts = torch.zeros(0, len(self.layers), base.parts.d_model)
        self.text: list[list[int]] = []
        self.names: list[str] = []
        self.keys: dict[int, Tensor] = {}
        self.prefixes: tuple[str, ...] = ()
        self.rows: list[list[int]] = []  # of the second moment's text
        self._source = ""  # what tells them from others
        self._writer: Writer | None = None
        self._earlier: dict[str, float] = {}  # by file of targets, the seconds that earlier runs took for it

    # -- the contract ----------------------------------------------------------------------------------------

    def estimate(self, ledger: Ledger) -> str | None:
        """Which facts will get in each other's way."""
        self._begin(ledger)
        prepared, _ = self._prepare(choose_facts(ledger.facts(), dt.date.today())[0])
        if len(prepared) < 2:
            return None
        first = self.layers[0]
        with fast_attention(self.base.model), torch.no_grad():
            keys = Reader(self.base, prepared, first, first).read(first)[0]
        notes = self._collisions([one.fact for one in prepared], keys)
        return f"{self.name}: {notes[0]}" if notes else None

    def _begin(self, ledger: Ledger) -> None:
        """The text of the second moment, and the texts that prompts stand behind."""
        if not self.rows or self.options.text == "ledger":  # any other text is the same for every ledger
            texts = ordinary_text(self.options.text, self.name, (document.text for document in ledger.documents()))
            self._take(moment_rows(self.base, texts, self.options.tokens, self.settings.seed))
            if self.options.settle or self._beside:
                self.names = names_in(map(self.base.tokenizer.decode, self.rows[:_NAMED]), _NAMES, self.settings.seed)
        self.prefixes = self.prefixes or make_prefixes(self.base, self.options.prefixes, self.settings.seed)

    def _take(self, rows: list[list[int]]) -> None:
        self.rows, self._source, self._writer = rows, fingerprint(rows), None
        self.text = text_pieces(rows[:_TEXT])

    def learn(self, ledger: Ledger, progress: Progress = untold) -> LearnReport:
        """Write all facts of the ledger that hold."""
        super().learn(ledger)
        began = time.perf_counter()
        self._begin(ledger)
        self.holding, self.facts, self.keys, self.deltas = [], [], {}, {}
        self.skipped, self._earlier = {}, {}
        self.z, self.shifts = self.z[:0], self.shifts[:0]
        facts = list(ledger.facts())
        notes: list[str] = []
        size = self.options.batch or max(len(facts), 1)
        for start in range(0, len(facts), size):
            found = self._follow([*self.holding, *facts[start : start + size]], progress)
            # Of what was seen on the way, only what went too far, and that all was solved anew, is still news.
            notes = [note for note in notes if _PAST in note or note == _ANEW] if found else notes
            number = f"batch {start // size + 1}: " if size < len(facts) else ""
            notes += [f"{number}{note}" if _PAST in note else note for note in found]
        progress(len(self.skipped))
        return self._report(time.perf_counter() - began, tuple(dict.fromkeys(notes)))

    def _hold(self, facts: Sequence[Fact], changed: Collection[str]) -> LearnReport:
        """All are solved for again, with targets sought for what is new.

        Old ones that no longer hold beside it are settled with it.
        """
        began = time.perf_counter()
        self.skipped = {id: why for id, why in self.skipped.items() if id not in changed}
        before = {name: vars(self)[name] for name in _STATE}
        try:
            notes = self._let_in_what_is_due(changed) if self.options.gate == "rollback" else ()
            notes += self._follow([fact for fact in facts if fact.id in changed or fact.id not in self._refused])
        except BaseException:
            vars(self).update(before)
            raise
        return self._report(time.perf_counter() - began, notes)

    def _let_in_what_is_due(self, changed: Collection[str]) -> tuple[str, ...]:
        """Write what waited for a day that has come, one fact after the other, so that a gate judges each by itself.

        Args:
            changed: facts that are not looked at here, since they are no longer what they were.
        """
        written = {fact.id for fact in self.facts}
        prepared, _ = self._prepare(choose_facts(self.holding, dt.date.today())[0])
        due = [one.fact for one in prepared if one.fact.id not in written and one.fact.id not in changed]
        there = [fact for fact in self.holding if fact.id in written]
        notes: tuple[str, ...] = ()
        for fact in due:
            found = self._follow([*there, fact])
            notes += tuple(f"fact {fact.id}: {note}" for note in found if _PAST in note)
            there = self.holding
        return notes

    @property
    def _refused(self) -> set[str]:
        """The ids of the facts that a gate did not let in."""
        return {id for id, why in self.skipped.items() if why == _REFUSED}

    def undo(self, ids: Sequence[str], *, settle: bool = False) -> LearnReport:
        """Take facts out again.

        No target is sought anew, but for facts that were written as one with an undone one (``merge``) or after it, in
        the model that had it (``sequence=accumulate``), and for those that were held back by it; the report names the
        latter.

        Args:
            settle: settle those again that the model no longer says. What settling moves knows of all facts, and with
                many of them gone some of the others are said no more.

        Raises:
            DataError: where one of them was not written; nothing changes then.
            UsageError: for ``settle`` where nothing settles (``settle=0``).
        """
        if settle and not self.options.settle:
            raise UsageError("--settle: this edit was learnt with edit.settle=0, so that nothing in it settles")
        began = time.perf_counter()
        for id in ids:
            if id not in {fact.id for fact in self.facts}:
                why = f" (skipped when it was learnt: {self.skipped[id]})" if id in self.skipped else ""
                raise DataError(f'edit: holds no fact "{id}"{why}')
        before, waited = {fact.id for fact in self.facts}, self.skipped
        notes = self._follow([fact for fact in self.holding if fact.id not in ids], untold, settle)
        come = [
            f"{fact.id} (until now: {waited.get(fact.id, 'left out')})" for fact in self.facts if fact.id not in before
        ]
        if come:
            notes += (f"written now: {', '.join(come)}",)
        return self._report(time.perf_counter() - began, notes)

    # -- following a set of facts ----------------------------------------------------------------------------

    def _follow(
        self, holding: Sequence[Fact], progress: Progress = untold, check: bool = False
    ) -> tuple[str, ...]:  # fmt: skip
        """Make these the facts that hold: targets for what is new, then the weights. All of it or nothing.

        Args:
            check: settle what is no longer said, though nothing is new.
        """
        before = {name: vars(self)[name] for name in _STATE}
        try:
            chosen, skipped = choose_facts(holding, dt.date.today())
            prepared, more = self._prepare(chosen)
            known = dict(zip(self._marks(self.facts), zip(self.z, self.shifts, strict=True), strict=True))
            marks = self._marks([one.fact for one in prepared])
            added = self.options.sequence == "accumulate" and bool(self.facts) and known.keys() <= set(marks)
            if self.options.sequence == "accumulate":  # what was sought in a model with one that is gone is sought anew
                known = dict(takewhile(lambda item: item[0] in marks, known.items()))
                # And so is all that shares a change with what is.
                grouped = list(zip(marks, self._groups([one.fact for one in prepared]), strict=True))
                broken = {group for mark, group in grouped if mark not in known}
                known = {mark: known[mark] for mark, group in grouped if group not in broken}
            new = {mark: one for mark, one in zip(marks, prepared, strict=True) if mark not in known}
            progress = scaled(progress, 1 + self.options.settle, 1)
            anew = self.options.sequence == "accumulate" and bool(self.facts) and bool(marks) and not added
            if added:
                self._accumulate(list(new.values()), progress)
            else:
                z = self._targets(list(new.values()), progress)
                known |= zip(new, zip(z, self._unshifted(len(z)), strict=True), strict=True)
                self.z = torch.stack([known[mark][0] for mark in marks]) if marks else self.z[:0]
                shifts = torch.stack([known[mark][1] for mark in marks]) if marks else self.shifts[:0]
                places = {n for n, mark in enumerate(marks) if mark in new}
                self.shifts, written = self._settled(prepared, self.z, shifts, places, progress, check=anew or check)
                self.deltas, self.keys = written.deltas, written.keys
                self.facts = [one.fact for one in prepared]
            there = {fact.id for fact in holding}
            refused = dict.fromkeys(self._refused - there, _REFUSED)
            self.holding, self.skipped = list(holding), refused | skipped | more
            had = {fact.id: fact for fact in before["facts"]}
            notes = self._guarded(before, [one.fact for one in new.values() if had.get(one.fact.id) != one.fact])
            return (_ANEW, *notes) if anew else notes
        except BaseException:
            vars(self).update(before)
            raise

    def _accumulate(self, new: Sequence[Prepared], progress: Progress) -> None:
        """Add facts as published: sought and solved on the changed model, with the keys of earlier ones held."""
        if not new:
            return
        self._ready()  # the second moment is that of the base, whatever is attached
        with self.attached():
            z = self._targets(new, progress, self._standing(self.facts, self.z, self.shifts))
            shifts, written = self._settled(new, z, self._unshifted(len(z)), set(range(len(new))), progress, self.keys)
        self.facts = [*self.facts, *(one.fact for one in new)]
        self.z, self.shifts = torch.cat([self.z, z]), torch.cat([self.shifts, shifts])
        self.deltas = stacked(self.deltas, written.deltas)
        self.keys = {layer: torch.cat([self.keys[layer], some]) for layer, some in written.keys.items()}

    def _unshifted(self, facts: int) -> Tensor:
        return torch.zeros(facts, len(self.layers), self.base.parts.d_model)

    def _settled(
        self, prepared: Sequence[Prepared], z: Tensor, shifts: Tensor, new: set[int], progress: Progress,
        past: dict[int, Tensor] | None = None, *, check: bool = False,
    ) -> tuple[Tensor, Written]:  # fmt: skip
        """What each fact is to add beyond what its target says, and what is written with it.

        New facts are settled beside all others, and with them those of the others that no longer hold, and whatever
        shares a change with these, several times with other draws, of which the mean is taken; then again what does not
        hold by then, as long as that is not the same as before. What leaves the fewest is kept.

        Args:
            check: see to those that no longer hold where none is new, too.
        """
        if not prepared:
            return shifts, Written()
        written = self._write(prepared, z, shifts, past)
        if not self.options.settle or not (new or check):
            return shifts, written
        facts = [one.fact for one in prepared]
        groups = self._groups(facts)
        fresh, lost = new, self._lost(facts, written, new)
        if not fresh and not lost:
            return shifts, written
        best = None if fresh else (lost, shifts, written)
        for _ in range(1 + _AGAIN):
            chosen = {groups[n] for n in fresh | lost}
            places = [n for n, group in enumerate(groups) if group in chosen]
            options = asdict(self.options) | {"text": self._source}  # what it says, and not where it lies
            runs = options.pop("settle_runs")
            runs = runs if fresh else 1
            made_with = [
                VERSION, self.base.hash, str(self.base.dtype), options, self.layers, self.prefixes,
                self._standing(facts, z, shifts), places,
                self._standing(self.facts, self.z, self.shifts) if past else None, sorted(fresh),
            ]  # fmt: skip
            tell, found = scaled(progress, runs * len(places), len(fresh)), []
            for run in range(runs):
                seed = f"{self.settings.seed}+{run}" if run else str(self.settings.seed)
                store = self.work / "edit" / f"settling-{fingerprint(*made_with, seed)}.safetensors"
                began = time.perf_counter()
                moved, trained = settle(
                    self.base, prepared, written, groups, places, fresh, self.text, self.names, self.options, seed,
                    store, tell,
                )  # fmt: skip
                self._earlier[store.name] = max(0.0, trained.seconds - (time.perf_counter() - began))
                found.append(moved)
            shifts = shifts + torch.stack(found).mean(0)[groups]
            written = _as_kept(written.shifted(shifts, groups))
            before, fresh, lost = None if fresh else lost, set(), self._lost(facts, written)
            if best is None or len(lost) < len(best[0]):
                best = lost, shifts, written
            if not lost or lost == before:
                break
        assert best is not None
        return best[1:]

    def _lost(self, facts: Sequence[Fact], written: Written, new: Collection[int] = ()) -> set[int]:
        """The places of facts that the model does not say with these written, new ones not among them."""
        old = {n: fact for n, fact in enumerate(facts) if n not in new}
        with changed_by(self.base, written.deltas):
            lost = {fact.id for fact in guard.unsaid(self.base, list(old.values()))}
        return {n for n, fact in old.items() if fact.id in lost}

    def _standing(self, facts: Sequence[Fact], z: Tensor, shifts: Tensor) -> list[Any]:
        """What a model with these facts written follows from, besides what targets depend on anyway."""
        written = {name: getattr(self.options, name) for name in WriteOptions.__dataclass_fields__}
        told = [f.model_dump_json() for f in facts]
        return [told, digest_of([z, shifts]), written, self.options.merge, self.layers, self._source]

    def _marks(self, facts: Sequence[Fact]) -> list[str]:
        """What each fact's target depends on: the fact, and those that share a change with it."""
        members: dict[int, list[str]] = {}
        groups = self._groups(facts)
        for fact, group in zip(facts, groups, strict=True):
            members.setdefault(group, []).append(fact.model_dump_json())
        whole = {group: sorted(texts) for group, texts in members.items()}
        return [fingerprint(fact.model_dump_json(), whole[g]) for fact, g in zip(facts, groups, strict=True)]

    def _guarded(self, before: dict[str, Any], new: Sequence[Fact]) -> tuple[str, ...]:
        """What the gate says; goes back where it is to, and the edit went too far."""
        options = self.options
        if options.gate == "off":
            return ()
        if not new:
            return self._unsaid_notes()
        rows = guard.text(self.base, self.settings.seed)
        standing = guard.measure(self.base, rows, self.facts, self.settings.seed)
        with self.attached():
            after = guard.measure(self.base, rows, self.facts, self.settings.seed)
        said, within = guard.drift_notes(standing, after, options.max_perplexity, options.max_neighbours)
        if not within and options.gate == "rollback":
            refused = {fact.id: _REFUSED for fact in new}
            rest = [fact for fact in self.holding if fact.id not in refused]
            vars(self).update(before)
            # What was taken out stays out, and what waits goes on waiting.
            notes = self._follow(rest) if rest != self.holding else self._unsaid_notes()
            self.skipped = self.skipped | refused
            return (*notes, f"{_PAST} ({said}): {len(new)} fact{'s' * (len(new) > 1)} rolled back")
        if not within:
            said = f"warning: {_PAST} ({said}); --gate rolls such an edit back"
        return (*self._unsaid_notes(), said)

    def _unsaid_notes(self) -> tuple[str, ...]:
        """Which of the facts that are written the model does not say."""
        with self.attached():
            return guard.unsaid_notes(guard.unsaid(self.base, self.facts), len(self.facts))

    def _collisions(self, facts: Sequence[Fact], keys: Tensor | None) -> tuple[str, ...]:
        """Which facts have nearly the same key at the first layer."""
        if keys is None:
            return ()
        factor = self._ready().factor(self.layers[0])
        return guard.collision_notes(*guard.collisions(facts, keys, factor, self._groups(facts)))

    def _prepare(self, facts: Sequence[Fact]) -> tuple[list[Prepared], dict[str, str]]:
        return prepare(self.base, facts, self.prefixes, paraphrases=self.options.paraphrases)

    def _targets(self, prepared: Sequence[Prepared], progress: Progress, standing: Sequence[Any] = ()) -> Tensor:
        """Targets of facts, those that an earlier run left in the working folder, under their marks, among them.

        Args:
            standing: what else they depend on: what the model was changed by before.
        """
        marks = self._marks([one.fact for one in prepared])
        sought = {name: getattr(self.options, name) for name in TargetOptions.__dataclass_fields__}
        made_with = [
            TARGETS_VERSION, self.base.hash, str(self.base.dtype), sought, self.layers[-1], self.prefixes,
            self.options.paraphrases,
        ]  # fmt: skip
        store = self.work / "edit" / f"{fingerprint(*made_with, *standing)}.safetensors"
        known = _read_tensors(store)
        taken = sum(float(known[name]) for mark in marks if (name := f"seconds {mark}") in known)
        self._earlier[store.name] = self._earlier.get(store.name, 0.0) + taken
        groups = self._groups([one.fact for one in prepared])
        missing: dict[int, list[int]] = {}
        for place, (mark, group) in enumerate(zip(marks, groups, strict=True)):
            if mark not in known:
                missing.setdefault(group, []).append(place)
        progress(len(prepared) - sum(map(len, missing.values())))
        # Like lengths together: a batch is padded to its longest row.
        ordered = sorted(missing.values(), key=lambda some: max(len(r.tail) for n in some for r in prepared[n].rows))
        for start in range(0, len(ordered), _STEP):
            places = [n for some in ordered[start : start + _STEP] for n in some]
            began = time.perf_counter()
            some, of = [prepared[n] for n in places], [groups[n] for n in places]
            z = find_targets(self.base, some, self.layers[-1], self.options, of, progress).z
            each = (time.perf_counter() - began) / len(places)
            known |= {marks[n]: row for n, row in zip(places, z, strict=True)}
            known |= {f"seconds {marks[n]}": torch.tensor([each]) for n in places}
            with replacing(store) as path:
                save_file(known, path)
        return torch.stack([known[mark].to(self.z) for mark in marks]) if marks else self.z[:0]

    def _write(
        self, prepared: Sequence[Prepared], z: Tensor, shifts: Tensor, past: dict[int, Tensor] | None
    ) -> Written:
        facts = [one.fact for one in prepared]
        groups = self._groups(facts)
        others: list[list[Prepared]] = []
        if self._beside:
            # Drawn apart from those that settling then looks behind: it is to see what these leave.
            seed = f"{self.settings.seed}/written"
            some = about_others(facts, [fact.subject for fact in facts], self.names, seed, _OTHERS)
            others = [prepare(self.base, of_one, ())[0] for of_one in some]
        return _as_kept(self._ready().write(prepared, z, groups, past, others).shifted(shifts, groups))

    @property
    def _beside(self) -> bool:
        """Whether others stand in the solve."""
        return self.options.others > 0 and self.options.constraint == "none"

    def _ready(self) -> Writer:
        """The writer, with the base's second moments; made once."""
        if self._writer is None:
            self._writer = Writer(self.base, second_moments(self.base, self.layers, self.rows), self.options)
        return self._writer

    def _groups(self, facts: Sequence[Fact]) -> list[int]:
        """Of each fact, the number of those that it shares a change with; in the order in which they first come."""
        if not self.options.merge:
            return list(range(len(facts)))
        numbers: dict[str, int] = {}
        return [numbers.setdefault(fact.subject.strip(), len(numbers)) for fact in facts]

    def _report(self, seconds: float, notes: tuple[str, ...]) -> LearnReport:
        seconds += sum(self._earlier.values())
        self._earlier = dict.fromkeys(self._earlier, 0.0)  # told once
        notes = (*self._collisions(self.facts, self.keys.get(self.layers[0])), *notes)
        return LearnReport(
            seconds=seconds,
            bytes=self.bytes,
            facts=len(self.facts),
            skipped=dict(Counter(self.skipped.values())),
            notes=notes,
        )

    # -- keeping ---------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        kept = {"z": self.z, "shifts": self.shifts, "text": text_tensor(self.rows)}
        return kept | {f"keys.{layer}": keys for layer, keys in self.keys.items()}

    def _record(self) -> dict[str, Any]:
        return {
            "options": asdict(self.options),
            "range": list(self.layers),
            "prefixes": list(self.prefixes),
            "names": self.names,
        } | super()._record()

    def _load(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.options = EditOptions(**record["options"])  # what it was made with, not what is usual today
        self.layers = tuple(record["range"])
        self.prefixes = tuple(record["prefixes"])
        super()._load(record, tensors)
        self._take(text_rows_of(tensors["text"]))
        self.z = tensors["z"]
        self.shifts = tensors["shifts"]
        self.names = record["names"]
        self.keys = {layer: tensors[f"keys.{layer}"] for layer in record["layers"]}


def _as_kept(written: Written) -> Written:
    """As it will be kept, so that what was saved and what was not give the same weights."""
    deltas = {n: (left if left is None else left.float(), right.float()) for n, (left, right) in written.deltas.items()}
    return replace(written, deltas=deltas, keys={layer: keys.float() for layer, keys in written.keys.items()})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
        return found
    except (OSError, SafetensorError):
        return {}
