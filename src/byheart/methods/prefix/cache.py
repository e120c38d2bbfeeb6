"""The model's own keys and values of passages: each read alone, behind the same beginning, now or from disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from byheart import kv
from byheart.base import Base
from byheart.decode import batches, token_ids
from byheart.kv import KV, Rotation
from byheart.methods.prefix.blend import blended
from byheart.methods.prefix.store import Store
from byheart.progress import Progress, untold
from byheart.prompt import Example, PromptFormat
from byheart.segment import Passage

# What stands behind the beginning and before the question; examples that were found for it stand there, too.
Block = Passage | Example
# Tokens read at once.
_READ = 2_048
# Passages whose keys and values are in memory at once on their way to disk.
_HELD = 16
# Windows that a size estimate looks at.
_LOOKED_AT = 64


class Cache:
    """Passages behind the beginning of a prompt form.

    Attributes:
        head: keys and values of what stands before every passage; None where nothing does.
        start: the position at which the first passage begins.
        first: the position at which the beginning begins.
        files: where passages are kept.
        rotation: what moves keys.
        mark: how columns are made, where it is not by reading.
    """

    mark = ""

    def __init__(self, base: Base, form: PromptFormat, files: Store, rotation: Rotation | None, first: int = 0) -> None:
        """Read the form's beginning, from position ``first`` on."""
        self.base, self.form, self.files, self.rotation, self.first = base, form, files, rotation, first
        self._beginning, _, _ = form.pieces("", ())
        ids = token_ids(base.tokenizer, self._beginning, beginning=True)
        self.head = kv.read(base, [ids], start=first)[0] if ids else None
        self.start = first if self.head is None else self.head.end

    def encode(self, passages: Sequence[Block], *, kept: bool) -> list[KV]:
        """Keys and values of each passage; with ``kept`` from disk where they are there."""
        like = next(self.base.model.parameters())
        paths = [self.path(passage) for passage in passages]
        known = {path: self.files.get(path, like) for path in dict.fromkeys(paths)} if kept else {}
        missing = {path: one for path, one in zip(paths, passages, strict=True) if not known.get(path)}
        if missing:
            known |= zip(missing, self.fresh(list(missing.values())), strict=True)
        return [one for path in paths if (one := known[path]) is not None]

    def fresh(self, passages: Sequence[Block]) -> list[KV]:
        """Keys and values of passages that are not on disk."""
        rows = [self.ids(passage) for passage in passages]
        found: dict[int, KV] = {}
        for batch in batches([len(row) for row in rows], lambda count, longest: count * longest <= _READ):
            found |= zip(batch, kv.read(self.base, [rows[n] for n in batch], self.head, self.start), strict=True)
        return [found[n] for n in range(len(rows))]

    def past(self, passages: Sequence[Block], blocks: Sequence[KV], blend: float = 0.0) -> tuple[KV, ...]:
        """What a question stands behind: the beginning, then the passages' ``blocks``, each in its place.

        Args:
            blend: with several, the share of their tokens that is read again (:func:`blended`).
        """
        there = kv.placed(blocks, blocks[0].start if blocks else self.start, self.rotation)
        if blend and len(blocks) > 1:
            there = [blended(self.base, self.head, there, [self.ids(passage) for passage in passages], blend)]
        return (*([] if self.head is None else [self.head]), *there)

    def columns(self, passage: Block) -> int:
        """How many columns a passage takes."""
        return len(self.ids(passage))

    def ids(self, passage: Block) -> list[int]:
        """A passage's tokens, as they stand in the middle of a prompt."""
        return token_ids(self.base.tokenizer, self.form.block(passage), beginning=False)

    def path(self, passage: Block) -> Path:
        """A passage's file."""
        text = self.form.block(passage)
        return self.files.path(self.base.hash, str(self.base.dtype), str(self.first), self._beginning, text)

    def keep(self, passages: Iterable[Block], progress: Progress = untold) -> None:
        """Put what is not on disk yet there; ``progress`` is told of passages."""
        stream = iter(passages)
        while step := list(islice(stream, _HELD)):
            missing = [one for one in step if not self.path(one).exists()]
            for passage, found in zip(missing, self.encode(missing, kept=False), strict=True):
                self.files.put(self.path(passage), found)
            progress(len(step))

    def size(self, passages: Iterable[Block], columns: int | None = None) -> tuple[int, int, int]:
        """How many passages, about how many bytes each, and how many bytes of them are on disk already.

        Args:
            columns: of each, where that is known beforehand.
        """
        tokens: list[int] = []
        count, there = 0, 0
        for passage in passages:
            count += 1
            path = self.path(passage)
            there += path.stat().st_size if path.exists() else 0
            if len(tokens) < _LOOKED_AT:
                tokens.append(self.columns(passage) if columns is None else columns)
        fixed, column = self.files.sizes(kv.read(self.base, [[0]])[0])
        each = round(fixed + column * sum(tokens) / max(len(tokens), 1))
        return count, each, there


class Made(Cache):
    """The same passages, with columns that are made in another way; ``mark`` tells it from any other.

    Examples that were found for a question show how to answer; they stay as the model reads them.
    """

    def __init__(self, whole: Cache, mark: str) -> None:
        vars(self).update(vars(whole))  # the beginning is read already
        self.whole, self.mark = whole, mark

    def encode(self, passages: Sequence[Block], *, kept: bool) -> list[KV]:
        """Keys and values of each passage; with ``kept`` from disk where they are there, as examples always are."""
        shown = iter(self.whole.encode([one for one in passages if isinstance(one, Example)], kept=True))
        made = iter(super().encode([one for one in passages if isinstance(one, Passage)], kept=kept))
        return [next(shown if isinstance(one, Example) else made) for one in passages]

    def path(self, passage: Block) -> Path:
        """A passage's file; made in another way, another file."""
        path = self.whole.path(passage)
        return path if isinstance(passage, Example) else self.files.path(path.name, self.mark)


class Few(Made):
    """The same passages in a few columns each."""

    def __init__(self, whole: Cache, count: int, mark: str) -> None:
        super().__init__(whole, f"{count} {mark}")
        self._count = count

    def columns(self, passage: Block) -> int:
        """How many columns a passage takes at most; an example has one for each of its tokens."""
        whole = super().columns(passage)
        return whole if isinstance(passage, Example) else min(self._count, whole)
