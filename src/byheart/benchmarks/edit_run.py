"""Run an editing benchmark: learn the cases' facts with each method, then score every probe, after all edits."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byheart.base import Base
from byheart.benchmarks.editing import UNEDITED, Case, Probe, crossed
from byheart.benchmarks.kept import Kept
from byheart.decode import Job, Sampling, token_ids
from byheart.ledger import Ledger
from byheart.methods import LearnReport, Method, Settings, method_class
from byheart.methods.edit.weights import ChangedWeights
from byheart.perplexity import perplexity
from byheart.progress import Silent
from byheart.record import made_with, run_record
from byheart.score import (
    RESAMPLES,
    begins,
    generation_entropy,
    harmonic_mean,
    means,
    paired_difference,
    reference_score,
)
from byheart.storage import write_json, write_text

ANSWER_TOKENS = 16
TEXT_TOKENS = 100
_TOP_K = 5
# Of batches that are learnt apart, those after which perplexity is measured.
_PERPLEXITIES = 3
# A probe's kind and its metric's name: where there is a rival, as CounterFact scores it; where there is none, as zsRE.
_SUCCESS = {"edit": "es", "paraphrase": "ps", "neighbourhood": "ns"}
_OVERLAP = {
    "edit": "efficacy",
    "paraphrase": "paraphrase",
    "neighbourhood": "specificity",
    "portability": "portability",
}
# Harmonic means of three. A magnitude, being a difference, can be below zero and has none.
_TOGETHER = (
    ("s", ("es", "ps", "ns")),
    ("s_accuracy", ("es_accuracy", "ps_accuracy", "ns_accuracy")),
    ("s", ("efficacy", "paraphrase", "specificity")),  # zsRE's
)
PAIRED = (*_SUCCESS.values(), *_OVERLAP.values(), "generated", "leak", "leak_subject", "leak_reworded", "ge")


@dataclass(frozen=True)
class Plan:
    """What a run measures besides the main figure.

    Attributes:
        sizes: numbers of edits for the scaling curve; each learns that many facts at once.
        sets: batches learnt and scored one by one (same-subject batches, say), by name.
        texts: prompts a case to write on from, for GE and RS; 0: none.
        rows: token rows of ordinary text for perplexity.
    """

    sizes: tuple[int, ...] = ()
    sets: tuple[tuple[str, list[list[Case]]], ...] = ()
    texts: int = 1
    rows: tuple[tuple[int, ...], ...] = ()


def run_editing(
    title: str, base: Base, cases: Sequence[Case], methods: Sequence[str], out: Path, settings: Settings, plan: Plan,
    *, origin: dict[str, Any] | None = None, progress: Silent | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Edit in all cases' facts with each method, score all probes, and write ``run.json`` and ``answers.jsonl``.

    Run again after a kill, it goes on where it was: what ``edit`` learns and what models say are kept in ``out``.
    The unedited model is scored first, whatever ``methods`` says: no figure of an edit means anything without it.

    Returns:
        The content of ``run.json``.
    """
    show = progress or Silent()
    out.mkdir(parents=True, exist_ok=True)
    edits = [name for name in methods if name != UNEDITED]
    for name in edits:  # options that one refuses are told now, not once the unedited model has been scored
        method_class(name)(base, settings, out)
    run = run_record(base, settings, origin) | {"benchmark": title, "edits": len(cases), "methods": {}}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in [UNEDITED, *edits]:
        method, report = None, LearnReport()
        if name != UNEDITED:
            method = method_class(name)(base, settings, out)
            report = _learn(method, cases, out, show)
        with _attached(method):
            rows[name] = score_cases(_kept(base, out, show, method), cases, settings.seed, plan.texts, name)
            after = perplexity(base, plan.rows) if plan.rows else None
        run["methods"][name] = summarise(rows[name], settings.seed) | _written(report) | {"perplexity": after}
        if any(case.group for case in cases):
            run["methods"][name]["by_group"] = by_group(cases, rows[name], settings.seed)
        _drift(run["methods"], name)
        if method is not None:
            run["methods"][name]["skipped_facts"] = getattr(method, "skipped", {})
            run["methods"][name] |= made_with(method)
            _extras(
                run["methods"][name],
                name,
                base,
                cases,
                out,
                settings,
                plan,
                run["methods"][UNEDITED]["perplexity"],
                show,
            )
        write_json(out / "run.json", run)  # what is done is kept, whatever comes next
    run["pairs"] = _pairs(rows, settings.seed)
    run["unmeasured"] = list(_unmeasured(cases, rows[UNEDITED], plan.texts))
    write_json(out / "run.json", run)
    lines = (
        json.dumps({"method": name, "case": case.fact.id, "group": case.group} | row, ensure_ascii=False) + "\n"
        for name, found in rows.items()
        for case, row in zip(cases, found, strict=True)
    )
    write_text(out / "answers.jsonl", "".join(lines))
    return run


