"""Questions, with or without passages, through the prompt and the model to answers: what most methods end in."""

from __future__ import annotations

from collections.abc import Sequence

from byheart.base import Base
from byheart.decode import Completion, Job, complete
from byheart.methods.contract import Answer
from byheart.progress import Progress, untold
from byheart.prompt import PromptFormat
from byheart.rows import Question
from byheart.segment import Passage

# Stands in the question's place where an option's likelihood without the question is wanted (Zhao et al. 2021).
CONTENT_FREE = "N/A"


def read(
    base: Base,
    form: PromptFormat,
    questions: Sequence[Question],
    passages: Sequence[Sequence[Passage] | None],
    *,
    max_new_tokens: int,
    progress: Progress = untold,
) -> list[Answer]:
    """Ask the model each question with its passages (None: closed book), and score its choices or first answer."""

    def job(question: Question, given: Sequence[Passage] | None, text: str) -> Job:
        return Job(form.prompt(text, given, question.choices), options_of(form, question))

    pairs = list(zip(questions, passages, strict=True))
    jobs = [job(question, given, question.question) for question, given in pairs]
    free = [job(question, given, CONTENT_FREE) if question.choices else None for question, given in pairs]
    return ask(base, questions, passages, jobs, free, max_new_tokens=max_new_tokens, progress=progress)


def options_of(form: PromptFormat, question: Question) -> tuple[str, ...]:
    """What is scored behind a question's prompt: its choices, or its first answer."""
    return tuple(form.continuation(text) for text in question.choices or question.answers[:1])


def ask(
    base: Base,
    questions: Sequence[Question],
    passages: Sequence[Sequence[Passage] | None],
    jobs: Sequence[Job],
    free: Sequence[Job | None],
    *,
    max_new_tokens: int,
    progress: Progress = untold,
) -> list[Answer]:
    """The same with the jobs made elsewhere, one a question.

    Args:
        free: for questions with choices, the same jobs with :data:`CONTENT_FREE` for a question.
    """
    completions = complete(base, jobs, max_new_tokens=max_new_tokens, on_done=progress)
    # Closed book it is one job for all questions with the same choices.
    marks = [None if job is None else (job.prompt, job.options, tuple(map(id, job.past))) for job in free]
    different = {mark: job for mark, job in zip(marks, free, strict=True) if job is not None}
    done = complete(base, list(different.values()), max_new_tokens=0)
    without = {mark: one.options for mark, one in zip(different, done, strict=True)}
    return [
        _answer(question, given, completion, without.get(mark, ()))
        for question, given, completion, mark in zip(questions, passages, completions, marks, strict=True)
    ]


def _answer(
    question: Question,
    given: Sequence[Passage] | None,
    completion: Completion,
    without: tuple[float, ...],
) -> Answer:
    reference, hits, choice, calibrated = None, None, None, None
    if question.choices:
        scores = completion.options
        choice = _likeliest(question.choices, scores)
        calibrated = _likeliest(question.choices, [a - b for a, b in zip(scores, without, strict=True)])
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
