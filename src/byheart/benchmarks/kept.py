"""Completions on disk, so that the scoring of a run that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from byheart.base import Base
from byheart.decode import Completion, Job, Sampling, complete, speaker
from byheart.progress import Silent
from byheart.storage import fingerprint, resumed

# Completions a file is written after: what a kill costs, minutes at most.
_AT_ONCE = 512


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
        its place. No job may stand behind keys and values.
        """
        base, drawn = self.base, asdict(sampling) if sampling else None
        if any(job.past for job in jobs):
            raise ValueError("what stands behind keys and values is not told apart")
        # The longest first, so that what does not fit the model is told at once.
        order = sorted(range(len(jobs)), key=lambda n: -len(jobs[n].prompt)) if sampling is None else range(len(jobs))
        asked = [[jobs[n].prompt, *jobs[n].options] for n in order]
        mark = fingerprint(
            *speaker(base),
            self.state,
            max_new_tokens,
            drawn,
            asked,
        )
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
            rows = resumed(self.folder / f"{mark}.json", mark, [jobs[n] for n in order], max(step, 1), make)
            tick(len(jobs) - made)
        by_place = dict(zip(order, rows, strict=True))
        said = (by_place[n] for n in range(len(jobs)))
        return [Completion(**row | {"options": tuple(row["options"]), "hits": tuple(row["hits"])}) for row in said]
