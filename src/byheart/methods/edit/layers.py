"""Which layers an edit goes into: named by the user, found by causal tracing, or a share of the depth."""

from __future__ import annotations

from byheart.base import Base
from byheart.errors import UsageError
from byheart.storage import read_card, traced_path, write_json

# Where nothing was measured: six layers from a ninth of the depth on, where causal tracing put them in most models
# (GPT-J: 3-8 of 28).
_START = 1 / 9
WIDTH = 6


def choose_layers(base: Base, text: str, method: str = "edit") -> tuple[int, ...]:
    """The layers to edit, in ascending order: ``FIRST-LAST``, or ``auto``; ``method`` is whose option that is.

    Raises:
        UsageError: where the text names no range that the model has; at least one block must lie above it.
    """
    depth = len(base.parts.blocks)
    if text != "auto":
        first, _, last = text.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UsageError(f"--set {method}.layers={text}: must be FIRST-LAST, such as 3-7, or auto")
        start, end = int(first), int(last or first)
    else:
        path = traced_path(base.hash)
        if path.is_file():
            start, end = read_card(path, "range")["range"]
        else:
            start = min(int(depth * _START), depth - 2)
            end = min(start + WIDTH - 1, depth - 2)
    if not 0 <= start <= end < depth - 1:
        raise UsageError(
            f"{method}.layers={start}-{end}: this model has blocks 0 to {depth - 1}, and one must lie above"
        )
    return tuple(range(start, end + 1))


def keep_range(base: Base, first: int, last: int, record: dict[str, object]) -> None:
    """Keep the range that was measured for a model, for :func:`choose_layers`."""
    write_json(traced_path(base.hash), {"range": [first, last], "model": base.name} | record)
