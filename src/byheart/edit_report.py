"""An editing run and a causal trace as tables, pictures and a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byheart.benchmarks.editing import UNEDITED
from byheart.report import svg
from byheart.storage import read_card, read_json, replacing, traced_path
from byheart.tables import Grid, write_page

# Metric, heading and meaning: what a table shows where the run has it.
MAIN = (
    ("es", "ES", "share of edit prompts behind which the new object is likelier than the true one"),
    ("ps", "PS", "the same of their paraphrases"),
    ("ns", "NS", "share of prompts about neighbours behind which the true object is still the likelier"),
    ("s", "S", "harmonic mean of ES, PS and NS, or of efficacy, paraphrase and specificity"),
    ("es_magnitude", "ES mag.", "difference of the two probabilities"),
    ("ps_magnitude", "PS mag.", ""),
    ("ns_magnitude", "NS mag.", ""),
    ("es_accuracy", "ES acc.", "share of prompts behind which all tokens of what is wanted are the likeliest"),
    ("ps_accuracy", "PS acc.", ""),
    ("ns_accuracy", "NS acc.", ""),
    ("s_accuracy", "S acc.", ""),
    ("efficacy", "efficacy", "share of the new object's tokens that are the likeliest behind the edit prompt"),
    ("paraphrase", "paraphrase", "the same behind its paraphrase"),
    ("specificity", "specificity", "the same of right answers to unrelated questions"),
    ("portability", "portability", "the same of answers that follow from the new object"),
    ("generated", "said", "share of freely generated answers that begin with the new object"),
    ("generated_paraphrase", "said, paraphrase", "the same of answers to paraphrases"),
    ("leak", "leak, prompt", "share of edits whose object is said behind their prompt about another edit's subject"),
    ("leak_subject", "leak, subject", "share where the other edit's object is said there"),
    ("leak_reworded", "leak, reworded", "the same behind a paraphrase, which no edit has seen"),
    ("ge", "GE", "entropy of generated texts' word pairs and triples, times 100; low where they repeat themselves"),
    ("rs", "RS", "likeness (TF-IDF) of generated texts and texts about the new object, times 100"),
    ("perplexity_drift", "perplexity", "of ordinary text: that of the unedited model, and the change from it"),
)
_SHORT = ("es", "ps", "ns", "s", "efficacy", "paraphrase", "specificity", "generated", "perplexity_drift")
# Facts that are named of those that were skipped for one reason.
_NAMED = 5


def grids(run: dict[str, Any]) -> Iterator[Grid]:
    """Title, head and rows of each table, as texts."""
    methods = run["methods"]
    shown = [(key, label) for key, label, _ in MAIN if any(key in m["metrics"] for m in methods.values())]
    yield (
        f"{run['benchmark']}: {_edited(run)}, {run['base']['name']}; scored after all edits",
        ["", *methods],
        [[label, *(_cell(m, key) for m in methods.values())] for key, label in shown]
        + [["facts written", *(str(m["facts"]) if name != UNEDITED else "-" for name, m in methods.items())]]
        + [["seconds to write", *(f"{m['write_seconds']:.1f}" if m["facts"] else "-" for m in methods.values())]],
    )
    told = [[name, note] for name, method in methods.items() for note in _notes(method)]
    if told:
        yield "what stands out", ["", ""], told
    if run.get("pairs"):
        names = [name for name in methods if name != UNEDITED]
        by_metric: dict[str, dict[str, str]] = {}
        for pair in run["pairs"]:
            low, high = pair["interval"]
            by_metric.setdefault(pair["metric"], {})[pair["method"]] = (
                f"{pair['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
        labels = {key: label for key, label, _ in MAIN}
        rows = [[labels[metric], *(cells.get(name, "-") for name in names)] for metric, cells in by_metric.items()]
        yield "difference from the unedited model, case by case", ["", *names], rows
    for name, method in methods.items():
        short = [(key, label) for key, label, _ in MAIN if key in _SHORT and key in method["metrics"]]
        if method.get("curve"):
            rows = []
            for point in method["curve"]:
                rows += [
                    [f"{point['edits']}{what}", str(point["batches"]), *(_cell(part, key) for key, _ in short)]
                    for what, part in ((f", {UNEDITED}", point["unedited"]), ("", _with_drift(point)))
                ]
            yield f"{name}: more edits", ["edits", "batches", *(label for _, label in short)], rows
        for label, part in method.get("sets", {}).items():
            keys = [(key, head) for key, head, _ in MAIN if key in _with_drift(part)["metrics"]]
            both = (UNEDITED, part["unedited"]), (name, _with_drift(part))
            facts = f"{part['facts']} of {part['cases']} facts written"
            yield (
                f"{name}: {label}, {part['batches']} batches, {facts}",
                ["", *(head for _, head in keys)],
                [[what, *(_cell(one, key) for key, _ in keys)] for what, one in both],
            )
        groups = method.get("by_group", {})
        if name != UNEDITED and len(groups) > 1:
            short = [(key, label) for key, label in short if key != "perplexity_drift"]  # the model's, no relation's
            rows = [
                [group or "-", str(part["cases"]), *(_cell(part, key) for key, _ in short)]
                for group, part in groups.items()
            ]
            yield f"{name}: by relation", ["relation", "facts", *(label for _, label in short)], rows


def _edited(run: dict[str, Any]) -> str:
    """How many records were edited in, and how."""
    batch = run["methods"].get("edit", {}).get("options", {}).get("batch", 0)
    how = f"by edit in batches of {batch}" if 0 < batch < run["edits"] else "at once"
    return f"{run['edits']} records edited {how}"


def _notes(method: dict[str, Any]) -> Iterator[str]:
    """What a method says of its edit, and what it left out there and in what was learnt apart."""
    yield from _left_out(method)
    yield from method.get("notes", ())
    apart = [(f"{point['edits']} at once", point) for point in method.get("curve", ())]
    for where, part in (*apart, *method.get("sets", {}).items()):
        yield from (f"{where}: {said}" for said in _left_out(part))
        if 0 < part.get("perplexity_batches", 0) < part["batches"]:
            yield f"{where}: perplexity is measured after {part['perplexity_batches']} of {part['batches']} batches"


def _left_out(part: dict[str, Any]) -> Iterator[str]:
    """Which facts were skipped, a sentence a reason."""
    by_reason: dict[str, list[str]] = {}
    for id, why in part.get("skipped_facts", {}).items():
        by_reason.setdefault(why, []).append(id)
    for why, ids in by_reason.items():
        more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        yield f"{len(ids)} fact{'s' if len(ids) != 1 else ''} skipped ({', '.join(ids[:_NAMED])}{more}): {why}"


def _with_drift(part: dict[str, Any]) -> dict[str, Any]:
    drift = part.get("perplexity_drift")
    return part if drift is None else part | {"metrics": part["metrics"] | {"perplexity_drift": drift}}


def _cell(part: dict[str, Any], key: str) -> str:
    value = part["metrics"].get(key)
    if value is None and key == "perplexity_drift" and part.get("perplexity"):
        return f"{part['perplexity']:.1f}"
    if value is None:
        return "-"
    if key == "perplexity_drift":
        return f"{value:+.1%}"
    places = 1 if key in ("ge", "rs") else 3
    interval = part["intervals"].get(key)
    return f"{value:.{places}f}" + (f" [{interval[0]:.{places}f}, {interval[1]:.{places}f}]" if interval else "")


def write_edit_report(folder: Path) -> Path:
    """Write ``report.html`` of an editing run; it opens offline, with no other file.

    Where a causal trace of the same model is kept, its heat map is shown, too.
    """
    run = read_card(folder / "run.json", "methods", "benchmark", "edits", "base")
    sections: list[dict[str, Any]] = [{"title": title, "head": head, "rows": rows} for title, head, rows in grids(run)]
    sections[0]["meanings"] = {label: meaning for _, label, meaning in MAIN}
    missing = "".join(f" Not measured: {one}." for one in run.get("unmeasured", []))
    sections[0]["note"] = f"{UNEDITED} is the unedited model; with 95 % intervals.{missing}"
    for name, method in run["methods"].items():
        if len(method.get("curve", [])) > 1:
            sections.append({"title": f"{name}: what happens as edits are added", "svg": svg(_curve(method["curve"]))})
    traced = traced_path(run["base"].get("hash", ""))
    record = read_json(traced) if traced.is_file() else {}
    if record.get("facts"):
        sections.append(heat_section(record))
    made = {key: run[key] for key in ("command", "base", "settings", "origin", "machine") if run.get(key)}
    lead = f"{_edited(run)}, into {run['base']['name']}, all scored after all edits. "
    lead += f"{run['time'][:10]}."
    return write_page(folder, run["benchmark"], lead, sections, made)


def write_trace_report(folder: Path, record: dict[str, Any]) -> Path:
    """Write ``report.html`` of a causal trace, and ``trace.png``; of a sweep, the ranges that were tried out."""
    settings = {key: record[key] for key in ("model", "noise", "samples", "window", "seed")}
    first, last = record["range"]
    if not record["facts"]:
        (folder / "trace.png").unlink(missing_ok=True)  # of another model
        rows = [
            ["{}-{}".format(*one["range"]), f"{one['held']:.3f}", f"{one['stayed']:.3f}"] for one in record["tried"]
        ]
        lead = f"{record['model']}: {record['how']}. Proposed for editing: layers {first}-{last}."
        note = "A few edits a range: the share that holds behind other prefixes, and that of other facts that stay."
        sections = [{"title": "Ranges tried out", "head": ["layers", "held", "stayed"], "rows": rows, "note": note}]
        return write_page(folder, "Where facts are recalled", lead, sections, settings)
    import vl_convert

    chart = _heat(record).configure(background="white", font="sans-serif").configure_view(stroke=None)
    with replacing(folder / "trace.png") as path:
        path.write_bytes(vl_convert.vegalite_to_png(chart.to_dict(), scale=2))
    head = ["layer", *(f"{part}, last subject token" for part in record["parts"])]
    place = record["places"].index("last subject")
    rows = [
        [str(layer), *(_effect(record["effects"][n][place][layer]) for n in range(len(record["parts"])))]
        for layer in range(record["layers"])
    ]
    sections = [
        heat_section(record),
        {
            "title": "Average indirect effect by layer",
            "head": head,
            "rows": rows,
            "note": "How much of the right answer's probability one restored state brings back; with 95 % intervals.",
        },
    ]
    lead = (
        f"{record['model']}: {record['facts']} facts that it knows. p(right answer) {record['clean']:.2f}; with the "
        f"subject corrupted {record['corrupted']:.2f}. Proposed for editing: layers {first}-{last}."
    )
    return write_page(folder, "Where facts are recalled", lead, sections, settings)


def heat_section(record: dict[str, Any]) -> dict[str, Any]:
    """A trace's heat map as a section of a page."""
    return {
        "title": "Causal tracing: where facts are recalled",
        "svg": svg(_heat(record)),
        "note": f"Average over {record['facts']} facts. Hidden states one block at a time; MLP and attention over "
        f"{record['window']} blocks around each.",
    }


