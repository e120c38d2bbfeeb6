"""Learnt keys and values that stand before everything a question sees (prefix-tuning; Li and Liang 2021)."""

from __future__ import annotations

import torch
from torch import nn

from byheart.errors import DataError
from byheart.kv import KV


class Slots(nn.Module):
    """``n`` columns of keys and values for every block, in fp32, at the positions from 0 on.

    They begin as keys and values that the model itself made of a text: random ones take far longer, and some never
    recover (Li and Liang 2021, section 7.4; Eyuboglu et al. 2025).
    """

    def __init__(self, begin: KV) -> None:
        super().__init__()
        self.keys = nn.ParameterList(one.detach().float().clone() for one in begin.keys)
        self.values = nn.ParameterList(one.detach().float().clone() for one in begin.values)

    def __len__(self) -> int:
        """How many columns there are."""
        return int(self.keys[0].shape[1])

    def kv(self, dtype: torch.dtype) -> KV:
        """As the model takes them; gradients reach the parameters."""
        return KV(tuple(one.to(dtype) for one in self.keys), tuple(one.to(dtype) for one in self.values), 0, len(self))


def chosen_columns(source: KV, count: int) -> KV:
    """``count`` of a text's columns: the first, which models use as a sink, and others evenly through the rest.

    Raises:
        DataError: where the text has fewer.
    """
    if count > source.columns:
        raise DataError(
            f"prefix: {count} columns to learn, and the text that they begin as has only {source.columns} tokens"
        )
    places = torch.linspace(0, source.columns - 1, count).round().long()
    places = places.to(source.keys[0].device)
    return KV(tuple(k[:, places] for k in source.keys), tuple(v[:, places] for v in source.values), 0, len(places))
