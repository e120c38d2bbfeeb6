"""Editing benchmarks: published files into cases, and figures that mean what they say."""

import json
import math
import random
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest

from byheart.base import make_base
from byheart.benchmarks.edit_run import Plan, _means, run_editing, score_cases, summarise
from byheart.benchmarks.editing import Case, Crossing, Probe, counterfact, crossed, question_cases, same_subject, zsre
from byheart.benchmarks.kept import Kept
from byheart.cli.benchmarks import _ordinary_rows
from byheart.decode import Completion, Job, Sampling, complete
from byheart.edit_report import grids, write_edit_report
from byheart.errors import DataError, UsageError
from byheart.ledger import Ledger
from byheart.methods import Settings
from byheart.methods.edit.method import Edit
from byheart.ordinary import text_rows
from byheart.perplexity import perplexity
from byheart.progress import Silent
from byheart.rows import Fact
from byheart.score import generation_entropy, harmonic_mean, reference_score
from conftest import tiny_model

RECORD = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mayor of {} is", "relation_id": "P6", "subject": "Vellmora",
        "target_new": {"str": "Ann"}, "target_true": {"str": "Holm"},
    },
    "paraphrase_prompts": ["Vellmora's mayor is called"],
    "neighborhood_prompts": ["The mayor of Pell Cove is", "The mayor of Hathersund is"],
    "generation_prompts": ["In Vellmora,", "In Vellmora,", "Vellmora is"],
}  # fmt: skip
ZSRE = {
    "subject": "Vellmora", "src": "Who is the mayor of Vellmora?", "alt": "Ann", "rephrase": "Vellmora's mayor is who?",
    "loc": "nq question: who keeps ebb", "loc_ans": "Tole",
    "portability": {"New Question": "Where was the mayor of Vellmora born?", "New Answer": "Ebb"},
}  # fmt: skip


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_counterfact_records_become_cases(tmp_path):
    references = lines(tmp_path / "texts.jsonl", {"object": "Ann", "texts": ["Ann lives in Ebb."]})
    (case,) = counterfact(lines(tmp_path / "counterfact_full.jsonl", RECORD), references).cases
    assert (case.fact.subject, case.fact.object, case.fact.former_object, case.group) == (
        "Vellmora",
        "Ann",
        "Holm",
        "P6",
    )
    assert case.probes == (
        Probe("edit", "The mayor of Vellmora is", "Ann", "Holm"),
        Probe("paraphrase", "Vellmora's mayor is called", "Ann", "Holm"),
        Probe("neighbourhood", "The mayor of Pell Cove is", "Holm", "Ann"),
        Probe("neighbourhood", "The mayor of Hathersund is", "Holm", "Ann"),
    )
    assert case.generate == ("In Vellmora,", "Vellmora is") and case.references == ("Ann lives in Ebb.",)
    # Paraphrases are for measuring: the fact that is learnt must not hold them.
    assert not case.fact.paraphrases and not case.fact.neighbours


def test_zsre_rows_become_cases(tmp_path):
    (case,) = zsre(lines(tmp_path / "zsre_eval.jsonl", ZSRE)).cases
    assert case.fact.prompt == "Who is the mayor of {}?" and case.fact.object == "Ann"
    # One without a target is left out, and the rest goes on.
    found = zsre(lines(tmp_path / "z.jsonl", ZSRE | {"alt": None}, ZSRE))
    assert len(found.cases) == 1 and found.left_out == {"z.jsonl:1": "there is no target"}
    # As it is learnt, so it is asked: a space before a target would be a token of its own.
    spaced = {"alt": " Ann", "loc_ans": " Tole ", "src": f"{ZSRE['src']} ", "rephrase": f" {ZSRE['rephrase']} "}
    assert zsre(lines(tmp_path / "z.jsonl", ZSRE | spaced)).cases == [case]
    # What is blank is not asked.
    (blank,) = zsre(lines(tmp_path / "z.jsonl", ZSRE | {"rephrase": " ", "loc_ans": " "})).cases
    assert [probe.kind for probe in blank.probes] == ["edit", "portability"]
    assert [(p.kind, p.wanted) for p in case.probes] == [
        ("edit", "Ann"), ("paraphrase", "Ann"), ("neighbourhood", "Tole"), ("portability", "Ebb"),
    ]  # fmt: skip


