"""FEVER: its copies read alike, claims grouped, filled up and split; the experiment on a tiny model."""

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from byheart.base import make_base
from byheart.benchmarks.fever import LABELS, Claim, load_fever
from byheart.benchmarks.fever_run import FRAME, Plan, _ask, claim_pieces, controls, read_label, run_fever
from byheart.benchmarks.kept import Kept
from byheart.cli import main
from byheart.errors import DataError
from byheart.fever_report import grids, write_fever_report
from byheart.methods import Settings
from byheart.methods.memory.examples import packed
from byheart.methods.memory.method import Memory
from byheart.storage import read_json
from byheart.training import Trained
from conftest import tiny_model

SHARED = Path(os.environ.get("BYHEART_DATA", Path(__file__).parents[2] / "shared" / "data")) / "fever"
PAGES = {"Quay": "Ostrand Quay is the largest port.", "Cove_-LRB-bay-RRB-": "Pell Cove is a bay.", "Void": " "}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(count, page):
    return [(f"{page} has {n} piers.", LABELS[n % 2].upper(), page) for n in range(count)]


CLAIMS = [*made(12, "Quay"), *made(10, "Cove_-LRB-bay-RRB-"), *made(9, "Void")]
THIRD = [(f"Somebody saw {n} gulls.", "NOT ENOUGH INFO", None) for n in range(40)]


def by_page(folder):
    lines(folder / "pages.jsonl", [{"page_id": id, "title": "", "text": text} for id, text in PAGES.items()])
    rows = [{"id": n, "claim": c, "label": label, "page": page} for n, (c, label, page) in enumerate(CLAIMS)]
    lines(folder / "claims.jsonl", rows)
    lines(
        folder / "claims_not_enough_info.jsonl",
        [{"id": 100 + n, "claim": c, "label": label} for n, (c, label, _) in enumerate(THIRD)],
    )
    return folder


def official(folder):
    pages = [
        {"id": "", "text": "", "lines": ""},
        *({"id": id, "text": text, "lines": ""} for id, text in PAGES.items()),
    ]
    lines(folder / "wiki-pages" / "wiki-001.jsonl", pages)
    rows = [
        {"id": n, "verifiable": "VERIFIABLE", "label": label, "claim": c, "evidence": [[[1, 2, page, 0]]]}
        for n, (c, label, page) in enumerate([*CLAIMS, *THIRD])
    ]
    lines(folder / "train.jsonl", rows)
    return folder


def hub(folder):
    lines(folder / "wiki_pages.jsonl", [{"id": id, "text": text, "lines": ""} for id, text in PAGES.items()])
    rows = [
        {"id": n, "label": label, "claim": c, "evidence_wiki_url": page or "", "evidence_sentence_id": sentence}
        for n, (c, label, page) in enumerate([*CLAIMS, *THIRD])
        for sentence in (0, 1)  # a row an evidence sentence
    ]
    lines(folder / "train.jsonl", rows)
    return folder


def parquet(folder):
    """The Hub's copy as it is converted there: a folder a split."""
    datasets = pytest.importorskip("datasets")
    plain = hub(folder / "as lines")
    for name, to in (("train", "v1.0/train"), ("wiki_pages", "wiki_pages/wikipedia_pages")):
        rows = [json.loads(line) for line in (plain / f"{name}.jsonl").read_text().splitlines()]
        (folder / to).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / to / "0000.parquet")
    (folder / "v1.0" / "unlabelled_test").mkdir()
    unasked = [{"id": 999, "label": "", "claim": "Nobody knows.", "evidence_wiki_url": "", "evidence_sentence_id": -1}]
    datasets.Dataset.from_list(unasked).to_parquet(folder / "v1.0" / "unlabelled_test" / "0000.parquet")
    return folder


@pytest.mark.parametrize("write", [by_page, official, hub, parquet])
def test_every_copy_gives_the_same_pages_and_claims(write, tmp_path):
    fever = load_fever(write(tmp_path), top=5)
    assert [page.id for page in fever.pages] == ["Quay", "Cove_-LRB-bay-RRB-"]
    assert fever.pages[1].title == "Cove (bay)"
    assert fever.counts["pages without text"] == 1
    assert fever.counts["claims of other pages"] == 9
    found = Counter((claim.page, claim.label) for claim in fever.claims)
    # Six and six, so six of the third class; five and five, so five.
    assert found == {("Quay", label): 6 for label in LABELS} | {("Cove_-LRB-bay-RRB-", label): 5 for label in LABELS}
    assert len({claim.text for claim in fever.claims}) == len(fever.claims)


