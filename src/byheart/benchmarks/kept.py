"""Completions on disk, so that the scoring of a run that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from byheart import __version__
from byheart.base import Base
from byheart.decode import Completion, Job, Sampling, complete, end_tokens
from byheart.progress import Silent
from byheart.storage import fingerprint, resumed

# Completions a file is written after: what a kill costs, a minute or two.
_AT_ONCE = 256


class Kept:
    """What one state of a model says, each list of prompts in a file of its own."""

    def __init__(self, base: Base, folder: Path, show: Silent, state: str = "") -> None:
        """Take what a run shows its progress with, and a hash of what changes the model; "": nothing does."""
        self.base, self.folder, self.show, self.state = base, folder, show, state

    def complete(
        self, label: str, jobs: Sequence[Job], *, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[Completion]:
        """What :func:`byheart.decode.complete` gives, with a bar of that label, from disk what was asked before.

        With ``sampling`` each completion is ``max_new_tokens`` long, and all are made at once: a job's draws depend on
        its place. Keys and values in front of prompts are not told apart.
        """
        base, drawn = self.base, asdict(sampling) if sampling else None
        asked = [[job.prompt, *job.options] for job in jobs]
        mark = fingerprint(
            __version__, base.hash, str(base.dtype), base.device.type, sorted(end_tokens(base)), self.state,
            max_new_tokens, drawn, asked,
        )  # fmt: skip
        made = 0
        with self.show.bar(label, len(jobs)) as tick:

            def make(some: Sequence[Job]) -> list[dict[str, Any]]:
                nonlocal made
                made += len(some)
                done = complete(
                    base, some, max_new_tokens=max_new_tokens, sampling=sampling, whole=bool(sampling), on_done=tick
                )
                return [asdict(one) for one in done]

            self.folder.mkdir(parents=True, exist_ok=True)
            step = _AT_ONCE if sampling is None else len(jobs)
            rows = resumed(self.folder / f"{mark}.json", mark, jobs, max(step, 1), make)
            tick(len(jobs) - made)
        return [Completion(**row | {"options": tuple(row["options"]), "hits": tuple(row["hits"])}) for row in rows]
