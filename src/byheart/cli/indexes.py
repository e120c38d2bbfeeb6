"""`byheart index`: a searchable index of a ledger's documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from byheart.cli.options import (
    AsJson,
    Device,
    DtypeName,
    EncoderName,
    LedgerFile,
    Out,
    Passages,
    RetrieverMode,
    Segment,
    emit,
    parse_mode,
)
from byheart.errors import DataError, UsageError

app = typer.Typer(help="A searchable index of a ledger's documents.", no_args_is_help=True)


IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="The index folder.", show_default=False)]


@app.command("build")
def _index_build(
    ledger: LedgerFile,
    out: Out,
    encoder: EncoderName = "minilm",
    segment: Segment = "288/64",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Index a ledger's documents; goes on after a kill, and brings an older index up to date."""
    from byheart.encoder import load_encoder
    from byheart.ledger import Ledger
    from byheart.progress import Terminal
    from byheart.retrieve import index_ledger

    show = Terminal()
    loaded = load_encoder(encoder, device=device, dtype=_unpacked(dtype), say=show.say)
    with Ledger(ledger) as opened, show.bar("documents", opened.count("document")) as tick:
        index = index_ledger(opened, out, loaded, segment, on_done=tick)
    emit(_index_record(index), as_json, f"{out}: {len(index)} passages of {index.documents} documents")


@app.command("add")
def _index_add(
    ledger: LedgerFile, out: Out, device: Device = None, dtype: DtypeName = None, as_json: AsJson = False
) -> None:
    """Bring an index up to date with its ledger: what was inserted, revised or retracted since."""
    from byheart.index import Index

    index = Index.open(out)
    _index_build(ledger, out, index.card.name, index.segment, device, dtype, as_json)


@app.command("remove")
def _index_remove(
    index: IndexFolder, ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Documents.")]
) -> None:
    """Take documents out of an index."""
    from byheart.index import Index

    opened = Index.open(index)
    there = {passage.document for _, passage in opened.all_passages()}
    for id in ids:
        if id not in there:
            raise DataError(f'{index}: holds no document "{id}"')
    opened.change(remove=ids)
    print(f"{index}: {len(ids)} removed, {len(opened)} passages left")


@app.command("search")
def _index_search(
    index: IndexFolder,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for.")],
    k: Passages = 5,
    retriever: RetrieverMode = "hybrid",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Find passages for a question."""
    from dataclasses import asdict

    from byheart.encoder import load_encoder
    from byheart.index import Index
    from byheart.retrieve import Retriever

    mode, plain = parse_mode(retriever), _unpacked(dtype)
    found = Index.open(index)
    loaded = load_encoder(found.card.name, device=device, dtype=plain)
    (hits,) = Retriever(Index(index, loaded.card, found.segment), loaded, mode).retrieve([question], k)
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False, indent=2))
        return
    for rank, hit in enumerate(hits, 1):
        print(f"{rank:>2}. {hit.score:.3f} {hit.title or hit.document} ({hit.document}, {hit.start}-{hit.end})")
        print(f"    {' '.join(hit.text.split())[:300]}")


@app.command("stats")
def _index_stats(index: IndexFolder) -> None:
    """Show what an index holds and what it was made with, as JSON."""
    from byheart.index import Index

    opened = Index.open(index)
    record = _index_record(opened) | {"encoder": opened.card.to_dict(), "segment": opened.segment}
    print(json.dumps(record, indent=2))


def _index_record(index: Any) -> dict[str, Any]:
    return {
        "documents": index.documents,
        "passages": len(index),
        "bytes": index.bytes,
        "seconds": index.state("seconds", 0.0),
        "ledger_revision": index.state("stand", [None])[0],
    }


# -- shared --------------------------------------------------------------------------------------------------


def _unpacked(dtype: str | None) -> str | None:
    if dtype == "int8":
        raise UsageError("--dtype int8: packs language models alone, and no encoder")
    return dtype
