"""The FEVER experiment: what memory learns (nothing, pages, claims, both) × examples in the prompt, with controls."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from byheart.base import Base
from byheart.benchmarks.fever import LABELS, Claim, Fever
from byheart.benchmarks.kept import Kept
from byheart.decode import Job
from byheart.errors import DataError
from byheart.methods import Settings
from byheart.methods.memory.examples import Frame, Piece
from byheart.methods.memory.method import Memory
from byheart.perplexity import perplexity
from byheart.progress import Silent
from byheart.record import run_record
from byheart.rows import Document
from byheart.score import f1_by_label, f1_intervals, mcnemar, means, paired_difference
from byheart.storage import write_json, write_text

Variant = Literal["none", "doc", "temp", "doctemp", "other"]
# "other": claims alone, each page's from a memory that learnt those of other pages.
VARIANTS: tuple[Variant, ...] = ("none", "doc", "temp", "doctemp", "other")
_LETTERS = ("(a)", "(b)", "(c)")
_HEADER = (
    "Determine the factuality of the following claims\n"
    f"Answer candidates: {', '.join(f'{letter} {label}' for letter, label in zip(_LETTERS, LABELS, strict=True))}\n"
)
FRAME = Frame(header=_HEADER, joint="\n")
_CONTENT_FREE = "N/A"
_ANSWER_TOKENS = 8
# Two memories for "other", each asked about the pages that it did not learn.
_FOLDS = 2
# Of F1, which is a mean of nothing, as many as comparisons take.
_F1_RESAMPLES = 1_000
_NO_PAGES: dict[str, str] = {}
# In place of a number of examples: all of them, each run of each as much.
MEAN = "mean"


@dataclass(frozen=True)
class Plan:
    """What a run varies.

    Attributes:
        shots: numbers of examples in the prompt.
        variants: of :data:`VARIANTS`.
        seeds: each draws examples and trains networks of its own.
        context: also ask with the page's text in the prompt.
        rows: token rows of ordinary text for perplexity.
    """

    shots: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    variants: tuple[Variant, ...] = ("none", "doc", "temp", "doctemp")
    seeds: tuple[int, ...] = (0, 1, 2)
    context: bool = True
    rows: tuple[tuple[int, ...], ...] = ()


def claim_pieces(claims: Sequence[Claim]) -> list[Piece]:
    """Claims with their labels as a memory learns them."""
    return [
        Piece(owner=c.id, kind="question", lead=_asked(c.text), answer=f" {_LETTERS[LABELS.index(c.label)]}")
        for c in claims
    ]


def page_pieces(pages: Sequence[Document]) -> list[Piece]:
    """Pages as a memory learns them."""
    return [Piece(owner=page.id, kind="page", lead=f"{page.title}\n", answer=page.text) for page in pages]


def run_fever(
    fever: Fever, base: Base, out: Path, settings: Settings, plan: Plan,
    *, origin: dict[str, Any] | None = None, progress: Silent | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train and measure every variant with every number of examples; write ``run.json`` and ``answers.jsonl``.

    Trainings and answers that an earlier run of the same settings left in ``out`` are taken from there.

    Returns:
        The content of ``run.json``.
    """
    show = progress or Silent()
    out.mkdir(parents=True, exist_ok=True)
    Memory(base, settings, out).texts()  # what it refuses is told now, not once the plain model has been asked
    asked, learnt = fever.part("validation"), fever.part("train")
    run = run_record(base, settings, origin) | {
        "benchmark": "FEVER",
        "data": {
            "pages": len(fever.pages),
            "train": _by_label(learnt),
            "validation": _by_label(asked),
            **fever.counts,
        },
        "controls": controls(learnt, asked, settings.seed),
        "cells": [],
        "training": [],
        "perplexity": {"none": perplexity(base, plan.rows)} if plan.rows else {},
    }
    answers: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    folder = out / "answers"
    for seed in plan.seeds:
        for variant in plan.variants:
            own = replace(settings, seed=seed)
            for memory, some, known in _memories(variant, fever, base, out, own, run, plan, show):
                kept = Kept(base, folder, show, memory.digest if memory else "")
                with memory.attached() if memory else nullcontext():
                    for shots in plan.shots:
                        label = f"{variant}, {shots} shots, seed {seed}"
                        found = _ask(kept, some, _examples(known, shots, seed), label)
                        answers.setdefault((variant, shots, seed), []).extend(found)
            _order(answers, variant, seed, asked)
            write_json(out / "run.json", run | {"cells": _cells(answers, asked, settings.seed)})
        if plan.context:
            unchanged, texts = Kept(base, folder, show), {page.id: page.text for page in fever.pages}
            for shots in plan.shots:
                label = f"page in the prompt, {shots} shots, seed {seed}"
                try:
                    answers["context", shots, seed] = _ask(
                        unchanged, asked, _examples(learnt, shots, seed), label, texts
                    )
                except DataError as error:  # as many pages as that can be longer than the model reads
                    run.setdefault("left_out", {})[label] = str(error)
                    show.say(f"left out: {label}: {error}")
    run["cells"] = _cells(answers, asked, settings.seed)
    run["pairs"] = _pairs(answers, asked, run["controls"]["claim_only"]["given"], settings.seed)
    write_json(out / "run.json", run)
    lines = (
        json.dumps({"variant": variant, "shots": shots, "seed": seed, "claim": claim.id, "text": claim.text,
                    "page": claim.page, "label": claim.label} | row, ensure_ascii=False) + "\n"
        for (variant, shots, seed), rows in answers.items()
        for claim, row in zip(asked, rows, strict=True)
    )  # fmt: skip
    write_text(out / "answers.jsonl", "".join(lines))
    return run


