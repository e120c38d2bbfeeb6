"""Documents into overlapping token windows that keep the exact span of the source they cover."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from tokenizers import Tokenizer

from byheart.errors import UsageError
from byheart.rows import Document

# Size and step in tokens.
DEFAULT = "288/64"
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of a document: ``text`` is the document's text[start:end].

    ``score`` says how well it was found, where it was, and nothing of what it is: what is kept of a passage, or trained
    behind it, must not depend on the last digit of that.
    """

    document: str
    title: str
    text: str
    start: int
    end: int
    score: float = field(default=0.0, compare=False, repr=False)

    def overlaps(self, other: Passage, share: float = 0.5) -> bool:
        """Whether the two cover the same source by at least ``share`` of the shorter one."""
        if self.document != other.document:
            return False
        common = min(self.end, other.end) - max(self.start, other.start)
        return common >= share * min(self.end - self.start, other.end - other.start)


def parse_preset(text: str) -> tuple[int, int]:
    """Size and step from ``"SIZE/STEP"`` in tokens.

    Raises:
        UsageError: where it is not two numbers with 0 < STEP <= SIZE (a larger step would leave text out).
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    size, step = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < step <= size:
        raise UsageError(f'--segment {text}: must be SIZE/STEP in tokens with 0 < STEP <= SIZE, such as "{DEFAULT}"')
    return size, step


def windows(offsets: Sequence[tuple[int, int]], size: int, step: int) -> list[tuple[int, int]]:
    """Character spans of the token windows over a text whose tokens lie at ``offsets``.

    Windows begin every ``step`` tokens and the last one ends with the text: each token is in one at least.
    """
    spans = []
    for first in range(0, len(offsets), step):
        last = min(first + size, len(offsets))
        spans.append((offsets[first][0], offsets[last - 1][1]))
        if last == len(offsets):
            break
    return spans


def segment(documents: Iterable[Document], tokenizer: Tokenizer, preset: str = DEFAULT) -> Iterator[Passage]:
    """The windows of the documents, in their order, counted in the tokens of ``tokenizer``."""
    size, step = parse_preset(preset)
    for chunk in _chunks(documents):
        yield from _cut(chunk, tokenizer, size, step)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _cut(documents: list[Document], tokenizer: Tokenizer, size: int, step: int) -> list[Passage]:
    passages = []
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        offsets = [pair for pair in encoding.offsets if pair[0] < pair[1]]
        whole = Passage(document.id, document.title, document.text, 0, len(document.text))
        # A text that the tokeniser sees nothing in is still the document's text.
        spans = windows(offsets, size, step) or [(0, len(document.text))]
        passages += [replace(whole, text=document.text[a:b], start=a, end=b) for a, b in spans]
    return passages
