"""The ledger: files in, changes with their history, and what the check finds."""

import gzip
import json
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byheart.check import check
from byheart.errors import DataError
from byheart.formats import import_files
from byheart.ledger import Ledger
from byheart.rows import Document, Fact, Neighbour, Question, with_place

DOC = Document(id="d1", title="Ebb", text="The keeper of Ebb is Mara Tole.")
FACT = Fact(
    id="f1",
    subject="Ebb",
    prompt="The keeper of {} is",
    object="Mara Tole",
    paraphrases=["Who keeps {}? It is"],
    neighbours=[Neighbour(prompt="The keeper of Flow is", object="Jon Rill")],
    document="d1",
    span=(0, 31),
)
ASK = Question(id="q1", question="Who keeps Ebb?", answers=["Mara Tole"], facts=["f1"], documents=["d1"])


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "l.db", create=True)


def test_rows_come_back_as_they_went_in(ledger):
    assert ledger.insert([DOC, FACT, ASK], source="test") == 3
    assert list(ledger.documents()) == [DOC]
    assert list(ledger.facts()) == [FACT]
    assert list(ledger.questions()) == [ASK]
    assert FACT.filled() == "The keeper of Ebb is"


def test_history_holds_every_version_with_time_and_source(ledger):
    ledger.insert([FACT], source="a")
    new = FACT.model_copy(update={"object": "Jon Rill", "former_object": "Mara Tole"})
    ledger.revise(new, source="b")
    ledger.retract("fact", "f1", source="c")
    ledger.revise(FACT, source="d")
    changes = list(ledger.history("f1"))
    assert [(c.action, c.source) for c in changes] == [
        ("insert", "a"),
        ("revise", "b"),
        ("retract", "c"),
        ("revise", "d"),
    ]
    assert [(c.before, c.after) for c in changes] == [(None, FACT), (FACT, new), (new, None), (None, FACT)]
    assert [c.time for c in changes] == sorted(c.time for c in changes)
    assert ledger.revision == 4


def test_adding_the_same_rows_twice_changes_nothing_even_after_a_revision(ledger):
    ledger.insert([DOC, FACT])
    assert ledger.insert([DOC, FACT]) == 0
    ledger.revise(FACT.model_copy(update={"object": "Jon Rill"}))
    assert ledger.insert([FACT]) == 0
    assert next(ledger.facts()).object == "Jon Rill"


def test_wrong_changes_are_refused_and_leave_the_ledger_alone(ledger):
    ledger.insert([DOC])
    with pytest.raises(DataError, match="other content"):
        ledger.insert([FACT, DOC.model_copy(update={"text": "Another text."})])
    assert ledger.count("fact") == 0  # all or none
    with pytest.raises(DataError, match='no fact "f1" to revise'):
        ledger.revise(FACT)
    with pytest.raises(DataError, match='no fact "nope" to retract'):
        ledger.retract("fact", "nope")


