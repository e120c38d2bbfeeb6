"""Training questions as lessons for learnt columns: each with the passage that it would find, and its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from byheart.base import Base
from byheart.decode import option_ids, token_ids
from byheart.gold import gold_passages
from byheart.ledger import Ledger
from byheart.losses import drift, token_loss
from byheart.methods.contract import Progress
from byheart.methods.prefix.behind import Columns, Sample, answer_logits
from byheart.prompt import PromptFormat
from byheart.retrieve import Retriever
from byheart.score import contains, normalize
from byheart.segment import Passage
from byheart.training import Orders, Recipe, Trained, train

# Behind an answer, so that where it ends is learnt, too.
_END = "\n\n"


@dataclass(frozen=True)
class Lesson:
    """A training question's tokens and those of an answer, with the passages that hold it."""

    passages: tuple[Passage, ...]
    asked: tuple[int, ...]
    answer: tuple[int, ...]


def lessons(
    ledger: Ledger, base: Base, form: PromptFormat, retriever: Retriever | None, segment: str
) -> tuple[list[Lesson], dict[str, int]]:
    """A lesson for each training question that names a document, and why others are left out, counted.

    The passage is the one that is found first, where it holds an answer, as it will be when questions are asked; else
    a window of the question's own document that does. Without a ``retriever`` there are no passages, and no document
    is needed. Questions that stand among the examples are left out.
    """
    shown = {normalize(example.question) for example in form.examples}
    left_out: Counter[str] = Counter()
    asked = []
    for question in ledger.questions(["train"]):
        if normalize(question.question) in shown:
            left_out["stands among the examples"] += 1
        elif not question.answers:
            left_out["has no answer"] += 1
        elif retriever is not None and not question.documents:
            left_out["names no document"] += 1
        else:
            asked.append(question)
    ranked = retriever.retrieve([question.question for question in asked], 1) if retriever and asked else []
    found = []
    for n, question in enumerate(asked):
        passages: tuple[Passage, ...] = ()
        answers = question.answers
        if retriever is not None:
            own = gold_passages(ledger, question, retriever.encoder.splitter, segment)
            held = next((one for one in (*ranked[n], *own) if contains(one.text, question.answers)), None)
            if held is None:
                left_out["no passage holds its answer"] += 1
                continue
            passages, answers = (held,), [text for text in question.answers if contains(held.text, [text])]
        tail = form.pieces(question.question, (), question.choices)[2]
        ids = token_ids(base.tokenizer, tail, beginning=False)
        continued = option_ids(base.tokenizer, tail, ids, form.continuation(answers[0]) + _END, beginning=False)
        found.append(Lesson(passages, tuple(ids), tuple(continued)))
    return found, dict(left_out)


@dataclass(frozen=True)
class Batch:
    """Lessons ready for a step: columns with gradients, and samples behind them; the same with nothing left out.

    Attributes:
        whole: samples behind their whole passages, to be told from; None where nothing is.
    """

    first: Columns
    samples: list[Sample]
    whole: list[Sample] | None = None


def tune(
    base: Base,
    learnt: nn.Module,
    batch: Callable[[Sequence[int]], Batch],
    orders: Orders,
    recipe: Recipe,
    distil: float,
    store: Path,
    progress: Progress,
) -> Trained:
    """Train columns on lessons: cross-entropy of the answers through the frozen model.

    Args:
        batch: lessons by their numbers.
        distil: weight of KL(behind the whole passages || behind the columns) at the answers' tokens.
    """

    def loss(step: int) -> Tensor:
        _, numbers = orders.batch(step)
        given = batch(numbers)
        logits, label = answer_logits(base, given.first, given.samples)
        total = token_loss(logits, label, base.wide)[0].mean()
        if distil and given.whole is not None:
            with torch.no_grad():
                told, _ = answer_logits(base, [], given.whole)
            total = total + distil * drift(logits, told, base.wide)
        return total

    return train(learnt, loss, recipe, store, progress)