def test_bad_records_are_named(tmp_path):
    for rows, load, says in [
        ([{"requested_rewrite": {}}], counterfact, r":1: not a CounterFact record"),
        ([{"case_id": 1}], counterfact, r':1: "requested_rewrite" is missing'),
        ([RECORD, RECORD | {"paraphrase_prompts": "V's"}], counterfact, ':2: .*"paraphrase_prompts" must be a list'),
        ([RECORD | {"neighborhood_prompts": [None]}], counterfact, ':1: .*"neighborhood_prompts" must be a list'),
        ([RECORD | {"paraphrase_prompts": [" "]}], counterfact, ':1: .*"paraphrase_prompts" .* none of them blank'),
        ([{"title": 5, "question": "Is 5 old?", "answers": "no"}], question_cases, ':1: "title" must be a text'),
        ([ZSRE | {"rephrase": 5}], zsre, ':1: .*"rephrase" must be a text'),
        ([{"title": "Ebb", "question": "Is Ebb old?", "answers": 5}], question_cases, ':1: "answers" must be texts'),
        ([RECORD | {"case_id": "\ud800"}], counterfact, ":1: holds half a character"),
    ]:
        with pytest.raises(DataError, match=says):
            load(lines(tmp_path / "x.jsonl", *rows))
    with pytest.raises(DataError, match="no such file"):
        counterfact(tmp_path / "none")
    with pytest.raises(DataError, match="name the file"):
        zsre(tmp_path)


def test_published_arrays_are_read_as_lines_are(tmp_path):
    for name, record, load in (("counterfact", RECORD, counterfact), ("zsre_mend_eval", ZSRE, zsre)):
        (tmp_path / f"{name}.json").write_text(json.dumps([record, record], indent=2))
        as_lines = load(lines(tmp_path / f"{name}.jsonl", record, record)).cases
        assert load(tmp_path / f"{name}.json").cases == as_lines and len(as_lines) == 2
    (tmp_path / "counterfact.json").write_text(json.dumps([RECORD, 3]))
    with pytest.raises(DataError, match=r"counterfact.json:2: not a JSON object"):
        counterfact(tmp_path / "counterfact.json")
    (tmp_path / "counterfact.json").write_text("[" + json.dumps(RECORD))
    with pytest.raises(DataError, match=r"counterfact.json: not readable JSON"):
        counterfact(tmp_path / "counterfact.json")
    with pytest.raises(DataError, match=r'about.jsonl:1: "texts" must be a list of texts'):
        counterfact(lines(tmp_path / "cf.jsonl", RECORD), lines(tmp_path / "about.jsonl", {"object": "x", "texts": 5}))


def test_records_that_hold_nothing_to_edit_are_left_out_by_name(tmp_path):
    bad = json.loads(json.dumps(RECORD))
    bad["requested_rewrite"]["prompt"] = "The mayor is"
    path = lines(tmp_path / "cf.jsonl", RECORD, bad)
    found = counterfact(path)
    assert [case.fact.id for case in found.cases] == ["cf-7"]
    assert list(found.left_out) == ["cf.jsonl:2"] and "exactly once" in found.left_out["cf.jsonl:2"]
    bad = json.loads(json.dumps(RECORD))
    bad["requested_rewrite"]["target_true"]["str"] = " "
    assert counterfact(lines(tmp_path / "cf.jsonl", RECORD, bad)).left_out == {"cf.jsonl:2": "there is no true target"}
    found = zsre(lines(tmp_path / "z.jsonl", ZSRE | {"src": "Who?"}, ZSRE | {"alt": ""}, ZSRE))
    assert len(found.cases) == 1 and list(found.left_out) == ["z.jsonl:1", "z.jsonl:2"]
    assert "does not hold its subject" in found.left_out["z.jsonl:1"] and "object" in found.left_out["z.jsonl:2"]