_steps = st.lists(
    st.tuples(
        st.sampled_from(["insert", "revise", "retract"]), st.sampled_from("abc"), st.sampled_from(["x", "y", "z"])
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(_steps)
def test_any_sequence_of_changes_ends_where_a_plain_dict_does(tmp_path_factory, steps):
    ledger = Ledger(tmp_path_factory.mktemp("p") / "l.db", create=True)
    first: dict[str, str] = {}
    now: dict[str, str | None] = {}
    events = 0
    for action, id, text in steps:
        row = Document(id=id, text=text)
        try:
            if action == "insert":
                events += ledger.insert([row])
                assert id not in now or (now[id] is not None and text in (now[id], first[id]))
                if id not in now:
                    first[id] = now[id] = text
            elif action == "revise":
                events += ledger.revise(row) == "revised"
                assert id in now
                now[id] = text
            else:
                events += ledger.retract("document", id) == "retracted"
                now[id] = None
        except DataError:
            assert (id not in now) if action != "insert" else (id in now)
    assert {d.id: d.text for d in ledger.documents()} == {k: v for k, v in now.items() if v is not None}
    assert ledger.revision == events
    # History replays to the same state.
    replayed = {c.id: c.after for c in ledger.history()}
    assert {k: v.text for k, v in replayed.items() if v is not None} == {k: v for k, v in now.items() if v is not None}
    ledger.close()


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_bad_lines_are_all_listed_and_nothing_is_imported(ledger, tmp_path):
    good = {"type": "document", "id": "d1", "text": "Fine."}
    path = write(
        tmp_path / "rows.jsonl",
        good,
        "{not json",
        {"type": "document", "id": "d2", "text": "  "},
        {"type": "fact", "id": "f", "subject": "s", "prompt": "no place", "object": "o"},
        {"question": "Who?", "answer": ["x"]},
        "[1, 2]",
        {"type": "planet", "id": "p"},
        {"colour": "red"},
    )
    with pytest.raises(DataError) as caught:
        import_files(ledger, [path])
    text = str(caught.value)
    assert f"{path}:2: not JSON" in text
    assert f"{path}:3:" in text and "text is empty" in text
    assert f'{path}:4: "prompt"' in text and '"{}" exactly once' in text
    assert f'{path}:5: "answer": unknown field' in text
    assert f"{path}:6: not a JSON object" in text
    assert 'unknown type "planet"' in text
    assert f"{path}:8:" in text
    assert "7 bad lines" in text
    assert ledger.count("document") == 0 and ledger.revision == 0
    report = import_files(ledger, [path], skip_bad=True)
    assert report.bad == 7 and report.outcomes == {"inserted": 1}


def test_broken_files_are_named(ledger, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"type": "document", "text": "\xff"}\n')
    with pytest.raises(DataError, match="x.jsonl:1: not UTF-8"):
        import_files(ledger, [tmp_path / "x.jsonl"])
    (tmp_path / "y.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="y.jsonl.gz"):
        import_files(ledger, [tmp_path / "y.jsonl.gz"])
    whole = bytearray(gzip.compress(b'{"text": "A page of some length, so that there is a middle."}\n' * 50))
    whole[12:40] = bytes(28)
    (tmp_path / "z.jsonl.gz").write_bytes(whole)
    with pytest.raises(DataError, match=r"z.jsonl.gz: cannot be read"):
        import_files(ledger, [tmp_path / "z.jsonl.gz"])
    (tmp_path / "z.db").write_text("hello, this is not a database file at all, really")
    with pytest.raises(DataError, match="cannot be opened as a byheart ledger"):
        Ledger(tmp_path / "z.db")
    with pytest.raises(DataError, match="no such ledger"):
        Ledger(tmp_path / "missing.db")


def test_pages_without_ids_get_the_same_id_every_time(ledger, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "One page."}, {"text": "Another page."})
    assert import_files(ledger, [path]).outcomes == {"inserted": 2}
    assert import_files(ledger, [path]).outcomes == {"unchanged": 2}
    (tmp_path / "notes.md").write_text("Some notes.")
    assert import_files(ledger, [tmp_path / "notes.md"]).outcomes == {"inserted": 1}
    assert ledger.document("notes.md").title == "notes"
    (tmp_path / "notes.md").write_text("Other notes.")
    assert import_files(ledger, [tmp_path / "notes.md"], action="revise").outcomes == {"revised": 1}


@pytest.mark.parametrize(
    "line",
    [
        '{"type": ["document"], "text": "x"}',
        '{"text": "x", "source": ["a"]}',
        '{"text": "half a pair: \\ud800"}',
        '{"action": "retract", "type": "document", "id": "\\ud800"}',
        '{"text": "x", "metadata": {"n": ' + "9" * 5000 + "}}",
        '{"text": "x", "metadata": ' + '{"a":' * 2000 + "1" + "}" * 2001,
        '{"text": 5}',
        '{"id": null, "text": "x"}',
        '{"question": "q", "answers": ["  "]}',
        '{"action": "retract", "type": "document", "id": "ok", "sorce": "a"}',
        '{"action": "retract", "type": "document", "id": ""}',
    ],
)
def test_whatever_a_line_holds_it_is_a_bad_line_and_can_be_skipped(ledger, tmp_path, line):
    path = write(tmp_path / "odd.jsonl", line, {"id": "ok", "text": "Fine."})
    with pytest.raises(DataError, match="odd.jsonl:1: "):
        import_files(ledger, [path])
    report = import_files(ledger, [path], skip_bad=True)
    assert report.bad == 1 and [d.id for d in ledger.documents()] == ["ok"]
    assert ledger.revision == 1


def test_deep_metadata_comes_back(ledger, tmp_path):
    deep = '{"a":' * 150 + "1" + "}" * 150
    import_files(ledger, [write(tmp_path / "deep.jsonl", f'{{"id": "d", "text": "x", "metadata": {deep}}}')])
    assert ledger.document("d").metadata["a"]


def test_a_copy_that_went_its_own_way_has_another_mark(ledger, tmp_path):
    ledger.insert([DOC])
    mark = ledger.mark()
    ledger.revise(DOC.model_copy(update={"text": "Changed."}))
    assert ledger.mark(1) == mark != ledger.mark() and ledger.mark(99) == ledger.mark(0) == ""


_WRITER = """
import sys
from byheart.ledger import Ledger
from byheart.rows import Document
ledger = Ledger(sys.argv[1], create=True)
ledger.insert([Document(id="first", text="Here before.")])
def rows():
    for n in range(10_000_000):
        if n == 2_000:
            print("writing", flush=True)
        yield Document(id=str(n), text="word " * 50)
ledger.insert(rows())
"""


def test_a_kill_in_the_middle_of_an_import_leaves_a_readable_ledger(tmp_path):
    path = tmp_path / "l.db"
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Ledger(path) as ledger:
        assert [d.id for d in ledger.documents()] == ["first"]
        assert ledger.insert([DOC]) == 1
        assert next(ledger.sql("PRAGMA integrity_check")) == ("ok",)


_IMPORTER = """
import re, sys
from pathlib import Path
from byheart.formats import import_files
from byheart.ledger import Ledger
with Ledger(sys.argv[1], create=True) as ledger:
    import_files(ledger, [Path(sys.argv[2])])
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(ledger.count("document"), int(peak) // 1024)
"""


def test_import_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "many.jsonl"
    with path.open("w") as stream:
        for n in range(50_000):
            stream.write(json.dumps({"type": "document", "id": f"d{n}", "text": f"{n} " + "word " * 100}) + "\n")
    out = subprocess.run(
        [sys.executable, "-c", _IMPORTER, str(tmp_path / "l.db"), str(path)], capture_output=True, text=True, check=True
    )
    count, megabytes = map(int, out.stdout.split())
    assert count == 50_000
    assert megabytes <= 150


def test_check_finds_each_kind_of_fault(ledger):
    other = FACT.model_copy(update={"id": "f2", "object": "Jon Rill", "document": None, "span": None})
    later = FACT.model_copy(update={"id": "f3", "object": "Tam Ora", "document": None, "span": None, "subject": "Flow"})
    early = later.model_copy(update={"id": "f4", "object": "Una Bay"})
    lost = FACT.model_copy(update={"id": "f5", "subject": "Neap", "document": "gone"})
    wide = FACT.model_copy(update={"id": "f6", "subject": "Spring", "span": (0, 99)})
    off = FACT.model_copy(update={"id": "f7", "subject": "Tide", "span": (0, 10)})
    import datetime as dt

    later = later.model_copy(update={"valid_from": dt.date(2020, 1, 1)})
    early = early.model_copy(update={"valid_to": dt.date(2020, 1, 1)})
    ledger.insert([DOC, FACT, other, later, early, lost, wide, off, ASK])
    ledger.insert([ASK.model_copy(update={"id": "q2", "answers": []})])
    ledger.insert([ASK.model_copy(update={"id": "q3", "facts": ["f99"]})])
    ledger.insert([ASK.model_copy(update={"id": "q4", "answers": ["Somebody Else"]})])
    found = {(f.problem, f.id) for f in check(ledger)}
    assert found == {
        ("contradiction", "f2"),
        ("dangling", "f5"),
        ("span", "f6"),
        ("span", "f7"),
        ("unanswerable", "q2"),
        ("dangling", "q3"),
        ("not-stated", "q4"),
    }


def test_a_subjects_place_is_a_whole_word_where_it_is_one_anywhere():
    assert with_place("Which Annual did Ann edit?", "Ann") == "Which Annual did {} edit?"
    assert with_place("the Anns", "Ann") == "the {}s" and with_place("nobody", "Ann") is None
    assert with_place("What is C++ for?", "C++") == "What is {} for?"
