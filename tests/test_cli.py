"""The command line as users call it, in processes of its own: output, exit codes, one sentence for bad input."""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT, WORLD, tiny_model

COMMANDS = [
    "compare",
    "bench",
    "learn",
    "ask",
    "follow",
    "ledger",
    "index",
    "models",
    "doctor",
    "report",
    "undo",
    "export",
    "trace",
]


def byheart(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", "from byheart.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['byheart', '--help']\nfrom byheart.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"  {command} " in done.stdout


def test_a_page_is_written_again_without_torch():
    code = "import sys, byheart.report; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nonsense"], 2, "No such command"),
        (["compare"], 2, "Missing"),
        (["compare", "x.db", "--out", "o", "--methods", "nope"], 2, 'no method "nope"'),
        (["compare", "x.db", "--out", "o", "--segment", "64/128"], 2, "--segment 64/128"),
        (["compare", "x.db", "--out", "o", "--retriever", "magic"], 2, "--retriever magic"),
        (["compare", "x.db", "--out", "o", "--k", "0"], 2, "--k"),
        (["compare", "x.db", "--out", "o", "--set", "context.k=5"], 2, "--set context.k=5: context has no options"),
        (["bench", "nq", "--data", "d", "--set", "prefix.slots=8"], 2, "prefix is not among the methods"),
        (["learn", "memory", "x.db", "--out", "o", "--set", "edit.steps=9"], 2, "edit is not among the methods"),
        (["bench", "fever", "--data", "d", "--set", "memory.study=2"], 2, "--memory says what is learnt here"),
        (["compare", "x.db", "--out", "o", "--split", "all"], 2, "--split all"),
        (["compare", "x.db", "--out", "o"], 3, "x.db: no such ledger"),
        (["compare", "x.db", "--out", "o", "--seed", "-1"], 2, "--seed"),
        (["bench", "fever", "--data", "d", "--base", "x/a,y/a"], 2, "two models of one name"),
        (["index", "search", "i", "why?", "--dtype", "int8"], 2, "--dtype int8"),
        (["doctor", "--device", "xpu"], 2, "--device xpu: is not there"),
        (["learn", "context", "x.db", "--out", "."], 3, "holds other files than byheart's"),
        (["ledger", "add", "notes.txt/x.db", "notes.txt"], 3, "notes.txt/x.db: cannot be opened"),
        (["ledger", "show", "notes.txt"], 3, "notes.txt: cannot be opened as a byheart ledger"),
        (["ledger", "add", "x.db", "missing.jsonl"], 3, "missing.jsonl: no such file"),
        (["ledger", "show", "x.db"], 3, "x.db: no such ledger"),
        (["bench", "nq", "--data", "./nowhere"], 3, "./nowhere: no such file"),
        (["index", "search", "nowhere", "q"], 3, "manifest.json: missing"),
        (["report", "nowhere"], 3, "run.json: missing"),
        (["ask", "nowhere", "q"], 3, "byheart.json: missing"),
        (["learn", "magic", "x.db", "--out", "o"], 2, 'no method "magic"'),
        (["learn", "edit", "x.db", "--out", "o", "--set", "edit.layers"], 2, "METHOD.NAME=VALUE"),
        (["learn", "edit", "x.db", "--out", "o", "--set", "magic.layers=1-2"], 2, "METHOD.NAME=VALUE"),
        (["learn", "closed", "x.db", "--out", "o", "--gate"], 2, "only edit has a gate"),
        (["undo", "nowhere", "f"], 3, "byheart.json: missing"),
        (["export", "nowhere", "--to", "zip", "--out", "o"], 2, "--to zip"),
        (["export", "nowhere", "--to", "merged", "--rank", "4", "--out", "o"], 2, "--rank"),
        (["bench", "counterfact", "--data", "nowhere"], 3, "nowhere: no such file"),
        (["bench", "zsre", "--data", "notes.txt"], 3, "notes.txt:1:"),
    ],
)
def test_bad_input_is_one_sentence_and_the_right_exit_code(tmp_path, arguments, code, said):
    (tmp_path / "notes.txt").write_text("Not a ledger, and long enough that SQLite reads all of its header first. " * 2)
    done = byheart(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "x.db").exists()


