"""The command line: parses, calls the library, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from byheart import __version__
from byheart.errors import ByheartError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from byheart.methods import Method, Settings
    from byheart.rows import Kind

app = typer.Typer(
    help="Give a language model knowledge that it does not have, and measure which way works.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help: rich would double the time that --help takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
ledger_app = typer.Typer(help="Documents, facts and questions, and every change of them.", no_args_is_help=True)
index_app = typer.Typer(help="A searchable index of a ledger's documents.", no_args_is_help=True)
bench_app = typer.Typer(help="Published benchmarks, loaded, run and tabulated.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
app.add_typer(index_app, name="index")
app.add_typer(bench_app, name="bench")

LedgerFile = Annotated[Path, typer.Argument(metavar="LEDGER", help="The ledger file.", show_default=False)]
BaseName = Annotated[str, typer.Option("--base", help="Language model: embedded alias, folder, Hub id or GGUF file.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.", show_default=False)]
MethodNames = Annotated[str, typer.Option("--methods", help='Names with commas between them, or "all".')]
EncoderName = Annotated[str, typer.Option("--encoder", help="Text encoder: embedded alias, folder or Hub id.")]
Segment = Annotated[str, typer.Option("--segment", help="SIZE/STEP of the token windows: 288/64, 512/512 or any.")]
RetrieverMode = Annotated[str, typer.Option("--retriever", help="dense, bm25 or hybrid.")]
Passages = Annotated[int, typer.Option("--k", min=1, help="Retrieved passages a question.")]
Shots = Annotated[int, typer.Option("--shots", min=0, help="Examples in the prompt, from the training questions.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="What everything random is drawn from.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Ask only so many questions, drawn by the seed.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; by default CUDA where it is.")]
DtypeName = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default what is fast.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="METHOD.NAME=VALUE", help="An option of one method, such as edit.layers=3-7."),
]
Source = Annotated[str | None, typer.Option("--source", help="Who says so; kept with every change.")]


def main() -> None:
    """Run the command line; an error of ours is one sentence on stderr and its exit code."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app(args=[a for a in arguments if a != "--debug"], prog_name="byheart")
    except ByheartError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            print("interrupted; run the same command again to go on", file=sys.stderr)
        raise
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(3)
    except Exception as error:
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("compare")
def _compare(
    ledger: LedgerFile,
    out: Out,
    base: BaseName = "smollm2-135m",
    methods: MethodNames = "all",
    encoder: EncoderName = "minilm",
    segment: Segment = "288/64",
    retriever: RetrieverMode = "hybrid",
    k: Passages = 1,
    shots: Shots = 5,
    chat: Chat = False,
    max_new_tokens: MaxNew = 24,
    split: Annotated[str, typer.Option("--split", help="Which questions to ask.")] = "validation,test",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Ask every method the ledger's questions, and write run.json, answers.jsonl and report.html."""
    from byheart.ledger import Ledger

    settings = _settings(encoder, segment, retriever, k, shots, chat, max_new_tokens, seed, options)
    names, splits = _method_names(methods), _splits(split)
    with Ledger(ledger) as opened:
        _run(opened, base, names, out, settings, splits, limit, device, dtype, as_json, {})


@bench_app.command("nq")
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
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Natural Questions (NQ-open): questions with short answers over a corpus of Wikipedia passages."""
    from byheart.benchmarks.openqa import nq

    settings = _settings(encoder, segment, retriever, k, shots, chat, max_new_tokens, seed, options)
    names = _method_names(methods)
    _bench(nq(data, corpus), base, names, out, settings, split, limit, device, dtype, as_json)


@bench_app.command("triviaqa")
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
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """TriviaQA: questions with aliases, over a corpus that you name."""
    from byheart.benchmarks.openqa import triviaqa

    settings = _settings(encoder, segment, retriever, k, shots, chat, max_new_tokens, seed, options)
    names = _method_names(methods)
    _bench(triviaqa(data, corpus), base, names, out, settings, split, limit, device, dtype, as_json)


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


@bench_app.command("counterfact")
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
    from byheart.benchmarks.editing import counterfact, question_cases
    from byheart.benchmarks.editing import same_subject as batches

    cases = counterfact(data, references)
    sets = [] if not same_subject else [("same subject", batches(cases, same_subject, 10, seed))]
    sets += [] if questions is None else [("questions", [question_cases(questions)])]
    _edit_bench(
        "CounterFact",
        cases,
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


@bench_app.command("zsre")
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
    from byheart.benchmarks.editing import question_cases, zsre

    sets = [] if questions is None else [("questions", [question_cases(questions)])]
    _edit_bench(
        "zsRE", zsre(data), data, base, methods, out, text, edits, 0, sets, limit, seed, device, dtype, options, as_json
    )


@bench_app.command("fever")
def _bench_fever(
    data: Annotated[Path, typer.Option("--data", help="Folder of FEVER: official files, the Hub's copy, or by page.")],
    out: Out = Path("runs/fever"),
    base: BaseName = "smollm2-135m",
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
    text: Annotated[Path | None, typer.Option("--text", help="Ordinary text: its end for perplexity.")] = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """FEVER: does a memory of pages, of claims, or of both help to tell true claims from false ones?"""
    from byheart.base import load_base
    from byheart.benchmarks.fever import load_fever
    from byheart.benchmarks.fever_run import VARIANTS, Plan, run_fever, tables
    from byheart.methods.contract import Settings
    from byheart.progress import Terminal

    variants = tuple(name.strip() for name in memory.split(",") if name.strip())
    for name in variants:
        if name not in VARIANTS:
            raise UsageError(f"--memory {memory}: must be some of {', '.join(VARIANTS)}")
    if not variants:
        raise UsageError("--memory: names nothing to measure")
    if split not in ("claim", "page"):
        raise UsageError(f"--split {split}: must be claim or page")
    settings = Settings(shots=0, seed=seed, options=_method_options(options or []))
    fever = load_fever(data, top=pages, how=split, seed=seed, limit=limit)  # type: ignore[arg-type]
    model = load_base(base, device=device, dtype=dtype)
    out.mkdir(parents=True, exist_ok=True)
    rows, _ = _ordinary_rows(model, text, seed)
    plan = Plan(_shots(shots), variants, tuple(range(seed, seed + seeds)), context, rows)  # type: ignore[arg-type]
    origin = {"data": str(data), "split": split, "limit": limit}
    run = run_fever(fever, model, out, settings, plan, origin=origin, progress=Terminal())
    if as_json:
        print(json.dumps(run))
        return
    tables(run, print)
    print(f"written: {out / 'run.json'}")


def _shots(text: str) -> tuple[int, ...]:
    span = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    found = range(int(span[1]), int(span[2]) + 1) if span else [part.strip() for part in text.split(",")]
    if not found or not all(str(one).isdigit() for one in found):
        raise UsageError(f"--shots {text}: must be FIRST-LAST, or numbers with commas between")
    return tuple(map(int, found))


@app.command("report")
def _report(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Write report.html of a run again, from its run.json and answers.jsonl."""
    from byheart.edit_report import write_edit_report
    from byheart.report import write_report
    from byheart.storage import read_card

    editing = "benchmark" in read_card(run / "run.json", "methods")
    print(write_edit_report(run) if editing else write_report(run))


@app.command("learn")
def _learn(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="closed, context ...: `byheart learn x` lists them.")],
    ledger: LedgerFile,
    out: Out,
    base: BaseName = "smollm2-135m",
    encoder: EncoderName = "minilm",
    segment: Segment = "288/64",
    retriever: RetrieverMode = "hybrid",
    k: Passages = 1,
    shots: Shots = 5,
    chat: Chat = False,
    max_new_tokens: MaxNew = 24,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    options: Options = None,
    gate: Annotated[bool, typer.Option("--gate", help="Take an edit back that moves too much else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a ledger with one method, and write what was learnt to a folder that `byheart ask` reads."""
    from byheart.base import load_base
    from byheart.ledger import Ledger
    from byheart.methods import method_class
    from byheart.progress import Terminal
    from byheart.storage import check_replaceable

    cls = method_class(method)
    if gate:
        if method != "edit":
            raise UsageError("--gate: only edit has a gate")
        options = [*(options or []), "edit.gate=rollback"]
    settings = _settings(encoder, segment, retriever, k, shots, chat, max_new_tokens, seed, options)
    check_replaceable(out, "byheart.json")
    show = Terminal()
    with Ledger(ledger) as opened:
        learner = cls(
            load_base(base, device=device, dtype=dtype, say=show.say), settings, out.parent / f".{out.name}.work"
        )
        with show.bar(f"{method}: {learner.learns}s", opened.count(learner.learns)) as tick:
            report = learner.learn(opened, tick)
        learner.save_pretrained(out)
    _remove(out.parent / f".{out.name}.work")
    _show_report(report, out, as_json, f"{method}: learnt", skipped=getattr(learner, "skipped", {}))


@app.command("ask")
def _ask(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="What `byheart learn` wrote; several go side by side.")
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")],
    base: BaseName = "smollm2-135m",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Ask one question of what was learnt, and show the answer with its evidence."""
    from dataclasses import asdict

    from byheart.rows import Question

    if not question.strip():
        raise UsageError("QUESTION: is empty")
    rows = []
    for folder, method in zip(folders, _loaded(folders, base, device, dtype), strict=True):
        with method.attached():
            (answer,) = method.answer([Question(id="asked", question=question)])
        rows.append({"folder": str(folder), "method": method.name} | asdict(answer))
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for row in rows:
        print(f"{row['method']}: {row['text'] or row['skipped'] or '(no answer)'}")
        for passage in row["evidence"]:
            print(f"    {passage['title'] or passage['document']} ({passage['document']}, "
                  f"{passage['start']}-{passage['end']}): {' '.join(passage['text'].split())[:300]}")  # fmt: skip


@app.command("trace")
def _trace(
    out: Out = Path("runs/trace"),
    facts: Annotated[
        Path | None,
        typer.Option(
            "--facts", help="JSONL of subject, prompt or template, and object or attribute; else common facts."
        ),
    ] = None,
    base: BaseName = "smollm2-135m",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Draws of the noise a fact.")] = 3,
    window: Annotated[
        int, typer.Option("--window", min=1, help="Blocks over which MLPs or attention are restored.")
    ] = 5,
    limit: Limit = 40,
    seed: Seed = 0,
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Find the layers that facts are recalled from, by causal tracing; `learn edit` then edits those."""
    from byheart.base import load_base
    from byheart.edit_report import write_trace_report
    from byheart.methods.edit.tracing import trace_base
    from byheart.progress import Terminal
    from byheart.storage import write_json

    show = Terminal()
    model = load_base(base, device=device, dtype=dtype, say=show.say)
    record = trace_base(model, facts, limit or 40, samples, window, seed, show)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "trace.json", record)
    page = write_trace_report(out, record) if record["facts"] else None
    first, last = record["range"]
    _emit(record, as_json, f"layers {first}-{last} ({record['how']})")
    if page:
        show.say(f"heat map: {out / 'trace.png'}\nreport: {page}")


Learnt = Annotated[Path, typer.Argument(metavar="DIR", help="What `byheart learn` wrote.", show_default=False)]


@app.command("undo")
def _undo(
    folder: Learnt,
    facts: Annotated[list[str], typer.Argument(metavar="FACT_ID...", help="The facts to take out again.")],
    base: BaseName = "smollm2-135m",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Take facts out of an edit, as if they had never been learnt; nothing is optimised anew."""
    from byheart.methods.edit.method import Edit

    (method,) = _loaded([folder], base, device, dtype)
    if not isinstance(method, Edit):
        raise UsageError(f"{folder}: holds {method.name}, and only an edit's facts can be undone one by one")
    report = method.undo(facts)
    method.save_pretrained(folder)
    _show_report(report, folder, as_json, f"undone {', '.join(facts)}; left:", skipped={})


@app.command("export")
def _export(
    folder: Learnt,
    to: Annotated[str, typer.Option("--to", help="peft (a LoRA adapter) or merged (a whole model).")],
    out: Out,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="peft: the highest rank; what it cuts is reported.")
    ] = None,
    base: BaseName = "smollm2-135m",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Write a change of weights in a form that other programs load."""
    from byheart.methods.edit.export import export_merged, export_peft
    from byheart.methods.edit.weights import ChangedWeights

    if to not in ("peft", "merged"):
        raise UsageError(f"--to {to}: must be peft or merged")
    if rank is not None and to != "peft":
        raise UsageError("--rank: only for --to peft")
    (method,) = _loaded([folder], base, device, dtype)
    if not isinstance(method, ChangedWeights):
        raise UsageError(f"{folder}: {method.name} changes no weights, so there is nothing to export")
    record = export_peft(method, out, rank) if to == "peft" else export_merged(method, out)
    cut = max(record.get("error", {}).values(), default=0.0)
    said = (
        f", rank {record['rank']}" + (f", {cut:.1%} of the change cut at most" if cut else "") if to == "peft" else ""
    )
    _emit(record, as_json, f"{out}: written{said}")


def _loaded(folders: list[Path], base: str, device: str | None, dtype: str | None) -> Iterator[Method]:
    """What was learnt into each folder, one after the other, on one base."""
    from byheart.base import load_base
    from byheart.methods import method_class
    from byheart.progress import Terminal
    from byheart.storage import read_card

    cards = [read_card(folder / "byheart.json", "method") for folder in folders]
    model = load_base(base, device=device, dtype=dtype, say=Terminal().say)
    for folder, card in zip(folders, cards, strict=True):
        yield method_class(card["method"]).from_pretrained(folder, model)


def _show_report(report: Any, out: Path, as_json: bool, sentence: str, skipped: dict[str, str]) -> None:
    from dataclasses import asdict

    for id, why in skipped.items():
        print(f"skipped {id}: {why}", file=sys.stderr)
    for note in report.notes:
        print(note, file=sys.stderr)
    what = f"{report.facts} facts" if report.facts or not report.documents else f"{report.documents} documents"
    record = asdict(report) | {"skipped_rows": skipped, "out": str(out)}
    _emit(record, as_json, f"{sentence} {what} in {report.seconds:.1f} s: {out}")


@app.command("models")
def _models(as_json: AsJson = False) -> None:
    """List the embedded models, and whether they are there."""
    from byheart.embedded import EMBEDDED, folder_of, is_ready

    rows: list[dict[str, Any]] = [
        {
            "alias": m.alias,
            "role": m.role,
            "download_mb": m.megabytes,
            "licence": m.licence,
            "there": is_ready(m.alias),
            "folder": str(folder_of(m.alias)),
            "facts": m.facts,
        }
        for m in EMBEDDED.values()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = row["folder"] if row["there"] else f"not here yet ({row['download_mb']} MB to fetch)"
        print(f"{row['alias']:14} {row['role']:15} {row['licence']:11} {state}\n{'':14} {row['facts']}")


@app.command("doctor")
def _doctor(
    base: BaseName = "smollm2-135m",
    encoder: EncoderName = "minilm",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Load a model and an encoder, check that byheart can work on them, and show what was found."""
    from byheart.base import load_base
    from byheart.compare import machine
    from byheart.encoder import load_encoder
    from byheart.progress import Terminal
    from byheart.storage import home

    show = Terminal()
    record: dict[str, Any] = {"byheart": __version__, "home": str(home()), "machine": machine()}
    model = load_base(base, device=device, dtype=dtype, say=show.say)
    record["base"] = {
        "name": model.name,
        "type": model.model.config.model_type,
        "kind": model.kind,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "blocks": len(model.parts.blocks),
        "width": model.parts.d_model,
        "mlp_width": model.parts.d_ff,
        "hash": model.hash,
        "parts": model.parts.names(model.model),
        "self_check": "ok: the found parts give the model's own logits",
    }
    record["encoder"] = load_encoder(encoder, device=device, dtype=dtype, say=show.say).card.to_dict()
    print(json.dumps(record, indent=2) if as_json else _indented(record))


# -- ledger --------------------------------------------------------------------------------------------------


@ledger_app.command("add")
def _ledger_add(
    ledger: LedgerFile,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".jsonl, .jsonl.gz, .txt or .md files.")],
    source: Source = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines out instead of importing nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring files into a ledger (made if it is not there): all rows, or none where a line is bad."""
    _import(ledger, files, "insert", source, skip_bad, as_json)


@ledger_app.command("revise")
def _ledger_revise(
    ledger: LedgerFile,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="JSONL of whole rows with the ids to replace.")
    ],
    source: Source = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines out instead of changing nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Replace rows by id; lines may say "action": "retract" or "insert" themselves."""
    _import(ledger, files, "revise", source, skip_bad, as_json)


@ledger_app.command("retract")
def _ledger_retract(
    ledger: LedgerFile,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of documents, facts or questions.")],
    source: Source = None,
) -> None:
    """Withdraw rows: all of them, or none where an id is unknown. Their history stays."""
    from byheart.errors import DataError
    from byheart.ledger import Ledger
    from byheart.rows import Entry

    done = []
    with Ledger(ledger) as opened, opened.transaction():
        for id in ids:
            kinds = opened.kinds_of(id)
            if not kinds:
                raise DataError(f'{ledger}: no row "{id}"; nothing was retracted')
            for kind in kinds:
                done.append(f"{kind} {id}: {opened.apply(Entry('retract', kind, id, None), source=source)}")
    print("\n".join(done))


@ledger_app.command("show")
def _ledger_show(
    ledger: LedgerFile,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="A row; without it, the ledger as a whole.")] = None,
) -> None:
    """Show a row, or what the ledger holds, as JSON."""
    from byheart.errors import DataError
    from byheart.ledger import Ledger

    with Ledger(ledger) as opened:
        if id is None:
            kinds: tuple[Kind, ...] = ("document", "fact", "question")
            record: dict[str, Any] = {f"{kind}s": opened.count(kind) for kind in kinds}
            print(json.dumps({"ledger": str(ledger), "revision": opened.revision} | record, indent=2))
            return
        found = [(kind, opened.get(kind, id)) for kind in opened.kinds_of(id)]
        if not found:
            raise DataError(f'{ledger}: no row "{id}"')
        for kind, row in found:
            body = {"retracted": True} if row is None else row.model_dump(mode="json", exclude_defaults=True)
            print(json.dumps({"type": kind, "id": id} | body, ensure_ascii=False, indent=2))


@ledger_app.command("check")
def _ledger_check(ledger: LedgerFile, as_json: AsJson = False) -> None:
    """Find contradictions, ids that lead nowhere and unanswerable rows; exit code 3 where there are some."""
    from dataclasses import asdict

    from byheart.check import check
    from byheart.ledger import Ledger

    count = 0
    with Ledger(ledger) as opened:
        for finding in check(opened):
            count += 1
            print(json.dumps(asdict(finding), ensure_ascii=False) if as_json else finding)
    print(f"{count} finding{'s' if count != 1 else ''}" if count else "nothing wrong", file=sys.stderr)
    if count:
        raise typer.Exit(3)


@ledger_app.command("history")
def _ledger_history(
    ledger: LedgerFile,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="A row; without it, all of them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the changes of a row, or of all rows, oldest first."""
    from byheart.ledger import Ledger

    with Ledger(ledger) as opened:
        for change in opened.history(id):
            before, after = (
                None if row is None else row.model_dump(mode="json") for row in (change.before, change.after)
            )
            moved = sorted(k for k in after if before[k] != after[k]) if before and after else []
            if as_json:
                record = {k: getattr(change, k) for k in ("revision", "time", "action", "kind", "id", "source")}
                print(json.dumps(record | {"before": before, "after": after}, ensure_ascii=False))
                continue
            what = "".join(f"\n    {k}: {_short(before[k])} -> {_short(after[k])}" for k in moved if before and after)
            source = f" ({change.source})" if change.source else ""
            print(f"{change.revision:>7} {change.time} {change.action} {change.kind} {change.id}{source}{what}")


def _import(ledger: Path, files: list[Path], action: Any, source: str | None, skip_bad: bool, as_json: bool) -> None:
    from byheart.errors import DataError
    from byheart.formats import describe_bad, import_files
    from byheart.ledger import Ledger

    for file in files:
        if not file.exists():
            raise DataError(f"{file}: no such file")
    with Ledger(ledger, create=action == "insert") as opened:
        report = import_files(opened, files, action=action, source=source, skip_bad=skip_bad)
    if report.bad:
        print(describe_bad(report), file=sys.stderr)
    done = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.outcomes.items())) or "nothing to do"
    _emit(dict(report.outcomes) | {"bad": report.bad}, as_json, f"{ledger}: {done}")


# -- index ---------------------------------------------------------------------------------------------------

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="The index folder.", show_default=False)]