def _effect(values: list[float] | None) -> str:
    return "-" if values is None else f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]"


def _heat(record: dict[str, Any]) -> Any:
    import altair as alt

    cells = [
        {"part": part, "place": place, "layer": layer, "effect": values[0]}
        for part, places in zip(record["parts"], record["effects"], strict=True)
        for place, layers in zip(record["places"], places, strict=True)
        for layer, values in enumerate(layers)
        if values is not None
    ]
    return (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="block", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("place:N", sort=record["places"], title=None),
            color=alt.Color("effect:Q", title="effect", scale=alt.Scale(scheme="purples", domainMin=0)),
        )
        .properties(width=280, height=150)
        .facet(alt.Facet("part:N", sort=record["parts"], title=None), columns=3)
        .resolve_scale(color="independent")
    )


def _curve(points: list[dict[str, Any]]) -> Any:
    import altair as alt

    rows = [
        {"edits": point["edits"], "metric": label, "value": point["metrics"][key], "low": low, "high": high}
        for point in points
        for key, label, _ in MAIN
        if key in ("es", "ps", "ns", "efficacy", "paraphrase", "specificity", "generated") and key in point["metrics"]
        for low, high in [point["intervals"][key]]
    ]
    x = alt.X(
        "edits:Q",
        scale=alt.Scale(type="log"),
        title="edits at once",
        axis=alt.Axis(values=sorted({r["edits"] for r in rows})),
    )
    chart = alt.Chart(alt.Data(values=rows))
    colour = alt.Color("metric:N", title=None)
    lines = chart.mark_line(point=True).encode(
        x=x, y=alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, 1])), color=colour
    )
    bars = chart.mark_rule().encode(x=x, y="low:Q", y2="high:Q", color=colour)
    return alt.layer(lines, bars).properties(width=560, height=280)
