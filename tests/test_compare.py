"""The main job: methods on the same questions, what is recorded, what is picked up again, what differs."""

import json
import os

import pytest

from byheart import retrieve
from byheart.answer import answer_all, read_answers
from byheart.compare import choose_questions, compare, pairs, question_metrics, scored, summarise
from byheart.errors import DataError, UsageError
from byheart.methods import METHODS, Answer, LearnReport, Settings, method_class, parse_methods
from byheart.prompt import FORM_EXAMPLES, PromptFormat, as_sentence, choose_examples
from byheart.report import before_after, headline, write_report
from byheart.rows import Question
from byheart.score import contains
from byheart.segment import Passage

CONTROLS = ["closed", "context", "gold", "shuffled"]
ASK = Question(id="q", question="who", answers=["Mara Tole", "Tole"], documents=["a", "b"])
PAGE = Passage("a", "Ebb", "The keeper of Ebb is Mara Tole.", 0, 31)


def test_one_answers_metrics():
    answer = Answer("q", text="the Tole", reference=-1.0, ranked=("x", "a", "a", "b"))
    found = question_metrics(ASK, answer)
    assert found["em"] == 1 and found["f1"] == 1 and found["contains"] == 1 and found["abstained"] == 0
    assert found["answer_probability"] == pytest.approx(0.36788, abs=1e-4)
    assert found["recall@1"] == 0 and found["recall@5"] == 1 and found["mrr"] == 0.5
    assert question_metrics(ASK, Answer("q", skipped="why")) == {}
    # What does not stand in the passages that were read is not supported by them; declining claims nothing.
    said = {
        text: question_metrics(ASK, Answer("q", text=text, evidence=(PAGE,))) for text in ("Mara", "Nobody else", "")
    }
    assert said["Mara"]["hallucination"] == 0 and said["Nobody else"]["hallucination"] == 1
    assert "hallucination" not in question_metrics(ASK, Answer("q", text="Mara")) and "hallucination" not in said[""]
    none = Question(id="n", question="who", answerable=False)
    assert question_metrics(none, Answer("n", text="Unknown"))["em"] == 1
    assert question_metrics(none, Answer("n", text="Mara"))["em"] == 0
    pick = Question(id="c", question="?", choices=["yes", "no"], answers=["no"])
    found = question_metrics(pick, Answer("c", text="maybe", choice="no", choice_calibrated="yes"))
    assert (found["accuracy"], found["accuracy_calibrated"], found["em"]) == (1, 0, 0)
    open_end = Question(id="o", question="?", choices=["yes", "no"], answerable=False)
    missed = Answer("o", text="", choice="no", choice_calibrated="no", ranked=())
    assert "accuracy" not in question_metrics(open_end, missed)
    rows = scored([open_end], [missed])
    assert "micro_f1" not in summarise([open_end], [missed], rows, LearnReport(), 0)["metrics"]
    # Five passages of one page are five passages: the sixth is not behind the first five.
    deep = question_metrics(ASK, Answer("q", text="x", ranked=("x", "x", "a", "a", "a", "b")))
    assert (deep["recall@5"], deep["recall@10"], deep["mrr"]) == (0.5, 1, pytest.approx(1 / 3))
    # A search that found nothing is a miss, not a question that does not count.
    assert question_metrics(ASK, Answer("q", text="x", ranked=()))["recall@5"] == 0


def test_an_example_is_found_whatever_the_lines_of_its_evidence_hold(tmp_path):
    row = {
        "question": "q",
        "question_text": "Who?",
        "answers": ["Ann"],
        "evidence": [{"text": "one\u2028two\x85three"}],
    }
    rows = [
        row | {"method": "closed", "text": "Bo", "metrics": {"em": 0}},
        row | {"method": "memory", "text": "Ann", "metrics": {"em": 1}},
    ]
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
    (tmp_path / "answers.jsonl").write_text(text, encoding="utf-8")
    assert before_after(tmp_path) == "Who? before: 'Bo', with memory: 'Ann'"