@index_app.command("build")
def _index_build(
    ledger: LedgerFile,
    out: Out,
    encoder: EncoderName = "minilm",
    segment: Segment = "288/64",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Index a ledger's documents; goes on after a kill, and brings an older index up to date."""
    from byheart.encoder import load_encoder
    from byheart.ledger import Ledger
    from byheart.progress import Terminal
    from byheart.retrieve import index_ledger

    show = Terminal()
    loaded = load_encoder(encoder, device=device, dtype=dtype, say=show.say)
    with Ledger(ledger) as opened, show.bar("documents", opened.count("document")) as tick:
        index = index_ledger(opened, out, loaded, segment, on_done=tick)
    _emit(_index_record(index), as_json, f"{out}: {len(index)} passages of {index.documents} documents")


@index_app.command("add")
def _index_add(
    ledger: LedgerFile, out: Out, device: Device = None, dtype: DtypeName = None, as_json: AsJson = False
) -> None:
    """Bring an index up to date with its ledger: what was inserted, revised or retracted since."""
    from byheart.index import Index

    index = Index.open(out)
    _index_build(ledger, out, index.card.name, index.segment, device, dtype, as_json)


@index_app.command("remove")
def _index_remove(
    index: IndexFolder, ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Documents.")]
) -> None:
    """Take documents out of an index."""
    from byheart.errors import DataError
    from byheart.index import Index

    opened = Index.open(index)
    there = {passage.document for _, passage in opened.all_passages()}
    for id in ids:
        if id not in there:
            raise DataError(f'{index}: holds no document "{id}"')
    opened.change(remove=ids)
    print(f"{index}: {len(ids)} removed, {len(opened)} passages left")


@index_app.command("search")
def _index_search(
    index: IndexFolder,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for.")],
    k: Passages = 5,
    retriever: RetrieverMode = "hybrid",
    device: Device = None,
    dtype: DtypeName = None,
    as_json: AsJson = False,
) -> None:
    """Find passages for a question."""
    from dataclasses import asdict

    from byheart.encoder import load_encoder
    from byheart.index import Index
    from byheart.retrieve import Retriever

    mode = _mode(retriever)
    found = Index.open(index)
    loaded = load_encoder(found.card.name, device=device, dtype=dtype)
    (hits,) = Retriever(Index(index, loaded.card, found.segment), loaded, mode).retrieve([question], k)
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False, indent=2))
        return
    for rank, hit in enumerate(hits, 1):
        print(f"{rank:>2}. {hit.score:.3f} {hit.title or hit.document} ({hit.document}, {hit.start}-{hit.end})")
        print(f"    {' '.join(hit.text.split())[:300]}")


