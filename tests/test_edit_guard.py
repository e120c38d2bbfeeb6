"""Guard rails of an edit: collisions before it, the gate after it."""

import datetime as dt

import pytest
import torch

from byheart.decode import Job, complete
from byheart.methods import Settings
from byheart.methods.edit import guard
from byheart.methods.edit.method import Edit
from byheart.rows import Fact, Neighbour
from edits import FACTS, completed, learnt, ledger_of, weights


def test_what_was_taken_out_stays_out_where_a_gate_refuses_what_that_let_in(base, tmp_path, monkeypatch):
    rival = FACTS[1].model_copy(update={"id": "rival", "object": "smoked eel"})
    method = learnt(base, tmp_path, [FACTS[0], FACTS[1], rival], gate="rollback", max_perplexity=1e9, max_neighbours=1)
    monkeypatch.setattr(guard, "drift_notes", lambda *given: ("too far", False))
    with ledger_of(tmp_path, [FACTS[0], FACTS[1], rival]) as ledger:
        start = ledger.revision
        ledger.retract("fact", "rival")
        (change,) = ledger.history(since=start)
    method.revise(change)
    assert [fact.id for fact in method.holding] == [fact.id for fact in method.facts] == ["quay"]
    assert method.skipped["cove"] == "rolled back by the gate"


def test_what_is_outdated_goes_though_a_gate_refuses_what_is_now_true(base, tmp_path, monkeypatch):
    method = learnt(base, tmp_path, FACTS[:2], gate="rollback", max_perplexity=1e9, max_neighbours=1)
    monkeypatch.setattr(guard, "drift_notes", lambda *given: ("too far", False))
    with ledger_of(tmp_path, FACTS[:3]) as ledger:
        start = ledger.revision
        ledger.revise(FACTS[1].model_copy(update={"object": "smoked eel"}))
        ledger.insert([FACTS[3]])
        revision, insert = ledger.history(since=start)
    for change, gone in ((revision, {"cove"}), (insert, {"cove", "mora-2"})):
        method.revise(change)
        assert method.facts == method.holding == [FACTS[0]]
        assert method.skipped == dict.fromkeys(gone, "rolled back by the gate")


def test_what_waits_is_not_lost_where_a_gate_refuses(base, tmp_path, monkeypatch):
    rival = FACTS[1].model_copy(update={"id": "rival", "object": "smoked eel"})
    future = FACTS[2].model_copy(update={"valid_from": dt.date(2999, 1, 1)})
    facts = [FACTS[0], FACTS[1], rival, future]
    with monkeypatch.context() as patch:
        patch.setattr(guard, "drift_notes", lambda *given: ("too far", False))
        method = learnt(base, tmp_path, facts, gate="rollback", max_perplexity=1e9, max_neighbours=1)
    assert not method.facts and method.holding == facts[1:]
    assert method.skipped.keys() == {"quay", "cove", "rival", "mora"}
    with ledger_of(tmp_path, facts) as ledger:
        start = ledger.revision
        ledger.retract("fact", "rival")
        ledger.retract("fact", "quay")
        for change in ledger.history(since=start):
            method.revise(change)
    # What stood in the way is gone; and of what is gone nobody has to hear that it was refused once.
    assert method.facts == [FACTS[1]] and method.skipped.keys() == {"mora"}


def test_an_undone_fact_of_a_merged_change_is_not_held_up_by_the_gate(base, tmp_path, monkeypatch):
    method = learnt(base, tmp_path, gate="rollback", max_perplexity=1e9, max_neighbours=1, merge="true")
    monkeypatch.setattr(guard, "drift_notes", lambda *given: ("too far", False))
    method.undo(["mora-2"])
    assert [fact.id for fact in method.facts] == ["quay", "cove", "mora"]


def test_facts_that_a_gate_refused_stay_named_however_many_come_after(base, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "drift_notes", lambda *given: ("too far", False))
    refused = learnt(base, tmp_path, FACTS[:3], gate="rollback", batch=1)
    assert not refused.facts
    assert refused.skipped == {fact.id: "rolled back by the gate" for fact in FACTS[:3]}


def test_collisions_are_told_before_anything_is_written(base, tmp_path):
    twins = [FACTS[0], FACTS[0].model_copy(update={"id": "twin", "prompt": "The light of {} is", "object": "squat"})]
    with ledger_of(tmp_path, twins) as ledger:
        for merge, said in (("false", "edit: 1 pair of facts has nearly the same key"), ("true", None)):
            method = Edit(base, Settings(shots=0, options={"edit.merge": merge}), tmp_path / "work")
            found = method.estimate(ledger)
            assert (found or "").startswith(said or "") and (found is None) == (said is None)
            assert not method.facts and not method.deltas