# -- what is measured ----------------------------------------------------------------------------------------


def _memories(
    variant: Variant, fever: Fever, base: Base, out: Path, settings: Settings, run: dict[str, Any], plan: Plan,
    show: Silent,
) -> list[tuple[Memory | None, list[Claim], list[Claim]]]:  # fmt: skip
    """The trained memories of a variant, each with the claims to ask it and those that it may be shown."""
    asked, train = fever.part("validation"), fever.part("train")
    if variant == "none":
        return [(None, asked, train)]
    if variant != "other":
        return [(_trained(variant, variant, fever, train, base, out, settings, run, plan, show), asked, train)]
    found: list[tuple[Memory | None, list[Claim], list[Claim]]] = []
    order = sorted(page.id for page in fever.pages)
    random.Random(f"{settings.seed}/folds").shuffle(order)
    for fold in range(_FOLDS):
        out_of = set(order[fold::_FOLDS])
        learnt = [claim for claim in train if claim.page not in out_of]
        name = f"other, fold {fold}"
        memory = _trained(name, "temp", fever, learnt, base, out, settings, run, plan, show)
        found.append((memory, [claim for claim in asked if claim.page in out_of], learnt))
    return found


def _trained(
    name: str, what: str, fever: Fever, learnt: Sequence[Claim], base: Base, out: Path, settings: Settings,
    run: dict[str, Any], plan: Plan, show: Silent,
) -> Memory:  # fmt: skip
    memory = Memory(base, settings, out)
    pieces = [
        *(page_pieces(fever.pages) if what != "temp" else ()),
        *(claim_pieces(learnt) if what != "doc" else ()),
    ]
    with show.bar(f"{name}: training, seed {settings.seed}", 1000) as tick:
        trained, notes = memory.train(pieces, tick, 1000, FRAME)
    entry: dict[str, Any] = {"variant": name, "seed": settings.seed, "seconds": trained.seconds, "notes": list(notes)}
    if what != "temp":
        entry["page_token_accuracy"] = memory.accuracy(page_pieces(fever.pages))
    with memory.attached():
        if plan.rows:
            entry["perplexity"] = perplexity(base, plan.rows)
            entry["perplexity_drift"] = entry["perplexity"] / run["perplexity"]["none"] - 1
    run["training"].append(entry)
    return memory


