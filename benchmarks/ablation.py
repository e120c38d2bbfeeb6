"""What each part of `prefix` is worth: one change at a time, each against the same baseline, question by question.

python benchmarks/ablation.py DATA OUT [NAME ...] [-- ARGUMENT ...]

DATA as `byheart bench nq` takes it; NAMEs as below, default all; ARGUMENTs that every run takes beside, such as
`--limit 200`. Each is a run of `byheart bench nq` of its own under OUT, which goes on after a kill; done ones are only
tabulated.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from byheart.score import paired_difference

BASELINE = "baseline"
LEARNT = {"slots": 32, "epochs": 2}
# Options of `prefix` beside the baseline's, and arguments of the command.
VARIANTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    BASELINE: ({}, []),
    "nothing-learnt": ({"slots": 0, "epochs": 4}, []),
    **{f"slots-{n}": ({"slots": n}, []) for n in (1, 4, 10, 16)},
    **{f"selected-{n}": ({"encoder": "selected", "columns": n}, []) for n in (1, 4, 10, 16, 32)},
    **{f"compressed-{n}": ({"encoder": "compressed", "columns": n}, []) for n in (1, 4, 10, 16, 32)},
    "tokens": ({"encoder": "tokens"}, []),
    **{f"tokens-rank-{n}": ({"encoder": "tokens", "rank": n}, []) for n in (0, 16, 256)},
    "text": ({"encoder": "text"}, []),
    **{f"passages-{n}": ({}, ["--k", str(n)]) for n in (3, 5)},
    "passages-5-blended": ({"blend": 0.2}, ["--k", "5"]),
    "no-passages": ({"passages": "none"}, []),
    **{f"windows-{n}": ({}, ["--segment", f"{n}/{n // 2}"]) for n in (64, 128)},
    "distil": ({"distil": 1.0}, []),
    "wrong": ({"wrong": 0.5}, []),
    "vicreg": ({"encoder": "text", "vicreg": 0.1}, []),
    "study": ({"study": 1}, []),
    "realm": ({"realm": 5}, []),
    "hard": ({"hard": 1.0}, []),
    "demonstrations": ({"demonstrations": 2}, []),
    "interpolate": ({"interpolate": 0.3}, []),
}
METRICS = ("em", "f1", "answer_probability")


def main(data: str, folder: str, names: list[str], shared: list[str]) -> None:
    out = Path(folder)
    for name in names:
        if name not in VARIANTS:
            raise SystemExit(f"{name}: must be one of {', '.join(VARIANTS)}")
    chosen = list(dict.fromkeys([BASELINE, *(names or VARIANTS)]))
    failed = []
    for name in chosen:
        if not (out / name / "run.json").exists() and not run(data, out, name, shared):
            failed.append(name)
            if name == BASELINE:
                raise SystemExit(f"{name}: failed, and all others are held against it")
    print("\n".join(table(out, chosen)))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(data: str, out: Path, name: str, shared: list[str]) -> bool:
    """Run one, and say whether it ended well.

    Where windows are the same, index and ledger are the baseline's. What others trained and fitted is there, too, and
    is taken where it would become the same.
    """
    changed, arguments = VARIANTS[name]
    there = out / BASELINE
    if name != BASELINE and "--segment" not in arguments and not (out / name).exists():
        part = out / f".{name}"  # under its name it is whole
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(there / "index", part / "index")
        made = (file for kind in ("learnt", "fit") for file in out.glob(f"[!.]*/{kind}-*.safetensors"))
        for file in (there / "ledger.db", *made):
            shutil.copy2(file, part)
        part.rename(out / name)
    options = [part for key, value in (LEARNT | changed).items() for part in ("--set", f"prefix.{key}={value}")]
    options += [*arguments, *shared]
    command = [str(Path(sys.executable).with_name("byheart")), "bench", "nq", "--data", data, "--methods", "prefix"]
    print(f"{name}: {' '.join(options)}", file=sys.stderr)
    done = subprocess.run([*command, "--out", str(out / name), *options], stdout=subprocess.DEVNULL)
    return done.returncode == 0


def table(out: Path, names: list[str]) -> list[str]:
    """Each one's means with their intervals, and what it is above the baseline, with the interval of that."""
    rows = {name: metrics(out / name) for name in names if (out / name / "run.json").exists()}
    lines = ["| | exact match | against the baseline | F1 | p(answer) | ms a question |", "|---|---|---|---|---|---|"]
    for name, mine in rows.items():
        entry = json.loads((out / name / "run.json").read_text(encoding="utf-8"))["methods"]["prefix"]
        both = [key for key in mine if key in rows[BASELINE]]
        scores = [[some[key]["em"] for key in both] for some in (mine, rows[BASELINE])]
        difference, interval = paired_difference(*scores)
        first, *others = (ranged(entry["metrics"][metric], entry["intervals"][metric]) for metric in METRICS)
        cells = [first, "" if name == BASELINE else ranged(difference, interval, "+"), *others]
        lines.append(f"| {name} | {' | '.join(cells)} | {entry['query_ms']:.0f} |")
    return lines


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """By question what was measured of its answer."""
    with (folder / "answers.jsonl").open(encoding="utf-8") as lines:
        answered = [one for one in map(json.loads, lines) if one["method"] == "prefix" and one["skipped"] is None]
    return {one["question"]: one["metrics"] for one in answered}


def ranged(value: float, interval: Any, sign: str = "") -> str:
    return f"{value:{sign}.3f} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    data, out, *words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    main(data, out, words[:at], words[at + 1 :])
