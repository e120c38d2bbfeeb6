"""`byheart learn`, `ask`, `follow`, `trace`, `undo`, `export`: knowledge in, questions, knowledge out."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byheart.cli.options import (
    AsJson,
    BaseName,
    Chat,
    Device,
    DtypeName,
    EncoderName,
    LedgerFile,
    Limit,
    MaxNew,
    Options,
    Out,
    Passages,
    RetrieverMode,
    Seed,
    Segment,
    Shots,
    check_used,
    emit,
    make_settings,
)
from byheart.errors import DataError, UsageError
from byheart.storage import CARD

if TYPE_CHECKING:
    from byheart.base import Base
    from byheart.ledger import Ledger
    from byheart.methods import Method


app = typer.Typer()
OwnDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16 or int8; by default what it was learnt in."),
]
OwnBase = Annotated[
    str | None,
    typer.Option("--base", help="The language model it was made for; by default by the name that it had then."),
]


@app.command("learn")
def _learn(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="context, memory, prefix, edit ...; an unknown one lists all.")
    ],
    ledger: LedgerFile,
    out: Out,
    base: BaseName = "smollm2-135m",
    encoder: EncoderName = "minilm",
    segment: Segment = "288/64",
    retriever: RetrieverMode = "hybrid",
    k: Passages = 1,
    shots: Shots = 5,
    chat: Chat = False,
    max_new_tokens: MaxNew = 24,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    gate: Annotated[bool, typer.Option("--gate", help="Take an edit back that moves too much else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a ledger with one method, and write what was learnt to a folder that `byheart ask` reads."""
    from byheart.base import load_base
    from byheart.ledger import Ledger
    from byheart.methods import method_class
    from byheart.progress import Terminal
    from byheart.storage import check_replaceable

    cls = method_class(method)
    if why := getattr(cls, "not_kept", ""):
        raise UsageError(f"{method}: {why}")
    if gate:
        if method != "edit":
            raise UsageError("--gate: only edit has a gate")
        options = [*(options or []), "edit.gate=rollback"]
    elif method == "edit":
        options = ["edit.gate=warn", *(options or [])]
    settings = make_settings(encoder, segment, retriever, k, shots, chat, max_new_tokens, seed, options)
    check_used(options, [method])
    check_replaceable(out, CARD)
    show = Terminal()
    with Ledger(ledger) as opened:
        learner = cls(
            load_base(base, device=device, dtype=dtype, say=show.say), settings, out.parent / f".{out.name}.work"
        )
        if estimate := learner.estimate(opened):
            show.say(estimate)
        with show.bar(f"{method}: {learner.learns}s", opened.count(learner.learns)) as tick:
            report = learner.learn(opened, tick)
        learner.save_pretrained(out)
    shutil.rmtree(out.parent / f".{out.name}.work", ignore_errors=True)
    _show_report(report, out, as_json, f"{method}: learnt", skipped=getattr(learner, "skipped", {}))


@app.command("ask")
def _ask(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="What `byheart learn` wrote; several go side by side.")
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
    base: OwnBase = None,
    device: Device = None,
    dtype: OwnDtype = None,
    as_json: AsJson = False,
) -> None:
    """Ask one question of what was learnt, and show the answer with its evidence."""
    from dataclasses import asdict

    from byheart.rows import Question

    if not question.strip():
        raise UsageError("QUESTION: is empty")
    rows = []
    model = _base_of(folders, base, device, dtype)
    for folder in folders:
        method = _learnt_in(folder, model)
        with method.attached():
            (answer,) = method.answer([Question(id="asked", question=question)])
        rows.append({"folder": str(folder), "method": method.name} | asdict(answer))
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for row in rows:
        print(f"{row['method']}: {row['text'] or row['skipped'] or '(no answer)'}")
        for passage in row["evidence"]:
            print(f"    {passage['title'] or passage['document']} ({passage['document']}, "
                  f"{passage['start']}-{passage['end']}): {' '.join(passage['text'].split())[:300]}")  # fmt: skip


