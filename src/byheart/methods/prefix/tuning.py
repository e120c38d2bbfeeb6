"""Training questions as lessons for learnt columns, and the loss that they are learnt with: cross-entropy and terms."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from byheart.base import Base
from byheart.decode import option_ids, token_ids
from byheart.gold import gold_passages
from byheart.ledger import Ledger
from byheart.losses import drift, token_loss
from byheart.methods.facts import as_measured, to_measure
from byheart.methods.prefix.behind import Columns, Sample, answer_logits
from byheart.methods.prefix.cache import Block
from byheart.progress import Progress
from byheart.prompt import Example, PromptFormat
from byheart.retrieve import Retriever
from byheart.rows import Question
from byheart.score import contains, normalize
from byheart.segment import Passage
from byheart.training import Orders, Recipe, Trained, train

# Behind an answer, so that where it ends is learnt, too.
_END = "\n\n"
# Of a question: others with their answers, and how much it counts.
Beside = tuple[tuple[Example, ...], float]
# Training questions, each with passages of which one holds its answer; with none where none does.
Pairs = Sequence[tuple[Question, tuple[Passage, ...]]]
# What has been trained or fitted before moves in smaller steps than what is new: these shares of them, by name.
_SLOW = {".text.": 0.01, "tokens.": 0.1}
# What questions are told apart by where no attribute of theirs is named.
KIND = "kind"
# Lessons read at once.
_READ = 16


@dataclass(frozen=True)
class Lesson:
    """A question's tokens and those of an answer, with the passages that it stands behind.

    Attributes:
        group: what the fairness term tells questions apart by; empty where nothing is known.
        weight: how much it counts.
        shown: other questions with their answers, that stand before the passages.
    """

    passages: tuple[Passage, ...]
    asked: tuple[int, ...]
    answer: tuple[int, ...]
    group: str = ""
    weight: float = 1.0
    shown: tuple[Example, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All that stands before the question."""
        return (*self.shown, *self.passages)


def lesson(
    base: Base, form: PromptFormat, question: Question, answer: str, passages: Sequence[Passage], by: str = KIND
) -> Lesson:
    """A question with one of its answers as a lesson, its group that of the attribute ``by``."""
    tail = form.pieces(question.question, (), question.choices)[2]
    ids = token_ids(base.tokenizer, tail, beginning=False)
    group = question.kind if by == KIND else question.attributes.get(by, "")
    continued = option_ids(base.tokenizer, tail, ids, form.continuation(answer) + _END, beginning=False)
    return Lesson(tuple(passages), tuple(ids), tuple(continued), group)


def to_learn_from(ledger: Ledger, form: PromptFormat) -> tuple[list[Question], dict[str, int]]:
    """The training questions that can be learnt from, and why others are left out, counted."""
    shown = {normalize(example.question) for example in form.examples}
    measured = to_measure(ledger)
    left_out: Counter[str] = Counter()
    asked = []
    for question in ledger.questions(["train"]):
        if normalize(question.question) in shown:
            left_out["stands among the examples"] += 1
        elif not question.answers:
            left_out["has no answer"] += 1
        elif as_measured(question.question) in measured:
            left_out["is measured in the same words"] += 1
        else:
            asked.append(question)
    return asked, dict(left_out)


def held(
    ledger: Ledger, form: PromptFormat, retriever: Retriever, segment: str, k: int, seed: int
) -> tuple[Pairs, dict[str, int]]:
    """The training questions that can be learnt from, each with the passages it is learnt behind; why others are not.

    They are the first ``k`` that are found, as when questions are asked. Where none of these holds an answer, a window
    of the question's own document that does takes the place of one that the seed draws, so that no place gives the
    answer away; where there is no such window, or the question names no document, it has none.

    Where no question at all names a document, as in NQ-open, a question stands behind what is found for it where that
    holds an answer.
    """
    asked, left_out = to_learn_from(ledger, form)
    searched = [question for question in asked if question.documents] or asked
    ranked = iter(retriever.retrieve([question.question for question in searched], k) if searched else [])
    found = []
    for question in asked:
        there = next(ranked) if question.documents or searched is asked else []
        if not any(holds(one, question) for one in there):
            own = gold_passages(ledger, question, retriever.encoder.splitter, segment)
            instead = next((one for one in own if holds(one, question)), None)
            place = random.Random(f"{seed}/{question.id}").randrange(max(len(there), 1))
            there = [] if instead is None else [*there[:place], instead, *there[place + 1 :]]
        found.append((question, tuple(there)))
    return found, left_out


def holds(passage: Passage, question: Question) -> bool:
    """Whether one of a question's answers stands in a passage."""
    return bool(contains(passage.text, question.answers))


def lessons(
    pairs: Pairs,
    base: Base,
    form: PromptFormat,
    beside: Callable[[Sequence[Question]], Sequence[Beside]],
    *,
    needed: bool = True,
    by: str = KIND,
) -> tuple[list[Lesson], dict[str, int]]:
    """A lesson for each question behind its passages (see :func:`held`); why others are left out, counted.

    Where passages are not ``needed``, a question that has none is a lesson without.

    Args:
        beside: what stands beside each question.
        by: the attribute that groups are of.
    """
    named = any(question.documents for question, _ in pairs)
    left_out = Counter(
        "names no document" if named and not question.documents else "no passage holds its answer"
        for question, passages in pairs
        if not passages and needed
    )
    taken = [pair for pair in pairs if pair[1] or not needed]
    found = []
    for (question, passages), (shown, weight) in zip(taken, beside([one for one, _ in taken]), strict=True):
        answers = question.answers
        answer = next((text for text in answers if any(contains(one.text, [text]) for one in passages)), answers[0])
        made = lesson(base, form, question, answer, passages, by)
        found.append(replace(made, shown=shown, weight=weight))
    return found, dict(left_out)


