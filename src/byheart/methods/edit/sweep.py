"""The layers to edit, found by editing: a few facts into each of a few ranges, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byheart import __version__
from byheart.base import Base
from byheart.decode import Job, complete
from byheart.methods.edit.common_facts import common_facts
from byheart.methods.edit.covariance import moment_rows, second_moments
from byheart.methods.edit.layers import WIDTH
from byheart.methods.edit.prompts import make_prefixes, prepare, prompt_text, target_text
from byheart.methods.edit.targets import TargetOptions, find_targets
from byheart.methods.edit.weights import changed_by
from byheart.methods.edit.write import WriteOptions, Writer
from byheart.progress import Silent
from byheart.rows import Fact
from byheart.score import harmonic_mean
from byheart.storage import fingerprint, resumed

FACTS = 16
# Where ranges begin, as shares of the depth.
STARTS = (0.0, 0.1, 0.2, 0.3, 0.4)


def sweep(
    base: Base, facts: Sequence[Fact], seed: int, store: Path, show: Silent
) -> tuple[int, int, list[dict[str, Any]]]:
    """The range that best takes up edits and leaves other facts alone.

    Each of a few facts is given the object of another with the same prompt; a range's figure is the harmonic mean of
    the share of edits that hold behind prefixes not trained with, and of other facts whose likelier object stayed.

    Args:
        store: where what came of each range is kept, for one who goes on after a kill.

    Returns:
        First and last layer, and what each range came to.
    """
    edits, others = _swapped(facts)
    if not edits or not others:  # no two of them share a prompt
        edits, others = _swapped(common_facts())
    prefixes = make_prefixes(base, 4, seed)
    prepared, _ = prepare(base, edits, prefixes[:2])
    edits = [one.fact for one in prepared]
    depth = len(base.parts.blocks)
    ranges = sorted(
        {(first, min(first + WIDTH - 1, depth - 2)) for first in (int(depth * s) for s in STARTS) if first < depth - 1}
    )
    before = _likelier(base, others, ("",))
    rows = moment_rows(base, None, 2, seed)

    def tried_out(first: int, last: int) -> dict[str, Any]:
        layers = range(first, last + 1)
        z = find_targets(base, prepared, last, TargetOptions()).z
        moments = second_moments(base, layers, rows)
        deltas = Writer(base, moments, WriteOptions()).write(prepared, z).deltas
        with changed_by(base, deltas):
            held = _likelier(base, edits, prefixes[2:])
            stayed = [a == b for a, b in zip(before, _likelier(base, others, ("",)), strict=True)]
        return {"range": [first, last], "held": sum(held) / len(held), "stayed": sum(stayed) / len(stayed)}

    told = [fact.model_dump_json() for fact in (*edits, *others)]
    mark = fingerprint(__version__, base.hash, str(base.dtype), told, seed)
    with show.bar("trace: ranges", len(ranges)) as tick:
        tried: list[dict[str, Any]] = resumed(
            store, mark, ranges, 1, lambda some: [tried_out(*one) for one in some], tick
        )
    best = max(tried, key=lambda one: harmonic_mean([one["held"], one["stayed"]]))
    return best["range"][0], best["range"][1], tried


def _swapped(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """Facts with another's object, and the facts left over."""
    by_prompt: dict[str, list[Fact]] = {}
    for fact in facts:
        by_prompt.setdefault(fact.prompt, []).append(fact)
    edits: list[Fact] = []
    others: list[Fact] = []
    for same in by_prompt.values():
        for fact in same:
            rival = next((other.object for other in same if other.object != fact.object), None)
            if rival is not None and len(edits) < FACTS and len(edits) <= len(others):
                edits.append(fact.model_copy(update={"object": rival, "former_object": fact.object}))
            elif rival is not None:
                others.append(fact.model_copy(update={"former_object": rival}))
    return edits, others


def _likelier(base: Base, facts: Sequence[Fact], prefixes: Sequence[str]) -> list[bool]:
    """Whether each fact's object is likelier than its former one, behind each prefix."""
    jobs = [
        Job(prefix + prompt_text(fact), (target_text(fact), f" {fact.former_object}"))
        for fact in facts
        for prefix in prefixes
    ]
    return [one.options[0] > one.options[1] for one in complete(base, jobs, max_new_tokens=0)]