@app.command("trace")
def _trace(
    out: Out = Path("runs/trace"),
    facts: Annotated[
        Path | None,
        typer.Option(
            "--facts", help="JSONL of subject, prompt or template, and object or attribute; else common facts."
        ),
    ] = None,
    base: BaseName = "smollm2-135m",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Draws of the noise a fact.")] = 3,
    window: Annotated[
        int, typer.Option("--window", min=1, help="Blocks over which MLPs or attention are restored.")
    ] = 5,
    limit: Limit = 40,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Find the layers that facts are recalled from, by causal tracing; `learn edit` then edits those."""
    from byheart.base import load_base
    from byheart.edit_report import write_trace_report
    from byheart.methods.edit.tracing import trace_base
    from byheart.progress import Terminal
    from byheart.storage import write_json

    show = Terminal()
    model = load_base(base, device=device, dtype=dtype, say=show.say)
    out.mkdir(parents=True, exist_ok=True)
    record = trace_base(model, facts, limit or 40, samples, window, seed, out, show)
    write_json(out / "trace.json", record)
    page = write_trace_report(out, record)
    first, last = record["range"]
    emit(record, as_json, f"layers {first}-{last} ({record['how']})")
    if record["facts"]:
        show.say(f"heat map: {out / 'trace.png'}")
    show.say(f"report: {page}")


Learnt = Annotated[Path, typer.Argument(metavar="DIR", help="What `byheart learn` wrote.", show_default=False)]


@app.command("follow")
def _follow(
    folder: Learnt,
    ledger: LedgerFile,
    base: OwnBase = None,
    device: Device = None,
    dtype: OwnDtype = None,
    as_json: AsJson = False,
) -> None:
    """Bring what was learnt up to its ledger's last change, and to this day: what is new comes, what is gone goes."""
    from byheart.ledger import Ledger
    from byheart.methods.edit.weights import ChangedWeights
    from byheart.progress import Terminal
    from byheart.storage import SAVE_EVERY, read_card

    card, today = read_card(folder / CARD, "ledger"), dt.date.today().isoformat()
    with Ledger(ledger) as opened:
        if not opened.passed(card["ledger"]):
            raise DataError(f"{ledger}: is not the ledger that {folder} was learnt from; name that one, or learn anew")
        changes = list(opened.history(since=card["ledger"][0]))
        due = _due(opened, card.get("day", ""), today)
        notes: list[str] = []
        seconds = 0.0
        if changes or due:
            model = _base_of([folder], base, device, dtype)
            method = _learnt_in(folder, model)
            saved = time.monotonic()
            with Terminal().bar("follow: changes", len(changes)) as tick:
                # The weights of an edit follow from all facts at once; what is trained follows change by change, and so
                # does what a gate is to judge.
                gate = getattr(getattr(method, "options", None), "gate", "off")
                at_once = isinstance(method, ChangedWeights) and gate != "rollback"
                for some in [changes] if at_once and changes else [[change] for change in changes]:
                    had = getattr(method, "skipped", {})
                    report = method.revise(*some)
                    seconds += report.seconds
                    notes += _newly_skipped(method, had)
                    named = f"{some[0].kind} {some[0].id}: " if len(some) == 1 else ""
                    notes += [f"{named}{note}" for note in report.notes]
                    tick(len(some))
                    if time.monotonic() - saved > SAVE_EVERY:
                        method.save_pretrained(folder)
                        method = _learnt_in(folder, model)  # what it had open has moved
                        saved = time.monotonic()
            if due and not any(change.kind == "fact" for change in changes):
                had = getattr(method, "skipped", {})
                report = method.renew()
                seconds += report.seconds
                notes += [*_newly_skipped(method, had), *report.notes]
            method.day = today
            method.save_pretrained(folder)
    for note in notes:
        print(note, file=sys.stderr)
    record = {"changes": len(changes), "due": len(due), "seconds": seconds, "notes": notes, "out": str(folder)}
    dated = f" and the dates of {len(due)} facts" if due else ""
    emit(
        record,
        as_json,
        f"followed {len(changes)} change{'s' if len(changes) != 1 else ''}{dated} in {seconds:.1f} s: {folder}",
    )


def _due(ledger: Ledger, day: str, today: str) -> list[str]:
    """The ids of facts that have begun or ceased to hold since a day (ISO; blank: ever)."""
    return [
        fact.id
        for fact in ledger.facts()
        if any(date and day < date.isoformat() <= today for date in (fact.valid_from, fact.valid_to))
    ]


@app.command("undo")
def _undo(
    folder: Learnt,
    facts: Annotated[list[str], typer.Argument(metavar="FACT_ID...", help="The facts to take out again.")],
    settle: Annotated[bool, typer.Option("--settle", help="Settle others again that are no longer said.")] = False,
    base: OwnBase = None,
    device: Device = None,
    dtype: OwnDtype = None,
    as_json: AsJson = False,
) -> None:
    """Take facts out of an edit: the others are solved for again, from what is kept of them."""
    from byheart.methods.edit.method import Edit

    method = _learnt_in(folder, _base_of([folder], base, device, dtype))
    if not isinstance(method, Edit):
        raise UsageError(f"{folder}: holds {method.name}, and only an edit's facts can be undone one by one")
    had = method.skipped
    report = method.undo(facts, settle=settle)
    method.save_pretrained(folder)
    for note in _newly_skipped(method, had):
        print(note, file=sys.stderr)
    _show_report(report, folder, as_json, f"undone {', '.join(facts)}; left:", skipped={})


@app.command("export")
def _export(
    folder: Learnt,
    to: Annotated[str, typer.Option("--to", help="peft (a LoRA adapter) or merged (a whole model).")],
    out: Out,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="peft: the highest rank; what it cuts is reported.")
    ] = None,
    base: OwnBase = None,
    device: Device = None,
    dtype: OwnDtype = None,
    as_json: AsJson = False,
) -> None:
    """Write a change of weights, or a prefix without passages, in a form that other programs load."""
    from byheart.methods.edit.export import export_merged, export_peft
    from byheart.methods.edit.weights import ChangedWeights
    from byheart.methods.prefix.export import export_cartridge
    from byheart.methods.prefix.method import Prefix

    if to not in ("peft", "merged"):
        raise UsageError(f"--to {to}: must be peft or merged")
    if rank is not None and to != "peft":
        raise UsageError("--rank: only for --to peft")
    method = _learnt_in(folder, _base_of([folder], base, device, dtype))
    if isinstance(method, Prefix) and (to != "peft" or rank is not None):
        given = f"--rank {rank}" if rank is not None else f"--to {to}"
        raise UsageError(f"{given}: a prefix changes no weights; it is exported with --to peft alone, as a Cartridge")
    if isinstance(method, Prefix):
        record = export_cartridge(method, out)
        emit(record, as_json, f"{out}: written, {record['columns']} columns")
        return
    if not isinstance(method, ChangedWeights):
        raise UsageError(f"{folder}: {method.name} changes no weights, so there is nothing to export")
    record = export_peft(method, out, rank) if to == "peft" else export_merged(method, out)
    cut = max(record.get("error", {}).values(), default=0.0)
    said = (
        f", rank {record['rank']}" + (f", {cut:.1%} of the change cut at most" if cut else "") if to == "peft" else ""
    )
    emit(record, as_json, f"{out}: written{said}")


