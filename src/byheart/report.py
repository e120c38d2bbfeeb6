"""A run's `run.json` and `answers.jsonl` as a table in the terminal and as one self-contained HTML page."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byheart.errors import DataError
from byheart.storage import read_card, write_text

if TYPE_CHECKING:
    from rich.table import Table

# Questions shown side by side in the page; more would make it too heavy to open. answers.jsonl holds them all.
MAX_SHOWN = 2_000
_COLOURS = ("#2f6fde", "#d9742b", "#2a9d72", "#9b59b6", "#c0392b", "#7f8c8d", "#b8860b", "#16a2b8")
# Columns of the tables: key, heading, what it means.
QUALITY = (
    ("em", "exact match", "share of answers equal to a right one after SQuAD normalisation"),
    ("f1", "F1", "overlap of words with the best right answer"),
    ("contains", "contains", "share of answers that contain a right one"),
    ("accuracy", "accuracy", "share of questions whose right choice is the likeliest"),
    (
        "accuracy_calibrated",
        "accuracy (cal.)",
        "the same, after subtracting each choice's likelihood without the question",
    ),
    ("micro_f1", "micro-F1", "over the labels"),
    ("macro_f1", "macro-F1", "over the labels, each counted alike"),
    ("answer_probability", "p(answer)", "per-token probability of the first right answer"),
    (
        "token_accuracy",
        "token acc.",
        "share of the first right answer's tokens that are the likeliest where they stand",
    ),
    ("bertscore", "BERTScore", "how alike the tokens of the answer and of the best right one are, to the encoder"),
    ("bleurt", "BLEURT", "how well the answer says what the best right one says, to a model trained on ratings"),
    ("abstained", "abstains", "share of answers that decline"),
    ("hallucination", "unsupported", "share of answers that do not stand in the passages that were read for them"),
)
RETRIEVAL = (
    ("recall@1", "recall@1", "share of right documents behind the first passage"),
    ("recall@5", "recall@5", "share of right documents behind the first five passages"),
    ("recall@10", "recall@10", "share of right documents behind the first ten passages"),
    ("mrr", "MRR", "mean of one over the rank of the first passage of a right document"),
)
# What needs a model of its own, and how it is asked for.
_ON_WISH = (("bertscore", "BERTScore", "--bertscore"), ("bleurt", "BLEURT", "--bleurt CHECKPOINT"))


def summary_table(run: dict[str, Any]) -> Table:
    """The run as a table for the terminal."""
    from rich.table import Table

    columns = [c for c in (*QUALITY, *RETRIEVAL) if c[0] != "recall@10" and _present(run, c[0])]
    questions = run["questions"]["asked"]
    title = f"{run['base']['name']} on {run['origin'].get('title', run['ledger']['name'])}: {questions} questions"
    table = Table(title=f"{title}, 95 % intervals below", show_lines=True)
    table.add_column("method", style="bold")
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for heading in ("ms/question", "write", "size"):
        table.add_column(heading, justify="right")
    for name, method in run["methods"].items():
        cells = [_cell(method, key) for key, _, _ in columns]
        cells += [f"{method['query_ms']:.0f}", seconds(method["write_seconds"]), size(method["bytes"])]
        table.add_row(name, *cells)
    return table


def remarks(run: dict[str, Any]) -> list[str]:
    """What a reader must know to read the table right: what methods could not take in, warn of, or be asked."""
    found = [f"{name} left out: {why}" for name, why in run.get("methods_left_out", {}).items()]
    for name, method in run["methods"].items():
        asked = run["questions"]["asked"]
        found += [f"{name}: {count} of {asked} questions skipped: {why}" for why, count in method["skipped"].items()]
        found += [
            f"{name}: {count} of the ledger's rows left out: {why}" for why, count in method.get("left_out", {}).items()
        ]
        found += [f"{name}: {note}" for note in method.get("notes", [])]
    found += [f"{label}: not measured ({how})" for key, label, how in _ON_WISH if not _present(run, key)]
    return found


def before_after(folder: Path) -> str | None:
    """One question that a way of learning made right: what the model said before, and what it says now."""
    from byheart.methods import CONTROLS  # brings torch, which a page that is only written again does not need

    before: dict[str, dict[str, Any]] = {}
    with (folder / "answers.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["method"] == "closed":
                before[row["question"]] = row
            elif row["method"] not in CONTROLS and row["metrics"].get("em") == 1 and row["answers"]:
                old = before.get(row["question"])
                if old is not None and old["metrics"].get("em") == 0:
                    return f"{row['question_text']} before: {old['text']!r}, with {row['method']}: {row['text']!r}"
    return None


def write_report(folder: Path) -> Path:
    """Write ``report.html`` beside the run's files; it opens offline, with no other file.

    Raises:
        DataError: where the folder holds no run.
    """
    run = read_card(folder / "run.json", "methods", "pairs", "questions", "base", "ledger")
    try:
        shown = _side_by_side(folder / "answers.jsonl")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'answers.jsonl'}: not the answers of a run ({error!r})") from None
    colours = {name: _COLOURS[n % len(_COLOURS)] for n, name in enumerate(run["methods"])}
    page = render(
        "report.html",
        run=run,
        headline=headline(run),
        quality=[c for c in QUALITY if _present(run, c[0])],
        retrieval=[c for c in RETRIEVAL if _present(run, c[0])],
        remarks=remarks(run),
        pairs=[pair for pair in run["pairs"] if pair["metric"] == _main_metric(run)],
        main=_main_metric(run),
        charts=_charts(run, colours),
        colours=colours,
        # "<" could open or end an element in the script that carries the data.
        data=json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c"),
        more=max(0, run["questions"]["asked"] - MAX_SHOWN),
        record={key: run[key] for key in ("command", "base", "settings", "ledger", "origin", "machine") if run.get(key)}
        | ({"encoder": run["encoder"]} if run.get("encoder") else {}),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def render(template: str, **values: Any) -> str:
    """A page of ``web/`` with its values filled in."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("byheart", "web"), autoescape=select_autoescape())
    environment.filters |= {
        "share": share, "seconds": seconds, "size": size, "p": p_value, "split_interval": split_interval
    }  # fmt: skip
    return environment.get_template(template).render(**values)