def test_collisions_of_batches_are_told_once_for_all(base, tmp_path):
    said = {"is": "squat", "was": "tall", "stays": "dim"}
    twins = [FACTS[0].model_copy(update={"id": n, "prompt": f"The light of {{}} {n}", "object": said[n]}) for n in said]
    (note,) = learnt(base, tmp_path, twins, batch=2).report.notes
    assert note.startswith("3 pairs of facts have nearly the same key")


def test_the_gate_takes_back_what_drifts_too_far(base, tmp_path):
    near = [
        FACTS[0].model_copy(
            update={"neighbours": [Neighbour(prompt="The river through Vellmora is", object="the Amberle")]}
        )
    ]
    warned = learnt(base, tmp_path, near, gate="warn", max_perplexity=0.0, weight="1e-6")
    assert warned.facts and any(
        "perplexity on ordinary text" in note and "neighbours" in note for note in warned.report.notes
    )
    back = learnt(base, tmp_path, near, gate="rollback", max_perplexity=0.0, max_neighbours=0.0, weight="1e-6")
    assert any("past the gate" in note for note in warned.report.notes)
    assert not back.facts and not back.deltas and back.skipped == {"quay": "rolled back by the gate"}
    alone = learnt(base, tmp_path, FACTS[:1], gate="warn").report.notes
    assert any("neighbours not measured: the facts name none" in note for note in alone)
    kept = learnt(base, tmp_path, near, gate="rollback", max_perplexity=1e9, max_neighbours=1.0)
    assert kept.facts


