"""Natural Questions and TriviaQA from their published files."""

import json
from collections import Counter

import pytest

from byheart.benchmarks import load_benchmark
from byheart.benchmarks.openqa import nq, triviaqa
from byheart.errors import DataError


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(benchmark):
    return [row for row in benchmark.rows() if hasattr(row, "question")]


def test_the_official_nq_open_files(tmp_path):
    write(tmp_path / "NQ-open.train.jsonl", [{"question": "who wrote it", "answer": ["A"]}])
    write(tmp_path / "NQ-open.dev.jsonl", [{"question": "when was it", "answer": ["1976", "in 1976"]}])
    found = questions(nq(str(tmp_path)))
    assert {q.split: q.answers for q in found} == {"train": ["A"], "validation": ["1976", "in 1976"]}
    (single,) = questions(nq(str(tmp_path / "NQ-open.dev.jsonl")))
    assert single in found


def test_a_training_question_that_is_also_asked_is_dropped(tmp_path):
    write(
        tmp_path / "train.jsonl", [{"question": "Who  wrote it", "answer": ["A"]}, {"question": "b", "answer": ["B"]}]
    )
    write(tmp_path / "dev.jsonl", [{"question": "who wrote it", "answer": ["A"]}])
    benchmark = nq(str(tmp_path))
    assert Counter(q.split for q in questions(benchmark)) == {"validation": 1, "train": 1}
    assert benchmark.origin["questions_dropped_as_repeats_or_leaks"] == 1


def test_two_data_sets_are_not_mixed_in_one_ledger(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"question": f"asked in {name}", "answer": ["x"]}])
    load_benchmark(nq(str(tmp_path / "a.jsonl")), tmp_path / "l.db")[0].close()
    with pytest.raises(DataError, match="rows of other data too; name another --out"):
        load_benchmark(nq(str(tmp_path / "b.jsonl")), tmp_path / "l.db")
    # The refused rows did not get in: the first data still loads.
    with load_benchmark(nq(str(tmp_path / "a.jsonl")), tmp_path / "l.db")[0] as ledger:
        assert [q.question for q in ledger.questions()] == ["asked in a"]


def test_a_corpus_in_dprs_form(tmp_path):
    (tmp_path / "psgs_w100.tsv").write_text('id\ttext\ttitle\n1\t"A ""quoted"" text."\tTitle\n2\tMore.\tOther\n')
    data = write(tmp_path / "q" / "dev.jsonl", [{"question": "q", "answer": ["a"]}])
    documents = [r for r in nq(str(data), tmp_path / "psgs_w100.tsv").rows() if hasattr(r, "text")]
    assert [(d.id, d.title, d.text) for d in documents] == [("1", "Title", 'A "quoted" text.'), ("2", "Other", "More.")]


@pytest.mark.parametrize("odd", [b"3\t\xff\tTitle\n", b'3\t"' + b"x" * 200_000 + b'"\tTitle\n'])
def test_a_corpus_that_is_no_text_is_named(tmp_path, odd):
    (tmp_path / "psgs_w100.tsv").write_bytes(b"id\ttext\ttitle\n1\tMore.\tOther\n" + odd)
    data = write(tmp_path / "q" / "dev.jsonl", [{"question": "q", "answer": ["a"]}])
    with pytest.raises(DataError, match=r"psgs_w100.tsv: cannot be read after line \d"):
        list(nq(str(data), tmp_path / "psgs_w100.tsv").rows())


def test_triviaqa_in_its_published_form(tmp_path):
    entry = {"QuestionId": "t1", "Question": "Which?", "Answer": {"Value": "Bh", "Aliases": ["Bh", "BH"]}}
    (tmp_path / "unfiltered-web-dev.json").write_text(json.dumps({"Data": [entry]}))
    corpus = write(tmp_path / "corpus.jsonl", [{"id": 7, "title": None, "text": "A page."}])
    rows = list(triviaqa(str(tmp_path), corpus).rows())
    assert rows[0].id == "7" and rows[1].answers == ["Bh", "BH"] and rows[1].split == "validation"


def test_parquet_as_the_hub_serves_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    for split in ("train", "validation"):
        table = datasets.Dataset.from_list([{"question": f"asked in {split}", "answer": ["x", "y"]}])
        (tmp_path / "nq_open").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "nq_open" / f"{split}-00000-of-00001.parquet")
    found = questions(nq(str(tmp_path / "nq_open")))
    assert [(q.question, q.split) for q in found] == [
        ("asked in train", "train"),
        ("asked in validation", "validation"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "dev.jsonl:1: not JSON"),
        ('{"answer": ["x"]}', 'dev.jsonl:1: "question" is missing'),
        ('{"question": "q", "answer": {"text": 3}}', "needs a text and a list of answers"),
        ('{"question": "q", "answer": ["x", null]}', "needs a text and a list of answers"),
        ('{"question": "q", "answer": ["\\ud800"]}', "dev.jsonl:1: holds half a character"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, said):
    (tmp_path / "dev.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=said):
        questions(nq(str(tmp_path)))


def test_answers_that_are_numbers_are_read_as_they_are_written(tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"question": "when", "answer": [1969, "July 1969"]}\n')
    (one,) = questions(nq(str(tmp_path)))
    assert one.answers == ["1969", "July 1969"]


def test_missing_data_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        nq(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no question files"):
        nq(str(tmp_path))
    write(tmp_path / "dev.jsonl", [{"question": "q", "answer": ["a"]}])
    with pytest.raises(DataError, match="--corpus"):
        nq(str(tmp_path), tmp_path / "none.jsonl")
    write(tmp_path / "passages.jsonl", [{"id": 1, "text": " "}])
    with pytest.raises(DataError, match=r"passages.jsonl:1: the text is empty"):
        list(nq(str(tmp_path)).rows())


@pytest.mark.data
def test_the_real_rows(data, tmp_path):
    ledger, origin = load_benchmark(nq(str(data / "nq")), tmp_path / "l.db")
    assert ledger.count("document") == 7_699
    asked = list(ledger.questions(["validation"]))
    assert len(asked) == 500
    texts = {q.question.lower() for q in ledger.questions(["train"])}
    assert len(texts) > 1_000 and not any(q.question.lower() in texts for q in asked)
    assert all(ledger.document(q.documents[0]) for q in asked)
    assert origin["title"].startswith("Natural Questions")
    again, _ = load_benchmark(nq(str(data / "nq")), tmp_path / "l.db")
    assert again.revision == ledger.revision
    trivia = questions(triviaqa(str(data / "triviaqa"), data / "nq" / "passages.jsonl"))
    assert len(trivia) > 4_400