def test_the_split_by_claim_keeps_every_page_and_label_on_both_sides(tmp_path):
    fever = load_fever(by_page(tmp_path), top=5)
    sides = {part: Counter((c.page, c.label) for c in fever.part(part)) for part in ("train", "validation")}
    assert sides["train"].keys() == sides["validation"].keys()
    assert sum(sides["train"].values()) == round(0.7 * len(fever.claims))


def test_the_split_by_page_measures_on_pages_without_learnt_claims(tmp_path):
    fever = load_fever(by_page(tmp_path), top=5, how="page")
    learnt, asked = ({claim.page for claim in fever.part(part)} for part in ("train", "validation"))
    assert learnt
    assert asked
    assert not learnt & asked


def test_published_splits_are_kept_and_a_page_needs_claims_to_learn_from(tmp_path):
    official(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    quay = [row for row in rows if "Quay" in row["claim"]] + [row for row in rows if "Cove" in row["claim"]][:4]
    lines(tmp_path / "train.jsonl", [row for row in rows if row not in quay])
    lines(tmp_path / "paper_dev.jsonl", quay)
    fever = load_fever(tmp_path, top=5)
    assert [page.id for page in fever.pages] == ["Cove_-LRB-bay-RRB-"]
    assert fever.counts["pages without claims to learn from"] == 1


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"claim": "x", "label": "MAYBE"}, "labels"),
        ({"claim": "x", "label": "SUPPORTS"}, "no page"),
        ({"label": "x"}, '"claim" is missing'),
    ],
)
def test_a_bad_line_is_named(row, why, tmp_path):
    by_page(tmp_path)
    with (tmp_path / "claims.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"claims.jsonl:{len(CLAIMS) + 1}.*{why}"):
        load_fever(tmp_path)


def test_claims_that_files_number_alike_are_told_apart(tmp_path):
    folder = by_page(tmp_path)
    once = load_fever(folder)
    rows = [json.loads(line) for line in (folder / "claims_not_enough_info.jsonl").read_text().splitlines()]
    lines(folder / "claims_not_enough_info.jsonl", [row | {"id": row["id"] - 100} for row in rows])
    found = load_fever(folder)
    assert len({claim.id for claim in found.claims}) == len(found.claims) == len(once.claims)


def test_too_few_claims_are_refused(tmp_path):
    with pytest.raises(DataError, match="too few claims"):
        load_fever(by_page(tmp_path), top=1, how="page")


def test_a_page_label_that_is_not_learnt_is_missed(tmp_path):
    by_page(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "claims.jsonl").read_text().splitlines()]
    lines(tmp_path / "claims.jsonl", [row for row in rows if row["label"] == LABELS[0].upper()])
    with pytest.raises(DataError, match="none to learn from of supports or refutes"):
        load_fever(tmp_path)


def test_claims_without_a_label_are_counted(tmp_path):
    by_page(tmp_path)
    lines(tmp_path / "unlabelled_dev.jsonl", [{"id": 900, "label": "", "claim": "Gulls fly.", "evidence_wiki_url": ""}])
    assert load_fever(tmp_path, top=5).counts["claims without a label"] == 1


@pytest.mark.parametrize(
    ("said", "label"),
    [(" (b) refutes", "refutes"), ("a)", "supports"), ("Not enough info.", LABELS[2]), ("It supports", ""), ("", "")],
)
def test_labels_are_read_from_what_is_written(said, label):
    assert read_label(said) == label


def test_a_row_of_claims_is_the_template(tokenizer, tmp_path):
    pieces = claim_pieces(load_fever(by_page(tmp_path), top=5).part("train"))
    row = packed(tokenizer, pieces, 0, FRAME)[0]
    text = tokenizer.decode(row.ids).replace("<unk>", "\n")
    assert text.startswith("Determine the factuality of the following claims\nAnswer candidates: (a) supports,")
    assert text.count("Claim: ") == text.count("\nA: (") == 6
    said = tokenizer.decode([id for id, on in zip(row.ids, row.labels, strict=True) if on]).replace("<unk>", "\n")
    assert set(said.split()) <= {"(a)", "(b)", "(c)"}


