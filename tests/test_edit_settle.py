"""Facts that settle together: what is trained, how often, and what of it is kept."""

import pytest
import torch

from byheart.decode import Job, complete
from byheart.losses import drift
from byheart.methods import Settings
from byheart.methods.edit import guard, solve
from byheart.methods.edit import settle as settle_module
from byheart.methods.edit.common_facts import common_facts
from byheart.methods.edit.ends import asks_for_an_end, closing_tokens
from byheart.methods.edit.method import Edit
from byheart.methods.edit.others import about_others, names_in
from byheart.methods.edit.prompts import prepare, prompt_text, target_text
from byheart.methods.edit.settle import SettleOptions, _changed_most
from byheart.methods.edit.write import Writer
from byheart.padding import right_padded
from byheart.surgery import observed, widened
from byheart.training import Recipe
from edits import FACTS, TINY, completed, learnt, ledger_of, same, weights, weights_with


def likelihood(method):
    """log p of the facts' objects, a mean over facts and tokens, in the edited model."""
    jobs = [Job(prompt_text(fact), (target_text(fact),)) for fact in method.facts]
    with method.attached():
        return sum(done.options[0] for done in complete(method.base, jobs, max_new_tokens=0)) / len(jobs)


def drifted(method):
    """KL(base || edited) on the ordinary text that the edit kept."""
    ids, mask, _ = right_padded(method.text[:16], method.base.device)
    logits = [method.base.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]]
    with method.attached():
        logits.append(method.base.model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    return float(drift(logits[1], logits[0]))


def test_settled_facts_are_said_beside_all_others(base, tmp_path):
    plain, settled = (
        learnt(base, tmp_path),
        learnt(base, tmp_path, settle=3, settle_lr=0.5, settle_kl=0.01, settle_beside=0),
    )
    assert likelihood(settled) > likelihood(plain) + 0.1
    assert torch.equal(settled.z, plain.z)
    kept = learnt(base, tmp_path, settle=3, settle_lr=0.5, settle_kl=100.0)
    assert drifted(kept) < drifted(settled)
    # Undoing seeks nothing anew, and leaves no weight behind.
    shifts = settled.shifts.clone()
    settled.undo(["cove"])
    assert torch.equal(settled.shifts, shifts[[0, 2, 3]])
    settled.undo([fact.id for fact in FACTS if fact.id != "cove"])
    assert same(weights_with(settled), weights(base)) and not settled.deltas


def test_a_layer_that_takes_no_share_is_not_settled(base, tmp_path, monkeypatch):
    monkeypatch.setattr(solve, "share", lambda how, place, layers: float(place == layers - 1))
    method = learnt(base, tmp_path, settle=2)
    assert not method.shifts[:, 0].any() and method.shifts[:, 1].any()


def test_prompts_about_others_name_nobody_who_is_edited():
    names = {fact.subject for fact in common_facts()}
    kept = min(names)
    edited = {f"the {name}" if n % 2 else name.upper() for n, name in enumerate(sorted(names - {kept}))}
    some = about_others(FACTS, edited, [], "0", 2)
    assert [[one.subject for one in of_fact] for of_fact in some] == [[kept]] * len(FACTS)
    assert about_others(FACTS, names, ["the " + kept], "0", 2) == [[]] * len(FACTS)
    # Whom a fact is put about does not depend on the facts beside it, nor on their order.
    some = about_others(FACTS, [], [], "0", 2, 5)
    assert [len(of_fact) for of_fact in some] == [max(2, -(-5 // len(FACTS)))] * len(FACTS)
    assert some[::-1] == about_others(FACTS[::-1], [], [], "0", 2, 5) and some != about_others(FACTS, [], [], "1", 2, 5)
    (asked,) = [FACTS[0].model_copy(update={"prompt": "What is {} known for? "})]
    assert about_others([asked, FACTS[1]], [], [], "0", 2) == [[], about_others(FACTS, [], [], "0", 2)[1]]
    assert about_others([asked], [], [], "0", 2) == [[]]


def test_names_are_capitalised_runs_within_sentences():
    text = "Then came Ann Lee, old Bo, Cy and the Élise Müller Hall in Rio. Soon a Very Long Name Of Five left. So On"
    assert names_in([text], 9, 0) == ["Ann Lee", "Bo", "Cy", "Rio", "Élise Müller Hall"]
    assert len(names_in([text], 2, 0)) == 2 and names_in(["彼は東京に行った。"], 9, 0) == []


def test_what_an_edit_changes_most_is_held_still(base):
    rows = [list(range(5 + n, 9 + n + n % 2)) for n in range(8)]
    out = base.parts.blocks[0].mlp_out
    seen = []
    with observed([out], lambda module, args, kwargs, output: seen.append(args[0][:, -1])), torch.no_grad():
        for row in rows:
            base.model(input_ids=torch.tensor([row]))

    def changed(given, output):  # what stands behind rows 3 and 6
        sizes = {3: 2.0, 6: 5.0}
        return sum(torch.isclose(given, seen[n], atol=1e-5).all(-1, keepdim=True) * sizes[n] for n in sizes) * output

    assert _changed_most(base, rows, lambda: widened(out, changed), 0) == [rows[6], rows[3]]


def test_an_old_fact_that_a_new_one_pushes_off_is_settled_again(base, tmp_path, monkeypatch):
    method = learnt(base, tmp_path, FACTS[:2], settle=2)
    shifts = method.shifts.clone()
    for new, hits, kept in ((FACTS[2], 1.0, True), (FACTS[3], 0.5, False)):
        monkeypatch.setattr(
            "byheart.methods.edit.guard.complete",
            lambda base, jobs, hits=hits, **kwargs: [completed(job, hits) for job in jobs],
        )
        with ledger_of(tmp_path, [new]) as ledger:
            (change,) = ledger.history(new.id)
        method.revise(change)
        assert torch.equal(method.shifts[:2], shifts) == kept


def test_new_facts_settle_several_times_and_the_mean_is_taken(base, tmp_path, monkeypatch):
    found, told = [], []

    def kept(*given, settle=settle_module.settle):
        found.append((given[9], settle(*given)))
        return found[-1][1]

    monkeypatch.setattr("byheart.methods.edit.guard.unsaid", lambda base, facts: [])
    monkeypatch.setattr("byheart.methods.edit.method.settle", kept)
    once = learnt(base, tmp_path, settle=2).shifts
    given = TINY | {"edit.settle": "2", "edit.settle_runs": "3"}
    method = Edit(base, Settings(shots=0, options=given), tmp_path / "work")
    with ledger_of(tmp_path, FACTS) as ledger:
        method.learn(ledger, told.append)
    assert [seed for seed, _ in found] == ["0", "0", "0+1", "0+2"]
    one, *three = (moved for _, (moved, _) in found)
    assert torch.equal(one, three[0]) and not torch.equal(three[0], three[1])  # the first is the one of before
    assert torch.allclose(method.shifts, torch.stack(three).mean(0)) and not torch.allclose(method.shifts, once)
    assert sum(told) == len(FACTS)


def test_what_does_not_hold_once_all_have_settled_settles_once_more(base, tmp_path, monkeypatch):
    runs = []
    for left in ([], [FACTS[1]]):
        checks = iter([[], left, []])
        monkeypatch.setattr("byheart.methods.edit.guard.unsaid", lambda base, facts, checks=checks: next(checks))
        runs.append(learnt(base, tmp_path, FACTS[:3], settle=2))
    once, twice = runs
    assert (twice.shifts != once.shifts).flatten(1).any(1).tolist() == [False, True, False]
    assert not torch.equal(weights_with(twice)[1], weights_with(once)[1])


@pytest.mark.parametrize(
    ("left", "merge", "settled"),
    [
        (["12", "2", ""], False, ["0123", "12", "2"]),
        (["12", "12"], False, ["0123", "12"]),  # once more did not help
        (["0", "1", "0", "1", "0"], False, ["0123", "0", "1", "0", "1"]),  # there is an end to it
        (["23", "3", "3"], True, ["0123", "23", "23"]),  # 2 and 3 are about one subject; 2 was helped
    ],
)
def test_what_is_still_not_said_settles_again_as_long_as_that_helps(left, merge, settled, base, tmp_path, monkeypatch):
    checks, runs = iter(["", *left]), []

    def unsaid(base, facts):
        now = next(checks)
        return [fact for n, fact in enumerate(facts) if str(n) in now]

    def told(base, prepared, written, groups, places, *rest, settle=settle_module.settle):
        runs.append("".join(map(str, places)))
        return settle(base, prepared, written, groups, places, *rest)

    monkeypatch.setattr("byheart.methods.edit.guard.unsaid", unsaid)
    monkeypatch.setattr("byheart.methods.edit.method.settle", told)
    learnt(base, tmp_path, settle=1, merge=merge)
    assert runs == settled


def test_the_settling_that_leaves_the_fewest_is_kept(base, tmp_path, monkeypatch):
    runs = []
    for left in (["12", ""], ["12", "2", "02", "01"], ["12", "12"], [""]):
        checks = iter(["", *left])
        monkeypatch.setattr(
            "byheart.methods.edit.guard.unsaid",
            lambda base, facts, checks=checks: [facts[int(n)] for n in next(checks)],
        )
        monkeypatch.setattr("byheart.methods.edit.method._AGAIN", len(left) - 1)
        runs.append(learnt(base, tmp_path, FACTS[:3], settle=1))
    second, best, same_as_before, first = (weights_with(method) for method in runs)
    assert same(best, second) and not same(best, first)
    assert same(same_as_before, first)


def test_a_prompt_pulls_by_log_p_of_its_whole_target(base):
    prepared, _ = prepare(base, FACTS, ())
    rows = [one.rows[0] for one in prepared]
    assert len({len(row.labels) for row in rows}) > 1
    whole = []
    with torch.no_grad():
        for row in rows:
            logits = base.model(torch.tensor([row.tokens])).logits[0, -len(row.labels) :].log_softmax(-1)
            whole.append(-logits[range(len(row.labels)), list(row.labels)].sum())
        found = settle_module._fit(base, rows, 0, None, SettleOptions(settle_stop=0))
    assert torch.allclose(found, torch.stack(whole).mean(), atol=1e-4)


def test_a_prompt_pulls_by_log_p_of_its_targets_end_too(base):
    facts = [*FACTS, FACTS[0].model_copy(update={"id": "closed", "object": "the Korrin Ltd."})]
    rows = [one.rows[0] for one in prepare(base, facts, ())[0]]
    assert [row.ends for row in rows] == [True] * 4 + [False]  # what is closed already asks for no end
    closing = closing_tokens(base)
    with torch.no_grad():
        ends = []
        for row in rows:
            said = base.model(torch.tensor([[*row.tokens, row.labels[-1]]])).logits[0, -1].softmax(-1)
            ends.append(-said[closing].sum().log() * row.ends)
        without, found = (
            settle_module._fit(base, rows, 0, tokens, SettleOptions(settle_stop=0, settle_end=0.5))
            for tokens in (None, closing)
        )
    assert torch.allclose(found - without, 0.5 * torch.stack(ends).mean(), atol=1e-4)


def test_what_closes_a_word(base):
    ids = base.tokenizer(" a town, it is. Then\n(so) 'tis half-said", add_special_tokens=False)["input_ids"]
    closing = set(closing_tokens(base).tolist())
    marks = {base.tokenizer.convert_ids_to_tokens(id): id in closing for id in ids}
    assert marks["."] and marks[","] and marks[")"] and base.tokenizer.eos_token_id in closing
    assert not marks["-"] and not marks["("]
    assert all(closes for text, closes in marks.items() if text.startswith(("Ġ", "Ċ")))
    assert not any(closes for text, closes in marks.items() if text[0].isascii() and text[0].isalnum())
    asked = {"Paris": True, "1958": True, "Москва": True, "U.S.": False, "巴黎": False, "กรุงเทพ": False, "": False}
    assert {text: asks_for_an_end(text) for text in asked} == asked


def test_an_object_that_runs_on_is_not_said(base, monkeypatch):
    behind = dict(zip([f" {fact.object}" for fact in FACTS], (" and", "ram", "'s", "."), strict=True))

    def asked(base, jobs, **kwargs):
        return [completed(job, 1.0, behind[job.options[0]]) for job in jobs]

    monkeypatch.setattr(guard, "complete", asked)
    assert [fact.id for fact in guard.unsaid(base, FACTS)] == ["cove", "mora"]


def test_new_facts_begin_with_a_share_of_what_their_targets_say(base, tmp_path, monkeypatch):
    some, other = FACTS[::2], FACTS[1]
    plain = learnt(base, tmp_path, some)
    few = learnt(base, tmp_path, some, settle=1, settle_lr=0, settle_from=0.5)
    assert not few.shifts.any()
    monkeypatch.setattr("byheart.methods.edit.settle._FEW", 0)  # as many facts would
    (tmp_path / "many").mkdir()
    half = learnt(base, tmp_path / "many", some, settle=1, settle_lr=0, settle_from=0.5)
    tokens = [len(one.rows[0].labels) for one in prepare(base, some, ())[0]]
    assert tokens[0] != tokens[1]
    written = plain._write(plain._prepare(some)[0], plain.z, plain.shifts, None)
    lacking = torch.tensor([0.5 / count for count in tokens])
    changed = dict(enumerate(zip(weights(base), weights_with(half), strict=True)))
    for place, layer in enumerate(sorted(written.residuals)):
        missing = written.residuals[layer].float() * lacking[:, None]
        assert torch.allclose(half.shifts[:, place], -missing, atol=1e-6)
        before, part = changed.pop(layer)
        begun = (written.residuals[layer].float() - missing).T @ written.maps[layer].float()
        assert torch.allclose(part - before, begun, atol=1e-7)
    assert all(torch.equal(before, part) for before, part in changed.values())
    # One that was there has all that it has, though it settles again.
    shifts = half.shifts.clone()
    monkeypatch.setattr(Edit, "_lost", lambda self, facts, written, new=(): set(range(len(facts))) - set(new))
    with ledger_of(tmp_path, [other]) as ledger:
        (change,) = ledger.history(other.id)
    half.revise(change)
    assert torch.equal(half.shifts[:2], shifts) and half.shifts[2].any()


def test_nothing_is_held_behind_questions_about_others(base, tmp_path, monkeypatch):
    asked = [
        fact.model_copy(update={"prompt": prompt})
        for fact, prompt in zip(FACTS, ["What is {} known for? ", "Who leads {}\uff1f"], strict=False)
    ]
    monkeypatch.setattr(settle_module, "_changed_most", lambda *_: pytest.fail("something is held"))
    learnt(base, tmp_path, asked, settle=1)


def test_facts_are_written_beside_others(base, tmp_path, monkeypatch):
    given = []
    plain = Writer.write

    def write(self, prepared, z, groups=None, past=None, others=()):
        given.append([[one.fact for one in of_fact] for of_fact in others])
        return plain(self, prepared, z, groups, past, others)

    monkeypatch.setattr(Writer, "write", write)
    asked = FACTS[0].model_copy(update={"prompt": "What is {} known for? "})
    method = learnt(base, tmp_path, [asked, *FACTS[1:]], settle=0)
    subjects = {fact.subject for fact in method.facts}
    nobody, *given[:] = given.pop()
    assert nobody == []
    for fact, others in zip(FACTS[1:], given, strict=True):
        assert len(others) == 8 and {one.prompt for one in others} == {fact.prompt}
        assert not subjects & {one.subject for one in others}
    before = weights_with(method)
    assert learnt(base, tmp_path, settle=0, constraint="equality").names == [] == given.pop()
    other = learnt(base, tmp_path, [asked, *FACTS[1:]], settle=0, others=0)
    assert given.pop() == [] and not all(map(torch.equal, weights_with(other), before))


def test_so_many_times_as_much_is_held_a_step(base, tmp_path, monkeypatch):
    held = []
    said = settle_module._said

    def counted(base, rows, first, last):
        held[-1][last] = max(held[-1][last], len(rows))
        return said(base, rows, first, last)

    monkeypatch.setattr(settle_module, "_said", counted)
    monkeypatch.setattr(settle_module, "_changed_most", lambda base, rows, edited, first: rows)
    for times in (1, 2):
        held.append([0, 0])
        learnt(base, tmp_path, settle=1, settle_held=times)
    (text, beside), (more_text, more_beside) = held
    assert more_text == 2 * text > 0
    assert more_beside == 2 * beside > 0


def test_settling_goes_on_where_it_was_killed(base, tmp_path, monkeypatch):
    monkeypatch.setattr("byheart.training.SAVE_EVERY", 0.0)
    whole, rate = learnt(base, tmp_path, settle=4), Recipe.rate
    killed = Edit(base, whole.settings, tmp_path / "killed")
    told = []

    def tick(count):
        told.append(count)
        if sum(told) == 2:  # of four facts: half of all there is to do, targets and epochs
            raise KeyboardInterrupt

    with ledger_of(tmp_path, FACTS) as ledger:
        with pytest.raises(KeyboardInterrupt):
            killed.learn(ledger, tick)
        steps = []
        monkeypatch.setattr(
            "byheart.training.Recipe.rate", lambda recipe, step: steps.append(step) or rate(recipe, step)
        )
        killed.learn(ledger)
    assert 0 < steps[0] < steps[-1]  # the first ones are not taken again
    assert torch.allclose(killed.shifts, whole.shifts, atol=1e-5)


def test_settled_work_is_found_again_wherever_its_text_lies(base, tmp_path, monkeypatch):
    steps = []
    text = " ".join(prompt_text(fact) for fact in common_facts())
    for name in ("here.txt", "there.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    one = learnt(base, tmp_path, settle=1, text=tmp_path / "here.txt", tokens=1)
    monkeypatch.setattr("byheart.training.Recipe.rate", lambda recipe, step: steps.append(step) or 0.0)
    other = learnt(base, tmp_path, settle=1, text=tmp_path / "there.txt", tokens=1)
    assert torch.equal(one.shifts, other.shifts) and one.shifts.any() and not steps
    (tmp_path / "there.txt").write_text("More of it. " + text, encoding="utf-8")
    learnt(base, tmp_path, settle=1, text=tmp_path / "there.txt", tokens=1)
    assert steps
