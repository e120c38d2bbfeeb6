"""Vectors and the passages they stand for, in a folder: add, remove, replace, search exactly, resume after a kill."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from byheart.encoder import EncoderCard
from byheart.errors import DataError
from byheart.segment import Passage
from byheart.storage import bytes_under, read_card, write_json

FORMAT = 1
_BLOCK_ROWS = 65_536
_SCHEMA = """
CREATE TABLE passages (
    row INTEGER PRIMARY KEY, document TEXT NOT NULL, start INTEGER NOT NULL, end INTEGER NOT NULL,
    title TEXT NOT NULL, text TEXT NOT NULL, live INTEGER NOT NULL DEFAULT 1
);
CREATE INDEX passages_by_document ON passages (document);
CREATE INDEX passages_not_live ON passages (row) WHERE NOT live;
CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Index:
    """An exact inner-product index over memory-mapped float32 vectors.

    A folder with ``manifest.json`` (what the vectors depend on), ``vectors.f32`` and ``passages.sqlite``. Vectors are
    written and synced before the rows that name them are committed, so after a kill the rows tell how many vectors
    count; what lies behind them is overwritten by the next change.
    """

    def __init__(self, path: Path, card: EncoderCard, segment: str, *, create: bool = False) -> None:
        """Open the index in ``path``, or make one there with ``create=True``.

        Raises:
            DataError: where there is none, or it was made with another encoder, pooling, metric or segmentation.
        """
        self.path = path
        stamp = {"format": FORMAT, "encoder": card.to_dict(), "segment": segment}
        if create and not (path / "manifest.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "manifest.json", stamp)
        found = read_card(path / "manifest.json", "format", "encoder", "segment")
        _same_stamp(path, found, stamp)
        self.card, self.segment, self.dim = card, segment, card.dim
        self._vectors_path = path / "vectors.f32"
        try:
            self._db = sqlite3.connect(path / "passages.sqlite", isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'passages'").fetchone():
                self._db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            self._vectors_path.touch()
            self._load()
        except (sqlite3.DatabaseError, OSError) as error:
            raise DataError(f"{path}: cannot be opened as an index ({error})") from None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an index as it is, whatever encoder it was made with; to look into it, not to search it.

        Raises:
            DataError: where there is none.
        """
        manifest = read_card(path / "manifest.json", "format", "encoder", "segment")
        try:
            return cls(path, EncoderCard(**manifest["encoder"]), manifest["segment"])
        except TypeError:
            raise DataError(f"{path / 'manifest.json'}: not what byheart writes there") from None

    def _load(self) -> None:
        self.rows = self._rows_there()
        needed = self.rows * self.dim * 4
        if self._vectors_path.stat().st_size < needed:
            raise DataError(
                f"{self._vectors_path}: shorter than its {self.rows} rows need; delete {self.path} and index again"
            )
        self.live = np.ones(self.rows, dtype=bool)
        for (row,) in self._db.execute("SELECT row FROM passages WHERE NOT live"):
            self.live[row] = False
        self._vectors: NDArray[np.float32] = (
            np.memmap(self._vectors_path, dtype=np.float32, mode="r", shape=(self.rows, self.dim))
            if self.rows
            else np.empty((0, self.dim), dtype=np.float32)
        )

    def _rows_there(self) -> int:
        return cast(int, self._db.execute("SELECT coalesce(max(row), -1) + 1 FROM passages").fetchone()[0])

    def __len__(self) -> int:
        """How many passages can be found."""
        return int(self.live.sum())

    @property
    def documents(self) -> int:
        """How many documents have a passage that can be found."""
        found = self._db.execute("SELECT count(DISTINCT document) FROM passages WHERE live").fetchone()
        return cast(int, found[0])

    @property
    def bytes(self) -> int:
        """The folder's size on disk."""
        return bytes_under(self.path)

    def state(self, key: str, default: Any = None) -> Any:
        """A note kept with the index (how far a build got, which ledger revision it stands at)."""
        found = self._db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return default if found is None else json.loads(found[0])

    def change(
        self,
        *,
        remove: Iterable[str] = (),
        passages: Sequence[Passage] = (),
        vectors: NDArray[np.float32] | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Remove whole documents, then add passages with their vectors (len(passages), dim), then note ``state``.

        One transaction: after a kill all of it holds, or none. Replacing a document is removing and adding it.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if self._rows_there() != self.rows:
                raise DataError(f"{self.path}: another run writes there; wait for it, or name another folder")
            if passages:
                assert vectors is not None and vectors.shape == (len(passages), self.dim)
                with self._vectors_path.open("r+b") as stream:
                    stream.truncate(self.rows * self.dim * 4)
                    stream.seek(0, os.SEEK_END)
                    stream.write(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
                    stream.flush()
                    os.fsync(stream.fileno())
            self._db.executemany("UPDATE passages SET live = 0 WHERE document = ?", [(one,) for one in remove])
            self._db.executemany(
                "INSERT INTO passages (row, document, start, end, title, text) VALUES (?, ?, ?, ?, ?, ?)",
                [(self.rows + n, p.document, p.start, p.end, p.title, p.text) for n, p in enumerate(passages)],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO state VALUES (?, ?)",
                [(key, json.dumps(value)) for key, value in (state or {}).items()],
            )
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        self._load()

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best rows for each query by inner product.

        Args:
            queries: (n, dim).
            k: how many rows; fewer come back where the index holds fewer.

        Returns:
            scores (n, k) and rows (n, k), best first; equal scores in row order.
        """
        k = min(k, len(self))
        best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
        rows = np.empty((len(queries), 0), dtype=np.int64)
        for start in range(0, self.rows, _BLOCK_ROWS):
            block = self._vectors[start : start + _BLOCK_ROWS]
            scores = queries @ block.T
            scores[:, ~self.live[start : start + len(block)]] = -np.inf
            numbers = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
            best, rows = _top(np.hstack([best, scores]), np.hstack([rows, numbers]), k)
        return best, rows

    def passages(self, rows: Iterable[int]) -> dict[int, Passage]:
        """The passages behind row numbers."""
        wanted = sorted(set(map(int, rows)))
        found: dict[int, Passage] = {}
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            marks = ",".join("?" * len(part))
            for row, document, title, text, first, last in self._db.execute(
                f"SELECT row, document, title, text, start, end FROM passages WHERE row IN ({marks})", part
            ):
                found[row] = Passage(document, title, text, first, last)
        return found

    def all_passages(self) -> Iterable[tuple[int, Passage]]:
        """Every passage that can be found, with its row number; streamed."""
        for row, document, title, text, first, last in self._db.execute(
            "SELECT row, document, title, text, start, end FROM passages WHERE live ORDER BY row"
        ):
            yield row, Passage(document, title, text, first, last)

    def checkpoint(self) -> None:
        """Bring all rows into the main file, so that the folder can be copied."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the files."""
        self._db.close()


def _top(scores: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if scores.shape[1] > k:
        # argpartition leaves ties at the border to chance; k more than needed keeps them in row order in practice.
        part = np.argpartition(-scores, min(2 * k, scores.shape[1] - 1), axis=1)[:, : 2 * k]
        scores, rows = np.take_along_axis(scores, part, 1), np.take_along_axis(rows, part, 1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _same_stamp(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{path}: not an index that this byheart reads")
    for key, label in (
        ("hash", "encoder"),
        ("pooling", "pooling"),
        ("normalize", "normalisation"),
        ("metric", "metric"),
    ):
        theirs, ours = found["encoder"].get(key), wanted["encoder"][key]
        if theirs != ours:
            raise DataError(
                f"{path}: was made with another {label} ({found['encoder'].get('name')}: {theirs}) than "
                f"{wanted['encoder']['name']}: {ours}; use that encoder, or index again into another folder"
            )
    if found["segment"] != wanted["segment"]:
        raise DataError(
            f"{path}: holds segments of {found['segment']}, not {wanted['segment']}; index into another folder"
        )