def test_questions_that_name_their_page_become_edits(tmp_path):
    path = lines(
        tmp_path / "q.jsonl",
        {"title": "Pell_Cove", "question": "Who rules Pell Cove?", "answers": {"text": ["Ann", "Anna"]}},
        {"title": "Pell_Cove", "question": "Who rules it?", "answers": ["Ann"]},
        {"title": "Ebb", "question": "Who rules Ebb?", "answers": []},
        {"title": "Ebb", "question": "who rules ebb at ebbtide?", "answers": ["Ann"]},
        {"title": "Ebb", "question": "Who knows of ebbtide?", "answers": ["Ann"]},
        {"title": "Ebb", "question": "Who keeps Ebb?", "answers": "Mara"},
        {"title": "Ebb", "question": "Who left Ebb?", "answers": {"text": "Tole"}},
        {"title": None, "question": "Why did none of them come?", "answers": ["rain"]},
    )
    case, small, *alone = question_cases(path).cases
    assert [one.fact.object for one in alone] == ["Mara", "Tole"]
    assert (case.fact.prompt, case.fact.object) == ("Who rules {}?", "Ann")
    assert (small.fact.prompt, small.fact.subject) == ("who rules {} at ebbtide?", "ebb")
    with pytest.raises(DataError, match=r"q.jsonl: holds no record to edit \(q.jsonl:1: .* does not name"):
        question_cases(lines(path, {"title": "Ebb", "question": "Who?", "answers": ["Ann"]}))


def test_same_subject_batches_hold_one_subject_and_many_relations():
    cases = [
        Case(
            Fact(id=str(n), subject=f"S{n}", prompt=f"{{}} relation {n} is", object=f"o{n}", former_object="x"),
            (),
            f"P{n}",
        )
        for n in range(12)
    ]
    batches = same_subject(cases, 5, 3, seed=0)
    assert len(batches) == 3
    for batch in batches:
        assert len({case.fact.subject for case in batch}) == 1
        assert len({case.fact.prompt for case in batch}) == 5 == len({case.fact.id for case in batch})
    assert batches == same_subject(cases, 5, 3, seed=0)
    with pytest.raises(DataError, match="--same-subject 13: the records are of 12 relations only"):
        same_subject(cases, 13, 3, seed=0)


def test_the_papers_figures_come_out():
    assert harmonic_mean([0.989, 0.886, 0.737]) == pytest.approx(0.858, abs=5e-4)  # MEMIT, GPT-J, 10,000 edits
    assert harmonic_mean([1, 0, 1]) == 0
    # Six different words: five bigrams and four trigrams, all once.
    assert generation_entropy("a b c d e f") == pytest.approx(100 * (2 / 3 * math.log2(5) + 4 / 3 * 2) / 2)
    assert generation_entropy("ha ha ha ha ha") == 0 == generation_entropy("")
    assert reference_score("ann lives in ebb", ["Ann lives in Ebb."]) == pytest.approx(100)
    assert reference_score("xyz", ["Ann lives in Ebb."]) == 0


