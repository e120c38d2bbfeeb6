"""Question to ranked passages: dense, BM25 or both fused, each stretch of a source once; and ledgers into indexes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from byheart.encoder import Encoder
from byheart.errors import DataError, UsageError
from byheart.index import Index
from byheart.ledger import Change, Ledger
from byheart.progress import Progress, untold
from byheart.rows import Document
from byheart.segment import DEFAULT, Passage, parse_preset, segment
from byheart.storage import new_folder, read_json, write_json

# Question vectors (n, dim) to such as find better passages.
Turn = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Mode = Literal["dense", "bm25", "hybrid"]
MODES: tuple[Mode, ...] = ("dense", "bm25", "hybrid")
_DOCUMENTS_A_STEP = 256
_TITLE_ROOM = 32
# Weight of the BM25 score, divided by the question's best one, beside the dense inner product. Chosen on NQ training
# questions; see docs/trials.md.
BM25_WEIGHT = 0.2
_POOL = 100


class Retriever:
    """Finds passages for questions in an index."""

    def __init__(self, index: Index, encoder: Encoder, mode: Mode = "hybrid", turn: Turn | None = None) -> None:
        """Take an index, the encoder that it was made with, and what question vectors are put through, if anything."""
        self.index, self.encoder, self.mode, self.turn = index, encoder, mode, turn

    @cached_property
    def _lexical(self) -> Lexical:
        return Lexical(self.index)

    def prepare(self) -> None:
        """Make now what the first search would make; not with every change, of which an index may follow many."""
        if self.mode != "dense":
            _ = self._lexical

    def retrieve(self, questions: Sequence[str], k: int) -> list[list[Passage]]:
        """The ``k`` best passages for each question, best first.

        Of hits that cover the same stretch of a document by half or more only the best stays; the next ones move up.
        """
        found: list[list[Passage]] = [[] for _ in questions]
        pending, pool = list(range(len(questions))), max(_POOL, 4 * k)
        while pending and len(self.index):
            ranked = self._ranked([questions[n] for n in pending], pool)
            passages = self.index.passages(row for hits in ranked for row, _ in hits)
            short = []
            for n, hits in zip(pending, ranked, strict=True):
                found[n] = distinct((replace(passages[row], score=score) for row, score in hits), k)
                # Overlapping windows of one long page can fill the pool; look further down for these questions.
                if len(found[n]) < k and pool <= len(hits) and pool < len(self.index):
                    short.append(n)
            pending, pool = short, 4 * pool
        return found

    def _ranked(self, questions: Sequence[str], pool: int) -> list[list[tuple[int, float]]]:
        dense: list[dict[int, float]] = [{} for _ in questions]
        if self.mode != "bm25":
            vectors = self.encoder.encode(questions)
            scores, rows = self.index.search(vectors if self.turn is None else self.turn(vectors), pool)
            dense = [dict(zip(r.tolist(), s.tolist(), strict=True)) for r, s in zip(rows, scores, strict=True)]
        if self.mode == "dense":
            return [list(hits.items()) for hits in dense]
        lexical = self._lexical.search(questions, pool)
        if self.mode == "bm25":
            return [list(hits.items()) for hits in lexical]
        return [fuse(d, b) for d, b in zip(dense, lexical, strict=True)]


def fuse(dense: dict[int, float], lexical: dict[int, float], weight: float = BM25_WEIGHT) -> list[tuple[int, float]]:
    """Dense inner products and BM25 scores in one ranking, best first; a row that one list lacks counts as its worst.

    BM25 scores have no scale of their own: they are divided by the question's best one.
    """
    top = max(lexical.values(), default=0.0) or 1.0
    floor = min(dense.values(), default=0.0)
    fused = {row: dense.get(row, floor) + weight * lexical.get(row, 0.0) / top for row in dense.keys() | lexical.keys()}
    return sorted(fused.items(), key=lambda hit: (-hit[1], hit[0]))


def distinct(hits: Iterable[Passage], k: int) -> list[Passage]:
    """The first ``k`` hits that do not overlap an earlier one by half."""
    kept: list[Passage] = []
    for hit in hits:
        if not any(hit.overlaps(other) for other in kept):
            kept.append(hit)
            if len(kept) == k:
                break
    return kept


class Lexical:
    """BM25 over an index's passages, kept beside it and rebuilt when the passages change."""

    def __init__(self, index: Index) -> None:
        import bm25s

        folder = index.path / "bm25"
        stamp = {"rows": index.rows, "live": len(index)}
        try:
            fresh = read_json(folder / "stamp.json") == stamp
        except DataError:
            fresh = False
        if not fresh:
            with new_folder(folder) as made:
                numbers, texts = [], []
                for row, passage in index.all_passages():
                    numbers.append(row)
                    texts.append(searchable(passage))
                tokens = self._tokens(texts)
                if tokens.vocab:
                    engine = bm25s.BM25()
                    engine.index(tokens, show_progress=False)
                    engine.save(made / "engine")
                np.save(made / "rows.npy", np.asarray(numbers, dtype=np.int64))
                write_json(made / "stamp.json", stamp)
        # No engine where no passage holds a word that counts.
        self._engine: Any = bm25s.BM25.load(folder / "engine", mmap=True) if (folder / "engine").exists() else None
        self._rows = np.load(folder / "rows.npy")

    @staticmethod
    def _tokens(texts: Sequence[str]) -> Any:
        import bm25s

        return bm25s.tokenize(list(texts), stopwords="en", show_progress=False)

    def search(self, questions: Sequence[str], k: int) -> list[dict[int, float]]:
        """Row numbers with their BM25 scores, best first; rows that share no word with the question are left out."""
        if self._engine is None:
            return [{} for _ in questions]
        places, scores = self._engine.retrieve(self._tokens(questions), k=min(k, len(self._rows)), show_progress=False)
        return [
            {int(self._rows[p]): float(s) for p, s in zip(ps, ss, strict=True) if s > 0}
            for ps, ss in zip(places, scores, strict=True)
        ]