def split_interval(cell: str) -> Any:
    """A cell of a table with the interval behind its figure on a line of its own."""
    from markupsafe import Markup, escape

    value, bracket, interval = cell.partition(" [")
    if not bracket:
        return escape(cell)
    low, _, high = interval.rstrip("]").partition(", ")
    return Markup("{}<small>{} – {}</small>").format(value, low, high)


def headline(run: dict[str, Any]) -> str:
    """One sentence with what came out: the best and the plainest way, by the main metric."""
    key = _main_metric(run)
    scored = {name: m["metrics"][key] for name, m in run["methods"].items() if key in m["metrics"]}
    if not scored:
        return "No method could be scored."
    best = max(scored, key=lambda name: scored[name])
    label = next(heading for name, heading, _ in QUALITY if name == key)
    text = f"{best.capitalize()} answers best: {label} {share(scored[best])}"
    if "closed" in scored and best != "closed":
        text += f", against {share(scored['closed'])} closed book"
    return text + "."


def _main_metric(run: dict[str, Any]) -> str:
    return "accuracy" if _present(run, "accuracy") else "em"


def _present(run: dict[str, Any], key: str) -> bool:
    return any(key in method["metrics"] for method in run["methods"].values())


def _cell(method: dict[str, Any], key: str) -> str:
    if key not in method["metrics"]:
        return "-"
    if key not in method["intervals"]:
        return share(method["metrics"][key])
    low, high = method["intervals"][key]
    return f"{share(method['metrics'][key])}\n{share(low)}-{share(high)}"


def share(value: float) -> str:
    """A share with three decimals."""
    return f"{value:.3f}"


def seconds(value: float) -> str:
    """A time, in the unit a person would use."""
    if value <= 0:
        return "-"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def size(count: float) -> str:
    """A number of bytes, in the unit a person would use."""
    if count <= 0:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def p_value(value: float | None) -> str:
    """A p-value; very small ones as a bound."""
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _side_by_side(path: Path) -> dict[str, Any]:
    """The questions with every method's answer, and each passage's text once."""
    passages: dict[tuple[str, int, int], int] = {}
    texts: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as stream:
        rows = (json.loads(line) for line in stream)
        for id, group in groupby(rows, key=lambda row: row["question"]):
            if len(questions) == MAX_SHOWN:
                break
            by_method = {}
            for row in group:
                numbers = []
                for p in row["evidence"]:
                    key = (p["document"], p["start"], p["end"])
                    if key not in passages:
                        passages[key] = len(texts)
                        texts.append({k: p[k] for k in ("document", "title", "text", "start", "end")})
                    numbers.append([passages[key], round(p["score"], 3)])
                by_method[row["method"]] = {
                    "text": row["choice"] if row["choice"] is not None and not row["text"] else row["text"],
                    "skipped": row["skipped"],
                    "right": row["metrics"].get("accuracy", row["metrics"].get("em")),
                    "holds": row["metrics"].get("contains"),
                    "f1": row["metrics"].get("f1"),
                    "p": row["metrics"].get("answer_probability"),
                    "choice": row["choice"],
                    "evidence": numbers,
                }
                head = {"id": id, "question": row["question_text"], "kind": row["kind"], "answers": row["answers"]}
            questions.append(head | {"methods": by_method})
    return {"questions": questions, "passages": texts}