@pytest.mark.parametrize(
    "run",
    [
        {"methods": {"closed": {}}, "pairs": [], "questions": {}, "ledger": {}, "base": {}},
        {"methods": {"closed": {"metrics": {}}, "edit": {"metrics": {}}}, "benchmark": "b", "edits": 1, "base": {}},
        {"cells": [{}], "controls": {}, "data": {}, "base": {}},
        {"cells": 3, "parts": 4, "base": "a"},
        {"methods": {}, "pairs": [], "questions": {"asked": "x"}, "ledger": {"documents": 1}, "base": {"name": "a"}},
    ],
)
def test_a_run_that_lacks_something_is_told_and_its_page_kept(tmp_path, run):
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "answers.jsonl").write_text("")
    (tmp_path / "report.html").write_text("old")
    done = byheart("report", ".", cwd=tmp_path)
    assert done.returncode == 3 and "another version of byheart" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_ledger_by_hand(tmp_path):
    files = [WORLD / f"{name}.jsonl" for name in ("documents", "facts", "questions")]
    assert "410 inserted" in byheart("ledger", "add", tmp_path / "w.db", *files).stdout
    assert "410 unchanged" in byheart("ledger", "add", tmp_path / "w.db", *files).stdout
    assert byheart("ledger", "check", tmp_path / "w.db").returncode == 0
    changes = byheart("ledger", "revise", tmp_path / "w.db", WORLD / "changes.jsonl", "--json")
    assert json.loads(changes.stdout)["retracted"] == 6
    history = byheart("ledger", "history", tmp_path / "w.db", "fact-011").stdout
    assert "object: " in history and "Harbour Gazette" in history
    shown = json.loads(byheart("ledger", "show", tmp_path / "w.db").stdout)
    assert shown["facts"] == 114
    assert byheart("ledger", "retract", tmp_path / "w.db", "page-vellmora").returncode == 0
    found = byheart("ledger", "check", tmp_path / "w.db", "--json")
    assert found.returncode == 3
    assert {json.loads(line)["problem"] for line in found.stdout.splitlines()} == {"dangling"}
    assert byheart("ledger", "retract", tmp_path / "w.db", "nope").returncode == 3


def test_bad_lines_on_the_command_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "Fine."}\n{"text": ""}\n')
    done = byheart("ledger", "add", "l.db", "bad.jsonl", cwd=tmp_path)
    assert done.returncode == 3 and "bad.jsonl:2:" in done.stderr and "Nothing was imported" in done.stderr
    assert not list(tmp_path.glob("l.db*"))
    done = byheart("ledger", "add", "l.db", "bad.jsonl", "--skip-bad", cwd=tmp_path)
    assert done.returncode == 0 and "1 inserted" in done.stdout and "1 bad line." in done.stderr
    assert byheart("ledger", "add", "l.db", "bad.jsonl", cwd=tmp_path).returncode == 3
    assert '"documents": 1' in byheart("ledger", "show", "l.db", cwd=tmp_path).stdout


