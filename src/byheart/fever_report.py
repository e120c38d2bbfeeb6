"""A FEVER run as tables and a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byheart.storage import read_card
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


def grids(run: dict[str, Any]) -> Iterator[Grid]:
    """The run's tables as the seed prints them: a row a memory, a column a number of examples."""
    cells = {(cell["variant"], cell["shots"]): cell for cell in run["cells"]}
    shots = sorted({n for _, n in cells}, key=lambda n: (isinstance(n, str), n))
    variants = list(dict.fromkeys(variant for variant, _ in cells))
    for metric, title in _METRICS.items():
        rows = [[variant, *(_cell(cells.get((variant, n)), metric) for n in shots)] for variant in variants]
        yield title, ["memory", *("mean of all" if isinstance(n, str) else f"{n} shots" for n in shots)], rows
    if run.get("left_out"):
        yield "left out", ["", "why"], [[label, why] for label, why in run["left_out"].items()]
    only, most = run["controls"]["claim_only"], run["controls"]["majority"]
    yield (
        "controls that see no page",
        ["", "micro-F1", "macro-F1", "supports/refutes"],
        [
            ["claim only", *(f"{only[key]:.3f}" for key in ("micro_f1", "macro_f1", "supports_refutes"))],
            [f"always {most['label']}", f"{most['micro_f1']:.3f}", f"{most['macro_f1']:.3f}", "-"],
        ],
    )
    if run.get("pairs"):
        found: dict[tuple[str, str, int | str], dict[str, str]] = {}
        for pair in run["pairs"]:
            low, high = pair["interval"]
            row = found.setdefault((pair["variant"], pair["against"], pair["shots"]), {})
            row[pair["metric"]] = f"{pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows = [[a, b, str(n), *(row.get(key, "-") for key in _PAIRED)] for (a, b, n), row in found.items()]
        yield "differences on the same claims", ["memory", "against", "shots", *_PAIRED.values()], rows
    if run["training"]:
        rows = [
            [
                one["variant"],
                str(one["seed"]),
                f"{one['seconds']:.0f}",
                f"{one['page_token_accuracy']:.3f}" if "page_token_accuracy" in one else "-",
                f"{one['perplexity_drift']:+.1%}" if "perplexity_drift" in one else "-",
            ]
            for one in run["training"]
        ]
        yield "training", ["memory", "seed", "seconds", "page tokens right", "perplexity"], rows


def _cell(cell: dict[str, Any] | None, metric: str) -> str:
    if cell is None or metric not in cell["metrics"]:
        return "-"
    interval = cell["intervals"].get(metric)
    value = f"{cell['metrics'][metric]:.3f}"
    return value + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def write_fever_report(folder: Path) -> Path:
    """Write ``report.html`` of a FEVER run."""
    run = read_card(folder / "run.json", "cells", "controls", "data", "base")
    data = run["data"]
    lead = (
        f"{run['base']['name']}, {data['pages']} pages, {sum(data['validation'].values())} claims to tell true from "
        f"false, {sum(data['train'].values())} to learn from. {run['time'][:10]}."
    )
    note = "Means over seeds; intervals are 95 % over claims. context has the page's text in the prompt; other is a "
    note += "memory of claims about other pages."
    sections: list[dict[str, Any]] = [
        {"title": title, "head": head, "rows": rows, "note": "" if n else note}
        for n, (title, head, rows) in enumerate(grids(run))
    ]
    made = {key: run[key] for key in ("command", "base", "settings", "origin", "data", "machine") if run.get(key)}
    return write_page(folder, "FEVER: does a memory help?", lead, sections, made)
