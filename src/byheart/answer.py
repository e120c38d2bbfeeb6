"""Questions through a method, in steps that a later run can pick up, with the answers kept as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from byheart.methods import Answer, Method
from byheart.progress import Progress, untold
from byheart.rows import Question
from byheart.segment import Passage
from byheart.storage import write_text

STEP = 64


def answer_all(
    method: Method,
    questions: Sequence[Question],
    path: Path,
    mark: str,
    *,
    on_done: Progress = untold,
) -> list[Answer]:
    """All questions through an attached method; answers go to ``path`` step by step.

    A file that an earlier run left, of the same ``mark``, is continued; a line cut off by a kill is asked again.
    Seconds are those of the run that asked.
    """
    done = read_answers(path, mark)
    on_done(sum(q.id in done for q in questions))
    if not done:
        write_text(path, json.dumps({"mark": mark}) + "\n")
    left = [q for q in questions if q.id not in done]
    with method.attached():
        for start in range(0, len(left), STEP):
            answers = method.answer(left[start : start + STEP], on_done)
            with path.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
                stream.flush()
                os.fsync(stream.fileno())
            done |= {answer.question: answer for answer in answers}
    return [done[q.id] for q in questions]


def read_answers(path: Path, mark: str) -> dict[str, Answer]:
    """The answers an earlier run left in ``path``, by question id; none where its mark is another."""
    if not path.exists():
        return {}
    lines = path.read_bytes().split(b"\n")
    whole, cut = lines[:-1], lines[-1]
    if cut:
        # A kill came in the middle of this line; without it the file can be appended to again.
        os.truncate(path, path.stat().st_size - len(cut))
    try:
        rows = [json.loads(line) for line in whole]
        if not rows or rows[0].get("mark") != mark:
            return {}
        return {row["question"]: _answer(row) for row in rows[1:]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _answer(row: dict[str, Any]) -> Answer:
    evidence = tuple(Passage(**passage) for passage in row.pop("evidence"))
    return Answer(**row | {"evidence": evidence, "ranked": None if row["ranked"] is None else tuple(row["ranked"])})