def _charts(run: dict[str, Any], colours: dict[str, str]) -> dict[str, str]:
    """The plots as SVG: quality with intervals, by kind, and against time and bytes."""
    key = _main_metric(run)
    label = next(heading for name, heading, _ in QUALITY if name == key)
    rows = []
    for name, method in run["methods"].items():
        if key not in method["metrics"]:
            continue
        low, high = method["intervals"][key]
        rows.append(
            {
                "method": name,
                "value": method["metrics"][key],
                "low": low,
                "high": high,
                "ms": max(method["query_ms"], 0.01),
                "kilobytes": method["bytes"] / 1000,
            }
        )
    if not rows:
        return {}
    kinds = [
        {
            "method": name,
            "kind": kind,
            "value": part["metrics"][key],
            "low": part["intervals"][key][0],
            "high": part["intervals"][key][1],
        }
        for name, method in run["methods"].items()
        for kind, part in method["by_kind"].items()
        if key in part["metrics"]
    ]
    charts = {"quality": _dots(rows, label, colours)}
    charts["time"] = _scatter(rows, "ms", "milliseconds a question", label, colours, log=True)
    charts["bytes"] = _scatter(rows, "kilobytes", "stored, kB", label, colours, log=False)
    if kinds:
        charts["kinds"] = _dots(kinds, label, colours, facet=True)
    return charts


def _dots(rows: list[dict[str, Any]], label: str, colours: dict[str, str], *, facet: bool = False) -> str:
    import altair as alt

    order = list(colours)
    row = alt.Y("method:N", sort=order, title=None)
    top = min(1.0, max(0.1, 1.1 * max(r["high"] for r in rows)))
    scale = alt.Scale(domain=[0, top])
    chart = alt.Chart(alt.Data(values=rows))
    colour = _colour(colours)
    axis = alt.Axis(title=f"{label}, 95 % interval", tickCount=5)
    bars = chart.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", scale=scale, axis=axis), x2="high:Q", y=row, color=colour
    )
    points = chart.mark_point(filled=True, size=90, opacity=1).encode(
        x=alt.X("value:Q", scale=scale), y=row, color=colour
    )
    layered = alt.layer(bars, points).properties(width=980, height=30 * len(order))
    if facet:
        layered = layered.properties(width=430, height=24 * len(order)).facet(
            alt.Facet("kind:N", title=None), columns=2
        )
    return svg(layered)


def _scatter(
    rows: list[dict[str, Any]], key: str, title: str, label: str, colours: dict[str, str], *, log: bool
) -> str:
    import altair as alt

    top = max(0.1, 1.15 * max(r["high"] for r in rows))
    chart = alt.Chart(alt.Data(values=rows))
    values = [r[key] for r in rows]
    # A logarithmic axis over less than a decade has a single label, or none.
    log = log and max(values) > 10 * min(values)
    # Room on the right for the last name.
    scale = alt.Scale(type="log", nice=True) if log else alt.Scale(domain=[0, 1.2 * max(*values, 0.1)])
    x = alt.X(f"{key}:Q", scale=scale, axis=alt.Axis(title=title, tickCount=5))
    colour = _colour(colours)
    limits = chart.mark_rule().encode(
        x=x,
        y=alt.Y("low:Q", scale=alt.Scale(domain=[0, top]), axis=alt.Axis(title=label, tickCount=5)),
        y2="high:Q",
        color=colour,
    )
    points = chart.mark_point(filled=True, size=90, opacity=1).encode(x=x, y="value:Q", color=colour)
    # Names at three heights in turn: methods that cost much the same stand on one another otherwise.
    beside = sorted(rows, key=lambda row: float(row[key]))
    names = [
        alt.Chart(alt.Data(values=some))
        .mark_text(align="left", dx=9, dy=dy, fontSize=12)
        .encode(x=x, y="value:Q", text="method:N", color=colour)
        for some, dy in ((beside[::3], -9), (beside[1::3], -23), (beside[2::3], 14))
        if some
    ]
    return svg(alt.layer(limits, points, *names).properties(width=440, height=250))


def _colour(colours: dict[str, str]) -> Any:
    import altair as alt

    return alt.Color("method:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None)


def svg(chart: Any) -> str:
    """A chart as SVG that reads on the page's light and dark ground alike."""
    import vl_convert

    # Grey reads on the page's light and dark ground alike.
    chart = chart.configure(background="transparent", font="system-ui, sans-serif").configure_view(stroke=None)
    chart = chart.configure_axis(
        labelColor="#888", titleColor="#888", gridColor="#8884", domainColor="#888", tickColor="#888", labelFontSize=12,
        titleFontSize=12, titleFontWeight="normal",
    ).configure_header(labelColor="#888", labelFontSize=12)  # fmt: skip
    return str(vl_convert.vegalite_to_svg(chart.to_dict()))