def _unmeasured(cases: Sequence[Case], rows: Sequence[dict[str, Any]], texts: int) -> Iterator[str]:
    """Metrics of texts that were not measured, each with the reason."""
    if not any(case.generate for case in cases):
        why = "the records have no prompts to write on from"
    elif not texts:
        why = "no texts are written (--texts 0)"
    else:
        why = "no reference texts about these objects were given (--references)"
    for metric in ("ge", "rs"):
        if not any(metric in row["metrics"] for row in rows):
            yield f"{metric.upper()}: {why}"


def _learn(method: Method, cases: Sequence[Case], out: Path, show: Silent) -> LearnReport:
    path = out / "edits.db"
    for old in out.glob("edits.db*"):
        old.unlink()
    with Ledger(path, create=True) as ledger:
        ledger.insert([case.fact for case in cases], source="benchmark")
        with show.bar(f"{method.name}: facts", len(cases)) as tick:
            return method.learn(ledger, tick)


def _attached(method: Method | None) -> AbstractContextManager[None]:
    return nullcontext() if method is None else method.attached()


def _kept(base: Base, out: Path, show: Silent, method: Method | None) -> Kept:
    assert method is None or isinstance(method, ChangedWeights)
    return Kept(base, out / "answers", show, method.digest if method else "")


def _drift(methods: dict[str, Any], name: str) -> None:
    before, after = methods[UNEDITED]["perplexity"], methods[name]["perplexity"]
    if before and after and name != UNEDITED:
        methods[name]["metrics"]["perplexity_drift"] = after / before - 1