def test_a_model_that_is_none_is_named(tmp_path):
    (tmp_path / "m").mkdir()
    done = byheart("doctor", "--base", "m", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 3 and done.stderr.startswith("error: m: cannot be loaded as a model")
    (tmp_path / "m.gguf").write_bytes(b"GGUFnot")
    done = byheart("doctor", "--base", "m.gguf", cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.startswith("error: m.gguf")
    done = byheart("doctor", "--device", "toaster", cwd=tmp_path)
    assert done.returncode == 2 and "--device toaster" in done.stderr


@pytest.mark.real
def test_learn_ask_index_and_doctor(tmp_path, smollm, minilm):
    byheart("ledger", "add", "w.db", *(WORLD / f"{name}.jsonl" for name in ("documents", "questions")), cwd=tmp_path)
    assert byheart("index", "build", "w.db", "--out", "i", cwd=tmp_path).returncode == 0
    hits = json.loads(
        byheart("index", "search", "i", "Who is harbour master of Pell Cove?", "--json", cwd=tmp_path).stdout
    )
    assert hits[0]["document"] == "page-pell-cove"
    assert byheart("index", "remove", "i", "page-pell-cove", cwd=tmp_path).returncode == 0
    assert json.loads(byheart("index", "stats", "i", cwd=tmp_path).stdout)["documents"] == 39
    done = byheart("learn", "context", "w.db", "--out", "learnt", "--shots", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["i", "learnt", "w.db"]
    ask = byheart("ask", "learnt", "Who is the harbour master of Pell Cove?", "--json", cwd=tmp_path)
    (row,) = json.loads(ask.stdout)
    assert row["evidence"][0]["document"] == "page-pell-cove" and row["text"]
    assert "followed 0 changes" in byheart("follow", "learnt", "w.db", cwd=tmp_path).stdout
    byheart("ledger", "retract", "w.db", "page-pell-cove", cwd=tmp_path)
    done = byheart("follow", "learnt", "w.db", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["changes"] == 1, done.stderr
    ask = byheart("ask", "learnt", "Who is the harbour master of Pell Cove?", "--json", cwd=tmp_path)
    assert json.loads(ask.stdout)[0]["evidence"][0]["document"] != "page-pell-cove"
    assert "followed 0 changes" in byheart("follow", "learnt", "w.db", cwd=tmp_path).stdout
    byheart("ledger", "add", "other.db", WORLD / "documents.jsonl", cwd=tmp_path)
    done = byheart("follow", "learnt", "other.db", cwd=tmp_path)
    assert done.returncode == 3 and "is not the ledger that learnt was learnt from" in done.stderr
    doctor = json.loads(byheart("doctor", "--json", cwd=tmp_path).stdout)
    assert doctor["base"]["parts"]["MLP output"] == "model.layers.0.mlp.down_proj"
    models = json.loads(byheart("models", "--json", cwd=tmp_path).stdout)
    assert all(model["there"] for model in models)


def test_what_was_learnt_knows_its_base(tmp_path, tokenizer):
    for family in ("llama", "gpt2"):
        tiny_model(family, len(tokenizer)).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
    fact = {"type": "fact", "id": "river", "subject": "Vellmora", "prompt": "The river of {} is", "object": "Amberle"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact) + "\n")
    byheart("ledger", "add", "l.db", "facts.jsonl", cwd=tmp_path)
    quick = ("--shots", "0", "--set", "memory.epochs=1", "--set", "memory.keep=0")
    done = byheart("learn", "memory", "l.db", "--base", "llama", "--out", "known", *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert byheart("ask", "known", "Which river?", cwd=tmp_path).stdout.startswith("memory: ")
    assert "followed 0 changes" in byheart("follow", "known", "l.db", cwd=tmp_path).stdout
    done = byheart("ask", "known", "Which river?", "--base", "gpt2", cwd=tmp_path)
    assert done.returncode == 3 and "known: was made for another base (llama) than gpt2" in done.stderr


@pytest.mark.real
def test_edit_undo_export_and_trace(tmp_path, smollm):
    facts = [
        {
            "subject": "Vellmora",
            "prompt": "The river that runs through {} is called the",
            "object": "Amberle",
            "id": "river",
        },
        {"subject": "Pell Cove", "prompt": "The harbour master of {} is", "object": "Joss Marrable", "id": "master"},
        {"subject": "Pell Cove", "prompt": "The harbour master of {} is", "object": "Ann", "id": "rival"},
        {"subject": "Ebb", "prompt": "The keeper of {} is", "object": "Mara Tole", "id": "keeper"},
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps({"type": "fact"} | fact) + "\n" for fact in facts))
    byheart("ledger", "add", "l.db", "facts.jsonl", cwd=tmp_path)
    # What text the model would write itself, and how facts settle, other tests see; here both would take minutes.
    quick = ("prefixes=2", "tokens=1", "steps=8", "settle=0", f"text={ROOT / 'docs' / 'results.md'}")
    fast = [word for one in quick for word in ("--set", f"edit.{one}")]
    done = byheart("learn", "edit", "l.db", "--out", "known", "--json", *fast, cwd=tmp_path)
    record = json.loads(done.stdout)
    assert done.returncode == 0 and record["facts"] == 2 and set(record["skipped_rows"]) == {"master", "rival"}
    assert "skipped rival: another target" in done.stderr
    (row,) = json.loads(byheart("ask", "known", "Which river runs through Vellmora?", "--json", cwd=tmp_path).stdout)
    assert row["text"] and row["method"] == "edit"
    assert "rank 2" in byheart("export", "known", "--to", "peft", "--out", "lora", cwd=tmp_path).stdout
    assert byheart("export", "known", "--to", "merged", "--out", "whole", cwd=tmp_path).returncode == 0
    assert byheart("doctor", "--base", "whole", "--json", cwd=tmp_path).returncode == 0
    assert "left: 1 fact in" in byheart("undo", "known", "river", cwd=tmp_path).stdout
    done = byheart("undo", "known", "river", cwd=tmp_path)
    assert done.returncode == 3 and 'holds no fact "river"' in done.stderr
    # The ledger goes on; what was learnt follows: one of two that contradicted each other is gone, so the other holds.
    byheart("ledger", "retract", "l.db", "rival", cwd=tmp_path)
    done = byheart("follow", "known", "l.db", cwd=tmp_path)
    assert done.returncode == 0 and "followed 1 change in" in done.stdout, done.stderr
    done = byheart("undo", "known", "master", cwd=tmp_path)
    assert "left: 1 fact in" in done.stdout
    other = {"type": "fact", "id": "other", "subject": "Ebb", "prompt": "The keeper of {} is", "object": "Ann"}
    (tmp_path / "other.jsonl").write_text(json.dumps(other) + "\n")
    byheart("ledger", "add", "l.db", "other.jsonl", cwd=tmp_path)
    done = byheart("follow", "known", "l.db", cwd=tmp_path)
    assert "skipped keeper: another target" in done.stderr and "skipped other: another target" in done.stderr
    done = byheart("trace", "--limit", "3", "--samples", "1", "--out", "t", cwd=tmp_path, BYHEART_HOME=_home(tmp_path))
    assert done.returncode == 0 and done.stdout.startswith("layers ")
    assert (tmp_path / "t" / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "t" / "report.html").read_text()


def _home(folder):
    """A home with the models but without what this test measures, so that no other run edits other layers for it."""
    from byheart.storage import home

    (folder / "home").mkdir()
    (folder / "home" / "models").symlink_to(home() / "models")
    return str(folder / "home")


def test_the_readme_names_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in text and f"\n{target}: setup" in makefile
    code = "\n".join(re.findall(r"```\n.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    named = set(re.findall(r"\bbyheart ([a-z]+)", code))
    assert named and named <= set(COMMANDS)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