def test_answers_are_those_of_the_ledger_as_it_was_learnt(tiny, world, tmp_path, monkeypatch):
    base, settings = tiny("llama"), Settings(shots=0)
    plain = method_class("closed").learn
    compare(world, base, ["closed"], tmp_path, settings, limit=2)
    marks = [json.loads((tmp_path / "answers" / "closed.jsonl").read_text().partition("\n")[0])]

    def learn(self, ledger, progress=None):
        report = plain(self, ledger)
        ledger.insert([Question(id="late", question="Who came late?", answers=["Bo"], split="train")])
        return report

    with monkeypatch.context() as patch:  # the ledger goes on while something is learnt
        patch.setattr(method_class("closed"), "learn", learn)
        compare(world, base, ["closed"], tmp_path, settings, limit=2)
    compare(world, base, ["closed"], tmp_path / "new", settings, limit=2)
    for folder in (tmp_path, tmp_path / "new"):
        marks.append(json.loads((folder / "answers" / "closed.jsonl").read_text().partition("\n")[0]))
    before, during, after = marks
    assert before == during != after


def test_bm25_is_built_when_it_is_learnt_searched_or_kept_and_not_with_every_change(tiny, world, tmp_path, monkeypatch):
    built, plain = [], retrieve.Lexical
    monkeypatch.setattr(retrieve, "Lexical", lambda index: built.append(len(index)) or plain(index))
    method = method_class("context")(tiny("llama"), Settings(shots=0), tmp_path / "work")
    method.learn(world)
    assert len(built) == 1
    start = world.revision
    for document in list(world.documents())[:3]:
        world.retract("document", document.id)
    for change in world.history(since=start):
        method.revise(change)
    assert len(built) == 1
    method.save_pretrained(tmp_path / "kept")
    assert len(built) == 2 and built[1] < built[0]
    ask = next(iter(world.questions(["test"])))
    (answer,) = method.answer([ask])
    again = method_class("context").from_pretrained(tmp_path / "kept", tiny("llama"))
    stamp = (tmp_path / "kept" / "index" / "bm25" / "stamp.json").stat().st_mtime_ns
    assert again.answer([ask])[0].ranked == answer.ranked
    assert (tmp_path / "kept" / "index" / "bm25" / "stamp.json").stat().st_mtime_ns == stamp


def test_as_many_wrong_passages_as_others_show(tiny, world, minilm, tmp_path):
    question = next(iter(world.questions(["test"])))
    shown = {}
    for k in (1, 3):
        method = method_class("shuffled")(tiny("llama"), Settings(k=k, shots=0), tmp_path)
        method.learn(world)
        (shown[k],) = method.passages([question])
    assert shown[3][0] == shown[1][0] and len({one.document for one in shown[3]}) == 3
    assert not {one.document for one in shown[3]} & {*question.documents}


def test_an_example_goes_once_it_is_measured(tiny, world, tmp_path):
    method = method_class("closed")(tiny("llama"), Settings(shots=3), tmp_path)
    method.learn(world)
    first = method.form.examples[0].question
    (row,) = [one for one in world.questions(["train"]) if one.question == first]
    start = world.revision
    world.revise(row.model_copy(update={"split": "test"}))
    (change,) = world.history(since=start)
    method.revise(change)
    assert first not in {one.question for one in method.form.examples} and len(method.form.examples) == 2


def test_a_skipped_question_is_counted_and_not_scored():
    questions = [ASK, ASK.model_copy(update={"id": "r"})]
    answers = [Answer("q", text="Tole", seconds=0.5), Answer("r", skipped="no document")]
    rows = scored(questions, answers)
    found = summarise(questions, answers, rows, LearnReport(seconds=2, bytes=3), seed=0)
    assert found["metrics"]["em"] == 1 and found["asked"] == 1 and found["skipped"] == {"no document": 1}
    assert (found["query_ms"], found["write_seconds"], found["bytes"]) == (500, 2, 3)
    others = scored(questions, [Answer("q", text="x"), Answer("r", text="Tole")])
    (em, *_) = pairs({"one": rows, "two": others}, 0)
    assert (em["method"], em["against"], em["questions"], em["difference"]) == ("two", "one", 1, -1)


def test_the_prompt_is_one_format_for_all(tokenizer):
    form = PromptFormat(tokenizer)
    assert form.prompt("who keeps ebb") == "Question: Who keeps ebb?\nAnswer:"
    assert form.prompt("who keeps ebb", [PAGE]) == (
        "Question: Who keeps ebb?\nTitle: Ebb\nText: The keeper of Ebb is Mara Tole.\nQuestion: Who keeps ebb?\nAnswer:"
    )
    assert form.prompt("so?", None, ["yes", "no"]) == "Question: So?\nOptions: yes; no\nAnswer:"
    assert as_sentence(" what  is ____") == "What is ____?"
    assert as_sentence("誰が燈臺を守るか？") == "誰が燈臺を守るか？"
    with pytest.raises(UsageError, match="no chat template"):
        PromptFormat(tokenizer, chat=True)


