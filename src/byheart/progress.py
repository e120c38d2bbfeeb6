"""What a person sees while work goes on: lines and bars on stderr, bars only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tick = Callable[[int], None]


class Silent:
    """Shows nothing: for use as a library, and in tests."""

    def say(self, line: str) -> None:
        """One line for the person."""

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Tick]:
        """A bar over ``total`` steps; the block gets a function that counts steps."""
        yield lambda count: None


class Terminal(Silent):
    """Lines on stderr, and bars where stderr is a terminal."""

    def say(self, line: str) -> None:
        """One line on stderr."""
        print(line, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Tick]:
        """A rich bar on a terminal; elsewhere the label alone, once."""
        if not sys.stderr.isatty():
            self.say(f"{label} ({total})" if total is not None else label)
            yield lambda count: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(label, total=total)
            yield lambda count: progress.advance(task, count)
