"""`byheart trace`: facts that the model knows, their causal trace, and the range of layers that follows from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from byheart.base import Base
from byheart.errors import DataError
from byheart.formats import read_objects
from byheart.methods.edit.causal import PARTS, PLACES, average_effects, best_range, known_facts, trace
from byheart.methods.edit.common_facts import common_facts
from byheart.methods.edit.layers import keep_range
from byheart.methods.edit.sweep import sweep
from byheart.progress import Silent
from byheart.rows import SUBJECT_PLACE, Fact, content_id, with_place
from byheart.score import bootstrap_interval

# With fewer facts that the model knows, their average says too little, and ranges are tried out instead.
LEAST = 8
NOISE = 3.0


def trace_base(
    base: Base, path: Path | None, limit: int, samples: int, window: int, seed: int, work: Path, show: Silent
) -> dict[str, Any]:
    """Trace a model and keep the range found for it; returns the record.

    What was measured is kept in ``work``, where the same trace goes on after a kill.

    Raises:
        DataError: where the file of facts cannot be read, or the model is no causal one.
    """
    if base.kind != "causal":
        raise DataError(f"trace: {base.name} is an encoder-decoder model; tracing needs a decoder-only one")
    if len(base.parts.blocks) < 3:
        raise DataError(f"trace: {base.name} has {len(base.parts.blocks)} blocks; there is no range to choose")
    facts = common_facts() if path is None else read_facts(path)
    random.Random(seed).shuffle(facts)
    known = known_facts(base, facts)
    show.say(f"trace: {base.name} knows {len(known)} of {len(facts)} facts")
    record: dict[str, Any] = {
        "model": base.name, "noise": NOISE, "samples": samples, "window": window, "seed": seed,
        "layers": len(base.parts.blocks), "asked": len(facts), "known": len(known), "facts": 0,
    }  # fmt: skip
    if len(known) < LEAST:
        first, last, tried = sweep(base, facts, seed, work / "ranges.json", show)
        record |= {"how": f"a sweep: the model knows only {len(known)} of the facts", "tried": tried}
    else:
        with show.bar("trace: facts", min(limit, len(known))) as tick:
            some, store = known[:limit], work / "effects.json"
            traced = trace(
                base, some, samples=samples, window=window, noise=NOISE, seed=seed, store=store, on_done=tick
            )
        effects = average_effects(traced)
        first, last = best_range(effects)
        record |= {
            "how": f"causal tracing of {len(traced)} facts",
            "facts": len(traced),
            "clean": sum(one.clean for one in traced) / len(traced),
            "corrupted": sum(one.corrupted for one in traced) / len(traced),
            "parts": list(PARTS),
            "places": list(PLACES),
            "effects": _with_intervals([one.effect for one in traced], seed),
        }
    record["range"] = [first, last]
    keep_range(base, first, last, record)
    return record


def read_facts(path: Path) -> list[Fact]:
    """Facts from JSON lines: ``subject``, ``template`` or ``prompt``, and ``object`` or ``attribute``.

    Raises:
        DataError: names file, line and reason.
    """
    found = []
    for number, row in read_objects(path, ("subject",)):
        parts = (row.get("prompt") or row.get("template"), row.get("object") or row.get("attribute"), row["subject"])
        template, object, subject = (text.strip() if isinstance(text, str) else "" for text in parts)
        if not (template and object and subject):
            raise DataError(f"{path}:{number}: needs subject, prompt (or template) and object (or attribute)")
        if SUBJECT_PLACE not in template:
            template = with_place(template, subject) or template
        if template.count(SUBJECT_PLACE) != 1:
            raise DataError(f"{path}:{number}: the prompt does not hold its subject {subject!r}")
        found.append(Fact(id=content_id("known", template, subject), subject=subject, prompt=template, object=object))
    if not found:
        raise DataError(f"{path}: holds no facts")
    return found


def _with_intervals(effects: Sequence[torch.Tensor], seed: int) -> list[list[list[list[float] | None]]]:
    """By part, place and layer: mean, low and high; None where no fact has the place."""
    stack = torch.stack(list(effects))  # (facts, parts, places, layers)
    found: list[list[list[list[float] | None]]] = []
    for part in range(stack.shape[1]):
        found.append([])
        for place in range(stack.shape[2]):
            cells: list[list[float] | None] = []
            for layer in range(stack.shape[3]):
                values = [v for v in stack[:, part, place, layer].tolist() if v == v]
                if not values:
                    cells.append(None)
                    continue
                low, high = bootstrap_interval(values, resamples=1_000, seed=seed)
                cells.append([sum(values) / len(values), low, high])
            found[-1].append(cells)
    return found
