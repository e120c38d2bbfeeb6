"""The errors byheart raises on purpose: one sentence each, and the exit code the command line ends with."""

from __future__ import annotations


class ByheartError(Exception):
    """Something failed while running; the message is one sentence that says what and how to mend it."""

    exit_code = 1


class UsageError(ByheartError):
    """An option or argument makes no sense; the message names it."""

    exit_code = 2


class DataError(ByheartError):
    """A file, line, model or stored artefact is not what it should be; the message names it."""

    exit_code = 3


class ConflictError(DataError):
    """A row is there already with other content."""


def first_line(error: Exception) -> str:
    """The first line of another library's error, short enough for one sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