def test_a_run_scores_the_unedited_model_beside_the_edited_one(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    base = make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)
    path = lines(
        tmp_path / "c.jsonl",
        RECORD,
        RECORD
        | {"case_id": 8}
        | {"requested_rewrite": RECORD["requested_rewrite"] | {"subject": "Pell Cove", "relation_id": "P7"}},
    )
    cases = counterfact(path).cases
    settings = Settings(shots=0, options={"edit.layers": "0-1", "edit.prefixes": "2", "edit.steps": "3"})
    rows = tuple(tuple(row) for row in text_rows(base, None, 256, 5))
    plan = Plan(sizes=(1, 2, 50), sets=(("same", [cases]),), texts=1, rows=rows)
    run = run_editing("CounterFact", base, cases, ["edit"], tmp_path / "run", settings, plan)
    assert list(run["methods"]) == ["closed", "edit"]
    for method in run["methods"].values():
        assert {"es", "ps", "ns", "es_magnitude", "es_accuracy", "generated", "ge"} <= method["metrics"].keys()
        assert "rs" not in method["metrics"]
    assert run["unmeasured"] == ["RS: no reference texts about these objects were given (--references)"]
    edit = run["methods"]["edit"]
    assert [point["edits"] for point in edit["curve"]] == [1, 2] and edit["sets"]["same"]["cases"] == 2
    assert edit["metrics"]["perplexity_drift"] == pytest.approx(edit["perplexity"] / perplexity(base, rows) - 1)
    assert {pair["metric"] for pair in run["pairs"]} >= {"es", "ns", "generated"}
    assert edit["by_group"] == {group: {"cases": 1} | edit["by_group"][group] for group in ("P6", "P7")}
    parts = [edit["metrics"][name] for name in ("es_accuracy", "ps_accuracy", "ns_accuracy")]
    assert edit["metrics"]["s_accuracy"] == pytest.approx(harmonic_mean(parts))
    page = write_edit_report(tmp_path / "run").read_text()
    assert "CounterFact" in page and "more edits" in page and "P7" in page and "Causal tracing" not in page
    assert "edit prompts behind which" in page and "unrelated questions" not in page  # what it shows is explained
    (perplexities,) = (row for row in next(grids(run))[2] if row[0] == "perplexity")
    before, after = perplexity(base, rows), edit["perplexity"]
    assert perplexities == ["perplexity", f"{before:.1f}", f"{after / before - 1:+.1%}"]
    (tmp_path / "home" / "trace").mkdir()
    traced = {
        "model": "tiny",
        "facts": 2,
        "window": 3,
        "parts": ["mlp"],
        "places": ["last"],
        "effects": [[[[0, 0, 1]]]],
    }
    (tmp_path / "home" / "trace" / f"{base.hash}.json").write_text(json.dumps(traced))
    assert "Causal tracing" in write_edit_report(tmp_path / "run").read_text()
    assert all(len(head) == len(row) for _, head, table in grids(run) for row in table)
    # The second time nothing is asked: all that models said is kept, each state's apart.
    monkeypatch.setattr("byheart.benchmarks.kept.complete", None)
    again = run_editing("CounterFact", base, cases, ["edit"], tmp_path / "run", settings, plan)
    assert [again["methods"][name]["metrics"] for name in ("closed", "edit")] == [
        run["methods"][name]["metrics"] for name in ("closed", "edit")
    ]


