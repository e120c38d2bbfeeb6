"""What each part of `prefix` or `memory` is worth: one change at a time, against one baseline, question by question.

python benchmarks/ablation.py METHOD DATA OUT [NAME ...] [-- ARGUMENT ...]

For `prefix` DATA is as `byheart bench nq` takes it, for `memory` a ledger; NAMEs as below, default all; ARGUMENTs that
every run takes beside, such as `--limit 200`. Each is a run of its own under OUT, which goes on after a kill; done ones
are only tabulated. Where some differ by a number alone (`wordings-1`, `wordings-2`), that is drawn, too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byheart.score import paired_difference

BASELINE = "baseline"


@dataclass(frozen=True)
class Study:
    """The command of a method's runs, the baseline's options, and what is changed: options, and arguments beside."""

    command: tuple[str, ...]
    options: dict[str, Any]
    variants: dict[str, tuple[dict[str, Any], list[str]]]


PREFIX: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing-learnt": ({"slots": 0, "epochs": 4}, []),
    **{f"slots-{n}": ({"slots": n}, []) for n in (1, 4, 10, 16)},
    **{f"selected-{n}": ({"encoder": "selected", "columns": n}, []) for n in (1, 4, 10, 16, 32)},
    **{f"compressed-{n}": ({"encoder": "compressed", "columns": n}, []) for n in (1, 4, 10, 16, 32)},
    "tokens": ({"encoder": "tokens"}, []),
    **{f"tokens-rank-{n}": ({"encoder": "tokens", "rank": n}, []) for n in (0, 16, 256)},
    "text": ({"encoder": "text"}, []),
    **{f"width-{n}": ({"encoder": "text", "width": n}, []) for n in (64, 1024)},
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
MEMORY: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{f"wordings-{n}": ({"wordings": n}, []) for n in (1, 2, 3)},
    # As many steps as with all four.
    "wordings-1-longer": ({"wordings": 1, "epochs": 20}, []),
    **{what: ({"learn": what}, []) for what in ("doc", "temp")},
    **{place: ({"place": place}, []) for place in ("mlp", "parallel", "lora")},
    **{f"width-{n}": ({"width": n}, []) for n in (32, 512)},
    "study": ({"study": 1}, []),
}
STUDIES = {
    "prefix": Study(("bench", "nq", "--data"), {"slots": 32, "epochs": 2}, PREFIX),
    "memory": Study(("compare",), {"epochs": 8, "packings": 1, "lr": 0.002, "wordings": 4, "width": 128}, MEMORY),
}
METRICS = ("em", "f1", "answer_probability")


def main(method: str, data: str, folder: str, names: list[str], shared: list[str]) -> None:
    if method not in STUDIES:
        raise SystemExit(f"{method}: must be one of {', '.join(STUDIES)}")
    study, out = STUDIES[method], Path(folder)
    for name in names:
        if name not in study.variants and name != BASELINE:
            raise SystemExit(f"{name}: must be one of {', '.join(study.variants)}")
    chosen = list(dict.fromkeys([BASELINE, *(names or study.variants)]))
    failed = []
    for name in chosen:
        if not (out / name / "run.json").exists() and not run(method, data, out, name, shared):
            failed.append(name)
            if name == BASELINE:
                raise SystemExit(f"{name}: failed, and all others are held against it")
    done = [name for name in chosen if (out / name / "run.json").exists()]
    print("\n".join(table(method, out, done)))
    for path in drawn(method, out, done):
        print(path)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(method: str, data: str, out: Path, name: str, shared: list[str]) -> bool:
    """Run one, and say whether it ended well.

    Where windows are the same, index and ledger are the baseline's. What others trained and fitted is there, too, and
    is taken where it would become the same.
    """
    study = STUDIES[method]
    changed, arguments = study.variants.get(name, ({}, []))
    there = out / BASELINE
    if name != BASELINE and "--segment" not in arguments and (there / "index").exists() and not (out / name).exists():
        part = out / f".{name}"  # under its name it is whole
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(there / "index", part / "index")
        made = (file for kind in ("learnt", "fit") for file in out.glob(f"[!.]*/{kind}-*.safetensors"))
        for file in (there / "ledger.db", *made):
            shutil.copy2(file, part)
        part.rename(out / name)
    options = [
        part for key, value in (study.options | changed).items() for part in ("--set", f"{method}.{key}={value}")
    ]
    options += [*arguments, *shared]
    command = [str(Path(sys.executable).with_name("byheart")), *study.command, data, "--methods", method]
    print(f"{name}: {' '.join(options)}", file=sys.stderr)
    done = subprocess.run([*command, "--out", str(out / name), *options], stdout=subprocess.DEVNULL)
    return done.returncode == 0


def table(method: str, out: Path, names: list[str]) -> list[str]:
    """Each one's means with their intervals, and what it is above the baseline, with the interval of that."""
    entries = {name: entry_of(method, out / name) for name in names}
    kinds = list(entries[BASELINE]["by_kind"])
    head = ["", "exact match", "against the baseline", *kinds, "F1", "p(answer)", "s to learn", "ms a question"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = {name: metrics(method, out / name) for name in names}
    for name, mine in rows.items():
        entry = entries[name]
        both = [key for key in mine if key in rows[BASELINE]]
        scores = [[some[key]["em"] for key in both] for some in (mine, rows[BASELINE])]
        difference, interval = paired_difference(*scores)
        first, *others = (ranged(entry["metrics"][metric], entry["intervals"][metric]) for metric in METRICS)
        cells = [name, first, "" if name == BASELINE else ranged(difference, interval, "+")]
        cells += [f"{entry['by_kind'][kind]['metrics']['em']:.3f}" for kind in kinds]
        cells += [*others, f"{entry['write_seconds']:,.0f}", f"{entry['query_ms']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def drawn(method: str, out: Path, names: list[str]) -> list[Path]:
    """A picture for each option of which several numbers were run: exact match against the number."""
    import altair as alt
    import vl_convert

    families: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        if found := re.fullmatch(r"(.+)-(\d+)", name):
            families[found[1]][int(found[2])] = name
    for option, number in STUDIES[method].options.items():
        if option in families:
            families[option][number] = BASELINE
    paths = []
    for family, members in families.items():
        if len(members) < 2:
            continue
        values = []
        for number, name in members.items():
            entry = entry_of(method, out / name)
            for kind, part in ({"all": entry} | entry["by_kind"]).items():
                low, high = part["intervals"]["em"]
                value = {"number": number, "em": part["metrics"]["em"], "low": low, "high": high}
                values.append(value | {"questions": kind})
        chart = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X("number:Q", axis=alt.Axis(title=family, values=sorted(members))),
            color=alt.Color("questions:N"),
        )
        line = chart.mark_line(point=True).encode(y=alt.Y("em:Q", axis=alt.Axis(title="exact match, 95 % interval")))
        spread = chart.mark_rule(opacity=0.4).encode(y="low:Q", y2="high:Q")
        path = out / f"{family}.png"
        picture = alt.layer(line, spread).properties(width=420, height=280)
        path.write_bytes(vl_convert.vegalite_to_png(picture.to_dict(), scale=2))
        paths.append(path)
    return paths


def entry_of(method: str, folder: Path) -> dict[str, Any]:
    """What a run says of the method."""
    entry: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["methods"][method]
    return entry


def metrics(method: str, folder: Path) -> dict[str, dict[str, float]]:
    """By question what was measured of its answer."""
    with (folder / "answers.jsonl").open(encoding="utf-8") as lines:
        answered = [one for one in map(json.loads, lines) if one["method"] == method and one["skipped"] is None]
    return {one["question"]: one["metrics"] for one in answered}


def ranged(value: float, interval: Any, sign: str = "") -> str:
    return f"{value:{sign}.3f} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    method, data, out, *words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    main(method, data, out, words[:at], words[at + 1 :])