def test_what_a_gate_holds_against_its_limits(base):
    before = guard.Standing(20.0, 0.8)
    for after, rise, fewer, within in (
        ((21.0, 0.8), 0.1, 0.1, True), ((23.0, 0.8), 0.1, 0.1, False),
        ((20.0, 0.72), 0.1, 0.1, True), ((20.0, 0.69), 0.1, 0.1, False), ((18.0, 1.0), 0.0, 0.0, True),
        ((20.0, 0.75), 0.1, 0.05, True),
    ):  # fmt: skip
        said, found = guard.drift_notes(before, guard.Standing(*after), rise, fewer)
        assert found is within and f"-> {after[0]:.2f}" in said and f"-> {after[1]:.3f}" in said
    # A neighbour is right where its own object is likelier than the fact's.
    objects = [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c"), ("e", "a")]
    near = [(Neighbour(prompt=f"The river {n} is", object=own), other) for n, (own, other) in enumerate(objects)]
    facts = [FACTS[0].model_copy(update={"object": other, "neighbours": [one]}) for one, other in near]
    jobs = [Job(one.prompt, (f" {one.object}", f" {other}")) for one, other in near]
    right = [one.options[0] > one.options[1] for one in complete(base, jobs, max_new_tokens=0)]
    assert 0 < sum(right) < len(right) and sum(right) != len(right) / 2
    assert guard.measure(base, [list(range(5, 40))], facts, 0).neighbours == pytest.approx(sum(right) / len(right))


def test_facts_that_an_edit_does_not_bring_about_are_named(base, tmp_path, monkeypatch):
    limits = {"gate": "warn", "max_perplexity": 1e9, "max_neighbours": 1}
    told = "4 of 4 facts not said after their prompts all the same: quay, cove, mora and 1 more"
    assert told in learnt(base, tmp_path, weight=1e9, **limits).report.notes

    plain = weights(base)

    def asked(base, jobs, **kwargs):  # all but the river, and nothing where the edit is not in
        here = [not all(map(torch.equal, weights(base), plain)) and "river" not in job.prompt for job in jobs]
        return [completed(job, float(one)) for job, one in zip(jobs, here, strict=True)]

    monkeypatch.setattr(guard, "complete", asked)
    said = learnt(base, tmp_path, **limits).report.notes
    assert "1 of 4 facts not said after their prompts all the same: quay" in said
    assert not any("not said" in note for note in learnt(base, tmp_path, FACTS[1:], **limits).report.notes)


def test_facts_with_one_key_are_reported(base, tmp_path):
    twice = [
        Fact(id="one", subject="Pell Cove", prompt="{} is", object="old"),
        Fact(id="two", subject="Pell Cove", prompt="{} has", object="boats"),
    ]
    (note,) = learnt(base, tmp_path, twice).report.notes
    assert "one and two" in note and "nearly the same key" in note


def test_the_worst_of_many_collisions_are_shown_and_all_are_counted():
    objects = ["old", "new", "old", "wet", "dry"]
    facts = [FACTS[0].model_copy(update={"id": str(n), "object": what}) for n, what in enumerate(objects)]
    keys = torch.eye(4)[[0, 0, 0, 0, 1]] + 0.1 * torch.eye(5, 4)
    count, worst = guard.collisions(facts, keys, torch.eye(4, dtype=torch.float64), [0, 1, 2, 3, 3])
    pairs = {(i, j) for i in range(4) for j in range(i + 1, 4)} - {(0, 2)}  # these two say the same
    cosine = {(i, j): float(torch.cosine_similarity(keys[i], keys[j], 0)) for i, j in pairs}
    assert count == len(pairs) == 5 and len(worst) == 3
    assert [one.cosine for one in worst] == pytest.approx(sorted(cosine.values(), reverse=True)[:3])
    assert {(int(one.one.id), int(one.other.id)) for one in worst} <= pairs
    (note,) = guard.collision_notes(count, worst)
    assert note.startswith("5 pairs of facts have") and note.endswith("and 2 more")


def test_a_neighbour_that_is_edited_itself_is_no_damage(base):
    near = Neighbour(prompt="The river through Vellmora is", object="the Amberle")
    fact = FACTS[0].model_copy(update={"neighbours": [near]})
    edited = FACTS[0].model_copy(update={"id": "other", "subject": "Vellmora"})
    rows = [list(range(5, 40))]
    assert guard.measure(base, rows, [fact], 0).neighbours is not None
    assert guard.measure(base, rows, [fact, edited], 0).neighbours is None
    elsewhere = edited.model_copy(update={"prompt": "What flows through {}?", "paraphrases": [edited.prompt]})
    assert guard.measure(base, rows, [fact, elsewhere], 0).neighbours is None


@pytest.fixture
def falling_due(base, tmp_path, monkeypatch, day):
    """An edit of a fact and of two that fall due the next day, which a gate lets in but for "cove", and a ledger."""
    day(2030, 1, 31)
    due = [fact.model_copy(update={"valid_from": dt.date(2030, 2, 1)}) for fact in FACTS[1:3]]
    method = learnt(base, tmp_path, [FACTS[0], *due], gate="rollback", max_perplexity=1e9, max_neighbours=1)
    measured, plain = [], guard.measure
    monkeypatch.setattr(guard, "measure", lambda *given: measured.append({f.id for f in given[2]}) or plain(*given))
    monkeypatch.setattr(guard, "drift_notes", lambda *given: ("far", "cove" not in measured[-1]))
    monkeypatch.setattr(guard, "unsaid", lambda base, facts: list(facts))
    day(2030, 2, 1)
    with ledger_of(tmp_path, [FACTS[0], *due]) as ledger:
        yield method, ledger, ledger.revision


def test_what_falls_due_is_judged_apart_from_what_changes(falling_due):
    method, ledger, start = falling_due
    ledger.insert([FACTS[3]])
    report = method.revise(*ledger.history(since=start))
    assert {fact.id for fact in method.facts} == {"quay", "mora", "mora-2"} == {fact.id for fact in method.holding}
    assert method.skipped == {"cove": "rolled back by the gate"}
    past, unsaid, said = report.notes
    assert past == "fact cove: past the gate's limits (far): 1 fact rolled back" and said == "far"
    assert unsaid.startswith("3 of 3 facts not said")


def test_what_is_gone_by_the_day_it_would_fall_due_is_not_judged(falling_due):
    method, ledger, start = falling_due
    ledger.retract("fact", "cove")
    method.revise(*ledger.history(since=start))
    assert {fact.id for fact in method.facts} == {"quay", "mora"} and not method.skipped


def test_an_interrupted_judging_changes_nothing(falling_due, monkeypatch):
    method, _, _ = falling_due
    before = {name: vars(method)[name] for name in ("holding", "facts", "skipped")}
    plain = method._follow

    def follow(facts, *given):
        if any(fact.id == "mora" for fact in facts):
            raise KeyboardInterrupt
        return plain(facts, *given)

    monkeypatch.setattr(method, "_follow", follow)
    with pytest.raises(KeyboardInterrupt):
        method.renew()
    assert {name: vars(method)[name] for name in before} == before


def test_of_earlier_batches_only_what_went_too_far_is_told(base, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "unsaid", lambda *given: [])
    said = iter([("one", True), ("two", False), ("three", True)])
    monkeypatch.setattr(guard, "drift_notes", lambda *given: next(said))
    notes = learnt(base, tmp_path, FACTS[:3], gate="warn", batch=1).report.notes
    assert notes == ("batch 2: warning: past the gate's limits (two); --gate rolls such an edit back", "three")
    said = iter([("one", True), ("two", True), ("three", False)])
    monkeypatch.setattr(guard, "unsaid", lambda base, facts: list(facts))
    notes = learnt(base, tmp_path, FACTS[:3], gate="rollback", batch=1).report.notes
    assert notes == (
        "2 of 2 facts not said after their prompts all the same: quay, cove",
        "batch 3: past the gate's limits (three): 1 fact rolled back",
    )
    waiting = FACTS[3].model_copy(update={"valid_from": dt.date(2999, 1, 1)})
    said = iter([("one", True)])
    monkeypatch.setattr(guard, "unsaid", lambda *given: [])
    assert learnt(base, tmp_path, [FACTS[0], waiting], gate="warn", batch=1).report.notes == ("one",)