def test_the_experiment_runs_and_goes_on(tokenizer, tmp_path, monkeypatch):
    base = make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)
    fever = load_fever(by_page(tmp_path / "data"), top=5)
    options = {"memory.epochs": "2", "memory.width": "4", "memory.packings": "1"}
    plan = Plan(shots=(0, 2), variants=("none", "doc", "temp", "doctemp", "other"), seeds=(0, 1))
    run = run_fever(fever, base, tmp_path / "out", Settings(shots=0, options=options), plan)
    assert {(c["variant"], c["shots"]) for c in run["cells"]} == {
        (variant, n) for variant in (*plan.variants, "context") for n in (0, 2, "mean")
    }
    assert all(0 <= c["metrics"]["accuracy"] <= 1 for c in run["cells"])
    for cell in run["cells"]:
        for name in ("macro_f1", "micro_f1_calibrated", "macro_f1_generated"):
            low, high = cell["intervals"][name]
            assert low <= cell["metrics"][name] <= high
    assert {"page_token_accuracy"} <= set(next(t for t in run["training"] if t["variant"] == "doc"))
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    asked = len(fever.part("validation"))
    assert len(answers) == asked * 6 * 2 * 2
    for cell in run["cells"]:  # every figure can be found again in the answers
        rows = [a for a in answers if a["variant"] == cell["variant"] and cell["shots"] in (a["shots"], "mean")]
        right = sum(a["likelihood"] == a["label"] for a in rows) / len(rows)
        assert cell["metrics"]["accuracy"] == pytest.approx(right)
    page = write_fever_report(tmp_path / "out").read_text()
    assert f"{run['cells'][0]['metrics']['accuracy']:.3f}" in page
    assert "supports against refutes" in page and "mean of all" in page
    known = {(c["variant"], c["shots"]): c["metrics"]["accuracy"] for c in run["cells"]}
    for pair in run["pairs"]:
        if pair["metric"] == "accuracy" and pair["shots"] == "mean" and pair["against"] != "claim only":
            difference = known[pair["variant"], "mean"] - known[pair["against"], "mean"]
            assert pair["difference"] == pytest.approx(difference)
    # A page that is too long for the model to read costs its cell, and nothing else.
    plain = Kept.complete

    def ask(self, label, *given, **how):
        if label.startswith("page in the prompt, 2 shots"):
            raise DataError("too long")
        return plain(self, label, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "complete", ask)
        short = run_fever(fever, base, tmp_path / "out", Settings(shots=0, options=options), plan)
    assert short["left_out"] == {f"page in the prompt, 2 shots, seed {seed}": "too long" for seed in (0, 1)}
    assert [c for c in run["cells"] if c not in short["cells"]] == [
        c for c in run["cells"] if c["variant"] == "context" and c["shots"] in (2, "mean")
    ]
    page = write_fever_report(tmp_path / "out").read_text()
    assert "page in the prompt, 2 shots, seed 1" in page and "too long" in page
    # The second time nothing is asked: all answers are kept.
    monkeypatch.setattr("byheart.benchmarks.kept.complete", None)
    again = run_fever(fever, base, tmp_path / "out", Settings(shots=0, options=options), plan)
    assert again["cells"] == run["cells"]


def test_every_page_has_a_claim_to_learn_from_and_accents_are_written_alike(tmp_path):
    names = [f"Caf\u00e9_{n}" for n in range(10)]
    lines(
        tmp_path / "pages.jsonl", [{"page_id": unicodedata.normalize("NFD", n), "text": f"{n} is old."} for n in names]
    )
    claims = {names[0]: 20, names[-1]: 2}  # the last page has one claim of each label
    rows = [(f"{n} is {k}.", LABELS[k % 2].upper(), n) for n in names for k in range(claims.get(n, 1))]
    lines(tmp_path / "claims.jsonl", [{"claim": c, "label": label, "page": page} for c, label, page in rows])
    fever = load_fever(tmp_path)
    assert {page.id for page in fever.pages} == {*names} == {claim.page for claim in fever.part("train")}


def test_calibration_takes_off_what_is_said_of_nothing_and_two_are_two():
    class Said:
        def complete(self, label, jobs, *, max_new_tokens):
            free, said = (0.5, -1.0, 2.0), (1.3, 1.2, 2.1)
            return [SimpleNamespace(options=free if "Claim: N/A" in job.prompt else said, text="") for job in jobs]

    (row,) = _ask(Said(), [Claim("a", "It is.", "supports", None)], [], "")
    found = [row[how] for how in ("likelihood", "calibrated", "two", "two_calibrated")]
    assert found == [LABELS[2], LABELS[1], LABELS[0], LABELS[1]]


