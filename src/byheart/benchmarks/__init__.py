"""Published benchmarks: each module reads its files in the published formats and hands on ledger rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byheart.errors import ConflictError, DataError
from byheart.ledger import Ledger
from byheart.rows import Row


@dataclass(frozen=True)
class Benchmark:
    """A benchmark ready to load: its rows, streamed, and what to record about where they came from."""

    name: str
    title: str
    rows: Callable[[], Iterator[Row]]
    origin: dict[str, Any] = field(default_factory=dict)


def load_benchmark(
    benchmark: Benchmark, path: Path, say: Callable[[str], None] = lambda line: None
) -> tuple[Ledger, dict[str, Any]]:
    """The benchmark's rows in a ledger at ``path`` (made, or checked to hold just these), and its record.

    Raises:
        DataError: where a row is bad, or the ledger there holds other rows; it is left as it was then.
    """
    ledger = Ledger(path, create=True)

    def noted() -> Iterator[Row]:
        ids: set[tuple[str, str]] = set()
        for row in benchmark.rows():
            ids.add((type(row).__name__, row.id))
            yield row
        # Here, in the transaction that the rows go in by: a refusal takes them all out again.
        if len(ids) != ledger.count("document") + ledger.count("question"):
            raise DataError(f"{path}: holds rows of other data too; name another --out")

    try:
        new = ledger.insert(noted(), source=benchmark.title)
    except DataError as error:
        ledger.close()
        if isinstance(error, ConflictError):
            raise DataError(f"{path}: holds other rows of {benchmark.name} ({error}); name another --out") from None
        raise
    say(
        f"{benchmark.title}: {ledger.count('document')} documents, "
        f"{ledger.count('question')} questions ({new} rows new)"
    )
    return ledger, {"title": benchmark.title} | benchmark.origin