@index_app.command("stats")
def _index_stats(index: IndexFolder) -> None:
    """Show what an index holds and what it was made with, as JSON."""
    from byheart.index import Index

    opened = Index.open(index)
    record = _index_record(opened) | {"encoder": opened.card.to_dict(), "segment": opened.segment}
    print(json.dumps(record, indent=2))


def _index_record(index: Any) -> dict[str, Any]:
    return {
        "documents": index.documents,
        "passages": len(index),
        "bytes": index.bytes,
        "seconds": index.state("seconds", 0.0),
        "ledger_revision": index.state("stand", [None])[0],
    }


# -- shared --------------------------------------------------------------------------------------------------


def _settings(
    encoder: str, segment: str, retriever: str, k: int, shots: int, chat: bool, max_new_tokens: int, seed: int,
    options: list[str] | None,
) -> Settings:  # fmt: skip
    from byheart.methods.contract import Settings
    from byheart.segment import parse_preset

    parse_preset(segment)
    return Settings(
        encoder, segment, _mode(retriever), k, shots, chat, max_new_tokens, seed, _method_options(options or [])
    )


def _method_options(given: list[str]) -> dict[str, str]:
    from byheart.methods import METHODS

    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key.partition(".")[0] not in METHODS or "." not in key:
            raise UsageError(f"--set {text}: must be METHOD.NAME=VALUE, such as edit.layers=3-7")
        found[key] = value
    return found


