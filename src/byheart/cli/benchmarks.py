"""`byheart bench`: published benchmarks, loaded, run and tabulated."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byheart.cli.comparing import run_comparison
from byheart.cli.options import (
    AsJson,
    BaseName,
    BleurtName,
    Chat,
    Device,
    DtypeName,
    EncoderName,
    Limit,
    MaxNew,
    MethodNames,
    Options,
    Out,
    Passages,
    RetrieverMode,
    Seed,
    Segment,
    Shots,
    WithBertScore,
    check_used,
    make_settings,
    parse_method_names,
    parse_method_options,
    parse_splits,
    print_grids,
)
from byheart.errors import DataError, UsageError

if TYPE_CHECKING:
    from byheart.methods import Settings


app = typer.Typer(help="Published benchmarks, loaded, run and tabulated.", no_args_is_help=True)


@app.command("nq")
def _bench_nq(
    data: Annotated[str, typer.Option("--data", help="Folder or file of NQ-open questions, or the Hub's nq_open.")],
    out: Out = Path("runs/nq"),
    corpus: Annotated[Path | None, typer.Option("--corpus", help="JSONL of passages, where --data holds none.")] = None,
    base: BaseName = "smollm2-135m",
    methods: MethodNames = "closed,context,gold,shuffled",
    encoder: EncoderName = "minilm",
    segment: Segment = "288/64",
    retriever: RetrieverMode = "hybrid",
    k: Passages = 1,
    shots: Shots = 5,
    chat: Chat = False,
    max_new_tokens: MaxNew = 24,
    split: Annotated[str, typer.Option("--split", help="validation, or train (for choosing settings).")] = "validation",
    limit: Limit = None,
    bertscore: WithBertScore = False,
    bleurt: BleurtName = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Natural Questions (NQ-open): questions with short answers over a corpus of Wikipedia passages."""
    from byheart.benchmarks.openqa import nq

    settings = make_settings(encoder, segment, retriever, k, shots, chat, max_new_tokens, seed, options)
    names = parse_method_names(methods, options)
    _bench(nq(data, corpus), base, names, out, settings, split, limit, (bertscore, bleurt), device, dtype, as_json)


