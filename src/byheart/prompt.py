"""The one prompt format that every method and every model is asked in, and the examples it shows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from byheart.errors import UsageError
from byheart.gold import gold_passages
from byheart.ledger import Ledger
from byheart.rows import Question
from byheart.score import contains, normalize
from byheart.segment import Passage

# An example teaches the form of an answer: short, and taken from the passage.
_EXAMPLE_WORDS = 4
# Every token of an example is attended to for every question, so it shows a short window around its answer, and of
# this many times as many examples as needed the shortest are kept.
_EXAMPLE_SEGMENT = "64/32"
_EXAMPLE_POOL = 8
# What follows a question that has choices.
CHOICES = "\nOptions:"
_BETWEEN = "\n\n"
# The common one, and those of East Asian width, Arabic, Greek and Armenian.
_QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u037e", "\u055e")


@dataclass(frozen=True, slots=True)
class Example:
    """A training question with its answer and the passage that holds it (None: the ledger names none for it)."""

    question: str
    answer: str
    passage: Passage | None


def _form(number: int, question: str, answer: str, title: str, text: str) -> Example:
    return Example(question, answer, Passage(f"form-{number}", title, text, 0, len(text)))


# For a ledger without training questions: invented, so that they show the form of an answer and teach nothing.
FORM_EXAMPLES = (
    _form(1, "who built the clock of Merrowby", "Anna Kestle", "Merrowby",
          "Merrowby is a market town on a low hill. Its clock was built by Anna Kestle, who never left the county."),
    _form(2, "when did the Linfold bridge open", "1931", "Linfold bridge",
          "The Linfold bridge crosses the Orl where the river is widest. It opened in 1931 after six years of work."),
    _form(3, "where does the river Orl begin", "Lake Sennet", "Orl",
          "The Orl is a slow river of 140 kilometres. It begins in Lake Sennet and reaches the sea at Port Averil."),
    _form(4, "how many islands make up the Tarn Isles", "nine", "Tarn Isles",
          "The Tarn Isles are nine islands, of which only the largest has a harbour."),
    _form(5, "what is the flag of Dunmore Vale made of", "wool", "Dunmore Vale",
          "Dunmore Vale has a flag of wool, since the valley has kept sheep for as long as anybody remembers."),
)  # fmt: skip


class PromptFormat:
    """Questions, passages and examples to prompt texts.

    Plain text for base and instruct models alike; with ``chat`` the same text is the user's turn in the model's chat
    template.
    """

    def __init__(self, tokenizer: Any, examples: Sequence[Example] = (), *, chat: bool = False) -> None:
        """Take the model's tokeniser, the examples and whether to use its chat template.

        Raises:
            UsageError: where ``chat`` is asked of a model that has no chat template.
        """
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UsageError("--chat: the model's tokeniser has no chat template")
        self._tokenizer, self.examples, self._chat = tokenizer, tuple(examples), chat

    def prompt(
        self, question: str, passages: Sequence[Passage] | None = None, choices: Sequence[str] | None = None
    ) -> str:
        """The prompt for a question.

        ``passages=None`` is closed book, and its examples show no passages either.
        """
        shown = [
            f"{_turn(e.question, None if passages is None or e.passage is None else [e.passage])} {e.answer}"
            for e in self.examples
            # Where training questions are asked, to choose settings, none may be shown with its answer.
            if normalize(e.question) != normalize(question)
        ]
        text = _BETWEEN.join([*shown, _turn(question, passages, choices)])
        if not self._chat:
            return text
        return self._templated(text)

    def _templated(self, text: str) -> str:
        turn = [{"role": "user", "content": text}]
        prompt = str(self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        # Many templates write the BOS that the tokeniser adds again.
        bos = self._tokenizer.bos_token
        adds_bos = bos and self._tokenizer("a")["input_ids"][0] == self._tokenizer.bos_token_id
        return prompt.removeprefix(bos) if adds_bos else prompt

    def pieces(
        self, question: str, passages: Sequence[Passage], choices: Sequence[str] | None = None
    ) -> tuple[str, list[str], str]:
        """A prompt in three pieces: what stands before any passage, each passage, what asks.

        The first two do not depend on the question, so that what a model makes of them can be kept. Hence the passage
        stands before its question only, in the examples too, and these are the same for every question.
        """
        head = "".join(map(self.block, self.examples)).removeprefix(_BETWEEN)
        blocks = [self.block(passage) for passage in passages]
        tail = _BETWEEN + _asked(question, choices)
        if not self._chat:
            return head, blocks, tail
        # Some templates take the white space off that a text without examples begins with.
        text = (head + "".join(blocks) + tail).removeprefix(_BETWEEN)
        before, found, after = self._templated(text).partition(text)
        if not found:
            raise UsageError("--chat: the model's chat template does not keep a text as it is")
        return before + head, blocks, tail + after

    @staticmethod
    def block(one: Passage | Example) -> str:
        """A passage, or an example, as it stands in the middle of a prompt."""
        if isinstance(one, Passage):
            return _BETWEEN + _shown(one)
        passage = "" if one.passage is None else _BETWEEN + _shown(one.passage)
        return f"{passage}{_BETWEEN}{_asked(one.question)} {one.answer}"

    def continuation(self, answer: str) -> str:
        """An answer as it would follow the prompt."""
        return answer if self._chat else f" {answer}"


def _turn(question: str, passages: Sequence[Passage] | None, choices: Sequence[str] | None = None) -> str:
    blocks = _BETWEEN.join(map(_shown, passages or ()))
    # A small model reads a passage better when it knows what for: the question stands before and behind it.
    return "\n".join([*([f"Question: {as_sentence(question)}", blocks] if blocks else ()), _asked(question, choices)])


def _shown(passage: Passage) -> str:
    return f"Title: {passage.title}\nText: {passage.text}" if passage.title else f"Text: {passage.text}"


def _asked(question: str, choices: Sequence[str] | None = None) -> str:
    lines = [
        f"Question: {as_sentence(question)}",
        *([f"{CHOICES.strip()} {'; '.join(choices)}"] if choices else ()),
        "Answer:",
    ]
    return "\n".join(lines)


def as_sentence(question: str) -> str:
    """A question with a capital and a question mark (web queries have neither)."""
    text = " ".join(question.split())
    text = text[:1].upper() + text[1:]
    return text if is_question(text) or text.endswith((".", "!", ":")) else f"{text}?"


def is_question(text: str) -> bool:
    """Whether a text ends in a question mark, of whatever script."""
    return text.rstrip().endswith(_QUESTION_MARKS)


def choose_examples(ledger: Ledger, shots: int, seed: int, tokenizer: Tokenizer) -> list[Example]:
    """``shots`` examples drawn from the ledger's training questions: with a short answer that their passage holds.

    Only the split ``train`` is looked at. Fewer come back where it has fewer; the same seed draws the same ones. Where
    no training question names a document, the examples are questions and answers alone; where there is none at all,
    invented ones show the form.
    """
    if shots == 0:
        return []
    candidates = [q for q in ledger.questions(["train"]) if _is_plain(q)]
    if not candidates:
        return list(FORM_EXAMPLES[:shots])
    random.Random(seed).shuffle(candidates)
    found: list[tuple[int, Example]] = []
    for question in candidates if any(q.documents for q in candidates) else ():
        passages = gold_passages(ledger, question, tokenizer, _EXAMPLE_SEGMENT)
        answer = question.answers[0]
        if len(passages) == 1 and contains(passages[0].text, [answer]):
            found.append((len(passages[0].text), Example(question.question, answer, passages[0])))
            if len(found) == shots * _EXAMPLE_POOL:
                break
    if not found:
        return [Example(q.question, q.answers[0], None) for q in candidates[:shots]]
    return [example for _, example in sorted(found, key=lambda pair: pair[0])[:shots]]


def _is_plain(question: Question) -> bool:
    return bool(
        question.answers and not question.choices and len(normalize(question.answers[0]).split()) <= _EXAMPLE_WORDS
    )
