"""Files and folders on disk: written by rename, hashed, and the place where byheart keeps what it downloads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byheart.errors import DataError
from byheart.progress import Progress, untold

# What safetensors and temporary files would leave readable for their owner alone.
_READABLE = 0o644
# The file that says what a folder of something learnt holds.
CARD = "byheart.json"
# Seconds between two saves of work that goes on: what a kill can cost.
SAVE_EVERY = 60.0
# Left free on a disk, whatever is asked for.
_RESERVE = 1 << 30
_GIB = 1 << 30


def home() -> Path:
    """Where downloaded models live: ``BYHEART_HOME``, else ``byheart`` in the user's cache folder."""
    chosen = os.environ.get("BYHEART_HOME")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "byheart"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def traced_path(model: str) -> Path:
    """Where ``byheart trace`` keeps what it found for a model of this hash."""
    return home() / "trace" / f"{model}.json"


def fingerprint(*parts: Any) -> str:
    """A hash of what kept work depends on: it is only picked up where the hash is the same."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def check_room(folder: Path, needed: int, what: str, instead: str) -> None:
    """See that so many bytes find room under a folder, and a gibibyte is left.

    Args:
        what: needs them, to be named in the error.
        instead: what to do about it.

    Raises:
        DataError: where they would fill the disk.
    """
    place = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(place).free - _RESERVE
    if needed > free:
        raise DataError(
            f"{what}: needs {needed / _GIB:.1f} GiB under {folder}, where {max(free, 0) / _GIB:.1f} GiB may be filled; "
            f"use {instead}"
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that becomes ``path`` by rename when the block ends well: readers see the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(_READABLE)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file by rename."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, by rename."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        DataError: where the file is missing, or holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error})") from None


def read_card(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object in a file that byheart wrote, with at least ``keys``.

    Raises:
        DataError: where the file is missing or is something else.
    """
    card = read_json(path)
    if not isinstance(card, dict) or any(key not in card for key in keys):
        raise DataError(f"{path}: not what byheart writes there (it lacks {' or '.join(keys)})")
    return card


def resumed(
    path: Path,
    mark: str,
    items: Sequence[Any],
    step: int,
    make: Callable[[Sequence[Any]], Sequence[Any]],
    tell: Progress = untold,
) -> list[Any]:
    """What ``make`` gives for each item, as JSON holds it, ``step`` items at a time; ``tell`` is told how many.

    A file that an earlier run with the same ``mark`` left at ``path`` is gone on from.
    """
    try:
        kept = read_json(path)
        rows: list[Any] = kept["rows"] if kept["mark"] == mark else []
    except (DataError, KeyError, TypeError):
        rows = []
    tell(len(rows))
    for start in range(len(rows), len(items), step):
        rows += make(items[start : start + step])
        write_json(path, {"mark": mark, "rows": rows})
        tell(len(rows) - start)
    return rows


def check_replaceable(target: Path, marker: str) -> None:
    """Make sure that writing to ``target`` takes nobody's files away.

    Raises:
        DataError: where it is a file, or a folder that holds something but not the file ``marker``.
    """
    if target.is_file():
        raise DataError(f"{target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise DataError(f"{target}: holds other files than byheart's; name a new or empty folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A fresh folder that becomes ``target`` by rename when the block ends well, and vanishes when it does not.

    What stood at ``target`` before is moved aside first and deleted last; check it with :func:`check_replaceable`
    where it may be somebody else's.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    made, aside = temporary / "new", temporary / "old"
    made.mkdir()
    try:
        yield made
        for file in made.rglob("*"):
            if file.is_file():
                file.chmod(_READABLE)
        if target.exists():
            os.replace(target, aside)
        os.replace(made, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def bytes_under(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