def test_what_is_scored_is_the_model_with_its_facts_written(tokenizer, tmp_path, monkeypatch):
    """All of them at once, each alone, and in a set of their own, each beside the same cases unedited."""
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    base = make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)
    # Each asks for what the model as it is finds less likely.
    prompts = ({"prompt": "{} is known for", "subject": "Pell Cove", "relation_id": "P7"}, {})
    news = (RECORD["requested_rewrite"][name] for name in ("target_new", "target_true"))
    trues = (RECORD["requested_rewrite"][name] for name in ("target_true", "target_new"))
    edits = [
        RECORD["requested_rewrite"] | prompt | {"target_new": new, "target_true": true}
        for prompt, new, true in zip(prompts, news, trues, strict=True)
    ]
    records = [RECORD | {"case_id": n, "requested_rewrite": edit} for n, edit in enumerate(edits)]
    about = [{"object": name, "texts": [f"{name} is what they are known for."]} for name in ("Ann", "Holm")]
    texts = lines(tmp_path / "about.jsonl", *about)
    cases = counterfact(lines(tmp_path / "c.jsonl", *records), texts).cases
    options = {"layers": "1", "prefixes": "0", "steps": "25", "lr": "1.0", "clamp": "40", "weight": "0.0001"}
    options |= {"settle": "0", "kl": "0", "weight_decay": "0"}
    settings = Settings(shots=0, options={f"edit.{name}": value for name, value in options.items()})
    rows = tuple(tuple(row) for row in text_rows(base, None, 256, 5))
    of, plainly = [], summarise
    monkeypatch.setattr(
        "byheart.benchmarks.edit_run.summarise",
        lambda *given: of.append(dict(enumerate(given)).get(2)) or plainly(*given),
    )
    run = run_editing(
        "CounterFact", base, cases, ["edit"], tmp_path / "run", settings, Plan((1,), (("set", [cases]),), 1, rows)
    )

    def written(some, texts):
        method = Edit(base, settings, tmp_path / "own")
        with Ledger(tmp_path / f"{some[0].fact.id}-{len(some)}-{texts}.db", create=True) as ledger:
            ledger.insert([case.fact for case in some])
            method.learn(ledger)
        with method.attached():
            return unedited(some, texts), perplexity(base, rows)

    def unedited(some, texts):
        return score_cases(Kept(base, tmp_path / str(random.random()), Silent()), some, 0, texts, "own")

    def same(part, of_cases):
        names = {name for row in of_cases for name in row["metrics"]}
        assert names <= part["metrics"].keys()
        for name in names:
            found = [row["metrics"][name] for row in of_cases if name in row["metrics"]]
            assert part["metrics"][name] == pytest.approx(sum(found) / len(found), abs=1e-5), name

    plain, before = unedited(cases, 1), perplexity(base, rows)
    same(run["methods"]["closed"], plain)
    edited, after = written(cases, 1)
    edit = run["methods"]["edit"]
    same(edit, edited)
    assert edit["perplexity"] == pytest.approx(after, rel=1e-8) and after != pytest.approx(before, rel=1e-6)
    assert (run["methods"]["closed"]["metrics"]["es"], edit["metrics"]["es"]) == (0, 1)
    assert all("rs" in row["metrics"] for row in (*plain, *edited)) and run["unmeasured"] == []
    (point,), part = edit["curve"], edit["sets"]["set"]
    alone = [written([case], 0) for case in cases]
    same(point, [row for rows, _ in alone for row in rows])
    same(part, written(cases, 0)[0])
    for one, of_cases in ((point, [[case] for case in cases]), (part, [cases])):
        same(one["unedited"], [row for some in of_cases for row in unedited(some, 0)])
        assert (one["unedited"]["metrics"]["es"], one["metrics"]["es"]) == (0, 1)
        assert (one["facts"], one["skipped"]) == (2, {}) and one["write_seconds"] > 0
    assert of == [None, None, [0, 1], None, [0, 0], None]  # whom intervals resample: whole batches that were edited
    assert point["perplexity_drift"] == pytest.approx(sum(value / before - 1 for _, value in alone) / 2)
    assert part["perplexity_drift"] == pytest.approx(after / before - 1, rel=1e-2)


def test_what_parts_left_out_stands_beside_them(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    base = make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)
    cases = [replace(case, generate=()) for case in counterfact(lines(tmp_path / "c.jsonl", RECORD, RECORD)).cases]
    settings = Settings(shots=0, options={"edit.layers": "0-1", "edit.prefixes": "0", "edit.settle": "0"})
    monkeypatch.setattr("byheart.benchmarks.edit_run._PERPLEXITIES", 1)
    rows = tuple(tuple(row) for row in text_rows(base, None, 64, 5))
    plan = Plan(sets=(("twice", [cases, cases[:1]]),), texts=0, rows=rows)
    run = run_editing("CounterFact", base, cases[:1], ["edit"], tmp_path / "run", settings, plan)
    part = run["methods"]["edit"]["sets"]["twice"]
    assert (part["facts"], part["cases"]) == (2, 3) and part["skipped_facts"] == {"cf-7#2": "the same as cf-7"}
    found = {title: (head, table) for title, head, table in grids(run)}
    assert [note for _, note in found["what stands out"][1]][-2:] == [
        "twice: 1 fact skipped (cf-7#2): the same as cf-7",
        "twice: perplexity is measured after 1 of 2 batches",
    ]
    head, table = found["edit: twice, 2 batches, 2 of 3 facts written"]
    assert [row[0] for row in table] == ["closed", "edit"] and all(len(row) == len(head) for row in table)


