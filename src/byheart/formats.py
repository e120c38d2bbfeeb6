"""Files into the ledger: JSON Lines and plain pages, streamed, every bad line reported with file, line and reason."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from byheart.errors import DataError
from byheart.ledger import Ledger
from byheart.rows import Action, Document, Entry, parse_entry
from byheart.storage import read_json

MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that could not be read: ``FILE:LINE: reason``."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(slots=True)
class ImportReport:
    """What an import did: rows by outcome, and the first bad lines (``bad`` counts them all)."""

    outcomes: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any | BadLine]]:
    """The decoded lines of a ``.jsonl`` or ``.jsonl.gz`` file with their numbers; blank lines are passed over.

    Raises:
        DataError: where the file cannot be opened or is cut short.
    """
    try:
        with _opened(path) as stream:
            for number, raw in enumerate(stream, 1):
                if not raw.strip():
                    continue
                try:
                    yield number, json.loads(raw)
                except UnicodeDecodeError:
                    yield number, BadLine(path, number, "not UTF-8")
                except json.JSONDecodeError as error:
                    yield number, BadLine(path, number, f"not JSON ({error.msg} at column {error.colno})")
                except (RecursionError, ValueError) as error:
                    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                    yield number, BadLine(path, number, f"not JSON that can be read ({reason})")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_objects(path: Path, needed: Iterable[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a benchmark file with their line numbers, each with the keys ``needed``.

    Some are published as one array in a ``.json`` file: its objects are numbered.

    Raises:
        DataError: at the first line that is no object or lacks a key; names file, line and key.
    """
    whole = read_json(path) if _holds_array(path) else None
    for number, value in read_json_lines(path) if whole is None else enumerate(whole, 1):
        if isinstance(value, BadLine):
            raise DataError(str(value))
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: not a JSON object")
        for key in needed:
            if key not in value:
                raise DataError(f'{path}:{number}: "{key}" is missing')
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can write what is no text, and nothing can store it
            raise DataError(f"{path}:{number}: holds half a character") from None
        yield number, value


def read_entries(path: Path, action: Action = "insert") -> Iterator[tuple[int, Entry | BadLine]]:
    """The ledger entries of a file with their line numbers: JSON Lines, or a ``.txt`` or ``.md`` page as a document."""
    if path.suffix in (".txt", ".md"):
        yield 1, _page(path, action)
        return
    for number, value in read_json_lines(path):
        if isinstance(value, BadLine):
            yield number, value
            continue
        try:
            yield number, parse_entry(value, action)
        except ValueError as error:
            yield number, BadLine(path, number, str(error))


def import_files(
    ledger: Ledger,
    paths: Iterable[Path],
    *,
    action: Action = "insert",
    source: str | None = None,
    skip_bad: bool = False,
) -> ImportReport:
    """Bring files into the ledger in one transaction: all rows or none, unless ``skip_bad`` leaves the bad ones out.

    Streams: memory does not grow with the files. Bad lines are counted to the end of the last file, so one run
    shows them all.

    Raises:
        DataError: where a line is bad and ``skip_bad`` is off (nothing is imported then); it lists the first lines.
    """
    report = ImportReport()
    with ledger.transaction():
        for path in paths:
            for number, entry in read_entries(path, action):
                if not isinstance(entry, BadLine):
                    try:
                        report.outcomes[ledger.apply(entry, source=source or path.name)] += 1
                        continue
                    # Content that JSON can write but a ledger cannot hold (half a character, say) is a ValueError.
                    except (DataError, ValueError, RecursionError) as error:
                        entry = BadLine(path, number, str(error))
                report.bad += 1
                if len(report.bad_lines) < MAX_LISTED:
                    report.bad_lines.append(entry)
        if report.bad and not skip_bad:
            raise DataError(f"{describe_bad(report)}\nNothing was imported; mend the lines or use --skip-bad.")
    return report


def describe_bad(report: ImportReport) -> str:
    """The bad lines as text: one a line, the rest counted."""
    lines = [str(bad) for bad in report.bad_lines]
    if report.bad > len(lines):
        lines.append(f"... and {report.bad - len(lines)} more")
    lines.append(f"{report.bad} bad line{'s' if report.bad != 1 else ''}.")
    return "\n".join(lines)


def _holds_array(path: Path) -> bool:
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as stream:
        return next((line for line in stream if line.strip()), b"").lstrip().startswith(b"[")


def _opened(path: Path) -> BinaryIO:
    if path.is_dir():
        raise DataError(f"{path}: a folder, not a file")
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _page(path: Path, action: Action) -> Entry | BadLine:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return BadLine(path, 1, "not UTF-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        return BadLine(path, 1, "the page is empty")
    return Entry(action, "document", path.name, Document(id=path.name, title=path.stem, text=text))