def test_a_chat_prompt_has_one_bos(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    chatty = deepcopy(tokenizer)
    chatty.add_special_tokens({"bos_token": "<s>"})
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert PromptFormat(chatty, chat=True).prompt("who") == "<s>[Question: Who?\nAnswer:]"
    bos = ("<s>", chatty.bos_token_id)
    chatty.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    prompt = PromptFormat(chatty, chat=True).prompt("who")
    assert chatty(prompt)["input_ids"].count(chatty.bos_token_id) == 1


def test_examples_come_from_training_questions_alone(world, tokenizer):
    chosen = choose_examples(world, 6, 0, tokenizer.backend_tokenizer)
    train = {q.question for q in world.questions(["train"])}
    assert len(chosen) == 6 and all(e.question in train and contains(e.passage.text, [e.answer]) for e in chosen)
    assert chosen == choose_examples(world, 6, 0, tokenizer.backend_tokenizer)
    closed = PromptFormat(tokenizer, chosen).prompt("who?")
    assert "Text:" not in closed and closed.count("Question:") == 7
    for question in world.questions(["train"]):
        world.retract("question", question.id)
    form = choose_examples(world, 6, 0, tokenizer.backend_tokenizer)
    assert form == list(FORM_EXAMPLES) and all(e.answer in e.passage.text for e in form)
    assert choose_examples(world, 0, 0, tokenizer.backend_tokenizer) == []


def test_questions_are_drawn_by_the_seed_and_never_from_training(world):
    every = choose_questions(world, ["validation", "test"], None, 0)
    assert len(every) == 226 and all(q.split != "train" for q in every)
    some = choose_questions(world, ["test"], 30, 0)
    assert some == choose_questions(world, ["test"], 30, 0) != choose_questions(world, ["test"], 30, 1)
    assert len({q.kind for q in some}) == 4
    with pytest.raises(DataError, match="no questions of split validation"):
        choose_questions(world, ["validation"], None, 0)


def test_method_names():
    assert parse_methods("all") == [*CONTROLS, "memory", "prefix", "edit"] and parse_methods("gold, closed,gold") == [
        "gold",
        "closed",
    ]
    for bad in ("", "nothing", "closed,nope"):
        with pytest.raises(UsageError, match="--methods"):
            parse_methods(bad)
    for name in METHODS:
        assert method_class(name).name == name


class Counting:
    """A method that remembers what it was asked."""

    name = "counting"

    def __init__(self):
        self.asked = []

    def attached(self):
        from contextlib import nullcontext

        return nullcontext()

    def answer(self, questions, progress=None):
        self.asked += [q.id for q in questions]
        return [Answer(q.id, text=q.id, evidence=(PAGE,)) for q in questions]


def test_an_encoder_that_is_needed_is_loaded_before_any_work(tiny, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise DataError("no encoder")

    monkeypatch.setattr("byheart.methods.controls.load_encoder", refused)
    for name, shots in (("context", 0), ("gold", 0), ("prefix", 0), ("edit", 5)):
        with pytest.raises(DataError, match="no encoder"):
            method_class(name)(tiny("llama"), Settings(shots=shots), tmp_path)
    for name in ("closed", "edit", "memory"):
        assert method_class(name)(tiny("llama"), Settings(shots=0), tmp_path).used_encoder is None


def test_answers_are_picked_up_after_a_kill(tmp_path):
    questions = [Question(id=f"q{n}", question="?", answers=["x"]) for n in range(300)]
    path = tmp_path / "a.jsonl"
    whole = answer_all(Counting(), questions, path, "mark")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:150]) + lines[150][:20])  # a kill in the middle of a line
    second = Counting()
    assert answer_all(second, questions, path, "mark") == whole
    assert second.asked == [f"q{n}" for n in range(149, 300)]
    assert len(read_answers(path, "mark")) == 300
    third = Counting()
    answer_all(third, questions, path, "another mark")  # another model, ledger or setting: asked anew
    assert len(third.asked) == 300


