"""Open-domain question answering: NQ-open and TriviaQA, from their files or the Hub, over a corpus of passages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from byheart.benchmarks import Benchmark
from byheart.errors import DataError, UsageError, first_line
from byheart.formats import read_objects
from byheart.rows import Document, Question, Row, Split, content_id

_HUB_NAMES = {"nq_open": "google-research-datasets/nq_open"}
# How the published files name their splits; the first that is found in a file's name holds.
_SPLIT_WORDS: tuple[tuple[str, Split], ...] = (
    ("train", "train"),
    ("validation", "validation"),
    ("dev", "validation"),
    ("test", "test"),
)
_CORPUS_NAMES = ("passages.jsonl", "corpus.jsonl", "psgs_w100.tsv")


def nq(data: str, corpus: Path | None = None) -> Benchmark:
    """Natural Questions, open domain (Kwiatkowski et al. 2019; Lee et al. 2019).

    Args:
        data: a folder of question files (``NQ-open.train.jsonl``, ``questions_validation.jsonl``, parquet, ...), a
            single file (taken as validation unless its name says otherwise), or a dataset of the Hub.
        corpus: JSONL passages (``id``, ``title``, ``text``) or DPR's ``psgs_w100.tsv``; by default the one in ``data``.

    Raises:
        DataError: where a file is missing or a line is bad.
    """
    return _open_qa("nq", "Natural Questions (NQ-open)", data, corpus)


def triviaqa(data: str, corpus: Path) -> Benchmark:
    """TriviaQA (Joshi et al. 2017), unfiltered questions over a corpus that the user names."""
    return _open_qa("triviaqa", "TriviaQA", data, corpus)


def _open_qa(name: str, title: str, data: str, corpus: Path | None) -> Benchmark:
    path = Path(data)
    if path.exists():
        files = _question_files(path)
        if corpus is None and path.is_dir():
            corpus = next((path / one for one in _CORPUS_NAMES if (path / one).exists()), None)
        sources: list[tuple[Path | str, Split | None]] = [(file, split) for file, split in files if file != corpus]
    elif data.startswith((".", "/")) or ("/" in data and path.parent.exists()):
        raise DataError(f"--data {data}: no such file or folder")
    else:
        sources = [(data, None)]
    if corpus is not None and not corpus.exists():
        raise DataError(f"--corpus {corpus}: no such file")
    if not sources:
        raise DataError(f"--data {data}: holds no question files (.jsonl, .json or .parquet)")

    origin: dict[str, Any] = {"data": str(data), "corpus": None if corpus is None else str(corpus)}

    def rows() -> Iterator[Row]:
        if corpus is not None:
            yield from read_corpus(corpus)
        every = list(_questions(name, sources))
        kept = _without_leaks(every)
        origin["questions_dropped_as_repeats_or_leaks"] = len(every) - len(kept)
        yield from kept

    return Benchmark(name, title, rows, origin)


def _question_files(path: Path) -> list[tuple[Path, Split | None]]:
    if path.is_file():
        return [(path, _split_of(path.name) or "validation")]
    found = [p for p in sorted(path.rglob("*")) if p.suffix in (".jsonl", ".json", ".parquet", ".gz") and p.is_file()]
    return [(p, _split_of(p.name) or "validation") for p in found if p.name not in _CORPUS_NAMES]


def _split_of(name: str) -> Split | None:
    return next((split for word, split in _SPLIT_WORDS if word in name.lower()), None)


def read_corpus(path: Path) -> Iterator[Document]:
    """Passages from JSONL (``id``, ``text``, optional ``title``) or DPR's tab-separated file, streamed.

    Raises:
        DataError: at the first bad line.
    """
    if path.suffix == ".tsv":
        with path.open(newline="", encoding="utf-8") as stream:
            lines = csv.reader(stream, delimiter="\t")
            try:
                for number, cells in enumerate(lines, 1):
                    if cells[:2] == ["id", "text"]:
                        continue
                    if len(cells) < 2:
                        raise DataError(f"{path}:{number}: needs id, text and title with tabs between them")
                    yield _document(path, number, cells[0], cells[2] if len(cells) > 2 else "", cells[1])
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"{path}: cannot be read after line {lines.line_num} ({first_line(error)})") from None
        return
    for number, row in read_objects(path, ("text",)):
        id = row.get("id")
        yield _document(path, number, None if id is None else str(id), row.get("title") or "", row["text"])


def _document(path: Path, number: int, id: str | None, title: Any, text: Any) -> Document:
    if not isinstance(text, str) or not isinstance(title, str):
        raise DataError(f"{path}:{number}: text and title must be texts")
    if not text.strip():
        raise DataError(f"{path}:{number}: the text is empty")
    return Document(id=id or content_id("d", title, text), title=title, text=text)


def _questions(name: str, sources: Iterable[tuple[Any, Split | None]]) -> Iterator[Question]:
    for source, split in sources:
        for row, row_split in _raw(source, split):
            yield _question(name, source, row, row_split)


def _raw(source: Any, split: Split | None) -> Iterator[tuple[dict[str, Any], Split]]:
    if isinstance(source, Path) and source.suffix in (".jsonl", ".gz"):
        for _, row in read_objects(source, ("question",)):
            yield row, split or "validation"
    elif isinstance(source, Path) and source.suffix == ".json":
        for entry in _triviaqa_file(source):
            yield entry, split or "validation"
    else:
        for found_row, found in _with_datasets(source):
            yield found_row, split or found


def _triviaqa_file(path: Path) -> Iterator[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["Data"]
        for entry in entries:
            answer = entry.get("Answer") or {}
            aliases = [answer["Value"], *answer.get("Aliases", [])] if answer else []
            yield {"id": entry["QuestionId"], "question": entry["Question"], "answer": list(dict.fromkeys(aliases))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not in TriviaQA's published form ({error!r})") from None


def _with_datasets(source: Any) -> Iterator[tuple[dict[str, Any], Split]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError("--data: parquet files and Hub datasets need the extra: pip install 'byheart[hub]'") from None
    try:
        if isinstance(source, Path):
            found = {"validation": load_dataset("parquet", data_files=str(source), split="train")}
        else:
            found = load_dataset(_HUB_NAMES.get(source, source))
    except Exception as error:  # datasets raises many types, also its own; each ends in one sentence
        raise DataError(f"--data {source}: no such file, and the Hub does not give it ({first_line(error)})") from error
    for split, rows in found.items():
        for row in rows:
            yield dict(row), _split_of(split) or "validation"


def _question(name: str, source: Any, row: dict[str, Any], split: Split) -> Question:
    text = row.get("question")
    answers = row.get("answers", row.get("answer"))
    answers = answers if isinstance(answers, list) else [answers]
    # Years and other numbers are written as such in some copies.
    answers = [str(one) if isinstance(one, (int, float)) and not isinstance(one, bool) else one for one in answers]
    if not isinstance(text, str) or not text.strip() or not all(isinstance(one, str) for one in answers):
        raise DataError(f"{source}: a question needs a text and a list of answers: {json.dumps(row)[:120]}")
    gold = row.get("gold_pid")
    return Question(
        id=f"{name}-{split}-{row['id']}"
        if row.get("id") is not None and gold is not None
        else content_id("q", split, text),
        question=text.strip(),
        answers=[answer for answer in answers if answer.strip()],
        documents=[] if gold is None else [str(gold)],
        split=split,
    )


def _without_leaks(questions: Iterable[Question]) -> list[Question]:
    """Each question once, and no training question that is also asked: what is measured must not be learnt from."""
    kept: dict[str, Question] = {}
    for question in questions:
        text = " ".join(question.question.lower().split())
        other = kept.get(text)
        better = other is None or (other.split == "train" and (question.split != "train" or not other.documents))
        if better:
            kept[text] = question
    return list(kept.values())
