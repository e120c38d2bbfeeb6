"""The ledger: documents, facts and questions with stable ids, every change an event, in one SQLite file (WAL)."""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

from byheart.errors import ConflictError, DataError
from byheart.rows import MODELS, Action, Document, Entry, Fact, Kind, Question, Row, Split

SCHEMA_VERSION = 1
_TABLES: dict[Kind, str] = {"document": "documents", "fact": "facts", "question": "questions"}
# A row is kept as its JSON object, less the fields that hold their defaults; what queries need stands beside it as
# generated columns, so that both can never disagree and plain SQL tools still see columns.
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE events (
    revision INTEGER PRIMARY KEY, time TEXT NOT NULL, action TEXT NOT NULL, kind TEXT NOT NULL,
    id TEXT NOT NULL, source TEXT, before TEXT
);
CREATE INDEX events_by_row ON events (kind, id);
CREATE TABLE documents (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, revision INTEGER NOT NULL, retracted INTEGER NOT NULL DEFAULT 0,
    body TEXT NOT NULL, title TEXT AS (body ->> '$.title'), text TEXT AS (body ->> '$.text')
);
CREATE TABLE facts (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, revision INTEGER NOT NULL, retracted INTEGER NOT NULL DEFAULT 0,
    body TEXT NOT NULL, subject TEXT AS (body ->> '$.subject'), prompt TEXT AS (body ->> '$.prompt'),
    object TEXT AS (body ->> '$.object'), document TEXT AS (body ->> '$.document')
);
CREATE TABLE questions (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, revision INTEGER NOT NULL, retracted INTEGER NOT NULL DEFAULT 0,
    body TEXT NOT NULL, question TEXT AS (body ->> '$.question'),
    kind TEXT AS (coalesce(body ->> '$.kind', 'direct')), split TEXT AS (coalesce(body ->> '$.split', 'test'))
);
"""
Outcome = Literal["inserted", "revised", "retracted", "unchanged"]


@dataclass(frozen=True, slots=True)
class Change:
    """One event of the ledger's history: what happened to which row, and the row before and after it."""

    revision: int
    time: str
    action: Action
    kind: Kind
    id: str
    source: str | None
    before: Row | None
    after: Row | None

    @property
    def mark(self) -> str:
        """What :meth:`Ledger.mark` says of this event."""
        return f"{self.revision} {self.time} {self.kind} {self.id}"

    @property
    def stand(self) -> list[Any]:
        """What :attr:`Ledger.stand` is right after this event."""
        return [self.revision, self.mark]