def _ask(
    kept: Kept, claims: Sequence[Claim], examples: Sequence[Claim], label: str, texts: Mapping[str, str] = _NO_PAGES
) -> list[dict[str, Any]]:
    """Of each claim the likeliest label, the same calibrated, and what the model writes.

    Args:
        texts: of pages, to stand before the claims about them.
    """
    begin = _HEADER + "".join(
        f"{_page(texts.get(one.page or ''))}{_asked(one.text)} {_LETTERS[LABELS.index(one.label)]}\n"
        for one in examples
    )
    options = tuple(f" {letter}" for letter in _LETTERS)
    jobs = [Job(begin + _page(texts.get(claim.page or "")) + _asked(claim.text), options) for claim in claims]
    shown = list(dict.fromkeys(_page(texts.get(claim.page or "")) for claim in claims))
    jobs += [Job(begin + page + _asked(_CONTENT_FREE), options) for page in shown]
    done = kept.complete(label, jobs, max_new_tokens=_ANSWER_TOKENS)
    without = {page: one.options for page, one in zip(shown, done[len(claims) :], strict=True)}
    rows = []
    for claim, one in zip(claims, done, strict=False):
        free = without[_page(texts.get(claim.page or ""))]
        calibrated = [a - b for a, b in zip(one.options, free, strict=True)]
        rows.append(
            {
                "id": claim.id,
                "likelihood": _best(one.options),
                "calibrated": _best(calibrated),
                # Of the two labels that a page decides between.
                "two": _best(one.options[:2]),
                "two_calibrated": _best(calibrated[:2]),
                "generated": read_label(one.text),
                "said": one.text,
            }
        )
    return rows


def read_label(text: str) -> str:
    """The label that a generated answer begins with, as a letter or in words; empty where it is none."""
    said = text.strip().lower()
    for letter, label in zip(_LETTERS, LABELS, strict=True):
        if re.match(rf"\(?{letter[1]}\)|{label}\b", said):
            return label
    return ""


def _best(scores: Sequence[float]) -> str:
    return LABELS[max(range(len(scores)), key=lambda n: scores[n])]


def _examples(known: Sequence[Claim], shots: int, seed: int) -> list[Claim]:
    """Some of these claims, the labels in turn, the same first ones for every number of shots."""
    draw = random.Random(f"{seed}/examples")
    by_label = {label: [claim for claim in known if claim.label == label] for label in LABELS}
    order = [label for label in LABELS if by_label[label]]
    draw.shuffle(order)
    return [draw.choice(by_label[order[n % len(order)]]) for n in range(max(5, shots))][:shots]


def _asked(text: str) -> str:
    return f"Claim: {text}\nA:"


def _page(text: str | None) -> str:
    return f"Evidence: {text}\n" if text else ""


def _order(
    answers: dict[tuple[str, int, int], list[dict[str, Any]]], variant: str, seed: int, asked: Sequence[Claim]
) -> None:
    """Folds give their claims one after the other; back into the order of all."""
    for key in answers:
        if key[0] == variant and key[2] == seed:
            by_id = {row["id"]: row for row in answers[key]}
            answers[key] = [by_id[claim.id] for claim in asked]


# -- controls and scores -------------------------------------------------------------------------------------


