"""Rows of tokens to train on, the hidden states that no training changes, and the loss from there on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from byheart.attention import fast_attention
from byheart.base import Base, for_device
from byheart.blocks import Stretch
from byheart.decode import READ_TOKENS, batches
from byheart.losses import drift, token_loss
from byheart.methods.memory.adapter import Place, attached
from byheart.padding import right_padded
from byheart.storage import replacing

# Hidden states on disk hold these bits, whatever torch calls them.
_BITS = {2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: its tokens, and which of them (never the first) are to be predicted."""

    ids: tuple[int, ...]
    labels: tuple[bool, ...]


class States:
    """Hidden states of rows at the input of one block, in one file on disk; read through the page cache."""

    def __init__(self, path: Path, rows: Sequence[Row], width: int, dtype: torch.dtype) -> None:
        places = _places(rows)
        self._places = [places[row.ids] for row in rows]
        self._dtype = dtype
        self._data = np.memmap(path, _BITS[dtype.itemsize], "r", shape=(_tokens(places), width))

    def padded(self, numbers: Sequence[int]) -> Tensor:
        """The states of some rows (rows, longest, d_model), zeros behind them."""
        some = [torch.from_numpy(self._data[self._places[n]].copy()).view(self._dtype) for n in numbers]
        return nn.utils.rnn.pad_sequence(some, batch_first=True)


def keep_states(base: Base, rows: Sequence[Row], block: int, path: Path) -> States:
    """The states of ``rows`` at the input of block ``block``: computed once, then kept in ``path``.

    Rows of the same tokens are kept once. A kill leaves nothing half made: the file gets its name when it is whole.
    """
    width, dtype = base.parts.d_model, base.dtype
    if not path.exists():
        places = _places(rows)
        limit = for_device(READ_TOKENS, base.device)
        with replacing(path) as unfinished, fast_attention(base.model), torch.no_grad():
            data = np.memmap(unfinished, _BITS[dtype.itemsize], "w+", shape=(_tokens(places), width))
            texts = list(places)
            for batch in batches(list(map(len, texts)), lambda count, longest: count * longest <= limit):
                tokens = right_padded([texts[n] for n in batch], base.device)
                hidden = Stretch(base, *tokens, block, block).hidden.cpu()
                for n, one in zip(batch, hidden, strict=True):
                    kept = one[: len(texts[n])].contiguous().view(getattr(torch, f"int{8 * dtype.itemsize}"))
                    data[places[texts[n]]] = kept.numpy()
            data.flush()
    return States(path, rows, width, dtype)


def states_bytes(base: Base, rows: Sequence[Row]) -> int:
    """What the states of ``rows`` take on disk."""
    return _tokens(_places(rows)) * base.parts.d_model * base.dtype.itemsize


def _places(rows: Sequence[Row]) -> dict[tuple[int, ...], slice]:
    """Where in the file each text's states stand, one behind the other."""
    texts = list(dict.fromkeys(row.ids for row in rows))
    ends = [0, *accumulate(map(len, texts))]
    return {text: slice(*span) for text, span in zip(texts, pairwise(ends), strict=True)}


def _tokens(places: dict[tuple[int, ...], slice]) -> int:
    return sum(map(len, places))


class Upper:
    """The blocks from the first network up, run from kept states to the loss."""

    def __init__(self, base: Base, adapters: nn.ModuleDict, place: Place) -> None:
        self.base, self.adapters, self.place = base, adapters, place
        first = min(map(int, adapters))
        # Behind a block, the first network needs no more than that block's output: what the next one is given.
        behind = place == "block" and first + 1 < len(base.parts.blocks)
        self._own = adapters[str(first)] if behind else None
        self.start = first + (self._own is not None)
        above = {name: one for name, one in adapters.items() if self._own is None or int(name) != first}
        self._above = nn.ModuleDict(above)

    def labelled(self, rows: Sequence[Row], hidden: Tensor, *, plain: bool = False) -> tuple[Tensor, Tensor]:
        """Logits (labels, vocabulary) for every token to be predicted, and the tokens, row after row.

        Args:
            hidden: (rows, longest, d_model), what :meth:`States.padded` gave.
            plain: without the networks.
        """
        base = self.base
        tokens = right_padded([row.ids for row in rows], base.device)
        hidden = hidden.to(base.device)
        blocks = base.parts.blocks
        if self._own is not None and not plain:
            hidden = hidden + self._own(hidden)
        stretch = Stretch(base, *tokens, self.start, len(blocks) - 1, hidden=hidden)
        with fast_attention(base.model), nullcontext() if plain else attached(base, self._above, self.place):
            hidden = stretch.run(hidden, self.start, len(blocks) - 1)
        row, column, label = torch.tensor(
            [(n, place - 1, one.ids[place]) for n, one in enumerate(rows) for place, on in enumerate(one.labels) if on],
            device=base.device,
        ).T
        return base.parts.logits(hidden[row, column]), label

    def loss(self, rows: Sequence[Row], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of every token to be predicted (labels), and whether it is the likeliest."""
        return token_loss(*self.labelled(rows, hidden))

    def mean_loss(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        """The mean over rows of each row's mean: an answer's few tokens would drown beside a page's many."""
        found, _ = self.loss(rows, hidden)
        return torch.stack([one.mean() for one in torch.split(found, [sum(row.labels) for row in rows])]).mean()

    def drift(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        """KL(base || base with the networks), a mean over the tokens to be predicted."""
        with torch.no_grad():
            plain, _ = self.labelled(rows, hidden, plain=True)
        logits, _ = self.labelled(rows, hidden)
        return drift(logits, plain)
