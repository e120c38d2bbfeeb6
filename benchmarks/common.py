"""What the benchmarks share: texts to work on, alternating timings, and a line a result."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def texts(count: int) -> list[str]:
    """Real NQ passages where they are to be had (BYHEART_DATA, else ../shared/data), else pages of the example."""
    folder = Path(os.environ.get("BYHEART_DATA") or ROOT.parent / "shared" / "data")
    path = folder / "nq" / "passages.jsonl"
    if not path.exists():
        path = ROOT / "examples" / "world" / "documents.jsonl"
    found = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return (found * (count // len(found) + 1))[:count]


def questions(count: int) -> list[str]:
    """Questions of the example world."""
    lines = (ROOT / "examples" / "world" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines][:count]


def race(repeats: int, **contenders: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each contender, run in turns so that a busy moment hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, work in contenders.items():
            began = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_memory() -> str:
    """This process's peak resident memory."""
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return f"peak memory {int(match[1]) / 1024:.0f} MiB" if match else "peak memory unknown"
