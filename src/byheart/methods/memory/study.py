"""Self-study: the model asks and answers questions about its pages, and says them in other words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from byheart.base import Base
from byheart.decode import Job, Sampling, complete
from byheart.methods.memory.examples import Piece, owner_of
from byheart.prompt import PromptFormat, as_sentence
from byheart.score import contains, normalize, token_f1
from byheart.segment import Passage

_TOP_K = 20
_QUESTION_TOKENS, _ANSWER_TOKENS, _TEXT_TOKENS = 32, 24, 160
# A rewriting must say much the same, and not the very same.
_ALIKE = (0.4, 0.95)


def study(
    base: Base, form: PromptFormat, passages: Sequence[Passage], count: int, seed: int, asking: PromptFormat
) -> Iterator[Piece]:
    """What the model makes of its pages: ``count`` questions with answers, and ``count`` rewritings, a passage.

    An answer counts where the passage holds it, a rewriting where it overlaps the passage enough (token F1); so fewer
    may come back.

    Args:
        form: with examples, which show how to ask about a passage and how to answer from one.
        asking: how questions are asked closed book.
    """
    wanted = [passage for passage in passages for _ in range(count)]
    shown = "\n\n".join(
        f"Text: {one.passage.text}\nQuestion: {as_sentence(one.question)}" for one in form.examples if one.passage
    )
    begin = f"{shown}\n\n" if shown else ""
    jobs = [Job(f"{begin}Text: {passage.text}\nQuestion:") for passage in wanted]
    asked = complete(base, jobs, max_new_tokens=_QUESTION_TOKENS, sampling=Sampling(_TOP_K, seed))
    found = {(passage, as_sentence(one.text)) for passage, one in zip(wanted, asked, strict=True) if one.text.strip()}
    pairs = sorted(found, key=lambda pair: (pair[0].document, pair[0].start, pair[1]))
    jobs = [Job(form.prompt(question, [passage])) for passage, question in pairs]
    answered = complete(base, jobs, max_new_tokens=_ANSWER_TOKENS)
    for (passage, question), one in zip(pairs, answered, strict=True):
        if normalize(one.text) and contains(passage.text, [one.text]):
            lead = asking.prompt(question)
            yield Piece(
                owner=owner_of("document", passage.document),
                kind="study",
                lead=lead,
                answer=asking.continuation(one.text.strip()),
            )
    jobs = [Job(f"Text: {passage.text}\nThe same text in other words:") for passage in wanted]
    said = complete(base, jobs, max_new_tokens=_TEXT_TOKENS, sampling=Sampling(_TOP_K, seed), whole=True)
    for passage, one in zip(wanted, said, strict=True):
        text = one.text.strip().split("\n\n")[0]
        if _ALIKE[0] <= token_f1(text, [passage.text]) <= _ALIKE[1]:
            lead = f"{passage.title}\n" if passage.title else ""
            yield Piece(owner=owner_of("document", passage.document), kind="page", lead=lead, answer=text)