@pytest.fixture(scope="module")
def run(smollm, tmp_path_factory):
    """The real main job on a few questions of the example world."""
    from byheart.formats import import_files
    from byheart.ledger import Ledger
    from conftest import WORLD

    folder = tmp_path_factory.mktemp("run")
    with Ledger(folder / "world.db", create=True) as ledger:
        import_files(ledger, [WORLD / f"{name}.jsonl" for name in ("documents", "facts", "questions")])
        before = {k: v.clone() for k, v in smollm.model.state_dict().items()}
        found = compare(ledger, smollm, CONTROLS, folder, Settings(shots=2), limit=16)
        after = smollm.model.state_dict()
        assert all(before[k].equal(after[k]) for k in before)
    return folder, found


@pytest.mark.real
def test_the_main_job_writes_what_the_design_promises(run):
    folder, found = run
    on_disk = json.loads((folder / "run.json").read_text())
    assert on_disk == json.loads(json.dumps(found))
    assert set(on_disk["methods"]) == set(CONTROLS)
    for method in on_disk["methods"].values():
        assert {"metrics", "intervals", "write_seconds", "bytes", "query_ms"} <= set(method)
        assert all(0 <= value <= 1 for value in method["metrics"].values())
        for key, (low, high) in method["intervals"].items():
            assert low <= method["metrics"][key] <= high
    assert {"mrr", "recall@1", "recall@5"} <= set(on_disk["methods"]["context"]["metrics"])
    assert "mrr" not in on_disk["methods"]["gold"]["metrics"]
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 16 * 4
    for row in rows:
        given = [p["document"] for p in row["evidence"]]
        assert (not given) == (row["method"] == "closed")
        assert row["method"] != "context" or (len(given) == 1 and len(row["ranked"]) == 10)
        assert row["method"] != "shuffled" or not contains(row["evidence"][0]["text"], row["answers"])


@pytest.mark.real
def test_a_wrong_passage_is_wrong_for_every_question(world, smollm, tmp_path):
    method = method_class("shuffled")(smollm, Settings(shots=0), tmp_path)
    method.learn(world)
    questions = list(world.questions())
    drawn = method.passages(questions)
    # Unanswerable questions too, whose own page no answer would give away.
    assert all(p.document not in q.documents for q, passages in zip(questions, drawn, strict=True) for p in passages)
    assert len({passages[0].document for passages in drawn}) > 30
    assert method.passages(questions[::-1])[::-1] == drawn


@pytest.mark.real
def test_knowing_the_passage_helps_and_a_wrong_one_does_not(run):
    metrics = {name: method["metrics"] for name, method in run[1]["methods"].items()}
    assert metrics["gold"]["answer_probability"] > 3 * metrics["closed"]["answer_probability"]
    assert metrics["gold"]["contains"] > metrics["shuffled"]["contains"]


@pytest.mark.real
def test_a_second_run_asks_nothing_again_and_learnt_methods_come_back(run, smollm, tmp_path, monkeypatch):
    from byheart.ledger import Ledger
    from byheart.methods import controls

    folder, found = run
    with Ledger(folder / "world.db") as ledger:
        method = method_class("context")(smollm, Settings(shots=2), folder)
        method.learn(ledger)
        method.save_pretrained(tmp_path / "saved")
        again = method_class("context").from_pretrained(tmp_path / "saved", smollm)
        question = next(ledger.questions(["test"]))
        assert again.answer([question])[0].text == method.answer([question])[0].text
        with pytest.raises(UsageError, match="gold: needs questions with known documents"):
            method_class("gold")(smollm, Settings(), folder).save_pretrained(tmp_path / "gold")
        with pytest.raises(DataError, match="holds context, not gold"):
            method_class("gold").from_pretrained(tmp_path / "saved", smollm)
        monkeypatch.setattr(controls, "read", lambda *a, **k: pytest.fail("asked again"))
        once_more = compare(ledger, smollm, ["gold", "closed"], folder, Settings(shots=2), limit=16)
    for name in ("gold", "closed"):
        assert once_more["methods"][name]["metrics"] == found["methods"][name]["metrics"]


@pytest.mark.real
def test_the_report_is_one_file_that_needs_nothing_else(run):
    folder, _ = run
    page = write_report(folder).read_text()
    assert headline(json.loads((folder / "run.json").read_text())) in page
    for outside in ('src="', '<link rel="stylesheet', "@import", "url("):
        assert outside not in page
    assert page.count("<svg") == 4
    # The data island is JSON, and nothing in it can end the script element.
    island = page.split('id="data">')[1].split("</script>")[0]
    shown = json.loads(island)
    assert len(shown["questions"]) == 16 and "<" not in island
    assert os.listdir(folder).count("report.html") == 1
    with pytest.raises(DataError, match="run.json: missing"):
        write_report(folder / "answers")