@app.command("triviaqa")
def _bench_triviaqa(
    data: Annotated[str, typer.Option("--data", help="Folder or file of TriviaQA questions.")],
    corpus: Annotated[Path, typer.Option("--corpus", help="JSONL of passages to retrieve among.")],
    out: Out = Path("runs/triviaqa"),
    base: BaseName = "smollm2-135m",
    methods: MethodNames = "closed,context",
    encoder: EncoderName = "minilm",
    segment: Segment = "288/64",
    retriever: RetrieverMode = "hybrid",
    k: Passages = 1,
    shots: Shots = 5,
    chat: Chat = False,
    max_new_tokens: MaxNew = 24,
    split: Annotated[str, typer.Option("--split", help="validation, or train (for choosing settings).")] = "validation",
    limit: Limit = None,
    bertscore: WithBertScore = False,
    bleurt: BleurtName = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """TriviaQA: questions with aliases, over a corpus that you name."""
    from byheart.benchmarks.openqa import triviaqa

    settings = make_settings(encoder, segment, retriever, k, shots, chat, max_new_tokens, seed, options)
    names = parse_method_names(methods, options)
    _bench(
        triviaqa(data, corpus), base, names, out, settings, split, limit, (bertscore, bleurt), device, dtype, as_json
    )


Texts = Annotated[
    Path | None,
    typer.Option("--text", help="Ordinary text: its first half for the second moment, its end for perplexity."),
]
Sizes = Annotated[str, typer.Option("--edits", help="Numbers of edits for the scaling curve, with commas between.")]
Writing = Annotated[int, typer.Option("--texts", min=0, help="Texts to generate a record, for GE and RS.")]
Questions = Annotated[
    Path | None, typer.Option("--questions", help="JSONL of title, question, answers: edits from documents' questions.")
]
EditMethods = Annotated[str, typer.Option("--methods", help="edit, ft, ft-w, rome, mend, with commas between them.")]


@app.command("counterfact")
def _bench_counterfact(
    data: Annotated[Path, typer.Option("--data", help="Folder or file of CounterFact records (JSON lines).")],
    out: Out = Path("runs/counterfact"),
    base: BaseName = "smollm2-135m",
    methods: EditMethods = "edit",
    text: Texts = None,
    edits: Sizes = "",
    texts: Writing = 1,
    references: Annotated[
        Path | None, typer.Option("--references", help="JSONL of object and texts about it, for RS.")
    ] = None,
    same_subject: Annotated[
        int, typer.Option("--same-subject", min=0, help="Also edit batches of so many facts about one subject.")
    ] = 0,
    questions: Questions = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """CounterFact: edits of facts, scored on edit, paraphrase and neighbourhood prompts after all edits."""
    from byheart.benchmarks.editing import counterfact
    from byheart.benchmarks.editing import same_subject as batches

    records = counterfact(data, references)
    sets = [] if not same_subject else [("same subject", batches(records.cases, same_subject, 10, seed))]
    sets += _question_sets(questions)
    _edit_bench(
        "CounterFact",
        records,
        data,
        base,
        methods,
        out,
        text,
        edits,
        texts,
        sets,
        limit,
        seed,
        device,
        dtype,
        options,
        as_json,
    )


@app.command("zsre")
def _bench_zsre(
    data: Annotated[Path, typer.Option("--data", help="Folder or file of zsRE records (JSON lines).")],
    out: Out = Path("runs/zsre"),
    base: BaseName = "smollm2-135m",
    methods: EditMethods = "edit",
    text: Texts = None,
    edits: Sizes = "",
    questions: Questions = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """zsRE: edits of questions' answers, scored by token overlap after all edits."""
    from byheart.benchmarks.editing import zsre

    _edit_bench(
        "zsRE",
        zsre(data),
        data,
        base,
        methods,
        out,
        text,
        edits,
        0,
        _question_sets(questions),
        limit,
        seed,
        device,
        dtype,
        options,
        as_json,
    )


@app.command("fever")
def _bench_fever(
    data: Annotated[Path, typer.Option("--data", help="Folder of FEVER: official files, the Hub's copy, or by page.")],
    out: Out = Path("runs/fever"),
    base: Annotated[
        str,
        typer.Option("--base", help="Language models, with commas between: embedded alias, folder, Hub id, GGUF file."),
    ] = "smollm2-135m",
    shots: Annotated[str, typer.Option("--shots", help="Examples in the prompt: 0-5, or 0,5.")] = "0-5",
    memory: Annotated[
        str, typer.Option("--memory", help="none, doc, temp, doctemp, other, with commas between them.")
    ] = "none,doc,temp,doctemp,other",
    pages: Annotated[int, typer.Option("--pages", min=1, help="Pages with most claims to take.")] = 99,
    split: Annotated[
        str, typer.Option("--split", help="claim: each page's claims are split; page: the pages are.")
    ] = "claim",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, from --seed on.")] = 3,
    context: Annotated[
        bool, typer.Option("--context/--no-context", help="Also ask with the page's text in the prompt.")
    ] = True,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Ordinary text: its first half for memory.keep, its end for perplexity."),
    ] = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """FEVER: does a memory of pages, of claims, or of both help to tell true claims from false ones?"""
    from byheart.base import load_base, model_folder
    from byheart.benchmarks.fever import load_fever
    from byheart.benchmarks.fever_run import VARIANTS, Plan, run_fever
    from byheart.fever_report import grids, join_fever_runs, write_fever_report
    from byheart.methods.contract import Settings, parse_options
    from byheart.methods.memory.method import MemoryOptions
    from byheart.progress import Terminal

    variants = tuple(name.strip() for name in memory.split(",") if name.strip())
    for name in variants:
        if name not in VARIANTS:
            raise UsageError(f"--memory {memory}: must be some of {', '.join(VARIANTS)}")
    if not variants:
        raise UsageError("--memory: names nothing to measure")
    if split not in ("claim", "page"):
        raise UsageError(f"--split {split}: must be claim or page")
    _check_text(text)
    told = parse_method_options(options or [])
    for key in told:  # what is wrong with them is said before anything is loaded
        if key in ("memory.learn", "memory.study", "memory.wordings"):
            raise UsageError(f"--set {key}: --memory says what is learnt here")
    check_used(options, ["memory"])
    if "memory.text" in told and not parse_options(MemoryOptions, "memory", told).keep:
        raise UsageError(f"--set memory.text={told['memory.text']}: says nothing while memory.keep is 0")
    bases = list(dict.fromkeys(name.strip() for name in base.split(",") if name.strip()))
    if not bases:
        raise UsageError("--base: names no language model")
    parts = [(Path(name).resolve() if Path(name).is_dir() else Path(name)).name for name in bases]
    if len({*parts}) < len(parts):
        raise UsageError(f"--base {base}: two models of one name would write into one folder")
    numbers, seen = _shots(shots), range(seed, seed + seeds)
    fever = load_fever(data, top=pages, how=split, seed=seed, limit=limit)  # type: ignore[arg-type]
    show = Terminal()
    for name in bases if len(bases) > 1 else ():  # a misspelt one is told before hours with the first
        if not name.endswith(".gguf"):
            model_folder(name, show.say)
    origin = {"data": str(data), "split": split, "limit": limit}
    runs = []
    for name, part in zip(bases, parts, strict=True):
        folder = out / part if len(bases) > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        model = load_base(name, device=device, dtype=dtype)
        rows, rest = _ordinary_rows(model, text, seed)
        given = _given_text(rest, folder, ["memory"])
        settings = Settings(shots=0, seed=seed, options=parse_method_options([*given, *(options or [])]))
        plan = Plan(numbers, variants, tuple(seen), context, rows)  # type: ignore[arg-type]
        runs.append(run_fever(fever, model, folder, settings, plan, origin=origin, progress=show))
        if len(bases) > 1:
            show.say(f"report: {write_fever_report(folder)}")
            join_fever_runs(out, parts[: len(runs)], runs)
    if as_json:
        print(json.dumps(runs if len(runs) > 1 else runs[0], ensure_ascii=False, indent=2))
    else:
        print_grids(grids(*runs))
    show.say(f"report: {write_fever_report(out)}")


def _shots(text: str) -> tuple[int, ...]:
    span = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    found = range(int(span[1]), int(span[2]) + 1) if span else [part.strip() for part in text.split(",")]
    if not found or not all(str(one).isdecimal() for one in found):
        raise UsageError(f"--shots {text}: must be FIRST-LAST, or numbers with commas between")
    return tuple(map(int, found))


def _bench(
    benchmark: Any, base: str, names: list[str], out: Path, settings: Settings, split: str, limit: int | None,
    judged: tuple[bool, str | None], device: str | None, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    from byheart.benchmarks import load_benchmark
    from byheart.progress import Terminal

    splits = parse_splits(split)
    ledger, origin = load_benchmark(benchmark, out / "ledger.db", Terminal().say)
    with ledger:
        run_comparison(ledger, base, names, out, settings, splits, limit, judged, device, dtype, as_json, origin)


def _edit_bench(
    title: str, records: Any, data: Path, base: str, methods: str, out: Path, text: Path | None, edits: str,
    texts: int, sets: list[Any], limit: int | None, seed: int, device: str | None, dtype: str | None,
    options: list[str] | None, as_json: bool,
) -> None:  # fmt: skip
    from byheart.base import load_base
    from byheart.benchmarks.edit_run import Plan, run_editing
    from byheart.edit_report import grids, write_edit_report
    from byheart.methods import BASELINES
    from byheart.progress import Terminal
    from byheart.rows import drawn

    names = parse_method_names(methods, options)
    for name in names:
        if name not in ("edit", *BASELINES):
            raise UsageError(f"--methods {name}: edits nothing; the unedited model is always scored beside the others")
    show = Terminal()
    _say_left_out(show, records)
    _check_text(text)
    cases = drawn(records.cases, limit, seed)
    sizes = _sizes(edits)
    model = load_base(base, device=device, dtype=dtype, say=show.say)
    rows, rest = _ordinary_rows(model, text, seed)
    plan, given = Plan(sizes, tuple(sets), texts, rows), _given_text(rest, out, ["edit", "rome"])
    settings = make_settings("minilm", "288/64", "hybrid", 1, 0, False, 24, seed, [*given, *(options or [])])
    origin = {
        "data": str(data),
        "text": None if text is None else str(text),
        "limit": limit,
        "left_out": records.left_out,
    }
    run = run_editing(title, model, cases, names, out, settings, plan, origin=origin, progress=show)
    if as_json:
        print(json.dumps(run, ensure_ascii=False, indent=2))
    else:
        print_grids(grids(run))
    show.say(f"report: {write_edit_report(out)}")


def _question_sets(path: Path | None) -> list[Any]:
    """Edits from documents' questions as a set of their own; none where no file is given."""
    from byheart.benchmarks.editing import question_cases
    from byheart.progress import Terminal

    if path is None:
        return []
    records = question_cases(path)
    _say_left_out(Terminal(), records)
    return [("questions", [records.cases])]


def _say_left_out(show: Any, records: Any) -> None:
    from byheart.formats import MAX_LISTED

    for place, why in list(records.left_out.items())[:MAX_LISTED]:
        show.say(f"{place} left out: {why}")
    if len(records.left_out) > MAX_LISTED:
        show.say(f"{len(records.left_out)} records left out in all")


def _given_text(rest: str | None, out: Path, methods: Sequence[str]) -> list[str]:
    """Options that give methods their ordinary text: never the part that is measured on."""
    from byheart.storage import write_text

    if rest is None:
        return []
    write_text(out / "text.txt", rest)
    return [f"{name}.text={out / 'text.txt'}" for name in methods]


def _check_text(text: Path | None) -> None:
    if text is not None and not text.is_file():
        raise DataError(f"--text {text}: no such file")


def _ordinary_rows(model: Any, text: Path | None, seed: int) -> tuple[tuple[tuple[int, ...], ...], str | None]:
    """Token rows to measure perplexity on, and the half of the text that they are not from."""
    from byheart.ordinary import ROW, SLICE, ordinary_text, text_rows
    from byheart.perplexity import TOKENS

    if text is None:
        return tuple(map(tuple, text_rows(model, None, TOKENS, seed + 1_000_003))), None
    (whole,) = ordinary_text(str(text), "edit") or [""]
    ids = model.tokenizer(whole[len(whole) // 2 :][-SLICE:])["input_ids"][-TOKENS:]
    if len(ids) < 2:  # a token to begin with is none that is predicted
        raise DataError(f"--text {text}: holds too little text to measure perplexity on")
    rows = tuple(tuple(ids[start : start + 2 * ROW]) for start in range(0, len(ids), 2 * ROW))
    return rows, whole[: len(whole) // 2]


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--edits {text}: must be whole numbers with commas between")
    return tuple(map(int, parts))
