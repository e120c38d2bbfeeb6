"""`byheart ledger`: documents, facts and questions, and every change of them."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byheart.cli.options import AsJson, LedgerFile, Source, emit, short
from byheart.errors import DataError

if TYPE_CHECKING:
    from byheart.rows import Kind


app = typer.Typer(help="Documents, facts and questions, and every change of them.", no_args_is_help=True)


@app.command("add")
def _ledger_add(
    ledger: LedgerFile,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".jsonl, .jsonl.gz, .txt or .md files.")],
    source: Source = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines out instead of importing nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring files into a ledger (made if it is not there): all rows, or none where a line is bad."""
    _import(ledger, files, "insert", source, skip_bad, as_json)


@app.command("revise")
def _ledger_revise(
    ledger: LedgerFile,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="JSONL of whole rows with the ids to replace.")
    ],
    source: Source = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines out instead of changing nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replace rows by id; lines may say "action": "retract" or "insert" themselves."""
    _import(ledger, files, "revise", source, skip_bad, as_json)


@app.command("retract")
def _ledger_retract(
    ledger: LedgerFile,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of documents, facts or questions.")],
    source: Source = None,
) -> None:
    """Withdraw rows: all of them, or none where an id is unknown. Their history stays."""
    from byheart.ledger import Ledger
    from byheart.rows import Entry

    done = []
    with Ledger(ledger) as opened, opened.transaction():
        for id in ids:
            kinds = opened.kinds_of(id)
            if not kinds:
                raise DataError(f'{ledger}: no row "{id}"; nothing was retracted')
            for kind in kinds:
                done.append(f"{kind} {id}: {opened.apply(Entry('retract', kind, id, None), source=source)}")
    print("\n".join(done))


@app.command("show")
def _ledger_show(
    ledger: LedgerFile,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="A row; without it, the ledger as a whole.")] = None,
) -> None:
    """Show a row, or what the ledger holds, as JSON."""
    from byheart.ledger import Ledger

    with Ledger(ledger) as opened:
        if id is None:
            kinds: tuple[Kind, ...] = ("document", "fact", "question")
            record: dict[str, Any] = {f"{kind}s": opened.count(kind) for kind in kinds}
            print(json.dumps({"ledger": str(ledger), "revision": opened.revision} | record, indent=2))
            return
        found = [(kind, opened.get(kind, id)) for kind in opened.kinds_of(id)]
        if not found:
            raise DataError(f'{ledger}: no row "{id}"')
        for kind, row in found:
            body = {"retracted": True} if row is None else row.model_dump(mode="json", exclude_defaults=True)
            print(json.dumps({"type": kind, "id": id} | body, ensure_ascii=False, indent=2))


@app.command("check")
def _ledger_check(ledger: LedgerFile, as_json: AsJson = False) -> None:
    """Find contradictions, ids that lead nowhere and unanswerable rows; exit code 3 where there are some."""
    from dataclasses import asdict

    from byheart.check import check
    from byheart.ledger import Ledger

    count = 0
    with Ledger(ledger) as opened:
        for finding in check(opened):
            count += 1
            print(json.dumps(asdict(finding), ensure_ascii=False) if as_json else finding)
    print(f"{count} finding{'s' if count != 1 else ''}" if count else "nothing wrong", file=sys.stderr)
    if count:
        raise typer.Exit(3)


@app.command("history")
def _ledger_history(
    ledger: LedgerFile,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="A row; without it, all of them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the changes of a row, or of all rows, oldest first."""
    from byheart.ledger import Ledger

    with Ledger(ledger) as opened:
        for change in opened.history(id):
            before, after = (
                None if row is None else row.model_dump(mode="json") for row in (change.before, change.after)
            )
            moved = sorted(k for k in after if before[k] != after[k]) if before and after else []
            if as_json:
                record = {k: getattr(change, k) for k in ("revision", "time", "action", "kind", "id", "source")}
                print(json.dumps(record | {"before": before, "after": after}, ensure_ascii=False))
                continue
            what = "".join(f"\n    {k}: {short(before[k])} -> {short(after[k])}" for k in moved if before and after)
            source = f" ({change.source})" if change.source else ""
            print(f"{change.revision:>7} {change.time} {change.action} {change.kind} {change.id}{source}{what}")


def _import(ledger: Path, files: list[Path], action: Any, source: str | None, skip_bad: bool, as_json: bool) -> None:
    from byheart.formats import describe_bad, import_files
    from byheart.ledger import Ledger

    for file in files:
        if not file.exists():
            raise DataError(f"{file}: no such file")
    there = ledger.exists()
    try:
        with Ledger(ledger, create=action == "insert") as opened:
            report = import_files(opened, files, action=action, source=source, skip_bad=skip_bad)
    except BaseException:
        if not there:  # nothing came in, and an empty ledger was not asked for
            with suppress(OSError):
                ledger.unlink()
        raise
    if report.bad:
        print(describe_bad(report), file=sys.stderr)
    done = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.outcomes.items())) or "nothing to do"
    emit(dict(report.outcomes) | {"bad": report.bad}, as_json, f"{ledger}: {done}")


# -- index ---------------------------------------------------------------------------------------------------
