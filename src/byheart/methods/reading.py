"""Questions, with or without passages, through the prompt and the model to answers: what most methods end in."""

from __future__ import annotations

from collections.abc import Sequence

from byheart.base import Base
from byheart.decode import Completion, Job, complete
from byheart.methods.contract import Answer, Progress
from byheart.prompt import PromptFormat
from byheart.rows import Question
from byheart.segment import Passage

# Stands in the question's place where an option's likelihood without the question is wanted (Zhao et al. 2021).
_CONTENT_FREE = "N/A"


def read(
    base: Base,
    form: PromptFormat,
    questions: Sequence[Question],
    passages: Sequence[Sequence[Passage] | None],
    *,
    max_new_tokens: int,
    progress: Progress = lambda count: None,
) -> list[Answer]:
    """Ask the model each question with its passages (None: closed book), and score its choices or first answer."""
    jobs = [
        Job(form.prompt(question.question, given, question.choices), options_of(form, question))
        for question, given in zip(questions, passages, strict=True)
    ]
    return ask(base, form, questions, passages, jobs, max_new_tokens=max_new_tokens, progress=progress)


def options_of(form: PromptFormat, question: Question) -> tuple[str, ...]:
    """What is scored behind a question's prompt: its choices, or its first answer."""
    return tuple(form.continuation(text) for text in question.choices or question.answers[:1])


def ask(
    base: Base,
    form: PromptFormat,
    questions: Sequence[Question],
    passages: Sequence[Sequence[Passage] | None],
    jobs: Sequence[Job],
    *,
    max_new_tokens: int,
    progress: Progress = lambda count: None,
) -> list[Answer]:
    """The same with the jobs made elsewhere, one a question."""
    completions = complete(base, jobs, max_new_tokens=max_new_tokens, on_done=progress)
    without = _likelihood_without_question(base, form, questions)
    return [
        _answer(question, given, completion, without)
        for question, given, completion in zip(questions, passages, completions, strict=True)
    ]


def _likelihood_without_question(
    base: Base, form: PromptFormat, questions: Sequence[Question]
) -> dict[tuple[str, ...], tuple[float, ...]]:
    sets = list(dict.fromkeys(tuple(q.choices) for q in questions if q.choices))
    jobs = [Job(form.prompt(_CONTENT_FREE, None, choices), tuple(map(form.continuation, choices))) for choices in sets]
    done = complete(base, jobs, max_new_tokens=0)
    return {choices: completion.options for choices, completion in zip(sets, done, strict=True)}


def _answer(
    question: Question,
    given: Sequence[Passage] | None,
    completion: Completion,
    without: dict[tuple[str, ...], tuple[float, ...]],
) -> Answer:
    reference, hits, choice, calibrated = None, None, None, None
    if question.choices:
        scores = completion.options
        choice = _likeliest(question.choices, scores)
        free = without[tuple(question.choices)]
        calibrated = _likeliest(question.choices, [a - b for a, b in zip(scores, free, strict=True)])
        both = zip(question.choices, zip(scores, completion.hits, strict=True), strict=True)
        right = [found for text, found in both if text in question.answers]
        reference, hits = max(right) if right else (None, None)
    elif completion.options:
        reference, hits = completion.options[0], completion.hits[0]
    return Answer(
        question=question.id,
        text=completion.text,
        score=completion.logprob,
        reference=reference,
        token_accuracy=hits,
        choice=choice,
        choice_calibrated=calibrated,
        evidence=tuple(given or ()),
        seconds=completion.seconds,
        prompt_tokens=completion.prompt_tokens,
        new_tokens=completion.new_tokens,
    )


def _likeliest(choices: Sequence[str], scores: Sequence[float]) -> str:
    return max(zip(scores, choices, strict=True), key=lambda pair: pair[0])[1]
