"""Self-study as pieces to learn: questions that the model asked itself, and its pages in other words."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from byheart.base import Base
from byheart.decode import Job, Sampling, complete
from byheart.methods.facts import as_measured
from byheart.methods.memory.examples import Piece, owner_of
from byheart.methods.study import TOP_K, ask_itself
from byheart.prompt import PromptFormat
from byheart.score import token_f1
from byheart.segment import Passage

_TEXT_TOKENS = 160
# A rewriting must say much the same, and not the very same.
_ALIKE = (0.4, 0.95)


def study(
    base: Base,
    form: PromptFormat,
    passages: Sequence[Passage],
    count: int,
    seed: int,
    asking: PromptFormat,
    measured: Container[str],
) -> Iterator[Piece]:
    """What the model makes of its pages: ``count`` questions with answers, and ``count`` rewritings, a passage.

    A rewriting counts where it overlaps the passage enough (token F1); so fewer may come back.

    Args:
        form: see :func:`byheart.methods.study.ask_itself`.
        asking: how questions are asked closed book.
        measured: what :func:`to_measure` gave: none is asked in these very words.
    """
    for passage, question, answer in ask_itself(base, form, passages, count, seed):
        if as_measured(question) in measured:
            continue
        yield Piece(
            owner=owner_of("document", passage.document),
            kind="study",
            lead=asking.prompt(question),
            answer=asking.continuation(answer),
        )
    wanted = [passage for passage in passages for _ in range(count)]
    jobs = [Job(f"Text: {passage.text}\nThe same text in other words:") for passage in wanted]
    said = complete(base, jobs, max_new_tokens=_TEXT_TOKENS, sampling=Sampling(TOP_K, seed), whole=True)
    for passage, one in zip(wanted, said, strict=True):
        text = one.text.strip().split("\n\n")[0]
        if _ALIKE[0] <= token_f1(text, [passage.text]) <= _ALIKE[1]:
            lead = f"{passage.title}\n" if passage.title else ""
            yield Piece(owner=owner_of("document", passage.document), kind="page", lead=lead, answer=text)