def test_other_neither_learns_nor_is_shown_claims_of_the_pages_that_it_is_asked_about(tokenizer, tmp_path, monkeypatch):
    base = make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)
    fever = load_fever(by_page(tmp_path / "data"), top=5)
    learnt, asked = [], []
    page_of = {claim.id: claim.page for claim in fever.claims}
    monkeypatch.setattr(
        Memory,
        "train",
        lambda self, pieces, *_: (learnt.append({page_of[p.owner] for p in pieces}), (Trained(), ()))[1],
    )

    def ask(kept, claims, examples, label):
        asked.append(({c.page for c in claims}, {c.page for c in examples}))
        ways = ("likelihood", "calibrated", "two", "two_calibrated", "generated")
        return [{"id": claim.id, **dict.fromkeys(ways, claim.label)} for claim in claims]

    monkeypatch.setattr("byheart.benchmarks.fever_run._ask", ask)
    plan = Plan(shots=(5,), variants=("other",), seeds=(0,), context=False)
    run_fever(fever, base, tmp_path / "out", Settings(shots=0), plan)
    assert len(learnt) == 2 and set.union(*(pages for pages, _ in asked)) == {page.id for page in fever.pages}
    for known, (pages, shown) in zip(learnt, asked, strict=True):
        assert known and shown and not pages & known and not pages & shown


def test_controls_see_the_wording_alone():
    def claims(words, part):
        return [Claim(f"{part}{n}", f"It {words[n % 3]} there.", LABELS[n % 3], None, part) for n in range(30)]

    telling = controls(
        claims(("is", "never was", "may be"), "train"), claims(("is", "never was", "may be"), "validation"), 0
    )
    silent = controls(claims(("is",) * 3, "train"), claims(("is",) * 3, "validation"), 0)
    assert telling["claim_only"]["micro_f1"] == telling["claim_only"]["supports_refutes"] == 1
    assert silent["claim_only"]["micro_f1"] == pytest.approx(1 / 3)
    assert telling["majority"]["micro_f1"] == pytest.approx(1 / 3)
    assert {*telling["claim_only"]["given"]["two"]} == {*LABELS[:2]}


def test_several_models_stand_in_the_same_tables(tokenizer, tmp_path, monkeypatch, capsys):
    for family in ("llama", "gpt2"):
        tiny_model(family, len(tokenizer)).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
    by_page(tmp_path / "data")
    (tmp_path / "text.txt").write_text("The ferry crosses twice a day. " * 40)
    monkeypatch.chdir(tmp_path)
    call = ["bench", "fever", "--data", "data", "--text", "text.txt", "--out", "out", "--shots", "0", "--seeds", "1"]
    call += ["--memory", "none", "--no-context"]

    def ran(*arguments):
        monkeypatch.setattr("sys.argv", ["byheart", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    code, said = ran(*call, "--base", "llama,gpt2")
    assert code == 0, said.err
    alone = {}
    for family in ("llama", "gpt2"):
        (cell,) = read_json(tmp_path / "out" / family / "run.json")["cells"]
        alone[family] = f"{cell['metrics']['accuracy']:.3f}"
    page = (tmp_path / "out" / "report.html").read_text()
    first = next(grids(*(read_json(tmp_path / "out" / one / "run.json") for one in alone)))
    assert [[*row[:2], row[2][:5]] for row in first[2]] == [[one, "none", alone[one]] for one in alone]
    assert all(one in page and one in said.out for one in alone) and "llama, gpt2, 2 pages" in page
    code, said = ran("report", "out")
    assert code == 0 and (tmp_path / "out" / "report.html").read_text() == page
    monkeypatch.setattr("byheart.benchmarks.fever_run._ask", lambda *_, **__: pytest.fail("asked before it is refused"))
    code, said = ran(*call, "--base", "llama", "--set", "memory.width=0")
    assert code == 2 and "memory.width=0" in said.err
    code, said = ran(*call, "--base", "llama", "--set", "memory.text=text.txt")
    assert code == 2 and "memory.text=text.txt: says nothing while memory.keep is 0" in said.err
    bad = ("--set", "memory.keep=1", "--set", "memory.text=nowhere.txt")
    code, said = ran(*call, "--base", "llama", *bad)
    assert code == 2 and "memory.text=nowhere.txt: must be own or a text file" in said.err
    code, said = ran(*call, "--base", "llama,nowhere")
    assert code == 3 and "nowhere" in said.err
    for wrong, why in (("llama,x/llama", "two models of one name"), (" , ", "names no language model")):
        code, said = ran(*call, "--base", wrong)
        assert code == 2 and why in said.err and len(said.err.splitlines()) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared FEVER rows (BYHEART_DATA)")
def test_the_shared_rows():
    fever = load_fever(SHARED)
    assert len(fever.pages) == 99
    found = Counter(claim.label for claim in fever.claims)
    assert found["not enough info"] > 800
    assert {claim.page for claim in fever.part("validation")} <= {page.id for page in fever.pages}
