"""Of a passage the few words that answers are most likely to stand in, as the model itself made their tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byheart.base import digest_of
from byheart.encoder import Encoder
from byheart.kv import KV
from byheart.methods.prefix.cache import Block, Cache, Few
from byheart.methods.prefix.known import Sums, known_of, places_of
from byheart.segment import Passage

# Passages whose tokens are described at once.
_AT_ONCE = 16
# So many blocks of the model's upper half, evenly apart from the last one down, tell what they keep of a token.
_BLOCKS = 5
# A token in twenty is an answer's, and what tells them apart is faint: of what is known, most is noise to it.
_RIDGE = 1.0
# What counts as a word: letters and digits, or marks, in a row. One of more tokens (no word at all, or of a script that
# puts no space between words) is taken token by token.
_WORD, _LONGEST = re.compile(r"\w+|[^\w\s]+"), 8


class Likely(nn.Module):
    """Of what is known of a token (see :func:`read_of`), how likely it is part of an answer: a linear form."""

    def __init__(self, weight: Tensor) -> None:
        """Take the form (known,)."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, known: Tensor) -> Tensor:
        """The likelihoods (n,) of tokens of which ``known`` (n, known) is known; only their order means anything."""
        return known @ self.weight


class Selected(Few):
    """Passages in a few of their own columns, those of the words that answers are most likely to stand in.

    Words are taken whole, as long as they fit, since a model cannot say half of one; what room is left goes to the
    likeliest other tokens. A word that stands there already says no more: of each the likeliest place is taken.
    """

    def __init__(self, whole: Cache, count: int, likely: Likely, encoder: Encoder) -> None:
        super().__init__(whole, count, f"selected words, {digest_of(likely.state_dict().values())}")
        self._likely, self._encoder = likely, encoder

    def fresh(self, passages: Sequence[Block]) -> list[KV]:
        """Columns of passages that are not on disk."""
        blocks = self.whole.encode(passages, kept=True)
        known = read_of(self.whole, self._encoder, passages, blocks)
        return [self._of(*one) for one in zip(passages, blocks, known, strict=True)]

    def _of(self, passage: Block, block: KV, known: Tensor) -> KV:
        taken = likeliest(*words_of(self.whole, passage), self._likely(known).tolist(), self._count)
        places = torch.tensor(taken, device=block.keys[0].device)
        keys, values = (tuple(one[:, places] for one in kept) for kept in (block.keys, block.values))
        return KV(keys, values, block.start, block.end)


def read_of(whole: Cache, encoder: Encoder, passages: Sequence[Block], blocks: Sequence[KV]) -> list[Tensor]:
    """What is known of each passage's tokens once the model has read them (tokens, known), in fp32.

    The values that it keeps of a token and of the next one in some of its upper blocks, and what :func:`known_of` says.
    """
    depth = len(whole.base.parts.blocks)
    upper = range(depth - 1, depth // 2 - 1, -max(1, depth // (2 * _BLOCKS)))[:_BLOCKS]
    found = []
    for block, known in zip(blocks, known_of(whole, encoder, passages), strict=True):
        kept = torch.cat([block.values[n].transpose(0, 1).flatten(1) for n in upper], 1).to(known)
        found.append(torch.cat([kept, torch.cat([kept[1:], torch.zeros_like(kept[:1])]), known], 1))
    return found


def words_of(whole: Cache, passage: Block) -> tuple[list[str], list[list[int]]]:
    """What stands at each of a passage's tokens, and its words: the places of their tokens, in order.

    A token that lies over two words goes with the first, one that lies over none (space) with none.
    """
    text = whole.form.block(passage)
    places = places_of(whole, [text])[0][1].tolist()
    words = [one.span() for one in _WORD.finditer(text)]
    found: dict[int, list[int]] = {}
    word = 0
    for n, (start, end) in enumerate(places):
        while word < len(words) and words[word][1] <= start:
            word += 1
        if word < len(words) and words[word][0] < end:
            found.setdefault(word, []).append(n)
    parts = [[word] if len(word) <= _LONGEST else [[n] for n in word] for word in found.values()]
    return [text[start:end] for start, end in places], [one for some in parts for one in some]


def likeliest(tokens: Sequence[str], words: Sequence[Sequence[int]], told: Sequence[float], count: int) -> list[int]:
    """The places of ``count`` tokens: whole words first, by the mean of their likelihoods, each once.

    Args:
        tokens: what stands at each place.
        words: the places of each one's tokens.
        told: how likely each token is.
    """
    best: dict[str, tuple[float, Sequence[int]]] = {}
    for word in words:
        said, mean = "".join(tokens[n] for n in word).strip().casefold(), sum(told[n] for n in word) / len(word)
        if said not in best or mean > best[said][0]:
            best[said] = (mean, word)
    taken: list[int] = []
    for _, word in sorted(best.values(), key=lambda one: -one[0]):
        if len(taken) + len(word) <= count:
            taken += word
    left = sorted(set(range(len(tokens))) - set(taken), key=lambda n: -told[n])
    return sorted(taken + left[: count - len(taken)])


def fit_likely(whole: Cache, encoder: Encoder, answered: Sequence[tuple[Passage, Sequence[str]]]) -> Likely:
    """What tells the tokens of answers from others in passages that hold some (least squares on 1 and 0)."""
    sums = Sums()
    for n in range(0, len(answered), _AT_ONCE):
        some = answered[n : n + _AT_ONCE]
        passages = [passage for passage, _ in some]
        known = torch.cat(read_of(whole, encoder, passages, whole.encode(passages, kept=True)))
        inside = np.concatenate([_answered(whole, passage, answers) for passage, answers in some])
        sums.add(known, torch.from_numpy(inside).to(known)[:, None])
    scale, weight = sums.solved(_RIDGE)
    return Likely((weight[:, 0] / scale).float().contiguous())


def _answered(whole: Cache, passage: Passage, answers: Sequence[str]) -> NDArray[np.bool_]:
    """Of each of a passage's tokens, whether it lies over an answer that stands there in whole words (n,)."""
    text, given = whole.form.block(passage), [re.escape(answer.strip()) for answer in answers if answer.strip()]
    found = [one.span() for text_of in given for one in re.finditer(rf"(?<!\w){text_of}(?!\w)", text, re.IGNORECASE)]
    places = places_of(whole, [text])[0][1]
    over = np.zeros(len(places), dtype=bool)
    for start, end in found:
        over |= (places[:, 0] < end) & (places[:, 1] > start)
    return over
