"""`byheart compare` and `report`: the main job, and its page again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byheart.cli.options import (
    AsJson,
    BaseName,
    BleurtName,
    Chat,
    Device,
    DtypeName,
    EncoderName,
    LedgerFile,
    Limit,
    MaxNew,
    MethodNames,
    Options,
    Out,
    Passages,
    RetrieverMode,
    Seed,
    Segment,
    Shots,
    WithBertScore,
    make_settings,
    parse_method_names,
    parse_splits,
    print_tables,
)
from byheart.errors import DataError

if TYPE_CHECKING:
    from byheart.methods import Settings


app = typer.Typer()


@app.command("compare")
def _compare(
    ledger: LedgerFile,
    out: Out,
    base: BaseName = "smollm2-135m",
    methods: MethodNames = "all",
    encoder: EncoderName = "minilm",
    segment: Segment = "288/64",
    retriever: RetrieverMode = "hybrid",
    k: Passages = 1,
    shots: Shots = 5,
    chat: Chat = False,
    max_new_tokens: MaxNew = 24,
    split: Annotated[str, typer.Option("--split", help="Which questions to ask.")] = "validation,test",
    limit: Limit = None,
    bertscore: WithBertScore = False,
    bleurt: BleurtName = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Ask every method the ledger's questions, and write run.json, answers.jsonl and report.html."""
    from byheart.ledger import Ledger

    settings = make_settings(encoder, segment, retriever, k, shots, chat, max_new_tokens, seed, options)
    names, splits = parse_method_names(methods, options), parse_splits(split)
    with Ledger(ledger) as opened:
        judged = (bertscore, bleurt)
        run_comparison(opened, base, names, out, settings, splits, limit, judged, device, dtype, as_json, {})


@app.command("report")
def _report(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Write report.html of a run again, from its run.json and answers.jsonl."""
    from jinja2 import UndefinedError

    from byheart.edit_report import write_edit_report
    from byheart.fever_report import write_fever_report
    from byheart.report import write_report
    from byheart.storage import read_card

    card = read_card(run / "run.json", "base")
    write = write_fever_report if "cells" in card else write_edit_report if "benchmark" in card else write_report
    try:
        page = write(run)
    except (KeyError, TypeError, AttributeError, ValueError, UndefinedError) as error:
        raise DataError(
            f"{run / 'run.json'}: not a whole run, or one of another version of byheart ({error!r})"
        ) from None
    print(page)


def run_comparison(
    ledger: Any, base: str, names: list[str], out: Path, settings: Settings, splits: list[Any], limit: int | None,
    judged: tuple[bool, str | None], device: str | None, dtype: str | None, as_json: bool, origin: dict[str, Any],
) -> None:  # fmt: skip
    """Compare, and print the table, what stands out, and where the page is.

    Args:
        judged: whether BERTScore is measured, and the checkpoint of BLEURT where it is.
    """
    from byheart.base import load_base
    from byheart.compare import compare
    from byheart.encoder import load_encoder
    from byheart.judges import BertScore, Bleurt, Judge
    from byheart.progress import Terminal
    from byheart.report import before_after, remarks, summary_table, write_report

    show = Terminal()
    model = load_base(base, device=device, dtype=dtype, say=show.say)
    judges: list[Judge] = []
    if judged[0]:
        judges.append(BertScore(load_encoder(settings.encoder, device=device, say=show.say)))
    if judged[1]:
        judges.append(Bleurt(judged[1], device))
    run = compare(
        ledger, model, names, out, settings, splits=splits, limit=limit, judges=judges, origin=origin, progress=show
    )
    report = write_report(out)
    if as_json:
        print(json.dumps(run, ensure_ascii=False, indent=2))
    else:
        print_tables([summary_table(run)])
        for remark in remarks(run):
            print(remark)
        example = before_after(out)
        if example is not None:
            print(f"for example: {example}")
    show.say(f"report: {report}")