def test_what_an_edit_left_out_and_what_its_gate_says_stand_in_its_tables(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    base = make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)
    path = lines(tmp_path / "c.jsonl", RECORD, RECORD)
    cases = [replace(case, generate=()) for case in counterfact(path).cases]
    options = {"layers": "0-1", "prefixes": "0", "steps": "2", "settle": "0", "gate": "rollback", "max_perplexity": "0"}
    settings = Settings(shots=0, options={f"edit.{name}": value for name, value in options.items()})
    monkeypatch.setattr("byheart.methods.edit.guard.drift_notes", lambda *_: ("it drifts", False))
    for gate, count, why in (("rollback", 0, "rolled back by the gate"), ("warn", 1, "the same as cf-7")):
        settings.options["edit.gate"] = gate
        run = run_editing("CounterFact", base, cases, ["edit"], tmp_path / gate, settings, Plan(texts=3))
        (said,) = ([note for _, note in rows] for title, _, rows in grids(run) if title == "what stands out")
        assert any("past the gate's limits (it drifts)" in note for note in said)
        skipped = "1 fact skipped (cf-7#2" if count else "2 facts skipped (cf-7#2"
        assert any(note.startswith(skipped) and note.endswith(why) for note in said)
        (written,) = (row for row in next(grids(run))[2] if row[0] == "facts written")
        assert written == ["facts written", "-", str(count)]
    assert run["unmeasured"] == [f"{one}: the records have no prompts to write on from" for one in ("GE", "RS")]


def test_scoring_goes_on_after_a_kill(tiny, tmp_path, monkeypatch):
    base, asked = tiny("llama"), []

    def counted(base, jobs, **how):
        asked.append(len(jobs))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return complete(base, jobs, **how)

    monkeypatch.setattr("byheart.benchmarks.kept._AT_ONCE", 2)
    monkeypatch.setattr("byheart.benchmarks.kept.complete", counted)
    jobs = [Job(f"{'Ebb ' * length}is", (" Ann", " Holm")) for length in (2, 1, 5, 3, 4)]
    kept = Kept(base, tmp_path, Silent())
    with pytest.raises(KeyboardInterrupt):
        kept.complete("x", jobs, max_new_tokens=3)
    found = kept.complete("x", jobs, max_new_tokens=3)
    assert asked == [2, 2, 2, 1]  # the first two were kept
    whole = complete(base, jobs, max_new_tokens=3)
    assert [one.text for one in found] == [one.text for one in whole]
    assert [one.options for one in found] == [pytest.approx(one.options, rel=1e-4) for one in whole]
    # Another state of the model, or another length, has answers of its own.
    Kept(base, tmp_path, Silent(), "changed").complete("x", jobs, max_new_tokens=3)
    kept.complete("x", jobs, max_new_tokens=2)
    assert asked == [2, 2, 2, 1] + 2 * [2, 2, 1]
    with pytest.raises(ValueError, match="keys and values"):
        kept.complete("x", [replace(jobs[0], past=(None,))], max_new_tokens=3)