class Ledger:
    """Documents, facts and questions in one SQLite file.

    Opened for reading and writing; several readers and one writer may share a file. Every insert, revision and
    retraction is one event with a time and a source; the number of the last event is the ledger's ``revision``.
    """

    def __init__(self, path: Path | str, *, create: bool = False) -> None:
        """Open the ledger at ``path``, or make it there with ``create=True``.

        Raises:
            DataError: where the file is missing, or is no byheart ledger.
        """
        self.path = Path(path)
        exists = self.path.exists() and self.path.stat().st_size > 0
        if not exists and not create:
            raise DataError(f"{self.path}: no such ledger; make one with `byheart ledger add {self.path} FILE...`")
        if self.path.is_dir():
            raise DataError(f"{self.path}: a folder, not a ledger file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            if exists:
                self._check_version()
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            if not exists:
                with self.transaction():
                    self._create()
        except (sqlite3.DatabaseError, OSError) as error:
            raise DataError(f"{self.path}: cannot be opened as a byheart ledger ({error})") from None

    def _create(self) -> None:
        for statement in _SCHEMA.split(";\n"):
            if statement.strip():
                self._db.execute(statement)
        self._db.execute("INSERT INTO meta VALUES ('byheart_ledger', ?)", (str(SCHEMA_VERSION),))

    def _check_version(self) -> None:
        try:
            found = self._db.execute("SELECT value FROM meta WHERE key = 'byheart_ledger'").fetchone()
        except sqlite3.OperationalError:
            found = None
        if found is None:
            raise DataError(f"{self.path}: a SQLite file, but not a byheart ledger")
        if int(found[0]) != SCHEMA_VERSION:
            raise DataError(f"{self.path}: ledger format {found[0]}; this byheart reads format {SCHEMA_VERSION}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. The ledger cannot be used afterwards."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside happen, or none of them does (also after a kill)."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # -- changes ---------------------------------------------------------------------------------------------

    def apply(self, entry: Entry, *, source: str | None = None, time: str | None = None) -> Outcome:
        """Do what ``entry`` says; ``source`` holds where the entry names none, ``time`` is now by default.

        Inserting the very row that is there already changes nothing, so a file can be added twice.

        Raises:
            DataError: where the id exists with other content (insert) or does not exist (revise, retract).
        """
        table = _TABLES[entry.kind]
        found = self._db.execute(f"SELECT body, retracted FROM {table} WHERE id = ?", (entry.id,)).fetchone()
        body = None if entry.row is None else _dump(entry.row)
        if entry.action == "insert":
            if found is None:
                revision = self._event(entry, source, time, None)
                self._db.execute(
                    f"INSERT INTO {table} (id, revision, body) VALUES (?, ?, ?)", (entry.id, revision, body)
                )
                return "inserted"
            if found[1]:
                raise DataError(f'{entry.kind} "{entry.id}" was retracted; revise it to bring it back')
            # Changed since it was first inserted, but this very row opened its history: adding a file again.
            if body in (found[0], self._body_after(entry.kind, entry.id, 0)):
                return "unchanged"
            raise ConflictError(f'{entry.kind} "{entry.id}" is there already with other content; revise it instead')
        if found is None:
            raise DataError(f'no {entry.kind} "{entry.id}" to {entry.action}')
        if entry.action == "retract":
            if found[1]:
                return "unchanged"
            revision = self._event(entry, source, time, found[0])
            self._db.execute(f"UPDATE {table} SET retracted = 1, revision = ? WHERE id = ?", (revision, entry.id))
            return "retracted"
        if found[0] == body and not found[1]:
            return "unchanged"
        revision = self._event(entry, source, time, None if found[1] else found[0])
        self._db.execute(
            f"UPDATE {table} SET body = ?, retracted = 0, revision = ? WHERE id = ?", (body, revision, entry.id)
        )
        return "revised"

    def insert(self, rows: Iterable[Row], *, source: str | None = None) -> int:
        """Insert ``rows``, all or none; returns how many were new."""
        with self.transaction():
            entries = (Entry("insert", _kind(row), row.id, row) for row in rows)
            return sum(self.apply(entry, source=source) == "inserted" for entry in entries)

    def revise(self, row: Row, *, source: str | None = None) -> Outcome:
        """Replace the row that has ``row.id``."""
        with self.transaction():
            return self.apply(Entry("revise", _kind(row), row.id, row), source=source)

    def retract(self, kind: Kind, id: str, *, source: str | None = None) -> Outcome:
        """Withdraw a row; its history stays."""
        with self.transaction():
            return self.apply(Entry("retract", kind, id, None), source=source)

    def _event(self, entry: Entry, source: str | None, time: str | None, before: str | None) -> int:
        time = time or dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")
        cursor = self._db.execute(
            "INSERT INTO events (time, action, kind, id, source, before) VALUES (?, ?, ?, ?, ?, ?)",
            (time, entry.action, entry.kind, entry.id, entry.source or source, before),
        )
        return cast(int, cursor.lastrowid)

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """The number of the last event; 0 for an empty ledger."""
        return cast(int, self._db.execute("SELECT coalesce(max(revision), 0) FROM events").fetchone()[0])

    def mark(self, revision: int | None = None) -> str:
        """What tells this ledger's history up to ``revision`` (now by default) from another: the event there.

        Empty for revision 0, and for a revision that this ledger never had.
        """
        number = self.revision if revision is None else revision
        found = self._db.execute("SELECT time, kind, id FROM events WHERE revision = ?", (number,)).fetchone()
        return "" if found is None else f"{number} {' '.join(found)}"

    @property
    def stand(self) -> list[Any]:
        """Where this ledger is now, for whatever follows it to keep: the last event's number and mark."""
        return [self.revision, self.mark()]

    def passed(self, stand: Any) -> bool:
        """Whether this history has been where ``stand`` says; another's, or what is no stand at all, has not."""
        known = isinstance(stand, list) and len(stand) == 2 and isinstance(stand[0], int)
        return known and self.mark(stand[0]) == stand[1]

    def count(self, kind: Kind) -> int:
        """How many rows of ``kind`` hold now."""
        return cast(int, self._db.execute(f"SELECT count(*) FROM {_TABLES[kind]} WHERE NOT retracted").fetchone()[0])

    def documents(self, after: str | None = None) -> Iterator[Document]:
        """The documents that hold now, in the order they came; streamed. ``after``: only those behind this id."""
        start = 0
        if after is not None:
            found = self._db.execute("SELECT seq FROM documents WHERE id = ?", (after,)).fetchone()
            start = found[0] if found else 0
        return cast(Iterator[Document], self._rows("document", "seq > ?", (start,)))

    def facts(self) -> Iterator[Fact]:
        """The facts that hold now, in the order they came."""
        return cast(Iterator[Fact], self._rows("fact"))

    def questions(self, splits: Iterable[Split] | None = None) -> Iterator[Question]:
        """The questions of ``splits`` (all by default) that hold now, in the order they came."""
        if splits is None:
            return cast(Iterator[Question], self._rows("question"))
        wanted = tuple(splits)
        marks = ", ".join("?" * len(wanted))
        return cast(Iterator[Question], self._rows("question", f"split IN ({marks})", wanted))

    def get(self, kind: Kind, id: str) -> Row | None:
        """The row with this id as it holds now; None where there is none, or it was retracted."""
        return next(self._rows(kind, "id = ?", (id,)), None)

    def document(self, id: str) -> Document | None:
        """The document with this id; None where there is none, or it was retracted."""
        return cast(Document | None, self.get("document", id))

    def document_from(self, place: float) -> Document | None:
        """The document at or behind a share (0 to 1) of the ledger's places; for drawing one without listing all."""
        last = self._db.execute("SELECT coalesce(max(seq), 0) FROM documents").fetchone()[0]
        found = self._rows("document", "seq > ?", (int(place * last),))
        return cast(Document | None, next(found, None))

    def _rows(self, kind: Kind, where: str = "1", parameters: tuple[Any, ...] = ()) -> Iterator[Row]:
        sql = f"SELECT body FROM {_TABLES[kind]} WHERE NOT retracted AND {where} ORDER BY seq"
        for (body,) in self._db.execute(sql, parameters):
            yield _load(kind, body)

    def kinds_of(self, id: str) -> list[Kind]:
        """The kinds of row that have, or had, this id."""
        return [
            kind
            for kind, table in _TABLES.items()
            if self._db.execute(f"SELECT 1 FROM {table} WHERE id = ?", (id,)).fetchone()
        ]

    def history(self, id: str | None = None, *, since: int = 0) -> Iterator[Change]:
        """The events after revision ``since``, oldest first; of the row with this id, or of all rows."""
        where, parameters = ("AND id = ?", (since, id)) if id is not None else ("", (since,))
        sql = f"SELECT revision, time, action, kind, id, source, before FROM events WHERE revision > ? {where}"
        for revision, time, action, kind, row_id, source, before in self._db.execute(
            sql + " ORDER BY revision", parameters
        ):
            after = None if action == "retract" else self._body_after(kind, row_id, revision)
            yield Change(
                revision=revision,
                time=time,
                action=action,
                kind=kind,
                id=row_id,
                source=source,
                before=None if before is None else _load(kind, before),
                after=None if after is None else _load(kind, after),
            )

    def _body_after(self, kind: Kind, id: str, revision: int) -> str:
        # An event keeps the row as it stood before it, so a row stood after an event as the next one found it.
        later = self._db.execute(
            "SELECT before FROM events WHERE kind = ? AND id = ? AND revision > ? AND before IS NOT NULL"
            " ORDER BY revision LIMIT 1",
            (kind, id, revision),
        ).fetchone()
        if later is None:
            later = self._db.execute(f"SELECT body FROM {_TABLES[kind]} WHERE id = ?", (id,)).fetchone()
        return cast(str, later[0])

    def sql(self, query: str, parameters: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Run a reading query over the tables `documents`, `facts`, `questions` and `events`."""
        return cast(Iterator[tuple[Any, ...]], self._db.execute(query, parameters))


def _kind(row: Row) -> Kind:
    return next(kind for kind, model in MODELS.items() if isinstance(row, model))


def _dump(row: Row) -> str:
    body = json.dumps(row.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False, separators=(",", ":"))
    body.encode()  # half a surrogate pair is no text; better known here than in the middle of a change
    return body


def _load(kind: Kind, body: str) -> Row:
    return MODELS[kind].model_validate(json.loads(body))
