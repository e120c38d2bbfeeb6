"""The shipped example world is what its README says, before and after its changes."""

from collections import Counter

from byheart.check import check
from byheart.formats import import_files, read_json_lines
from conftest import WORLD


def test_the_world_is_whole(world):
    assert (world.count("document"), world.count("fact"), world.count("question")) == (40, 120, 250)
    assert Counter(q.kind for q in world.questions()) == {
        "direct": 100, "paraphrased": 80, "two-step": 40, "unanswerable": 30,
    }  # fmt: skip
    assert list(check(world)) == []
    for fact in world.facts():
        document = world.document(fact.document)
        assert fact.object in document.text[slice(*fact.span)]
        assert len(fact.paraphrases) >= 2 and len(fact.neighbours) >= 2
    asked = {id for q in world.questions() for id in q.facts}
    assert asked == {f.id for f in world.facts()}


def test_its_changes_apply_and_leave_it_whole(world):
    rows = [row for _, row in read_json_lines(WORLD / "changes.jsonl")]
    counted = Counter(r["action"] for r in rows if r["type"] == "fact" and r.get("note") != "span moved")
    assert counted == {"revise": 14, "retract": 6}
    report = import_files(world, [WORLD / "changes.jsonl"], action="revise")
    assert report.bad == 0 and report.outcomes["retracted"] == 6
    assert list(check(world)) == []
    assert world.count("fact") == 114
    changed = [
        c for c in world.history() if c.kind == "fact" and c.action == "revise" and c.before.object != c.after.object
    ]
    assert len(changed) == 14
    assert all(c.after.former_object == c.before.object and c.source for c in changed)