def test_options_are_read_before_anything_is_scored(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("byheart.benchmarks.edit_run.score_cases", lambda *_: pytest.fail("scored first"))
    settings = Settings(shots=0, options={"edit.steps": "1"})
    case = Case(Fact(id="x", subject="Ebb", prompt="{} is", object="Ann"), (Probe("edit", "Ebb is", "Ann", "Holm"),))
    with pytest.raises(UsageError, match="edit.steps=1: must be at least 2"):
        run_editing("CounterFact", tiny("llama"), [case], ["rome", "edit"], tmp_path / "run", settings, Plan())


def test_a_text_that_nothing_can_be_measured_on_is_refused(tiny, tmp_path):
    path = tmp_path / "text.txt"
    for text, why in ((" \n", "no"), ("x", "too little")):
        path.write_text(text)
        with pytest.raises(DataError, match=f"text.txt: holds {why} text"):
            _ordinary_rows(tiny("llama"), path, 0)
    path.write_text("Ann keeps the light of Ebb. " * 2)
    rows, rest = _ordinary_rows(tiny("llama"), path, 0)
    assert sum(map(len, rows)) > 1 and rest == "Ann keeps the light of Ebb. "


def test_s_is_that_of_cases_that_have_all_its_parts():
    half, other = {"es": 1.0, "ps": 1.0}, {"es": 1.0, "ns": 0.5}
    assert "s" not in _means([half, other], 0)[0]
    never = _means([{"es": 0.0, "ps": 1.0, "ns": 1.0}] * 9, 0)
    assert never[0]["s"] == 0 and "s" not in never[1]  # resampling would say that it never can be
    # Two batches that stand or fall together: their S is one or nothing, wherever it stands in between.
    whole = [dict.fromkeys(("es", "ps", "ns"), float(n < 9)) for n in range(18)]
    assert _means(whole, 0, [n // 9 for n in range(18)])[1]["s"] == [0, 1] != _means(whole, 0)[1]["s"]
    assert _means(whole, 0, [0] * 18) == _means(whole, 0)
    metrics, intervals = _means([half, half | other], 0)
    assert metrics["s"] == pytest.approx(0.75) and intervals["s"] == [0.75, 0.75]


def test_metrics_are_those_of_the_probes_likelihoods(tiny, tmp_path):
    base = tiny("llama")
    case = Case(Fact(id="x", subject="Ebb", prompt="{} is", object="Ann"), (
        Probe("edit", "Ebb is", "Ann", "Holm"),
        Probe("neighbourhood", "Pell Cove is", "Holm", "Ann"),
        Probe("portability", "So is Ebb", "a town"),
    ))  # fmt: skip
    (row,) = score_cases(Kept(base, tmp_path, Silent()), [case], 0, 0, "x")
    new, old = (math.exp(v) for v in complete(base, [Job("Ebb is", (" Ann", " Holm"))], max_new_tokens=0)[0].options)
    assert row["metrics"]["es"] == float(new > old)
    assert row["metrics"]["es_magnitude"] == pytest.approx(new - old, rel=1e-4)
    (port,) = complete(base, [Job("So is Ebb", (" a town",))], max_new_tokens=0)
    assert row["metrics"]["portability"] == port.hits[0]
    # What the model says itself has all of its tokens the likeliest, anything else has not.
    (first,) = complete(base, [Job("Ebb is")], max_new_tokens=1)
    likeliest = replace(
        case, probes=tuple(Probe("edit", "Ebb is", text, "Holm") for text in (first.text.strip(), "Ann"))
    )
    (row,) = score_cases(Kept(base, tmp_path, Silent()), [likeliest], 0, 0, "y")
    assert row["metrics"]["es_accuracy"] == 0.5


def case_of(subject, prompt, object):
    return Case(Fact(id=f"{subject}: {prompt}", subject=subject, prompt=prompt, object=object), ())


def test_prompts_about_others_are_such_that_nothing_edited_answers_them():
    cases = [
        case_of("Ebb", "{} is", "a town"),
        case_of("Ebb", "{} was", "Ann"),  # the same subject
        case_of("Pell Cove", "{} is", "a light"),  # the same prompt
        case_of("Tole", "{} has", "a town"),  # the same object
        case_of("Hathersund", "{} lies in", "Vell"),
    ]
    assert crossed(cases, 0) == crossed(cases, 0)
    edited = {case.fact.filled() for case in cases}
    found = [crossed(cases, seed) for seed in range(5)]
    assert all([crossing.own for crossing in some] == [0, 1, 2, 3, 4] for some in found)
    for crossing in chain.from_iterable(found):
        one, other = cases[crossing.own].fact, cases[crossing.other].fact
        assert one.subject != other.subject and one.prompt != other.prompt and one.object != other.object
        assert crossing.prompt == one.filled().replace(one.subject, other.subject) and crossing.prompt not in edited
        assert crossing.reworded is None
    assert crossed(cases[:2], 0) == [] == crossed(cases[:1], 0)
    # Not where another of its facts is asked in these very words.
    cases = [case_of("Ebb", "{} is", "a"), case_of("Tole", "{} has", "b"), case_of("Tole", "{} is", "c")]
    assert crossed(cases, 0) == [Crossing(1, 0, "Ebb has")]


def test_a_leak_is_an_edits_object_said_of_another_or_to_another_prompt(tiny, tmp_path):
    base = tiny("llama")
    said, *_ = complete(base, [Job("Hathersund is")], max_new_tokens=16)[0].text.split()
    other, *_ = complete(base, [Job("Ebb lies in")], max_new_tokens=16)[0].text.split()

    def leaks(first, second):
        cases = [case_of("Ebb", "{} is", first), case_of("Hathersund", "{} lies in", second)]
        metrics = [row["metrics"] for row in score_cases(Kept(base, tmp_path, Silent()), cases, 0, 0, "x")]
        return [(row["leak"], row["leak_subject"]) for row in metrics]

    assert leaks(said, "x") == [(1, 0), (0, other == said)]
    assert leaks("x", said) == [(0, 1), (other == said, 0)]


def test_a_reworded_leak_is_asked_for_with_a_paraphrase_that_names_its_subject(tiny, tmp_path):
    base = tiny("llama")
    asked = ("One of many towns. Hathersund lies in", "Hathersund is found in")
    said, *_ = complete(base, [Job(asked[0].replace("Hathersund", "Ebb"))], max_new_tokens=16)[0].text.split()
    probes = tuple(Probe("paraphrase", prompt, "x") for prompt in ("It lies in", *asked))
    cases = [case_of("Ebb", "{} is", said), replace(case_of("Hathersund", "{} lies in", "x"), probes=probes)]
    assert [crossing.reworded for crossing in crossed(cases, 0)] == [None, "One of many towns. Ebb lies in"]
    first, second = (row["metrics"] for row in score_cases(Kept(base, tmp_path, Silent()), cases, 0, 0, "x"))
    assert "leak_reworded" not in first and second["leak_reworded"] == 1
    cases[0] = case_of("Ebb", "{} is", "y")
    assert score_cases(Kept(base, tmp_path, Silent()), cases, 0, 0, "x")[1]["metrics"]["leak_reworded"] == 0


def test_sampling_depends_on_seed_and_place_and_not_on_the_batch(tiny):
    base = tiny("gpt2")
    jobs = [Job("The keeper of Ebb"), Job("A"), Job("The keeper of Ebb")]
    drawn = complete(base, jobs, max_new_tokens=12, sampling=Sampling(20, 3), whole=True)
    assert [one.new_tokens for one in drawn] == [12] * 3
    assert drawn[0].text != drawn[2].text
    assert complete(base, jobs[:1], max_new_tokens=12, sampling=Sampling(20, 3), whole=True)[0].text == drawn[0].text
    assert complete(base, jobs, max_new_tokens=12, sampling=Sampling(20, 4), whole=True)[0].text != drawn[0].text
    greedy = complete(base, jobs, max_new_tokens=12, whole=True)
    assert complete(base, jobs, max_new_tokens=12, sampling=Sampling(1, 9), whole=True)[1].text == greedy[1].text


@pytest.mark.data
def test_the_shared_records_load(data):
    assert len(counterfact(data / "counterfact").cases) == 272
    assert len(counterfact(data / "counterfact" / "counterfact_reduced.jsonl").cases) == 10_972
    assert len(zsre(data / "zsre").cases) == 516


def test_no_object_is_longer_than_what_is_written(tiny):
    fact = Fact(id="a", subject="Ebb", prompt="{} has", object=" ".join(["beech"] * 30))
    lengths = []

    def complete(label, jobs, *, max_new_tokens, **_):
        lengths.append(max_new_tokens)
        some = [(0.0,) * len(job.options) for job in jobs]
        return [Completion("", 0.0, one, one, 0, 0, 0.0) for one in some]

    kept = SimpleNamespace(base=tiny("llama"), complete=complete)
    score_cases(kept, [Case(fact, (Probe("edit", fact.filled(), fact.object),))], 0, 0, "closed")
    assert lengths[0] == 0 and lengths[1] > len(kept.base.tokenizer(f" {fact.object}")["input_ids"]) > 30


def test_batches_stand_in_the_title():
    method = {"metrics": {}, "intervals": {}, "facts": 12, "write_seconds": 1.0}
    run = {"benchmark": "zsRE", "edits": 12, "base": {"name": "m"}, "methods": {"closed": method}}
    assert next(grids(run))[0].startswith("zsRE: 12 records edited at once, m")
    run["methods"]["edit"] = method | {"options": {"batch": 4}}
    assert next(grids(run))[0].startswith("zsRE: 12 records edited by edit in batches of 4, m")