def _base_of(folders: list[Path], base: str | None, device: str | None, dtype: str | None) -> Base:
    """The base that is named, or else the one that the first folder was learnt for."""
    from byheart.base import DTYPES, INT8, load_base
    from byheart.progress import Terminal
    from byheart.storage import read_card

    cards = [read_card(folder / CARD, "method", "base") for folder in folders]
    try:
        name = base or str(cards[0]["base"]["name"])
        kept = ["int8" if card["base"].get("packed") else card["base"].get("dtype") for card in cards]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{folders[0] / 'byheart.json'}: does not name its base; give --base") from None
    show = Terminal()
    chosen = dtype or (kept[0] if kept[0] in (*DTYPES, INT8) else None)
    for folder, one in zip(folders, kept, strict=True):
        if chosen and one and one != chosen:
            show.say(
                f"{folder}: learnt in {one}, opened in {chosen}: what it says, and learns from here on, is of both"
            )
    return load_base(name, device=device, dtype=chosen, say=show.say)


def _learnt_in(folder: Path, base: Base) -> Method:
    """What was learnt into a folder."""
    from byheart.methods import method_class
    from byheart.storage import read_card

    return method_class(read_card(folder / CARD, "method")["method"]).from_pretrained(folder, base)


def _newly_skipped(method: Method, had: dict[str, str]) -> list[str]:
    """Of rows that a method could not learn, or no longer holds, those of which that was not known."""
    now: dict[str, str] = getattr(method, "skipped", {})
    return [f"skipped {id}: {why}" for id, why in now.items() if had.get(id) != why]


def _show_report(report: Any, out: Path, as_json: bool, sentence: str, skipped: dict[str, str]) -> None:
    from dataclasses import asdict

    for id, why in skipped.items():
        print(f"skipped {id}: {why}", file=sys.stderr)
    for note in report.notes:
        print(note, file=sys.stderr)
    kind, count = ("fact", report.facts) if report.facts or not report.documents else ("document", report.documents)
    what = f"{count} {kind}{'s' if count != 1 else ''}"
    record = asdict(report) | {"skipped_rows": skipped, "out": str(out)}
    emit(record, as_json, f"{sentence} {what} in {report.seconds:.1f} s: {out}")
