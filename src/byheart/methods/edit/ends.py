"""Where an object ends: the tokens that may follow its last word, so that "Max Wolf" does not run on into "Wolfram"."""

from __future__ import annotations

import torch
from torch import Tensor

from byheart.base import Base
from byheart.decode import end_tokens, token_ids
from byheart.score import unspaced

# What may stand right behind a word that is over. An apostrophe or a hyphen goes on with it ("Sega's", "trance-like").
_CLOSING = frozenset('.,;:!?)]}"”»،؛؟।')


def asks_for_an_end(text: str) -> bool:
    """Whether a text ends in a word that spaces or punctuation would close."""
    last = text.rstrip()[-1:]
    return last.isalnum() and not unspaced(last)


def closing_tokens(base: Base) -> Tensor:
    """The tokens (their numbers) that close a word before them: white space, closing punctuation, the text's end."""
    tokenizer = base.tokenizer
    # Behind a word: a tokeniser that marks where words begin drops the mark at a text's beginning.
    word = token_ids(tokenizer, "a", beginning=False)[-1:]
    alone = tokenizer.decode(word)
    texts = (text.removeprefix(alone) for text in tokenizer.batch_decode([[*word, id] for id in range(len(tokenizer))]))
    closing = {id for id, text in enumerate(texts) if text[:1].isspace() or text[:1] in _CLOSING}
    return torch.tensor(sorted(closing | end_tokens(base)), device=base.device)
