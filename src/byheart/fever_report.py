"""A FEVER run as tables and a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from byheart.storage import read_card, write_json
from byheart.tables import Grid, write_page

_METRICS = {
    "accuracy": "accuracy (micro-F1) by likelihood",
    "macro_f1": "macro-F1 by likelihood",
    "accuracy_calibrated": "accuracy by calibrated likelihood",
    "macro_f1_calibrated": "macro-F1 by calibrated likelihood",
    "accuracy_generated": "accuracy of freely generated answers",
    "micro_f1_generated": "micro-F1 of freely generated answers",
    "macro_f1_generated": "macro-F1 of freely generated answers",
    "supports_refutes": "supports against refutes, by likelihood",
    "supports_refutes_calibrated": "supports against refutes, by calibrated likelihood",
}
_PAIRED = {"accuracy": "accuracy", "accuracy_generated": "generated", "supports_refutes": "supports/refutes"}


def grids(*runs: dict[str, Any]) -> Iterator[Grid]:
    """The runs' tables: a row a model and memory, a column a number of examples.

    Runs are of one split of the same claims, each with a model of its own.
    """
    cells = {(n, cell["variant"], cell["shots"]): cell for n, run in enumerate(runs) for cell in run["cells"]}
    shots = sorted({count for *_, count in cells}, key=lambda n: (isinstance(n, str), n))
    rows_of = list(dict.fromkeys((n, variant) for n, variant, _ in cells))
    head = ["model", "memory"] if len(runs) > 1 else ["memory"]

    def named(n: int, *of_it: str) -> list[str]:
        return [runs[n]["base"]["name"], *of_it] if len(runs) > 1 else list(of_it)

    for metric, title in _METRICS.items():
        rows = [[*named(*row), *(_cell(cells.get((*row, n)), metric) for n in shots)] for row in rows_of]
        yield title, [*head, *("mean of all" if isinstance(n, str) else f"{n} shots" for n in shots)], rows
    left_out = [named(n, label, why) for n, run in enumerate(runs) for label, why in run.get("left_out", {}).items()]
    if left_out:
        yield "left out", [*head[:-1], "", "why"], left_out
    only, most = runs[0]["controls"]["claim_only"], runs[0]["controls"]["majority"]
    yield (
        "controls that see no page",
        ["", "micro-F1", "macro-F1", "supports/refutes"],
        [
            ["claim only", *(f"{only[key]:.3f}" for key in ("micro_f1", "macro_f1", "supports_refutes"))],
            [f"always {most['label']}", f"{most['micro_f1']:.3f}", f"{most['macro_f1']:.3f}", "-"],
        ],
    )
    found: dict[tuple[int, str, str, int | str], dict[str, str]] = {}
    for n, run in enumerate(runs):
        for pair in run.get("pairs", ()):
            low, high = pair["interval"]
            row = found.setdefault((n, pair["variant"], pair["against"], pair["shots"]), {})
            row[pair["metric"]] = f"{pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    if found:
        rows = [
            [*named(n, a, b, str(count)), *(row.get(k, "-") for k in _PAIRED)]
            for (n, a, b, count), row in found.items()
        ]
        yield "differences on the same claims", [*head, "against", "shots", *_PAIRED.values()], rows
    rows = [
        named(
            n,
            one["variant"],
            str(one["seed"]),
            f"{one['seconds']:.0f}",
            f"{one['page_token_accuracy']:.3f}" if "page_token_accuracy" in one else "-",
            f"{one['perplexity_drift']:+.1%}" if "perplexity_drift" in one else "-",
        )
        for n, run in enumerate(runs)
        for one in run["training"]
    ]
    if rows:
        yield "training", [*head, "seed", "seconds", "page tokens right", "perplexity"], rows


def _cell(cell: dict[str, Any] | None, metric: str) -> str:
    if cell is None or metric not in cell["metrics"]:
        return "-"
    interval = cell["intervals"].get(metric)
    value = f"{cell['metrics'][metric]:.3f}"
    return value + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def join_fever_runs(folder: Path, parts: Sequence[str], runs: Sequence[dict[str, Any]]) -> None:
    """Write the ``run.json`` of runs with several models, each in a folder ``parts`` of its own in ``folder``."""
    names = ", ".join(run["base"]["name"] for run in runs)
    write_json(folder / "run.json", {"base": {"name": names}, "cells": [], "parts": list(parts)})


def write_fever_report(folder: Path) -> Path:
    """Write ``report.html`` of a FEVER run, or of several that differ in their model."""
    keys = ("cells", "controls", "data", "base")
    parts = read_card(folder / "run.json", "cells").get("parts")
    runs = [read_card(folder / part / "run.json", *keys) for part in parts or (".",)]
    run, data = runs[0], runs[0]["data"]
    lead = (
        f"{', '.join(one['base']['name'] for one in runs)}, {data['pages']} pages, {sum(data['validation'].values())} "
        f"claims to tell true from false, {sum(data['train'].values())} to learn from. {run['time'][:10]}."
    )
    note = "Means over seeds; intervals are 95 % over claims. context has the page's text in the prompt; other is a "
    note += "memory of claims about other pages."
    sections: list[dict[str, Any]] = [
        {"title": title, "head": head, "rows": rows, "note": "" if n else note}
        for n, (title, head, rows) in enumerate(grids(*runs))
    ]
    made = {key: run[key] for key in ("command", "base", "settings", "origin", "data", "machine") if run.get(key)}
    if len(runs) > 1:
        made["base"] = [one["base"] for one in runs]
    return write_page(folder, "FEVER: does a memory help?", lead, sections, made)
