"""Metrics that need a model of their own: BERTScore with the encoder that is here, BLEURT with a checkpoint of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from byheart.base import choose_device, model_folder
from byheart.encoder import Encoder
from byheart.errors import DataError, first_line
from byheart.loading import quiet_transformers

_TEXTS = 128


class Judge(Protocol):
    """Says how good answers are."""

    name: str

    def scores(self, answers: Sequence[str], golds: Sequence[Sequence[str]]) -> list[float]:
        """Of each answer its score against the best of its right ones; none of them may be without one."""
        ...


class BertScore:
    """F1 of greedily matched tokens (Zhang et al. 2020, section 3), without weights of rarity and without a baseline.

    Every token of one text meets the token of the other whose state, in the encoder's last layer, has the highest
    cosine with its own. What is absolute in these figures is the encoder's; differences between methods are theirs.
    """

    name = "bertscore"

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def scores(self, answers: Sequence[str], golds: Sequence[Sequence[str]]) -> list[float]:
        """Between 0 and 1; 0 for an empty answer, and for one of which no token is like any of the right ones."""
        states = self._states(sorted({*answers, *(text for some in golds for text in some)}))
        return [
            max(_matched(states[answer], states[gold]) for gold in some)
            for answer, some in zip(answers, golds, strict=True)
        ]

    def _states(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Of each text its tokens' states (tokens, dim), of length 1, without those that only mark its ends."""
        found = {}
        for start in range(0, len(texts), _TEXTS):
            some = list(texts[start : start + _TEXTS])
            with torch.no_grad():
                hidden, mask = self._encoder.states(some)
            marks = self._encoder.tokenizer(
                some, truncation=True, max_length=mask.shape[1], return_special_tokens_mask=True
            )["special_tokens_mask"]
            for text, states, own in zip(some, functional.normalize(hidden.float(), dim=-1), marks, strict=True):
                found[text] = states[: len(own)][~torch.tensor(own, dtype=torch.bool, device=states.device)]
        return found


def _matched(one: Tensor, other: Tensor) -> float:
    if not len(one) or not len(other):
        return 0.0
    alike = one @ other.T
    # A cosine can be negative, and a harmonic mean of numbers of both signs is without bound.
    precision, recall = float(alike.amax(1).mean().clamp(0, 1)), float(alike.amax(0).mean().clamp(0, 1))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class Bleurt:
    """A checkpoint of BLEURT (Sellam et al. 2020): a BERT-like model that was trained to rate an answer."""

    name = "bleurt"

    def __init__(self, name: str, device: str | None = None) -> None:
        """Load it from a folder or the Hub.

        Raises:
            DataError: where it cannot be loaded, or gives other than one number a pair.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = model_folder(name)
        try:
            with quiet_transformers():
                self._model: Any = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        # transformers raises many types for files that are wrong in many ways; each ends in the same one sentence.
        except Exception as error:
            raise DataError(f"--bleurt {name}: cannot be loaded ({first_line(error)})") from error
        if self._model.config.num_labels != 1:
            raise DataError(f"--bleurt {name}: rates with {self._model.config.num_labels} numbers, not one")
        self._model.to(choose_device(device)).eval()

    @torch.inference_mode()
    def scores(self, answers: Sequence[str], golds: Sequence[Sequence[str]]) -> list[float]:
        """Ratings; about 1 for a perfect answer and 0 for a useless one, in most checkpoints."""
        asked = [(gold, answer) for answer, some in zip(answers, golds, strict=True) for gold in some]
        rated: dict[tuple[str, str], float] = {}
        for start in range(0, len(asked), _TEXTS):
            some = asked[start : start + _TEXTS]
            given = self._tokenizer(
                [gold for gold, _ in some],
                [answer for _, answer in some],
                padding=True,
                truncation=True,
                max_length=self._model.config.max_position_embeddings,
                return_tensors="pt",
            ).to(self._model.device)
            rated |= zip(some, self._model(**given).logits[:, 0].float().tolist(), strict=True)
        return [max(rated[gold, answer] for gold in some) for answer, some in zip(answers, golds, strict=True)]