def _extras(
    entry: dict[str, Any], name: str, base: Base, cases: Sequence[Case], out: Path, settings: Settings, plan: Plan,
    before: float | None, show: Silent,
) -> None:  # fmt: skip
    """The scaling curve, and the sets that are learnt apart."""
    entry["curve"] = []
    for size in plan.sizes:
        batches = [list(cases[start : start + size]) for start in range(0, len(cases), size)]
        whole = [batch for batch in batches if len(batch) == size][: max(1, 50 // size)]
        if not whole:
            show.say(f"no curve at {size} edits: there are {len(cases)}")
            continue
        entry["curve"].append({"edits": size} | _in_batches(name, base, whole, out, settings, plan, before, show))
    entry["sets"] = {}
    for label, batches in plan.sets:
        entry["sets"][label] = _in_batches(name, base, batches, out, settings, plan, before, show)


def _in_batches(
    name: str, base: Base, batches: Sequence[list[Case]], out: Path, settings: Settings, plan: Plan,
    before: float | None, show: Silent,
) -> dict[str, Any]:  # fmt: skip
    """Each batch learnt by itself and scored, and beside it unedited; the mean rise of perplexity over the first few.

    The report is the sum of all of theirs.
    """
    rows: list[dict[str, Any]] = []
    unedited: list[dict[str, Any]] = []
    rises: list[float] = []
    of: list[int] = []
    whole = LearnReport()
    skipped: dict[str, str] = {}
    method = method_class(name)(base, settings, out)  # one for all: what depends on no fact is made once
    for number, batch in enumerate(batches):
        of += [number] * len(batch)
        unedited += score_cases(_kept(base, out, show, None), batch, settings.seed, 0, UNEDITED)
        report = _learn(method, batch, out, show)
        skipped |= getattr(method, "skipped", {})
        whole = replace(
            whole,
            seconds=whole.seconds + report.seconds,
            bytes=whole.bytes + report.bytes,
            facts=whole.facts + report.facts,
            skipped=dict(Counter(whole.skipped) + Counter(report.skipped)),
            notes=tuple(dict.fromkeys((*whole.notes, *report.notes))),
        )
        with method.attached():
            rows += score_cases(_kept(base, out, show, method), batch, settings.seed, 0, name)
            if before is not None and len(rises) < _PERPLEXITIES:
                rises.append(perplexity(base, plan.rows) / before - 1)
    rise = {"perplexity_drift": sum(rises) / len(rises) if rises else None, "perplexity_batches": len(rises)}
    part = {"batches": len(batches)} | rise | summarise(rows, settings.seed, of) | _written(whole)
    return part | {"skipped_facts": skipped, "unedited": summarise(unedited, settings.seed)}


# -- scoring -------------------------------------------------------------------------------------------------


def score_cases(kept: Kept, cases: Sequence[Case], seed: int, texts: int, label: str) -> list[dict[str, Any]]:
    """Each case's metrics, with what the model wrote after the edit prompt and its paraphrases.

    ``leak`` and ``leak_subject`` say of its prompt about the subject of another case (:func:`crossed`) whether the
    model writes its own object, or the other's; ``leak_reworded`` says the latter of its paraphrase.
    """
    probes = [(n, probe) for n, case in enumerate(cases) for probe in case.probes]
    jobs = [Job(p.prompt, tuple(f" {text}" for text in (p.wanted, p.rival) if text is not None)) for _, p in probes]
    scored = kept.complete(f"{label}: probes", jobs, max_new_tokens=0)
    asked = [(n, probe) for n, probe in probes if probe.kind in ("edit", "paraphrase")]
    jobs = [Job(p.prompt) for _, p in asked]
    most = max([ANSWER_TOKENS, *(_length(kept.base, case.fact.object) + 2 for case in cases)])  # none is cut off
    written = kept.complete(f"{label}: generated answers", jobs, max_new_tokens=most)
    crossings = crossed(cases, seed)
    reworded = [(crossing, crossing.reworded) for crossing in crossings if crossing.reworded is not None]
    jobs = [Job(prompt) for prompt in (*(one.prompt for one in crossings), *(prompt for _, prompt in reworded))]
    leaked = kept.complete(f"{label}: asked about others", jobs, max_new_tokens=most)
    values: list[dict[str, list[float]]] = [{} for _ in cases]
    for (n, probe), done in zip(probes, scored, strict=True):
        for name, value in _probe_metrics(probe, done.options, done.hits):
            values[n].setdefault(name, []).append(value)
    answers: list[list[str]] = [[] for _ in cases]
    for (n, probe), done in zip(asked, written, strict=True):
        suffix = "" if probe.kind == "edit" else "_paraphrase"
        values[n].setdefault(f"generated{suffix}", []).append(begins(done.text, probe.wanted))
        answers[n].append(done.text)
    for one, done in zip(crossings, leaked, strict=False):
        values[one.own]["leak"] = [begins(done.text, cases[one.own].fact.object)]
        values[one.own]["leak_subject"] = [begins(done.text, cases[one.other].fact.object)]
    for (one, _), done in zip(reworded, leaked[len(crossings) :], strict=True):
        values[one.own]["leak_reworded"] = [begins(done.text, cases[one.other].fact.object)]
    for n, name, value in _text_metrics(kept, cases, seed, texts, label):
        values[n].setdefault(name, []).append(value)
    return [
        {"metrics": {name: sum(v) / len(v) for name, v in row.items()}, "generated": said}
        for row, said in zip(values, answers, strict=True)
    ]


def _length(base: Base, text: str) -> int:
    return len(token_ids(base.tokenizer, f" {text}", beginning=False))


def _probe_metrics(probe: Probe, options: tuple[float, ...], hits: tuple[float, ...]) -> Iterator[tuple[str, float]]:
    if probe.rival is None:
        name = _OVERLAP[probe.kind]
        yield name, hits[0]
        yield f"{name}_exact", float(hits[0] == 1)
        yield f"{name}_probability", math.exp(options[0])
        return
    name = _SUCCESS[probe.kind]
    wanted, rival = (math.exp(one) for one in options)
    yield name, float(wanted > rival)
    yield f"{name}_magnitude", wanted - rival
    yield f"{name}_accuracy", float(hits[0] == 1)


def _text_metrics(
    kept: Kept, cases: Sequence[Case], seed: int, texts: int, label: str
) -> Iterator[tuple[int, str, float]]:
    prompts = [(n, prompt) for n, case in enumerate(cases) for prompt in case.generate[:texts]]
    jobs = [Job(prompt) for _, prompt in prompts]
    done = kept.complete(f"{label}: texts", jobs, max_new_tokens=TEXT_TOKENS, sampling=Sampling(_TOP_K, seed))
    for (n, prompt), one in zip(prompts, done, strict=True):
        text = prompt + one.text
        yield n, "ge", generation_entropy(text)
        if cases[n].references:
            yield n, "rs", reference_score(text, cases[n].references)


def summarise(rows: Sequence[dict[str, Any]], seed: int, batches: Sequence[int] | None = None) -> dict[str, Any]:
    """Means over cases with 95 % intervals, among them those of :data:`_TOGETHER`.

    Args:
        batches: which batch each case was learnt in, where they were learnt apart.
    """
    metrics, intervals = _means([row["metrics"] for row in rows], seed, batches)
    return {"metrics": metrics, "intervals": intervals, "cases": len(rows)}


def _written(report: LearnReport) -> dict[str, Any]:
    return {
        "write_seconds": report.seconds,
        "bytes": report.bytes,
        "facts": report.facts,
        "skipped": report.skipped,
        "notes": list(report.notes),
    }


def by_group(cases: Sequence[Case], rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Metrics a relation, those of most cases first."""
    counts = Counter(case.group for case in cases)
    found = {}
    for group, count in counts.most_common():
        metrics, intervals = _means(
            [row["metrics"] for case, row in zip(cases, rows, strict=True) if case.group == group], seed
        )
        found[group] = {"cases": count, "metrics": metrics, "intervals": intervals}
    return found


def _means(
    rows: Sequence[dict[str, float]], seed: int, batches: Sequence[int] | None = None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    metrics, intervals = means(rows, seed, batches)
    for name, parts in _TOGETHER:
        there = [n for n, row in enumerate(rows) if set(parts) <= row.keys()]
        if there:
            whole = np.array([[rows[n][part] for part in parts] for n in there])
            metrics[name] = harmonic_mean(whole.mean(0).tolist())
            if metrics[name] > 0:  # of what never holds, resampling says nothing
                units = [there] if batches is None else [there, [batches[n] for n in there]]
                found = [_s_interval(whole, seed, each) for each in units]  # the wider one, as of any mean
                intervals[name] = [min(low for low, _ in found), max(high for _, high in found)]
    return metrics, intervals


def _s_interval(table: NDArray[np.float64], seed: int, batches: Sequence[int]) -> tuple[float, float]:
    """Of the harmonic mean of the columns' means; whole batches are resampled."""
    _, places = np.unique(batches, return_inverse=True)
    sums = np.stack([np.bincount(places, column) for column in table.T], 1)
    counts = np.bincount(places)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, len(sums), len(sums)) for _ in range(RESAMPLES // 10))
    found = [harmonic_mean((sums[one].sum(0) / counts[one].sum()).tolist()) for one in draws]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _pairs(rows: dict[str, list[dict[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """Each method against the unedited model, case by case."""
    found = []
    for name in rows:
        for metric in PAIRED if name != UNEDITED else ():
            both = [
                (a["metrics"][metric], b["metrics"][metric])
                for a, b in zip(rows[name], rows[UNEDITED], strict=True)
                if metric in a["metrics"] and metric in b["metrics"]
            ]
            if both:
                difference, interval = paired_difference([a for a, _ in both], [b for _, b in both], seed=seed)
                found.append(
                    {"method": name, "against": UNEDITED, "metric": metric, "cases": len(both)}
                    | {"difference": difference, "interval": list(interval)}
                )
    return found
