"""The command line: parses, calls the library, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from byheart import __version__
from byheart.cli import benchmarks, comparing, indexes, learning, ledgers, models
from byheart.errors import ByheartError

app = typer.Typer(
    help="Give a language model knowledge that it does not have, and measure which way works.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help: rich would double the time that --help takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(comparing.app)
app.add_typer(learning.app)
app.add_typer(benchmarks.app, name="bench")
app.add_typer(ledgers.app, name="ledger")
app.add_typer(indexes.app, name="index")
app.add_typer(models.app)


def main() -> None:
    """Run the command line; an error of ours is one sentence on stderr and its exit code."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app(args=[a for a in arguments if a != "--debug"], prog_name="byheart")
    except ByheartError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            print("interrupted; run the same command again to go on", file=sys.stderr)
        raise
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(3)
    except Exception as error:
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