def _mode(name: str) -> Any:
    from byheart.retrieve import MODES

    if name not in MODES:
        raise UsageError(f"--retriever {name}: must be one of {', '.join(MODES)}")
    return name


def _method_names(text: str) -> list[str]:
    from byheart.methods import parse_methods

    return parse_methods(text)


def _splits(text: str) -> list[Any]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for part in chosen or [text]:
        if part not in ("train", "validation", "test"):
            raise UsageError(f"--split {text}: must name train, validation or test")
    return chosen


def _bench(
    benchmark: Any, base: str, names: list[str], out: Path, settings: Settings, split: str, limit: int | None,
    device: str | None, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    from byheart.benchmarks import load_benchmark
    from byheart.progress import Terminal

    splits = _splits(split)
    ledger, origin = load_benchmark(benchmark, out / "ledger.db", Terminal().say)
    with ledger:
        _run(ledger, base, names, out, settings, splits, limit, device, dtype, as_json, origin)


def _edit_bench(
    title: str, cases: list[Any], data: Path, base: str, methods: str, out: Path, text: Path | None, edits: str,
    texts: int, sets: list[Any], limit: int | None, seed: int, device: str | None, dtype: str | None,
    options: list[str] | None, as_json: bool,
) -> None:  # fmt: skip
    from byheart.base import load_base
    from byheart.benchmarks.edit_run import run_editing
    from byheart.compare import drawn
    from byheart.edit_report import tables, write_edit_report
    from byheart.errors import DataError
    from byheart.methods import BASELINES
    from byheart.methods.edit.layers import traced_path
    from byheart.progress import Terminal

    names = _method_names(methods)
    for name in names:
        if name not in ("edit", *BASELINES):
            raise UsageError(f"--methods {name}: edits nothing; the unedited model is always scored beside the others")
    if not cases:
        raise DataError(f"--data {data}: holds no records")
    if text is not None and not text.is_file():
        raise DataError(f"--text {text}: no such file")
    cases = drawn(cases, limit, seed)
    sizes = _sizes(edits)
    show = Terminal()
    model = load_base(base, device=device, dtype=dtype, say=show.say)
    plan, given = _edit_plan(model, text, out, sizes, sets, texts, seed)
    settings = _settings("minilm", "288/64", "hybrid", 1, 0, False, 24, seed, [*given, *(options or [])])
    origin = {"data": str(data), "text": None if text is None else str(text), "limit": limit}
    run = run_editing(title, model, cases, names, out, settings, plan, origin=origin, progress=show)
    if as_json:
        print(json.dumps(run, ensure_ascii=False, indent=2))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 200)
        for table in tables(run):
            console.print(table)
    show.say(f"report: {write_edit_report(out, traced_path(model))}")