@dataclass(frozen=True)
class Batch:
    """Lessons ready for a step: columns with gradients, and samples behind them.

    Attributes:
        whole: samples behind their whole passages with nothing left out, to be told from; empty where nothing is.
        states: what the encoder says of each passage, before heads make columns of it (rows, n, dim), where it does.
    """

    first: Columns
    samples: list[Sample]
    whole: list[Sample]
    states: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """What is added to the cross-entropy of the answers, each with its weight.

    Attributes:
        distil: KL(behind the whole passage || behind what is learnt) at the answers' tokens.
        vicreg: variance and covariance of what the encoder says of the batch's passages (Bardes et al. 2022).
        fair: by how much the loss of the worst-off group of questions in the batch is above that of the best-off one.
        wrong: the mass that the distribution of an answer's first token keeps when the passage is exchanged for that of
            another question: Σ_v min(p, q).
    """

    distil: float = 0.0
    vicreg: float = 0.0
    fair: float = 0.0
    wrong: float = 0.0


def tune(
    base: Base,
    learnt: nn.Module,
    found: Sequence[Lesson],
    batch: Callable[[Sequence[Lesson]], Batch],
    orders: Orders,
    recipe: Recipe,
    terms: Terms,
    store: Path,
    progress: Progress,
) -> Trained:
    """Train columns on lessons through the frozen model."""

    def loss(step: int) -> Tensor:
        _, numbers = orders.batch(step)
        some = [found[n] for n in numbers]
        given = batch(some)
        logits, label = answer_logits(base, given.first, given.samples)
        each = of_lessons(token_loss(logits, label, base.wide)[0], some)
        tokens = sum(len(one.answer) for one in some)
        total = torch.stack([one.weight * value for one, value in zip(some, each, strict=True)]).sum() / tokens
        if terms.distil and given.whole:
            with torch.no_grad():
                told, _ = answer_logits(base, [], given.whole)
            total = total + terms.distil * drift(logits, told, base.wide)
        if terms.vicreg and given.states is not None:
            total = total + terms.vicreg * spread(given.states)
        if terms.fair:
            total = total + terms.fair * gap(
                [value / len(one.answer) for one, value in zip(some, each, strict=True)], [one.group for one in some]
            )
        if terms.wrong:
            total = total + terms.wrong * _kept(base, batch, some, logits)
        return total

    def rate(name: str) -> float:
        return next((share for part, share in _SLOW.items() if part in name), 1.0)

    return train(learnt, loss, recipe, store, progress, rate)


def likelihoods(base: Base, found: Sequence[Lesson], batch: Callable[[Sequence[Lesson]], Batch]) -> list[float]:
    """log p of each lesson's answer, all tokens together."""
    each: list[float] = []
    for start in range(0, len(found), _READ):
        some = found[start : start + _READ]
        given = batch(some)
        logits, label = answer_logits(base, given.first, given.samples)
        each += [-float(value) for value in of_lessons(token_loss(logits, label, base.wide)[0], some)]
    return each


def of_lessons(each: Tensor, some: Sequence[Lesson]) -> list[Tensor]:
    """The sum over each lesson's own tokens."""
    return [part.sum() for part in torch.split(each, [len(one.answer) for one in some])]


def spread(states: Tensor) -> Tensor:
    """VICReg's variance and covariance terms (Bardes et al. 2022, section 4.1), for states (rows, n, dim).

    A hinge at a standard deviation of 1 keeps what each of the n says of different passages apart; squared
    covariances, off the diagonal, keep its numbers from saying the same. Both run over passages, not over the n, which
    differ without saying anything.
    """
    rows = states - states.mean(0)
    deviation = (rows.square().mean(0) + 1e-4).sqrt()
    count = max(len(states) - 1, 1) * states.shape[1]
    rows = rows.flatten(0, 1)
    covariance = rows.T @ rows / count
    off = covariance - covariance.diag().diag()
    return (1 - deviation).clamp(min=0).mean() + off.square().sum() / states.shape[-1]


def gap(losses: Sequence[Tensor], groups: Sequence[str]) -> Tensor:
    """The mean loss of the group that has the highest, minus that of the one that has the lowest; 0 with none."""
    by_group: dict[str, list[Tensor]] = {}
    for group, value in zip(groups, losses, strict=True):
        if group:
            by_group.setdefault(group, []).append(value)
    if not by_group:
        return losses[0].new_zeros(())
    means = torch.stack([torch.stack(values).mean() for values in by_group.values()])
    return means.max() - means.min()


def _kept(base: Base, batch: Callable[[Sequence[Lesson]], Batch], some: Sequence[Lesson], logits: Tensor) -> Tensor:
    """What the first answer token's distribution keeps behind the next question's passage, a mean over lessons."""
    pairs = [
        (n, replace(one, passages=other.passages))
        for n, (one, other) in enumerate(zip(some, [*some[1:], some[0]], strict=True))
        if {passage.document for passage in one.passages}.isdisjoint(passage.document for passage in other.passages)
    ]
    if not pairs:
        return logits.new_zeros(())
    exchanged = batch([one for _, one in pairs])
    other, _ = answer_logits(base, exchanged.first, [replace(one, answer=one.answer[:1]) for one in exchanged.samples])
    firsts = torch.tensor([0, *(len(one.answer) for one in some)]).cumsum(0)
    right = logits[firsts[[n for n, _ in pairs]]]
    both = (right.to(base.wide).softmax(-1), other.to(base.wide).softmax(-1))
    return torch.minimum(*both).sum(-1).mean()
