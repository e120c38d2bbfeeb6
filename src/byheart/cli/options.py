"""What commands share: options by type, settings from them, and how a result is printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byheart.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from byheart.methods import Settings
    from byheart.tables import Grid


LedgerFile = Annotated[Path, typer.Argument(metavar="LEDGER", help="The ledger file.", show_default=False)]
BaseName = Annotated[str, typer.Option("--base", help="Language model: embedded alias, folder, Hub id or GGUF file.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.", show_default=False)]
MethodNames = Annotated[str, typer.Option("--methods", help='Names with commas between them, or "all".')]
EncoderName = Annotated[str, typer.Option("--encoder", help="Text encoder: embedded alias, folder or Hub id.")]
Segment = Annotated[str, typer.Option("--segment", help="SIZE/STEP of the token windows: 288/64, 512/512 or any.")]
RetrieverMode = Annotated[str, typer.Option("--retriever", help="dense, bm25 or hybrid.")]
Passages = Annotated[int, typer.Option("--k", min=1, help="Retrieved passages a question.")]
Shots = Annotated[int, typer.Option("--shots", min=0, help="Examples in the prompt, from the training questions.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="What everything random is drawn from.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Ask only so many questions, drawn by the seed.")]
WithBertScore = Annotated[bool, typer.Option("--bertscore", help="Also measure BERTScore, with the text encoder.")]
BleurtName = Annotated[
    str | None, typer.Option("--bleurt", help="Also measure BLEURT, with this checkpoint: a folder or Hub id.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; by default CUDA where it is.")]
DtypeName = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16, or int8 (packed weights); by default what is fast."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="METHOD.NAME=VALUE", help="An option of one method, such as edit.layers=3-7."),
]
Source = Annotated[str | None, typer.Option("--source", help="Who says so; kept with every change.")]


def make_settings(
    encoder: str, segment: str, retriever: str, k: int, shots: int, chat: bool, max_new_tokens: int, seed: int,
    options: list[str] | None,
) -> Settings:  # fmt: skip
    """What the options of a command say that all methods of a run share."""
    from byheart.methods.contract import Settings
    from byheart.segment import parse_preset

    parse_preset(segment)
    return Settings(
        encoder,
        segment,
        parse_mode(retriever),
        k,
        shots,
        chat,
        max_new_tokens,
        seed,
        parse_method_options(options or []),
    )


def parse_method_options(given: list[str]) -> dict[str, str]:
    """``--set`` texts as a mapping."""
    from byheart.methods import METHODS

    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key.partition(".")[0] not in METHODS or "." not in key:
            raise UsageError(f"--set {text}: must be METHOD.NAME=VALUE, such as edit.layers=3-7")
        found[key] = value
    return found


def check_used(options: list[str] | None, names: Iterable[str]) -> None:
    """Refuse options of methods that a command does not ask, or that have none: they would silently do nothing.

    Args:
        names: of the methods; a control of a method takes the options of that method.
    """
    from byheart.methods import CONTROLS, PREFIX_CONTROLS

    named = list(names)
    for text in options or []:
        method = text.partition(".")[0]
        if method in CONTROLS:
            raise UsageError(f"--set {text}: {method} has no options")
        if method not in named and not (method == "prefix" and {*PREFIX_CONTROLS} & {*named}):
            raise UsageError(f"--set {text}: {method} is not among the methods ({', '.join(named)})")


def parse_mode(name: str) -> Any:
    """A retriever by its name."""
    from byheart.retrieve import MODES

    if name not in MODES:
        raise UsageError(f"--retriever {name}: must be one of {', '.join(MODES)}")
    return name


def parse_method_names(text: str, options: list[str] | None = None) -> list[str]:
    """``--methods`` as names; ``options`` of others are refused."""
    from byheart.methods import parse_methods

    names = parse_methods(text)
    check_used(options, names)
    return names


def parse_splits(text: str) -> list[Any]:
    """``--split`` as splits."""
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for part in chosen or [text]:
        if part not in ("train", "validation", "test"):
            raise UsageError(f"--split {text}: must name train, validation or test")
    return chosen


def emit(record: dict[str, Any], as_json: bool, sentence: str) -> None:
    """Print the result: as JSON, or as a sentence."""
    print(json.dumps(record, ensure_ascii=False, indent=2) if as_json else sentence)


def indented(record: dict[str, Any], depth: int = 0) -> str:
    """A record as lines for people."""
    lines = []
    for key, value in record.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{key}:", indented(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{key}: {value}")
    return "\n".join(lines)


def short(value: Any) -> str:
    """A value as JSON that fits a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Columns where stdout is no terminal: no line is as long, and none is cut.
_WIDE = 10_000


def print_tables(tables: Iterable[Table]) -> None:
    """Tables on stdout; where it is no terminal, wide enough that no figure is cut."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    for table in tables:
        console.print(table)


def print_grids(grids: Iterable[Grid]) -> None:
    """Grids as tables on stdout."""
    from byheart.tables import terminal_table

    print_tables(map(terminal_table, grids))