def _edit_plan(
    model: Any, text: Path | None, out: Path, sizes: tuple[int, ...], sets: list[Any], texts: int, seed: int
) -> tuple[Any, list[str]]:
    """What to measure, and the options that give methods their ordinary text: never the part that is measured on."""
    from byheart.benchmarks.edit_run import Plan
    from byheart.storage import write_text

    rows, rest = _ordinary_rows(model, text, seed)
    given = []
    if rest is not None:
        write_text(out / "text.txt", rest)
        given = [f"{name}.text={out / 'text.txt'}" for name in ("edit", "rome")]
    return Plan(sizes, tuple(sets), texts, rows), given


def _ordinary_rows(model: Any, text: Path | None, seed: int) -> tuple[tuple[tuple[int, ...], ...], str | None]:
    """Token rows to measure perplexity on, and the half of the text that they are not from."""
    from byheart.methods.edit.covariance import ROW, ordinary_text, text_rows
    from byheart.perplexity import TOKENS

    if text is None:
        return tuple(map(tuple, text_rows(model, None, TOKENS, seed + 1_000_003))), None
    (whole,) = ordinary_text(str(text), "edit") or [""]
    ids = model.tokenizer(whole[len(whole) // 2 :])["input_ids"][-TOKENS:]
    rows = tuple(tuple(ids[start : start + 2 * ROW]) for start in range(0, len(ids), 2 * ROW))
    return rows, whole[: len(whole) // 2]


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--edits {text}: must be whole numbers with commas between")
    return tuple(map(int, parts))


def _run(
    ledger: Any, base: str, names: list[str], out: Path, settings: Settings, splits: list[Any], limit: int | None,
    device: str | None, dtype: str | None, as_json: bool, origin: dict[str, Any],
) -> None:  # fmt: skip
    from byheart.base import load_base
    from byheart.compare import compare
    from byheart.progress import Terminal
    from byheart.report import before_after, remarks, summary_table, write_report

    show = Terminal()
    model = load_base(base, device=device, dtype=dtype, say=show.say)
    run = compare(ledger, model, names, out, settings, splits=splits, limit=limit, origin=origin, progress=show)
    report = write_report(out)
    if as_json:
        print(json.dumps(run, ensure_ascii=False, indent=2))
    else:
        from rich.console import Console

        # Not a terminal: wide enough that no figure is cut.
        Console(width=None if sys.stdout.isatty() else 200).print(summary_table(run))
        for remark in remarks(run):
            print(remark)
        example = before_after(out)
        if example is not None:
            print(f"for example: {example}")
    show.say(f"report: {report}")


def _emit(record: dict[str, Any], as_json: bool, sentence: str) -> None:
    print(json.dumps(record, ensure_ascii=False, indent=2) if as_json else sentence)


def _indented(record: dict[str, Any], depth: int = 0) -> str:
    lines = []
    for key, value in record.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{key}:", _indented(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{key}: {value}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
