"""Self-study: the model asks questions about passages and answers those that it can from the passage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from byheart.base import Base
from byheart.decode import Job, Sampling, complete
from byheart.prompt import PromptFormat, as_sentence
from byheart.score import contains, normalize
from byheart.segment import Passage

TOP_K = 20
_QUESTION_TOKENS, _ANSWER_TOKENS = 32, 24


def ask_itself(
    base: Base, form: PromptFormat, passages: Sequence[Passage], count: int, seed: int
) -> Iterator[tuple[Passage, str, str]]:
    """``count`` questions a passage with their answers; fewer where the passage does not hold the answer.

    Args:
        form: with examples, which show how to ask about a passage and how to answer from one.
    """
    shown = "\n\n".join(
        f"Text: {one.passage.text}\nQuestion: {as_sentence(one.question)}" for one in form.examples if one.passage
    )
    begin = f"{shown}\n\n" if shown else ""
    wanted = [passage for passage in passages for _ in range(count)]
    jobs = [Job(f"{begin}Text: {passage.text}\nQuestion:") for passage in wanted]
    asked = complete(base, jobs, max_new_tokens=_QUESTION_TOKENS, sampling=Sampling(TOP_K, seed))
    found = {(passage, as_sentence(one.text)) for passage, one in zip(wanted, asked, strict=True) if one.text.strip()}
    pairs = sorted(found, key=lambda pair: (pair[0].document, pair[0].start, pair[1]))
    answered = complete(base, [Job(form.prompt(q, [p])) for p, q in pairs], max_new_tokens=_ANSWER_TOKENS)
    for (passage, question), one in zip(pairs, answered, strict=True):
        if normalize(one.text) and contains(passage.text, [one.text]):
            yield passage, question, one.text.strip()
