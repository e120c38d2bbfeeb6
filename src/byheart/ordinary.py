"""Ordinary text - the user's, the ledger's, or what the model writes by itself - as rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from byheart.base import Base
from byheart.decode import Job, Sampling, complete
from byheart.errors import DataError, UsageError
from byheart.storage import home, read_json, write_json

# Tokens of a row; a row's first ones stand for the beginnings of texts.
ROW = 128
# Characters that are tokenised at once, up to the end of their line: some hundred million tokens are no list.
SLICE = 4_000_000
_TOP_K = 50
# What texts of many kinds begin with; the model continues each to make the text that nobody gave it.
_OPENINGS = (
    "The city lies on the banks of", "In the early years of the war,", "The film was directed by", "She was born in",
    "The album was released in", "According to the report,", "The species is found in", "He played as a midfielder for",
    "The church was built in the", "During the nineteenth century,", "The company was founded by", "In mathematics, a",
    "The river flows through", "The first season of the series", "The game was developed by",
    "In an interview, he said", "The battle took place near", "A recent study has shown that",
    "The novel tells the story of", "The storm moved north", "The population of the town was",
    "After graduating from university,", "The road begins at", "The song reached number", "The law was passed by the",
    "Scientists have long believed that", "The museum holds a collection of", "My grandmother",
    "To make the dough, mix", "The patient was treated with", "The ship was launched in", "He was elected to the",
    "The painting shows a woman", "In the third quarter, the company", "The bird has a long tail and",
    "It was a cold morning", "The language is spoken by", "The team won the championship",
    "On the morning of the attack,", "The island is part of", "The king married the daughter of",
    "The bridge was designed by", "Critics praised the performance", "The court ruled", "The mineral is used in",
    "The airport serves", "The festival is held every year", "The word comes from the Latin",
    "As a child, he learned to", "The engine produces", "The treaty was signed in", "The disease is caused by",
    "The episode was watched by", "The house stands at the end", "Her first book was published",
    "The railway line runs", "The tree grows to a height of", "In computer science, an", "The party won the election",
    "The temple is dedicated to", "The mountain was first climbed", "The newspaper reported that",
    "The character first appears in", "The school has about",
)  # fmt: skip


def ordinary_text(option: str, method: str, documents: Iterable[str] | None = None) -> Sequence[str] | None:
    """The texts that a method's option ``text`` names; None where the model is to write them.

    Args:
        option: ``own``, ``ledger`` or a file.
        documents: the texts of the ledger's, where it is at hand; read only where they are asked for.

    Raises:
        UsageError: where it names nothing that is there.
        DataError: where the file holds no text.
    """
    if option == "own":
        return None
    if option == "ledger":
        if documents is None:
            raise UsageError(f"{method}.text=ledger: the documents are not at hand here; learn from the ledger again")
        return list(documents)
    path = Path(option)
    check_text(option, method, named="own or" if documents is None else "own, ledger or")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: holds no text")
    return [text]


def check_text(option: str, method: str, named: str = "own, ledger or") -> None:
    """See that a method's option ``text`` names something, before any work.

    Raises:
        UsageError: where it is a file that is not there.
    """
    if option not in ("own", "ledger") and not Path(option).is_file():
        raise UsageError(f"--set {method}.text={option}: must be {named} a text file")


def text_rows(
    base: Base, texts: Sequence[str] | None, tokens: int, seed: int, least: int | None = None
) -> Iterator[list[int]]:
    """Rows of up to :data:`ROW` tokens, together about ``tokens``: from ``texts``, then written by the model.

    Args:
        least: how many the model fills up to where texts are short; by default ``tokens``, too.
    """
    taken = 0
    for row in _cut(base, texts or ()):
        if taken >= tokens:
            return
        yield row
        taken += len(row)
    left = (tokens if least is None else least) - taken
    if left > 0:
        yield from _written(base, -(-left // ROW), seed)


def text_tensor(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as one tensor (rows, longest), to be kept; -1 where a row has ended."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.int32).reshape(-1, longest)


def text_rows_of(kept: Tensor) -> list[list[int]]:
    """The rows that :func:`text_tensor` was given."""
    return [[token for token in row if token >= 0] for row in kept.int().tolist()]


def _written(base: Base, count: int, seed: int) -> list[list[int]]:
    """``count`` rows that the model writes; kept in byheart's cache folder, since they take half a minute to make."""
    path = home() / "text" / base.hash / f"{count}-{seed}-{base.dtype_name}.json"
    if path.exists():
        kept: list[list[int]] = read_json(path)
        return kept
    jobs = [Job(_OPENINGS[n % len(_OPENINGS)]) for n in range(count)]
    drawn = complete(base, jobs, max_new_tokens=ROW, sampling=Sampling(_TOP_K, seed), whole=True)
    rows = [
        list(base.tokenizer(job.prompt + one.text)["input_ids"])[:ROW] for job, one in zip(jobs, drawn, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
    return rows


def _cut(base: Base, texts: Sequence[str]) -> Iterator[list[int]]:
    for text in texts:
        start = 0
        while start < len(text):  # no more is read than rows are taken, which may be the beginning of a large file
            end = text.find("\n", start + SLICE) + 1 or len(text)
            part, start = text[start:end], end
            ids = list(base.tokenizer(part)["input_ids"]) if part.strip() else []
            yield from (ids[first : first + ROW] for first in range(0, len(ids), ROW))