def searchable(passage: Passage) -> str:
    """What is encoded and matched of a passage: its document's title, where it has one, and its text."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def embedded(encoder: Encoder, passages: Sequence[Passage], preset: str) -> NDArray[np.float32]:
    """Vectors (n, dim) of passages of a preset, as an index holds them."""
    size, _ = parse_preset(preset)
    # A window counts its own tokens; title and special tokens come on top.
    return encoder.encode([searchable(passage) for passage in passages], max_tokens=size + _TITLE_ROOM)


def index_ledger(
    ledger: Ledger,
    path: Path,
    encoder: Encoder,
    preset: str = DEFAULT,
    *,
    on_done: Progress = untold,
) -> Index:
    """The index of a ledger's documents in folder ``path``: built, resumed after a kill, or brought up to date.

    Only documents that changed since the index's ledger revision are encoded again. Seconds of encoding add up in
    the index's state over all its runs.

    Raises:
        DataError: where the folder holds the index of another ledger, encoder or segmentation.
        UsageError: where windows are longer than the encoder reads.
    """
    size, _ = parse_preset(preset)
    if size > encoder.card.limit:
        raise UsageError(
            f"--segment {preset}: {encoder.card.name} reads {encoder.card.limit} tokens at once; dense search would "
            "not see what stands behind these"
        )
    index = Index(path, encoder.card, preset, create=True)
    # Where the index, or its unfinished build, stands in the ledger's history.
    stand = index.state("stand")
    if stand is not None and not ledger.passed(stand):
        raise DataError(f"{path}: was not made from this ledger's history; delete the folder or name another")
    if not index.state("complete", False):
        # What changes in the ledger during the build is caught up with below, from the revision it began at.
        if stand is None:
            stand = ledger.stand
            index.change(state={"stand": stand})
        done = index.state("documents_done", 0)
        on_done(done)
        stream = ledger.documents(after=index.state("last_document"))
        while step := list(islice(stream, _DOCUMENTS_A_STEP)):
            done += len(step)
            _put(index, encoder, preset, step, [], {"last_document": step[-1].id, "documents_done": done})
            on_done(len(step))
        index.change(state={"complete": True})
    now = ledger.stand
    changed = sorted({c.id for c in ledger.history(since=index.state("stand")[0]) if c.kind == "document"})
    for start in range(0, len(changed), _DOCUMENTS_A_STEP):
        ids = changed[start : start + _DOCUMENTS_A_STEP]
        # Replacing a document twice does no harm, so the stand moves on only when all are done.
        _put(index, encoder, preset, [d for d in map(ledger.document, ids) if d is not None], ids, {})
    index.change(state={"stand": now})
    return index


def follow(index: Index, encoder: Encoder, preset: str, change: Change) -> float:
    """Bring an index up to date with one change of its ledger; returns the seconds it took."""
    began = time.perf_counter()
    if change.kind == "document":
        documents = [change.after] if isinstance(change.after, Document) else []
        _put(index, encoder, preset, documents, [change.id], {"stand": change.stand})
    return time.perf_counter() - began


def _put(
    index: Index,
    encoder: Encoder,
    preset: str,
    documents: list[Document],
    remove: Iterable[str],
    state: dict[str, Any],
) -> None:
    """Index ``documents``, out with what the index held of ``remove``, and note ``state``: one step, whole or not."""
    began = time.perf_counter()
    passages = list(segment(documents, encoder.splitter, preset))
    vectors = embedded(encoder, passages, preset)
    seconds = index.state("seconds", 0.0) + time.perf_counter() - began
    index.change(remove=remove, passages=passages, vectors=vectors, state=state | {"seconds": seconds})
