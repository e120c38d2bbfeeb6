"""A store of training instances: what the nearest questions were answered with (RetroPrompt; Chen et al. 2022)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from byheart.encoder import Encoder
from byheart.errors import DataError
from byheart.formats import read_objects
from byheart.methods.prefix.marginal import SHARPNESS
from byheart.prompt import Example
from byheart.retrieve import Retriever
from byheart.rows import Document, Question
from byheart.score import contains, normalize
from byheart.segment import Passage, segment
from byheart.storage import write_text

# Instances that vote on an answer.
NEAREST = 16
# Questions whose likeness to all instances is in memory at once.
_QUESTIONS = 256
# An instance is shown with a short window of its passage around the answer, as the examples of a prompt are.
_WINDOW = "64/32"
# Of what no neighbour says: an answer counts at most 1 + 4.6 times the weight of "hard" for it.
_LEAST = 0.01


@dataclass(frozen=True)
class Instance:
    """A training question with its answer and, where one was found, a window that holds it.

    Attributes:
        answers: all that count as right, the example's among them.
    """

    id: str
    example: Example
    answers: tuple[str, ...]


Near = list[tuple[Instance, float]]


class Instances:
    """Instances with the vectors of their questions; all are in memory, and all are looked at."""

    def __init__(self, encoder: Encoder, found: Iterable[Instance] = ()) -> None:
        self._encoder = encoder
        self.all: dict[str, Instance] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self.add(found)

    def add(self, found: Iterable[Instance]) -> None:
        """Take instances in, in the place of those with the same id."""
        new = list(found)
        vectors = self._encoder.encode([one.example.question for one in new])
        self.all |= {one.id: one for one in new}
        self._vectors |= zip((one.id for one in new), vectors, strict=True)

    def drop(self, id: str) -> None:
        """Forget an instance, if it is there."""
        self.all.pop(id, None)
        self._vectors.pop(id, None)

    def nearest(self, questions: Sequence[str], count: int, *, shown: bool = False) -> list[Near]:
        """The nearest instances of each question and their shares, which add up to 1; never the question itself.

        Args:
            shown: only such as have a window to show.
        """
        some = [one for one in self.all.values() if one.example.passage is not None or not shown]
        if not some or not questions or not count:
            return [[] for _ in questions]
        places: dict[str, list[int]] = {}
        for n, one in enumerate(some):
            places.setdefault(normalize(one.example.question), []).append(n)
        vectors = np.stack([self._vectors[one.id] for one in some])
        found: list[Near] = []
        for start in range(0, len(questions), _QUESTIONS):
            asked = list(questions[start : start + _QUESTIONS])
            scores = self._encoder.encode(asked) @ vectors.T
            for question, row in zip(asked, scores, strict=True):
                row[places.get(normalize(question), [])] = -np.inf
                best = np.argpartition(-row, min(count, len(row)) - 1)[:count]
                best = best[np.isfinite(row[best])]
                best = best[np.lexsort((best, -row[best]))]
                shares = np.exp(SHARPNESS * (row[best] - row[best].max(initial=-np.inf))) if len(best) else row[best]
                found.append([(some[n], float(share)) for n, share in zip(best, shares / shares.sum(), strict=True)])
        return found

    def save(self, path: Path) -> None:
        """Write them as JSON lines."""
        lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in self.all.values())
        write_text(path, "".join(lines))

    @classmethod
    def load(cls, path: Path, encoder: Encoder) -> Self:
        """What :meth:`save` wrote.

        Raises:
            DataError: where the file is missing or is something else.
        """
        try:
            rows = [
                Instance(
                    row["id"],
                    Example(**row["example"] | {"passage": passage and Passage(**passage)}),
                    tuple(row["answers"]),
                )
                for _, row in read_objects(path, ("id", "example", "answers"))
                for passage in [row["example"]["passage"]]
            ]
        except (TypeError, KeyError) as error:
            raise DataError(f"{path}: not what byheart writes there ({error!r})") from None
        return cls(encoder, rows)


def instances_of(questions: Sequence[Question], retriever: Retriever) -> list[Instance]:
    """Training questions that have an answer, each with a window that holds it of what is found first for it."""
    asked = [one for one in questions if one.split == "train" and one.answers]
    ranked = retriever.retrieve([one.question for one in asked], 1)
    return [
        Instance(one.id, _example(one, hits, retriever.encoder), tuple(one.answers))
        for one, hits in zip(asked, ranked, strict=True)
    ]


def _example(question: Question, hits: Sequence[Passage], encoder: Encoder) -> Example:
    for hit in hits:
        page = Document(id=hit.document, title=hit.title, text=hit.text)
        for window in segment([page], encoder.splitter, _WINDOW):
            if answer := next((text for text in question.answers if contains(window.text, [text])), None):
                return Example(question.question, answer, window)
    return Example(question.question, question.answers[0], None)


def votes(near: Near) -> dict[str, float]:
    """p_kNN: the share of each answer, in its normal form, among the nearest (equation 5 there)."""
    found: dict[str, float] = {}
    for one, share in near:
        answer = normalize(one.example.answer)
        found[answer] = found.get(answer, 0.0) + share
    return found


def hardness(near: Near, answers: Sequence[str]) -> float:
    """-log p_kNN of the right answers: how little the neighbours give a question away (equation 6 there)."""
    found = votes(near)
    right = sum(found.get(answer, 0.0) for answer in {normalize(text) for text in answers})
    return -math.log(max(right, _LEAST))


def interpolated(likelihoods: Sequence[float], candidates: Sequence[str], near: Near, share: float) -> int:
    """The place of the best candidate under ``share`` · p_kNN + (1 - ``share``) · p_LM (equation 7 there).

    Args:
        likelihoods: mean log-probability of a token of each candidate; p_LM is their softmax.
    """
    found = votes(near)
    top = max(likelihoods)
    odds = [math.exp(one - top) for one in likelihoods]
    total = sum(odds)
    scores = [
        share * found.get(normalize(text), 0.0) + (1 - share) * one / total
        for text, one in zip(candidates, odds, strict=True)
    ]
    return max(range(len(scores)), key=lambda n: scores[n])