def controls(learnt: Sequence[Claim], asked: Sequence[Claim], seed: int) -> dict[str, Any]:
    """What the wording alone gives away: the majority label, and a classifier of character 2- to 5-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    truth = [claim.label for claim in asked]
    most = max(LABELS, key=lambda label: sum(claim.label == label for claim in learnt))
    given: dict[str, list[str]] = {}
    for name, labels in (("three", LABELS), ("two", LABELS[:2])):
        some = [claim for claim in learnt if claim.label in labels]
        vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        model = LogisticRegression(C=10, max_iter=2000, random_state=seed)
        model.fit(vectors.fit_transform([claim.text for claim in some]), [claim.label for claim in some])
        given[name] = [str(one) for one in model.predict(vectors.transform([claim.text for claim in asked]))]
    return {
        "majority": {"label": most, **f1_by_label(truth, [most] * len(truth))},
        "claim_only": {
            **f1_by_label(truth, given["three"]),
            "supports_refutes": _share(_two(asked, given["two"])),
            "given": given,
        },
    }


def _two(claims: Sequence[Claim], given: Sequence[str]) -> list[float]:
    """Right or wrong, for the claims that a page decides."""
    return [float(claim.label == one) for claim, one in zip(claims, given, strict=True) if claim.label in LABELS[:2]]


def _share(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _runs(
    answers: dict[tuple[str, int, int], list[dict[str, Any]]], asked: Sequence[Claim]
) -> dict[tuple[str, int | str], list[list[dict[str, Any]]]]:
    """The runs of each variant with each number of examples; as :data:`MEAN` all of one with which none is left out."""
    found: dict[tuple[str, int | str], list[list[dict[str, Any]]]] = {}
    for (variant, shots, _), rows in answers.items():
        if len(rows) == len(asked):
            found.setdefault((variant, shots), []).append(rows)
    numbers = {shots for _, shots in found}
    for variant in dict.fromkeys(variant for variant, _ in found):
        each = [found.get((variant, shots), []) for shots in numbers]
        # Every claim as often with each number: else one variant's mean would be of other prompts than another's.
        if len(numbers) > 1 and len({len(runs) for runs in each}) == 1:
            found[variant, MEAN] = [rows for runs in each for rows in runs]
    return found


def _cells(
    answers: dict[tuple[str, int, int], list[dict[str, Any]]], asked: Sequence[Claim], seed: int
) -> list[dict[str, Any]]:
    """A cell a variant and number of examples: means over its runs, intervals over claims."""
    cells = []
    for (variant, shots), runs in _runs(answers, asked).items():
        rows = [_claim_metrics(claim, [one[n] for one in runs]) for n, claim in enumerate(asked)]
        metrics, intervals = means(rows, seed)
        truth = [claim.label for claim in asked]
        for how in ("likelihood", "calibrated", "generated"):
            given = [[row[how] for row in one] for one in runs]
            each = [f1_by_label(truth, one) for one in given]
            suffix = "" if how == "likelihood" else f"_{how}"
            for name, bounds in f1_intervals(truth, given, resamples=_F1_RESAMPLES, seed=seed).items():
                metrics[name + suffix] = _share([one[name] for one in each])
                intervals[name + suffix] = list(bounds)
        cells.append(
            {"variant": variant, "shots": shots, "runs": len(runs), "metrics": metrics, "intervals": intervals}
        )
    return cells


def _claim_metrics(claim: Claim, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """One claim's share of right answers over the seeds, each way of asking."""
    names = {"accuracy": "likelihood", "accuracy_calibrated": "calibrated", "accuracy_generated": "generated"}
    found = {name: _share([float(row[how] == claim.label) for row in rows]) for name, how in names.items()}
    found["labels_generated"] = _share([float(bool(row["generated"])) for row in rows])
    if claim.label in LABELS[:2]:
        found["supports_refutes"] = _share([float(row["two"] == claim.label) for row in rows])
        found["supports_refutes_calibrated"] = _share([float(row["two_calibrated"] == claim.label) for row in rows])
    return found


def _pairs(
    answers: dict[tuple[str, int, int], list[dict[str, Any]]], asked: Sequence[Claim], claim_only: dict[str, list[str]],
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Differences on the same claims: what the questions of the experiment, and the controls, come down to."""
    table = {
        key: [_claim_metrics(claim, [one[n] for one in runs]) for n, claim in enumerate(asked)]
        for key, runs in _runs(answers, asked).items()
    }
    wording = [
        {"accuracy": float(three == claim.label)}
        | ({"supports_refutes": float(two == claim.label)} if claim.label in LABELS[:2] else {})
        for claim, three, two in zip(asked, claim_only["three"], claim_only["two"], strict=True)
    ]
    found = []

    def add(ours: str, theirs: str, shots: int | str, one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
        for metric in ("accuracy", "accuracy_generated", "supports_refutes"):
            both = [(a[metric], b[metric]) for a, b in zip(one, two, strict=True) if metric in a and metric in b]
            if both:
                a, b = [x for x, _ in both], [y for _, y in both]
                difference, interval = paired_difference(a, b, seed=seed)
                entry: dict[str, Any] = {"variant": ours, "against": theirs, "shots": shots, "metric": metric}
                entry |= {"claims": len(both), "difference": difference, "interval": list(interval)}
                if set(a) | set(b) <= {0.0, 1.0}:
                    entry["mcnemar_p"] = mcnemar(a, b)
                found.append(entry)

    against = {"doc": ("none",), "temp": ("none", "other"), "doctemp": ("none", "doc", "temp", "other", "context")}
    for (variant, shots), rows in table.items():
        for other in against.get(variant, ()):
            if (other, shots) in table:
                add(variant, other, shots, rows, table[other, shots])
        if variant not in ("none", "context"):
            add(variant, "claim only", shots, rows, wording)
        if shots not in (0, MEAN) and (variant, 0) in table:
            add(f"{variant}, {shots} shots", f"{variant}, 0 shots", shots, rows, table[variant, 0])
    return found


def _by_label(claims: Sequence[Claim]) -> dict[str, int]:
    return {label: sum(claim.label == label for claim in claims) for label in LABELS}
