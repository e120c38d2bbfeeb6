"""What is known of a passage's tokens without the model's reading it, and least squares on that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byheart.decode import batches
from byheart.encoder import Encoder
from byheart.methods.prefix.cache import Block, Cache

# Something that is known whose root mean square is below this counts as 0.
_LEAST = 1e-6
# Tokens that the encoder sees at once.
_READ = 2_048


def known_of(whole: Cache, encoder: Encoder, passages: Sequence[Block]) -> list[Tensor]:
    """What is known of each passage's tokens (tokens, known), in fp32.

    The model's own embeddings of a token and of the one before it, the encoder's states in its middle and at its top
    where it stands, and that it is one (a 1).
    """
    base, texts = whole.base, [whole.form.block(passage) for passage in passages]
    rows = places_of(whole, texts)
    found: dict[int, Tensor] = {}
    for batch in batches([len(ids) for ids, _ in rows], lambda count, longest: count * longest <= _READ):
        for n, (states, places) in zip(batch, encoder.described([texts[n] for n in batch]), strict=True):
            ids, spans = rows[n]
            with torch.no_grad():
                own = base.parts.embeddings(torch.tensor(ids, device=base.device)).float()
            shares = torch.from_numpy(_shares(spans, places)).to(states.device)
            before = torch.cat([torch.zeros_like(own[:1]), own[:-1]])
            told = (shares @ states.float()).to(own.device)
            found[n] = torch.cat([own, before, told, torch.ones_like(own[:, :1])], 1)
    return [found[n] for n in range(len(rows))]


def places_of(whole: Cache, texts: Sequence[str]) -> list[tuple[list[int], NDArray[np.int64]]]:
    """The tokens of each text, and the characters from which and up to which each reaches (tokens, 2)."""
    rows = whole.base.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return [
        (ids, np.array(spans).reshape(-1, 2))
        for ids, spans in zip(rows["input_ids"], rows["offset_mapping"], strict=True)
    ]


def _shares(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> NDArray[np.float32]:
    """For each of our tokens (characters from, to) the shares of the encoder's that it lies over; they sum to 1.

    One that lies over none (space between words, or past what the encoder could read) goes with the last before it, or
    the first.
    """
    over = (theirs[None, :, 0] < ours[:, 1:]) & (theirs[None, :, 1] > ours[:, :1])
    nearest = np.searchsorted(theirs[:, 1], ours[:, 0], side="right").clip(1) - 1
    alone = np.arange(len(theirs))[None] == nearest[:, None]
    shares: NDArray[np.float32] = np.where(over.any(1, keepdims=True), over, alone).astype(np.float32)
    shares /= shares.sum(1, keepdims=True)
    return shares


class Sums:
    """Sums over tokens of what is known times itself, and times what is wanted: all that least squares need."""

    def __init__(self, known: Tensor | None = None, wanted: Tensor | None = None) -> None:
        """Go on from some sums; by default from none."""
        self.known = torch.zeros(()) if known is None else known
        self.wanted = torch.zeros(()) if wanted is None else wanted

    def add(self, known: Tensor, wanted: Tensor) -> None:
        """Add some tokens' (n, known) and (n, wanted)."""
        self.wanted = self.wanted + known.T @ wanted
        # Rounded to fp32, sums of so many would not always have a Cholesky factor.
        self.known = self.known + known.double().T @ known.double()

    def solved(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The size (root mean square) of each thing that is known, and the map from all, in these sizes, in fp64.

        Args:
            ridge: of the mean square of each: what keeps the map from going by what two of them share.
        """
        count = self.known[-1, -1]  # of tokens: the last that is known is that it is one
        scale = (self.known.diag() / count).sqrt().clamp(min=_LEAST)
        gram = self.known / count / scale / scale[:, None] + ridge * torch.eye(len(scale), device=scale.device)
        aim = self.wanted.double() / count / scale[:, None]
        return scale, torch.cholesky_solve(aim, torch.linalg.cholesky(gram))
