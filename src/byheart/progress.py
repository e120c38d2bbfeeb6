"""What a person sees while work goes on: lines and bars on stderr, bars only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

# Told how much more has got done.
Progress = Callable[[int], None]
untold: Progress = lambda count: None  # noqa: E731


def scaled(tick: Progress, of: int, to: int) -> Progress:
    """A tick that passes on ``to`` steps for every ``of`` steps that it is told of, in whole steps."""
    told = 0

    def scale(count: int) -> None:
        nonlocal told
        before, told = told, told + count
        tick(told * to // of - before * to // of)

    return scale


class Silent:
    """Shows nothing: for use as a library, and in tests."""

    def say(self, line: str) -> None:
        """One line for the person."""

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Progress]:
        """A bar over ``total`` steps; the block gets a function that counts steps."""
        yield untold


class Terminal(Silent):
    """Lines on stderr, and bars where stderr is a terminal."""

    def say(self, line: str) -> None:
        """One line on stderr."""
        print(line, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Progress]:
        """A rich bar on a terminal, elsewhere the label once; nothing where no step is ever counted."""
        with ExitStack() as stack:
            advance: Progress | None = None

            def tick(count: int) -> None:
                nonlocal advance
                if advance is None and count:
                    advance = (
                        stack.enter_context(_bar(label, total)) if sys.stderr.isatty() else self._line(label, total)
                    )
                if advance is not None:
                    advance(count)

            yield tick

    def _line(self, label: str, total: int | None) -> Progress:
        self.say(f"{label} ({total})" if total is not None else label)
        return untold


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
