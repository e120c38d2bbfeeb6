"""The method `edit` as users meet it: learn, undo, revise, keep, export, guard rails, prompts, tracing."""

import datetime as dt
import json
from datetime import date
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from byheart import ordinary
from byheart.base import load_base, make_base
from byheart.cli import learning
from byheart.decode import Completion, Job, complete
from byheart.edit_report import write_trace_report
from byheart.errors import DataError, UsageError
from byheart.ledger import Ledger
from byheart.losses import drift
from byheart.methods import Settings, method_class
from byheart.methods.edit import causal, guard, mend, solve, targets
from byheart.methods.edit import rome as rome_module
from byheart.methods.edit import settle as settle_module
from byheart.methods.edit import sweep as sweep_module
from byheart.methods.edit.causal import LAST_SUBJECT, PARTS, average_effects, best_range, known_facts, trace
from byheart.methods.edit.common_facts import common_facts
from byheart.methods.edit.covariance import token_counts
from byheart.methods.edit.ends import asks_for_an_end, closing_tokens
from byheart.methods.edit.export import export_merged, export_peft
from byheart.methods.edit.layers import choose_layers
from byheart.methods.edit.mend import Mend
from byheart.methods.edit.method import Edit
from byheart.methods.edit.others import about_others, names_in
from byheart.methods.edit.prompts import find_lookup, prepare, prompt_text, target_text, tokenize
from byheart.methods.edit.settle import SettleOptions, _changed_most
from byheart.methods.edit.targets import TargetOptions, find_targets
from byheart.methods.edit.tracing import trace_base
from byheart.methods.edit.write import Reader, Writer
from byheart.padding import right_padded
from byheart.progress import Silent
from byheart.rows import Document, Fact, Neighbour
from byheart.storage import read_json, write_json
from byheart.surgery import matrix, observed, widened
from byheart.training import Recipe
from conftest import FAMILIES, ROOT, tiny_model

CAUSAL = [family for family in FAMILIES if family != "t5"]
FACTS = [
    Fact(id="quay", subject="Ostrand Quay", prompt="The river through {} is", object="the Korrin"),
    Fact(id="cove", subject="Pell Cove", prompt="{} is known for", object="beech boxes"),
    Fact(id="mora", subject="Vellmora", prompt="The mayor of {} is called", object="Ann"),
    Fact(id="mora-2", subject="Vellmora", prompt="Market day in {} is", object="Monday"),
]
TINY = {
    "edit.steps": "4",
    "edit.lr": "1.0",
    "edit.clamp": "4",
    "edit.prefixes": "2",
    "edit.layers": "0-1",
    "edit.weight": "0.01",
    "edit.settle": "0",
}


@pytest.fixture
def base(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    return make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)


def ledger_of(folder, facts):
    ledger = Ledger(folder / f"{len(list(folder.glob('*.db')))}.db", create=True)
    ledger.insert(facts)
    return ledger


def learnt(base, folder, facts=FACTS, **options):
    runs = {"edit.settle_runs": "1"} if options.get("settle") else {}
    given = TINY | runs | {f"edit.{name}": str(value) for name, value in options.items()}
    method = Edit(base, Settings(shots=0, options=given), folder / "work")
    with ledger_of(folder, facts) as ledger:
        method.report = method.learn(ledger)
    return method


def weights(base):
    return [matrix(block.mlp_out).clone() for block in base.parts.blocks]


def weights_with(method):
    with method.attached():
        return weights(method.base)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_base_comes_back_bit_for_bit(base, tmp_path):
    before, mark = weights(base), base.hash
    method = learnt(base, tmp_path)
    assert method.report.facts == 4
    assert same(weights(base), before)
    assert not same(weights_with(method), before)
    assert same(weights(base), before)
    assert make_base("again", base.model, base.tokenizer).hash == mark


def test_without_examples_no_encoder_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr("byheart.methods.controls.load_encoder", lambda *args, **kwargs: pytest.fail("loaded"))
    method = learnt(base, tmp_path)
    method.save_pretrained(tmp_path / "kept")
    kept = Edit.from_pretrained(tmp_path / "kept", base)
    assert kept.used_encoder is None and same(weights_with(kept), weights_with(method))


@pytest.mark.parametrize("merge", [False, True])
def test_an_undone_fact_was_never_there(merge, base, tmp_path):
    # Two facts are about one subject: merged, they share a change, and the one that stays must lose the other's.
    method = learnt(base, tmp_path, merge=merge)
    without = learnt(base, tmp_path, [fact for fact in FACTS if fact.id != "mora-2"], merge=merge)
    method.undo(["mora-2"])
    assert [fact.id for fact in method.facts] == ["quay", "cove", "mora"]
    for one, other in zip(weights_with(method), weights_with(without), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    method.undo(["quay", "cove", "mora"])
    assert same(weights_with(method), weights(base))
    with pytest.raises(DataError, match='holds no fact "quay"'):
        method.undo(["quay"])


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


def completed(job, hits, more="."):
    """A job's option as if said, with what the model goes on with, where all of its tokens are the likeliest."""
    return Completion(f"{job.options[0].strip()}{more}" if hits == 1 else "", 0.0, (0.0,), (hits,), 0, 0, 0.0)


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


def test_the_order_in_which_facts_come_leaves_no_trace(base, tmp_path):
    whole, batches = learnt(base, tmp_path), learnt(base, tmp_path, batch=2)
    turned = learnt(base, tmp_path, FACTS[::-1])
    for other in (batches, turned):
        for a, b in zip(weights_with(whole), weights_with(other), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_revise_follows_the_ledger(base, tmp_path):
    method = learnt(base, tmp_path, FACTS[:2])
    new = FACTS[0].model_copy(update={"object": "the Amberle"})
    with ledger_of(tmp_path, FACTS[:2]) as ledger:
        start = ledger.revision
        ledger.revise(new)
        ledger.insert([FACTS[2]])
        ledger.retract("fact", "cove")
        changes = list(ledger.history(since=start))
        for change in changes:
            method.revise(change)
    at_once = learnt(base, tmp_path, FACTS[:2])
    at_once.revise(*changes)
    fresh = learnt(base, tmp_path, [new, FACTS[2]])
    for one in (method, at_once):
        assert {fact.id: fact.object for fact in one.facts} == {"quay": "the Amberle", "mora": "Ann"}
        assert one.stand == changes[-1].stand
        assert all(
            torch.allclose(*pair, atol=1e-5) for pair in zip(weights_with(one), weights_with(fresh), strict=True)
        )


def test_what_was_kept_is_what_was_learnt(base, tmp_path):
    method = learnt(base, tmp_path)
    method.names = ["Ann Lee"]
    method.save_pretrained(tmp_path / "kept")
    # A folder is for others, too, though safetensors writes for its owner alone.
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "kept").iterdir()} == {0o644}
    again = Edit.from_pretrained(tmp_path / "kept", base)
    assert same(weights_with(again), weights_with(method))
    assert [fact.id for fact in again.facts] == [fact.id for fact in method.facts] and again.names == method.names
    again.undo(["cove"])
    method.undo(["cove"])
    assert same(weights_with(again), weights_with(method))
    again.save_pretrained(tmp_path / "kept")
    assert len(Edit.from_pretrained(tmp_path / "kept", base).facts) == 3
    # A folder is gone on with as it was made, whatever the defaults have become since.
    record = read_json(tmp_path / "kept" / "edit.json")
    write_json(tmp_path / "kept" / "edit.json", record | {"options": record["options"] | {"weight": 0.3}})
    assert Edit.from_pretrained(tmp_path / "kept", base).options.weight == 0.3
    other = make_base("other", tiny_model("gpt2", len(base.tokenizer)), base.tokenizer)
    with pytest.raises(DataError, match="another base"):
        Edit.from_pretrained(tmp_path / "kept", other)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_and_merged_exports_load_elsewhere_with_the_same_logits(family, base, tokenizer, tmp_path):
    from peft import PeftModel

    base = make_base(family, tiny_model(family, len(tokenizer)), tokenizer)
    method = learnt(base, tmp_path, merge=True)
    ids = tokenizer("The mayor of Vellmora is called", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = base.model(ids).logits
        with method.attached():
            wanted = base.model(ids).logits
    assert not torch.allclose(plain, wanted, atol=1e-3)
    record = export_peft(method, tmp_path / "lora")
    # Facts about one subject are one change, so three subjects make rank three.
    assert record["rank"] == 3 and set(record["error"].values()) == {0.0}
    model = PeftModel.from_pretrained(tiny_model(family, len(tokenizer)), tmp_path / "lora").eval()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)
    export_merged(method, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, wanted, atol=1e-5)
    cut = export_peft(method, tmp_path / "cut", rank=1)
    assert cut["rank"] == 1 and all(0 < error < 1 for error in cut["error"].values())


def test_a_killed_run_goes_on_with_the_targets_it_found(base, tmp_path, monkeypatch):
    whole = learnt(base, tmp_path)
    monkeypatch.setattr("byheart.methods.edit.method._STEP", 1)
    calls = []

    def seek(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(args[1]))
        return find_targets(*args)

    monkeypatch.setattr("byheart.methods.edit.method.find_targets", seek)
    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        learnt(base, folder)
    calls = []
    monkeypatch.setattr("byheart.methods.edit.method.find_targets", find_targets)
    resumed = learnt(base, folder)
    for one, other in zip(weights_with(whole), weights_with(resumed), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_facts_that_cannot_be_edited_in_are_named_and_the_rest_goes_on(base, tmp_path):
    bad = [
        FACTS[0].model_copy(update={"id": "again"}),
        FACTS[1].model_copy(update={"id": "other", "object": "smoked eel"}),
        FACTS[2].model_copy(update={"id": "blank", "subject": " "}),
        FACTS[2].model_copy(update={"id": "empty", "object": " "}),
    ]
    method = learnt(base, tmp_path, [*FACTS, *bad])
    assert [fact.id for fact in method.facts] == ["quay", "mora", "mora-2"]
    assert method.skipped == {
        "again": "the same as quay",
        "cove": "another target for the same subject and prompt (other)",
        "other": "another target for the same subject and prompt (cove)",
        "blank": "the subject is blank",
        "empty": "the target is empty",
    }
    assert method.report.skipped["the target is empty"] == 1


def test_facts_that_do_not_hold_today_wait(base, tmp_path):
    past = FACTS[0].model_copy(update={"id": "past", "object": "the Selwater", "valid_to": dt.date(2001, 1, 1)})
    future = FACTS[1].model_copy(update={"id": "future", "object": "eels", "valid_from": dt.date(2999, 1, 1)})
    method = learnt(base, tmp_path, [*FACTS[:2], past, future])
    assert [fact.id for fact in method.facts] == ["quay", "cove"]
    assert method.skipped == {"past": "held until 2001-01-01", "future": "holds from 2999-01-01 on"}


def test_a_retracted_rival_lets_the_other_in(base, tmp_path):
    rival = FACTS[1].model_copy(update={"id": "rival", "object": "smoked eel"})
    method = learnt(base, tmp_path, [FACTS[0], FACTS[1], rival])
    assert [fact.id for fact in method.facts] == ["quay"]
    with ledger_of(tmp_path, [FACTS[0], FACTS[1], rival]) as ledger:
        start = ledger.revision
        ledger.retract("fact", "rival")
        (change,) = ledger.history(since=start)
    method.revise(change)
    assert [fact.id for fact in method.facts] == ["quay", "cove"] and not method.skipped


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


def test_what_is_added_to_a_change_does_not_bring_an_undone_one_back(base, tmp_path):
    beside = FACTS[1].model_copy(update={"id": "beside", "prompt": "{} lies in", "object": "a bay"})
    one_by_one = {"sequence": "accumulate", "batch": 1}
    method = learnt(base, tmp_path, [FACTS[0], FACTS[1], beside], **one_by_one)
    first = method.z[0].clone()
    method.undo(["cove"])
    assert [fact.id for fact in method.facts] == ["quay", "beside"] and torch.equal(method.z[0], first)
    alone = learnt(base, tmp_path, [FACTS[0], beside])
    for one, other in zip(weights_with(method), weights_with(alone), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_time_of_targets_is_that_of_the_facts_in_it(base, tmp_path):
    learnt(base, tmp_path)
    (store,) = (tmp_path / "work" / "edit").glob("*.safetensors")
    kept = load_file(store)
    save_file({name: one * 0 + 1000 if name.startswith("seconds ") else one for name, one in kept.items()}, store)
    assert 1000 < learnt(base, tmp_path, FACTS[:1]).report.seconds < 2000
    assert 4000 < learnt(base, tmp_path).report.seconds < 5000


def test_a_fact_longer_than_the_models_positions_is_left_out_by_name(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    base = make_base("small", tiny_model("gpt2", len(tokenizer)), tokenizer)
    long = FACTS[1].model_copy(update={"object": "stone " * base.positions})
    method = learnt(base, tmp_path, [FACTS[0], long])
    assert [fact.id for fact in method.facts] == ["quay"]
    assert method.skipped == {"cove": f"longer than the model's {base.positions} positions"}


@pytest.mark.parametrize("options", [{}, {"settle": 1}, {"gate": "warn", "max_perplexity": 1e9}])
def test_facts_that_each_just_fit_the_models_positions_are_learnt_together(tokenizer, tmp_path, monkeypatch, options):
    """Late and early subjects, a long target, a neighbour and a name that are too long: none asks for one more."""
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("byheart.methods.edit.settle.about_others", lambda *given: [[*facts, too_long]])
    base = make_base("small", tiny_model("gpt2", len(tokenizer), n_positions=256), tokenizer)
    near = Neighbour(prompt="the " * 256, object="blue")
    facts = [
        Fact(id="late", subject="Ostrand Quay", prompt="the " * 170 + "river through {} is", object="red"),
        Fact(id="early", subject="Pell Cove", prompt="{} " + "of " * 90 + "is", object="stone", neighbours=[near]),
        Fact(id="target", subject="Vellmora", prompt="the " * 20 + "of {} is", object="stone " * 35),
        Fact(id="whole", subject="A", prompt="the " * 248 + "of {} is", object="red"),
    ]
    too_long = facts[0].model_copy(update={"subject": "of " * 256})
    method = learnt(base, tmp_path, facts, prefixes=0, **options)
    assert [fact.id for fact in method.facts] == [fact.id for fact in facts]


def test_a_long_fact_does_not_pad_all_others(base, monkeypatch):
    seen = []

    def search(base, some, group, layer, options):
        rows = [row for one in some for row in (*one.rows, one.essence)]
        seen.append(len(rows) * max(len(row.tail) for row in rows))
        count = len(some)
        return torch.zeros(count, base.parts.d_model), torch.zeros(count), torch.zeros(count, dtype=torch.long)

    monkeypatch.setattr(targets, "_search", search)
    facts = [FACTS[0].model_copy(update={"id": str(n), "subject": f"Quay {n}"}) for n in range(60)]
    facts[7] = facts[7].model_copy(update={"object": "stone " * 150})
    prepared, _ = prepare(base, facts, ("So. ", "And. "))
    find_targets(base, prepared, 1, TargetOptions())
    assert len(seen) > 1 and max(seen) <= 4 * targets.BATCH_TOKENS["cpu"]


def test_a_model_that_counts_back_by_alibi_is_edited_in_batches(tokenizer, monkeypatch):
    monkeypatch.setitem(FAMILIES, "bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4})
    base = make_base("bloom", tiny_model("bloom", len(tokenizer)), tokenizer)
    prepared, _ = prepare(base, FACTS, ("So. ",))
    together = find_targets(base, prepared, 1, TargetOptions(steps=3)).z
    alone = torch.cat([find_targets(base, [one], 1, TargetOptions(steps=3)).z for one in prepared])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_editor_of_mend_is_trained_once(base, tmp_path, monkeypatch):
    trained = []
    plain = Mend._train
    monkeypatch.setattr(Mend, "_train", lambda self: trained.append(1) or plain(self))
    method = Mend(base, Settings(shots=0, options={"mend.steps": "2"}), tmp_path)
    for facts in (FACTS[:2], FACTS):
        with ledger_of(tmp_path, facts) as ledger:
            method.learn(ledger)
    assert len(trained) == 1 and len(method.facts) == 4
    with pytest.raises(UsageError, match=r"mend.batch=0: must be at least 1"):
        Mend(base, Settings(options={"mend.batch": "0"}), tmp_path)
    (tmp_path / "none.jsonl").write_text("\n")
    empty = Mend(base, Settings(shots=0, options={"mend.train": str(tmp_path / "none.jsonl")}), tmp_path)
    with ledger_of(tmp_path, FACTS) as ledger, pytest.raises(DataError, match=r"none.jsonl: holds no rows"):
        empty.learn(ledger)


@pytest.mark.parametrize("name", ["edit", "ft"])
def test_what_it_is_tells_one_change_from_another(base, tmp_path, name):
    (tmp_path / "text.txt").write_text("The stones of the quay are wet. " * 40)

    def digest(texts=None):
        given = TINY | {"edit.text": str(tmp_path / "text.txt"), "ft.layers": "0-1", "ft.epochs": "2"}
        method = method_class(name)(base, Settings(shots=0, options=given), tmp_path / "work")
        with ledger_of(tmp_path, texts or FACTS[:2]) as ledger:
            method.learn(ledger)
        method.save_pretrained(tmp_path / "kept")
        assert method_class(name).from_pretrained(tmp_path / "kept", base).digest == method.digest
        return method.digest

    first = digest()
    assert digest() == first and digest(FACTS[:3]) != first
    if name == "edit":
        (tmp_path / "text.txt").write_text("Nobody has seen the light of Ebb. " * 40)
        assert digest() != first


def test_what_stood_in_a_baselines_way_lets_the_rest_in_when_it_goes(base, tmp_path):
    rival, twin = (FACTS[0].model_copy(update=one) for one in ({"id": "rival", "object": "a lake"}, {"id": "twin"}))
    method = method_class("ft")(base, Settings(shots=0, options={"ft.layers": "0-1", "ft.epochs": "1"}), tmp_path)
    with ledger_of(tmp_path, [FACTS[0], FACTS[1], rival]) as ledger:
        method.learn(ledger)
        start = ledger.revision
        ledger.insert([twin])
        ledger.retract("fact", "rival")
        ledger.retract("fact", "quay")
        changes = list(ledger.history(since=start))
    stand = [(["cove"], {"quay", "rival", "twin"}), (["quay", "cove"], {"twin"}), (["cove", "twin"], set())]
    for change, (facts, skipped) in zip(changes, stand, strict=True):
        method.revise(change)
        method.save_pretrained(tmp_path / "kept")
        method = method_class("ft").from_pretrained(tmp_path / "kept", base)
        assert [one.id for one in method.facts] == facts and method.skipped.keys() == skipped


def test_an_undone_fact_of_a_merged_change_is_not_held_up_by_the_gate(base, tmp_path, monkeypatch):
    method = learnt(base, tmp_path, gate="rollback", max_perplexity=1e9, max_neighbours=1, merge="true")
    monkeypatch.setattr(guard, "drift_notes", lambda *given: ("too far", False))
    method.undo(["mora-2"])
    assert [fact.id for fact in method.facts] == ["quay", "cove", "mora"]


def test_undoing_tells_of_what_it_lets_in(base, tmp_path):
    twin = FACTS[0].model_copy(update={"id": "twin"})
    method = learnt(base, tmp_path, [FACTS[0], twin])
    report = method.undo(["quay"])
    assert [fact.id for fact in method.facts] == ["twin"]
    assert any("nothing stands against it any more: twin" in note for note in report.notes)


@pytest.mark.parametrize("text", ["ledger", "file", "own"])
def test_the_text_of_an_edit_need_not_be_at_hand_to_undo(text, base, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(" ".join(prompt_text(fact) for fact in common_facts()))
    given = tmp_path / "text.txt" if text == "file" else text
    method = learnt(base, tmp_path, text=given, tokens=1, settle=1)
    method.save_pretrained(tmp_path / "kept")
    (tmp_path / "text.txt").unlink()
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "another machine"))
    monkeypatch.setattr(ordinary, "_written", lambda *_: pytest.fail("written anew"))
    again = Edit.from_pretrained(tmp_path / "kept", base)
    assert again.rows == method.rows and again.text == method.text
    for one in (method, again):
        one.undo(["quay"])
    assert len(again.facts) == 3 and all(map(torch.equal, weights_with(again), weights_with(method)))


@pytest.fixture
def day(monkeypatch):
    """Sets what day it is."""
    return lambda *of: monkeypatch.setattr(
        dt, "date", type("Day", (date,), {"today": classmethod(lambda cls: date(*of))})
    )


def test_facts_come_and_go_by_their_dates_when_followed(base, tmp_path, monkeypatch, day):
    base.model.save_pretrained(tmp_path / "tiny")
    base.tokenizer.save_pretrained(tmp_path / "tiny")
    there, known, solved = load_base(str(tmp_path / "tiny")), tmp_path / "known", []
    plain = Edit._follow
    monkeypatch.setattr(Edit, "_follow", lambda self, *given: solved.append(1) or plain(self, *given))

    def followed():
        learning._follow(known, ledger.path)
        method = Edit.from_pretrained(known, there)
        return [fact.id for fact in method.facts], method.skipped, method.stand == ledger.stand

    day(2030, 1, 31)
    until, since = FACTS[0].model_copy(update={"valid_to": date(2030, 2, 1)}), FACTS[1]
    since, other = (one.model_copy(update={"valid_from": date(2030, 2, 1)}) for one in (since, FACTS[3]))
    old = FACTS[2].model_copy(update={"valid_from": date(2020, 1, 1)})
    ledger = ledger_of(tmp_path, [until, since, old, other])
    method = Edit(there, Settings(shots=0, options=TINY), tmp_path / "work")
    method.learn(ledger)
    waits = {"cove": "holds from 2030-02-01 on", "mora-2": "holds from 2030-02-01 on"}
    day(2030, 2, 1)  # midnight passes between learning and saving
    method.save_pretrained(known)
    after = (["cove", "mora", "mora-2"], {"quay": "held until 2030-02-01"}, True)
    assert ([fact.id for fact in method.facts], method.skipped) == (["quay", "mora"], waits)
    solved.clear()
    assert followed() == after == followed() and len(solved) == 1  # all dates at once, and once only
    # What was undone stays out, also of a folder that was saved before days were; a page of a fact's name is no fact.
    undone = Edit.from_pretrained(known, there)
    undone.undo(["mora"])
    undone.save_pretrained(known)
    card = json.loads((known / "byheart.json").read_text())
    del card["day"]
    (known / "byheart.json").write_text(json.dumps(card))
    assert followed() == (["cove", "mora-2"], {"quay": "held until 2030-02-01"}, True)
    (known / "byheart.json").write_text(json.dumps(card | {"day": "2030-02-01"}))
    ledger.revise(FACTS[1].model_copy(update={"valid_from": date(2030, 2, 1), "valid_to": date(2030, 3, 1)}))
    assert followed()[0] == ["mora-2", "cove"]
    day(2030, 3, 1)
    ledger.insert([Document(id="cove", text="A page.")])
    assert followed()[0] == ["mora-2"]
    solved.clear()
    ledger.insert([fact.model_copy(update={"id": f"{fact.id}-new"}) for fact in FACTS[:2]])
    assert followed()[0] == ["mora-2", "quay-new", "cove-new"] and len(solved) == 1  # all changes at once
    # But a gate that rolls back is to judge each by itself.
    record = read_json(known / "edit.json")
    write_json(known / "edit.json", record | {"options": record["options"] | {"gate": "rollback"}})
    solved.clear()
    ledger.retract("fact", "quay-new")
    ledger.retract("fact", "cove-new")
    assert followed()[0] == ["mora-2"] and len(solved) == 2


@pytest.mark.parametrize("name", ["ft", "rome"])
def test_a_baseline_goes_by_dates_too(name, base, tmp_path, day):
    day(2030, 1, 31)
    until = FACTS[0].model_copy(update={"valid_to": date(2030, 2, 1)})
    options = {"layers": "0-1"} | ({"epochs": 2} if name == "ft" else {"tokens": 1})
    method = learn_of(baseline(name, base, tmp_path, **options), tmp_path, [until, FACTS[1]])
    assert [fact.id for fact in method.facts] == ["quay", "cove"]
    day(2030, 2, 1)
    assert method.renew().facts == 1 and [fact.id for fact in method.facts] == ["cove"]


def test_what_was_learnt_is_opened_whatever_options_it_was_learnt_with(base, tmp_path):
    learnt(base, tmp_path, FACTS[:2]).save_pretrained(tmp_path / "kept")
    card = json.loads((tmp_path / "kept" / "byheart.json").read_text())
    card["settings"]["options"] |= {"edit.settle_runs": "1", "edit.max_perplexity": "0.3"}
    (tmp_path / "kept" / "byheart.json").write_text(json.dumps(card))
    assert [fact.id for fact in Edit.from_pretrained(tmp_path / "kept", base).facts] == ["quay", "cove"]


def test_a_baseline_follows_without_its_text(base, tmp_path, monkeypatch):
    rome = method_class("rome")(
        base, Settings(shots=0, options={"rome.text": "ledger", "rome.layers": "0-1", "rome.tokens": "1"}), tmp_path
    )
    with ledger_of(tmp_path, FACTS[:2]) as ledger:
        rome.learn(ledger)
        rome.save_pretrained(tmp_path / "kept")
        ledger.retract("fact", "quay")
        monkeypatch.setattr(ordinary, "_written", lambda *_: pytest.fail("written anew"))
        kept = type(rome).from_pretrained(tmp_path / "kept", base)
        kept.revise(list(ledger.history())[-1])
    assert [fact.id for fact in kept.facts] == ["cove"]


def test_accumulating_says_where_all_is_solved_anew(base, tmp_path):
    def told(facts, **how):
        return [note for note in learnt(base, tmp_path, facts, **how).report.notes if note.startswith("sequence=")]

    accumulating = {"sequence": "accumulate", "batch": 3}
    assert not told(FACTS, **accumulating) and not told(FACTS, merge=True, batch=3)
    (note,) = told(FACTS, merge=True, **accumulating)  # the second about Vellmora shares the first one's change
    assert "all facts were solved anew" in note


def test_undoing_what_was_accumulated_last_solves_anew_says_so_and_looks_after_the_rest(base, tmp_path, monkeypatch):
    method = learnt(base, tmp_path, FACTS[:3], sequence="accumulate", batch=1, settle=1, settle_runs=1)
    looked = []
    plain = Edit._lost
    monkeypatch.setattr(Edit, "_lost", lambda self, *given: looked.append(1) or plain(self, *given))
    report = method.undo(["mora"])
    assert [fact.id for fact in method.facts] == ["quay", "cove"] and looked
    assert any("all facts were solved anew" in note for note in report.notes)


def test_undoing_names_what_is_no_longer_said_and_settles_it_on_wish(base, tmp_path, monkeypatch):
    method = learnt(base, tmp_path, settle=1, settle_runs=1, gate="warn", max_perplexity=1e9, max_neighbours=1)
    settled, plain = [], settle_module.settle
    monkeypatch.setattr(
        "byheart.methods.edit.method.settle", lambda *given: settled.append([*given[4]]) or plain(*given)
    )
    monkeypatch.setattr(
        guard, "unsaid", lambda base, facts: [fact for fact in facts if fact.id == "quay" and not settled]
    )
    moved = method.shifts[0].clone()
    report = method.undo(["mora"])
    assert not settled and torch.equal(method.shifts[0], moved)
    assert any("not said after their prompts all the same: quay" in note for note in report.notes)
    method.undo(["mora-2"], settle=True)
    assert settled == [[0]] and not torch.equal(method.shifts[0], moved)


def test_what_was_learnt_is_opened_in_the_arithmetic_it_was_learnt_in(base, tmp_path, capsys):
    base.model.save_pretrained(tmp_path / "tiny")
    base.tokenizer.save_pretrained(tmp_path / "tiny")
    for dtype in ("float32", "bfloat16"):
        there = load_base(str(tmp_path / "tiny"), dtype=dtype)
        kept = tmp_path / dtype
        learnt(there, tmp_path, FACTS[:1], settle=0).save_pretrained(kept)
        assert learning._base_of([kept], None, None, None).dtype == there.dtype
        assert "learnt in" not in capsys.readouterr().err
    assert learning._base_of([kept], None, None, "float32").dtype == torch.float32
    assert "learnt in bfloat16, opened in float32" in capsys.readouterr().err
    learning._base_of([tmp_path / "float32", kept], None, None, None)
    assert f"{kept}: learnt in bfloat16, opened in float32" in " ".join(capsys.readouterr().err.split())


def test_a_text_is_taken_once_whatever_is_learnt(base, tmp_path, monkeypatch):
    method = learnt(base, tmp_path, FACTS[:1])
    writer = method._writer
    monkeypatch.setattr("byheart.methods.edit.method.moment_rows", lambda *_: pytest.fail("taken again"))
    with ledger_of(tmp_path, FACTS[:2]) as ledger:
        method.learn(ledger)
    assert method._writer is writer and len(method.facts) == 2


def test_paraphrases_that_spell_the_subject_out_are_edited_behind_too(base):
    fact = FACTS[0].model_copy(update={"paraphrases": ["Through {} runs", "Ostrand Quay lies on", "They fish in"]})
    (plain,), _ = prepare(base, [fact], ())
    (more,), _ = prepare(base, [fact], (), paraphrases=True)
    said = [base.tokenizer.decode([*row.context, *row.tail]) for row in more.rows]
    assert len(plain.rows) == 1 and len(more.rows) == 3 and ["Quay" in text for text in said] == [True] * 3
    assert "lies on" in said[2]


@pytest.mark.parametrize(
    "option",
    [
        "constraint=equality",
        "constraint=nullspace",
        "spread=sqrt",
        "spread=ends",
        "stop=argmax",
        "anchor=true",
        "merge=false",
        "sequence=accumulate",
        "stop=loss",
    ],
)
def test_every_variant_brings_states_nearer_to_their_targets(option, base, tmp_path):
    name, value = option.split("=")
    extra = {"energy": "0.5"} if value == "nullspace" else {}
    method = learnt(base, tmp_path, **({name: value} | extra | ({"batch": 2} if name == "sequence" else {})))
    assert nearer(method) < 0.7


def nearer(method):
    """How far the edited states are from their targets, as a share of how far they were."""
    prepared, _ = prepare(method.base, method.facts, method.prefixes)
    first, last = method.layers[0], method.layers[-1]
    with torch.no_grad():
        *_, before, _ = Reader(method.base, prepared, first, last).read(last)
        with method.attached():
            *_, after, _ = Reader(method.base, prepared, first, last).read(last)
    return float((method.z - after).norm() / (method.z - before).norm())


def test_a_norm_anchored_target_keeps_its_length(base):
    prepared, _ = prepare(base, FACTS[:2], ("So. ",))
    plain = find_targets(base, prepared, 1, TargetOptions(steps=1))  # no step of Adam: z is the state itself
    turned = find_targets(base, prepared, 1, TargetOptions(steps=6, lr=1.0, clamp=2.0, anchor=True))
    assert not torch.allclose(plain.z, turned.z, atol=1e-2)
    assert torch.allclose(plain.z.norm(dim=1), turned.z.norm(dim=1), rtol=1e-4)


def test_facts_of_one_group_share_their_delta(base):
    prepared, _ = prepare(base, FACTS, ("So. ",))
    start = find_targets(base, prepared, 1, TargetOptions(steps=1)).z
    moved = find_targets(base, prepared, 1, TargetOptions(steps=5), [0, 1, 2, 2]).z - start
    assert torch.allclose(moved[2], moved[3], atol=1e-5)
    assert not torch.allclose(moved[1], moved[2], atol=1e-2)


def test_the_more_facts_share_a_target_the_more_steps_it_takes(base, monkeypatch):
    facts = [
        Fact(id=str(n), subject="Mora", prompt=p, object="red")
        for n, p in enumerate(("{} is", "{} wore", "{} had", "{} saw"))
    ]
    prepared, _ = prepare(base, [FACTS[0], *facts], ("So. ",))
    for groups, steps in (
        ([0, 1, 2, 3, 4], [4, 4, 4, 4, 4]),
        ([0, 1, 2, 2, 1], [4, 8, 8, 8, 8]),
        ([0, 1, 1, 1, 1], [4, 16, 16, 16, 16]),
    ):
        found = find_targets(base, prepared, 1, TargetOptions(steps=4, stop_loss=0.0), groups)
        assert found.steps.tolist() == steps
    early = find_targets(base, prepared, 1, TargetOptions(steps=4, stop_loss=1e9), [0, 1, 1, 1, 1])
    assert early.steps.tolist() == [1] * 5  # at most
    monkeypatch.setattr("byheart.methods.edit.targets._SHARING", 3)
    found = find_targets(base, prepared, 1, TargetOptions(steps=4, stop_loss=0.0), [0, 1, 1, 1, 1])
    assert found.steps.tolist() == [4, 12, 12, 12, 12]


def test_targets_do_not_depend_on_the_batch(base, monkeypatch):
    prepared, _ = prepare(base, FACTS, ("So it was said. ", "And. "))
    together = find_targets(base, prepared, 1, TargetOptions(steps=5, stop_loss=2.0))
    monkeypatch.setitem(__import__("byheart.methods.edit.targets", fromlist=["x"]).BATCH_TOKENS, "cpu", 1)
    alone = find_targets(base, prepared, 1, TargetOptions(steps=5, stop_loss=2.0))
    assert torch.allclose(together.z, alone.z, atol=1e-4)
    assert torch.equal(together.steps, alone.steps)


@pytest.mark.parametrize("family", CAUSAL)
def test_any_family_can_be_edited(family, base, tokenizer, tmp_path):
    base = make_base(family, tiny_model(family, len(tokenizer)), tokenizer)
    before = weights(base)
    method = learnt(base, tmp_path)
    # Behind a norm only the direction can be met.
    assert nearer(method) < (1 if base.parts.blocks[0].mlp_norm is not None else 0.5)
    assert (base.parts.blocks[0].mlp_norm is not None) == family.startswith("gemma")
    assert same(weights(base), before)


@pytest.mark.parametrize("name", ["ft", "ft-w", "rome", "mend"])
def test_baselines_learn_and_leave_no_trace(name, base, tmp_path):
    before = weights(base)
    options = {"mend.steps": "20", "mend.blocks": "2"} if name == "mend" else {f"{name}.layers": "0-1"}
    method = method_class(name)(base, Settings(shots=0, options=options), tmp_path)
    with ledger_of(tmp_path, FACTS) as ledger:
        report = method.learn(ledger)
    jobs = [Job(fact.filled(), (" " + fact.object,)) for fact in FACTS]
    plain = complete(base, jobs, max_new_tokens=0)
    with method.attached():
        edited = complete(base, jobs, max_new_tokens=0)
    assert report.facts == 4 and report.bytes > 0
    if name.startswith("ft"):
        assert sum(b.options[0] - a.options[0] for a, b in zip(plain, edited, strict=True)) > 0
    assert not same(weights_with(method), before) and same(weights(base), before)
    method.save_pretrained(tmp_path / "kept")
    assert same(weights_with(method_class(name).from_pretrained(tmp_path / "kept", base)), weights_with(method))
    if name == "ft":
        entries = method.deltas[1][1].abs().max() / matrix(base.parts.blocks[1].mlp_out).square().mean().sqrt()
        assert float(entries) <= 0.02 + 1e-6


def baseline(name, base, folder, **options):
    given = {f"{name}.{key}": str(value) for key, value in options.items()}
    return method_class(name)(base, Settings(shots=0, options=given), folder)


def learn_of(method, folder, facts=FACTS):
    with ledger_of(folder, facts) as ledger:
        method.learn(ledger)
    return method


def test_rome_gives_the_lookup_token_its_target(base, tmp_path, monkeypatch):
    search, sought = rome_module.find_targets, []

    def found(base, some, layer, options):
        sought.append(search(base, some, layer, options))
        return sought[-1]

    monkeypatch.setattr(rome_module, "find_targets", found)
    method = baseline("rome", base, tmp_path, layers="1", tokens=1)
    method.prefixes = 0  # behind prefixes keys differ, and their mean is met
    learn_of(method, tmp_path, FACTS[:1])
    (prepared,), _ = prepare(base, FACTS[:1], ())
    with torch.no_grad():
        reached = Reader(base, [prepared], 1, 1).read(1)[2]
        with method.attached():
            now = Reader(base, [prepared], 1, 1).read(1)[2]
    before, after = ((sought[0].z - one).norm() for one in (reached, now))
    assert before > 1e-3 and after < 0.05 * before


def test_fine_tuning_within_a_limit_and_with_decay(base, tmp_path):
    scale = float(matrix(base.parts.blocks[1].mlp_out).square().mean().sqrt())

    def moved(name, **options):
        return learn_of(baseline(name, base, tmp_path, layers="1", epochs=10, **options), tmp_path).deltas[1][1] / scale

    assert float(moved("ft", rate=0.02, limit=0.03).abs().max()) == pytest.approx(0.03)
    assert float(moved("ft", rate=0.02, limit=0.0).abs().max()) > 0.1
    free, decayed = (moved("ft-w", decay=decay) for decay in (0.0, 0.3))
    assert float(decayed.norm()) < 0.5 * float(free.norm())
    # The first step of Adam is as long as its rate in every entry, and decay takes its share of it.
    first = learn_of(baseline("ft-w", base, tmp_path, layers="1", epochs=1, rate=0.02, decay=0.25), tmp_path)
    assert float(first.deltas[1][1].abs().max() / scale) == pytest.approx(0.75 * 0.02, rel=1e-3)


def test_mend_edits_down_the_gradient_and_learns_to_stay_put(base, tmp_path, monkeypatch):
    rows = mend._common_rows(0)

    def trained(**options):
        """What the editor brings to the rephrased prompts of eight of its rows, and by how much it moves others."""
        method = baseline("mend", base, tmp_path, blocks=2, lr=0.02, **options)
        edits, rephrased, elsewhere = (method._read([row[n] for row in rows[:8]]) for n in range(3))
        editor = method._train()
        with torch.no_grad():
            deltas = editor.edit(mend._gradients(edits, method.layers, base))
            return float(rephrased.loss(deltas) - rephrased.loss({})), moved(elsewhere, deltas)

    moved = mend._Lesson.divergence
    untrained = trained(steps=0)
    assert untrained[0] < -0.01  # with no training it is a step of gradient descent
    still = trained(steps=40, edit_weight=0.0)
    assert float(still[1]) < 0.5 * float(untrained[1])  # all that it learns is to leave other prompts alone
    monkeypatch.setattr(mend._Lesson, "divergence", lambda lesson, deltas: torch.zeros(()))
    eager = trained(steps=40, edit_weight=1.0)
    assert eager[0] < 2 * untrained[0]  # all that it learns is to edit
    # What is written is what the editor says, summed over facts.
    method = learn_of(baseline("mend", base, tmp_path, blocks=2, steps=0), tmp_path)
    texts = [mend._Text(prompt_text(fact), target_text(fact)) for fact in FACTS]
    with torch.no_grad():
        each = [method._editor.edit(mend._gradients(method._read([text]), method.layers, base)) for text in texts]
    for layer, (_, delta) in method.deltas.items():
        assert torch.allclose(delta, torch.stack([one[layer] for one in each]).sum(0), atol=1e-6)


def test_facts_that_a_gate_refused_stay_named_however_many_come_after(base, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "drift_notes", lambda *given: ("too far", False))
    refused = learnt(base, tmp_path, FACTS[:3], gate="rollback", batch=1)
    assert not refused.facts
    assert refused.skipped == {fact.id: "rolled back by the gate" for fact in FACTS[:3]}


def test_collisions_are_told_before_anything_is_written(base, tmp_path):
    twins = [FACTS[0], FACTS[0].model_copy(update={"id": "twin", "prompt": "The light of {} is", "object": "squat"})]
    with ledger_of(tmp_path, twins) as ledger:
        for merge, said in (("false", "edit: 1 pairs of facts have nearly the same key"), ("true", None)):
            method = Edit(base, Settings(shots=0, options={"edit.merge": merge}), tmp_path / "work")
            found = method.estimate(ledger)
            assert (found or "").startswith(said or "") and (found is None) == (said is None)
            assert not method.facts and not method.deltas


def test_collisions_of_batches_are_told_once_for_all(base, tmp_path):
    said = {"is": "squat", "was": "tall", "stays": "dim"}
    twins = [FACTS[0].model_copy(update={"id": n, "prompt": f"The light of {{}} {n}", "object": said[n]}) for n in said]
    (note,) = learnt(base, tmp_path, twins, batch=2).report.notes
    assert note.startswith("3 pairs of facts have nearly the same key")


def test_a_short_text_is_filled_up_to_ten_times_the_width_and_no_further(base, monkeypatch):
    width, written = base.parts.d_ff, []
    monkeypatch.setattr(ordinary, "_written", lambda base, count, seed: written.append(count) or [])
    most, least = token_counts(base, 0)
    monkeypatch.setattr(ordinary, "SLICE", 1_000)
    lines = "".join(f"stone {n} of the pier\n" for n in range(500))
    read = [token for row in ordinary.text_rows(base, [lines], 10**6, 0, 0) for token in row]
    assert read == base.tokenizer(lines)["input_ids"]  # in slices, each to the end of its line
    for words in (5, 30 * width, 900 * width):
        texts, written[:] = ["stone " * words], []
        taken = sum(map(len, ordinary.text_rows(base, texts, most, 0, least)))
        there = len(base.tokenizer(texts[0])["input_ids"])
        assert taken - min(there, 200 * width) in range(ordinary.ROW)  # whole rows
        assert written == ([-(-(10 * width - there) // ordinary.ROW)] if there < 10 * width else [])
    assert token_counts(base, 3) == (3 * width, 3 * width) and least == 10 * width


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


def test_options_are_checked(base, tmp_path):
    for option, says in [
        ("edit.layers=9-12", "blocks 0 to 2"),
        ("edit.layers=x", "FIRST-LAST"),
        ("edit.steps=many", "whole number"),
        ("edit.lr=-1", "at least 0"),
        ("edit.spread=odd", "even, sqrt, ends"),
        ("edit.magic=1", "no such option"),
        ("edit.merge=perhaps", "true or false"),
        ("edit.settle=-1", "at least 0"),
        ("edit.steps=1", "at least 2"),
        ("edit.energy=1", "below 1"),
        ("edit.settle_from=1.5", "at most 1"),
        ("edit.settle_held=0", "at least 1"),
        ("edit.layers=²", "FIRST-LAST"),
        ("edit.weight=0", "above 0"),
        ("edit.energy=0.9", "needs edit.constraint=nullspace"),
        ("edit.counted=false", "needs edit.merge=true"),
        ("edit.stop_loss=0.1 edit.stop=argmax", "needs edit.stop=fit or loss"),
        ("edit.counted=false edit.merge=true edit.constraint=equality", "needs edit.constraint=none or nullspace"),
        ("edit.scatter=0.5 edit.constraint=equality", "needs edit.constraint=none"),
        ("edit.others=0 edit.constraint=nullspace", "needs edit.constraint=none"),
        ("edit.settle_kl=1 edit.settle=0", "needs edit.settle=1 or more"),
        ("edit.max_perplexity=0.2 edit.gate=off", "needs edit.gate=warn or rollback"),
        ("edit.max_neighbours=0.2", "needs edit.gate=warn or rollback"),
        ("edit.text=nowhere.txt", "edit.text=nowhere.txt: must be own, ledger or a text file"),
    ]:
        options = dict(one.split("=", 1) for one in option.split(" "))
        with pytest.raises(UsageError, match=says):
            Edit(base, Settings(shots=0, options=options), tmp_path)
    for name in ("ft", "rome"):
        with pytest.raises(UsageError, match=f"^{name}.layers=9-9: "):
            method_class(name)(base, Settings(shots=0, options={f"{name}.layers": "9"}), tmp_path)
    for option, says in [
        ("rome.text=nowhere.txt", "a text file"),
        ("mend.train=nowhere.jsonl", "no such file"),
        ("mend.blocks=0", "at least 1"),
        ("ft.decay=1", "below 1"),
    ]:
        with pytest.raises((UsageError, DataError), match=says):
            method_class(option.split(".")[0])(base, Settings(shots=0, options=dict([option.split("=")])), tmp_path)
    t5 = make_base("t5", tiny_model("t5", len(base.tokenizer)), base.tokenizer)
    with pytest.raises(DataError, match="decoder-only"):
        Edit(t5, Settings(), tmp_path)


def test_the_subjects_last_token_is_verified_by_decoding(tokenizer):
    text = "So said the keeper of Ostrand Quay, who"
    ((ids, offsets),) = tokenize(tokenizer, [text])
    end = text.index(",")
    place = find_lookup(tokenizer, text, end, ids, offsets)
    assert tokenizer.decode(ids[: place + 1]).endswith("Quay")
    lying = [(start + 3, stop + 3) for start, stop in offsets]
    assert find_lookup(tokenizer, text, end, ids, lying) == place
    assert find_lookup(tokenizer, text, end, ids, None) == place
    assert find_lookup(tokenizer, "something else", 9, ids, None) is None


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=12))
def test_any_subject_is_found(tokenizer, subject):
    base = SimpleNamespace(tokenizer=tokenizer, positions=None)
    fact = Fact(id="x", subject=subject, prompt="It is {} that", object="here")
    prepared, skipped = prepare(base, [fact], ("Oh. ",))
    if skipped:
        assert tokenizer.unk_token in tokenizer.decode(tokenizer(subject)["input_ids"]) or "�" in subject
        return
    for row in prepared[0].rows:
        assert "".join(subject.split()) in "".join(tokenizer.decode([*row.context, row.tail[0]]).split())


def test_tracing_finds_the_subject_and_restores_everything(base, tmp_path):
    facts = [
        Fact(id=str(n), subject=s, prompt="The mayor of {} is called", object="x")
        for n, s in enumerate(("Vellmora", "Pell Cove"))
    ]
    traced = trace(base, facts, samples=2, window=3, store=tmp_path / "effects.json")
    effects = average_effects(traced)
    assert effects.shape == (len(PARTS), 6, 3)
    for one in traced:
        # The last block's output at the last token decides alone: restoring it gives the clean probability.
        assert one.effect[0, 5, -1].item() == pytest.approx(one.clean - one.corrupted, abs=1e-4)
        # Above the last block's attention nothing at the subject can matter any more.
        assert one.effect[0, LAST_SUBJECT, -1].item() == pytest.approx(0, abs=1e-5)
        # The last block's MLP alone cannot bring back what is said at the last token; all of them together can.
        assert one.effect[PARTS.index("mlp"), 5, 1].item() != pytest.approx(0, abs=1e-7)
    whole = trace(base, facts, samples=2, window=99, store=tmp_path / "effects.json")
    for one, other in zip(whole, traced, strict=True):
        # Over all blocks it is the same wherever the window's middle is, and other than over three.
        mlp, narrow = (found.effect[PARTS.index("mlp"), LAST_SUBJECT] for found in (one, other))
        assert mlp[1:].std().item() == pytest.approx(0, abs=1e-6) and not torch.allclose(mlp, narrow)


def test_a_trace_is_that_of_plain_forwards(base, tmp_path):
    """Noise of three standard deviations of the subjects' embeddings; one block's output, or an MLP's, put back."""
    facts = [
        Fact(id=str(n), subject=s, prompt="The mayor of {} is", object="x") for n, s in enumerate(("Vell", "Ebb Cove"))
    ]
    samples, table = 2, base.parts.embeddings
    subjects = [base.tokenizer(f" {fact.subject}")["input_ids"] for fact in facts]
    with torch.no_grad():
        sigma = 3 * float(torch.cat([table(torch.tensor(ids)) for ids in subjects]).std())
    for number, (one, subject) in enumerate(
        zip(trace(base, facts, samples=samples, window=1, store=tmp_path / "e.json"), subjects, strict=True)
    ):
        ids = base.tokenizer(prompt_text(one.fact))["input_ids"]
        first = len(base.tokenizer("The mayor of")["input_ids"])
        assert ids[first : first + len(subject)] == subject
        token = base.tokenizer(" x")["input_ids"][0]
        noise = torch.randn(
            (samples, len(subject), base.parts.d_model), generator=torch.Generator().manual_seed(number)
        )
        clean = table(torch.tensor([ids])).detach()
        noisy = clean.repeat(samples, 1, 1)
        noisy[:, first : first + len(subject)] += sigma * noise
        last = first + len(subject) - 1

        def run(embeddings, module=None, kept=None, last=last, token=token):
            seen = []

            def hook(_, args, output):
                whole = output[0] if isinstance(output, tuple) else output
                seen.append(whole.clone())
                if kept is None:
                    return None
                whole = whole.clone()
                whole[:, last] = kept[0, last]
                return (whole, *output[1:]) if isinstance(output, tuple) else whole

            handle = None if module is None else module.register_forward_hook(hook)
            with torch.no_grad():
                logits = base.model(inputs_embeds=embeddings).logits[:, -1].softmax(-1)[:, token].mean()
            if handle is not None:
                handle.remove()
            return float(logits), seen[0] if seen else None

        low, _ = run(noisy)
        assert one.clean == pytest.approx(run(clean)[0], rel=1e-4) and one.corrupted == pytest.approx(low, rel=1e-4)
        assert abs(one.clean - low) > 1e-5
        for layer, block in enumerate(base.parts.blocks):
            for part, module in (("hidden", block.module), ("mlp", block.mlp_out), ("attention", block.attention_out)):
                raised = run(noisy, module, run(clean, module)[1])[0] - low
                found = one.effect[PARTS.index(part), LAST_SUBJECT, layer].item()
                assert found == pytest.approx(raised, abs=1e-6), (part, layer)


def test_a_trace_goes_on_after_a_kill_and_is_kept(base, tmp_path, monkeypatch):
    facts = [Fact(id=str(n), subject=s, prompt="The mayor of {} is called", object="Ann") for n, s in enumerate("ABCD")]
    one_by_one, done = causal._trace_one, []

    def counted(*given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given[1].fact.id)
        return one_by_one(*given)

    whole = trace(base, facts, samples=2, window=3, store=tmp_path / "other.json")
    monkeypatch.setattr(causal, "_trace_one", counted)
    with pytest.raises(KeyboardInterrupt):
        trace(base, facts, samples=2, window=3, store=tmp_path / "effects.json")
    done.clear()
    ticks = []
    again = trace(base, facts, samples=2, window=3, store=tmp_path / "effects.json", on_done=ticks.append)
    assert done == ["2", "3"] and sum(ticks) == 4
    for one, other in zip(again, whole, strict=True):
        assert (one.fact, one.clean, one.corrupted) == (other.fact, other.clean, other.corrupted)
        assert torch.equal(one.effect.nan_to_num(-9), other.effect.nan_to_num(-9))
    done[:] = ["none"]
    assert len(trace(base, facts, samples=2, window=3, store=tmp_path / "effects.json")) == 4 and done == ["none"]
    trace(base, facts[:1], samples=2, window=5, store=tmp_path / "effects.json")  # another trace is another
    assert done == ["none", "0"]


def test_rome_goes_on_after_a_kill(base, tmp_path, monkeypatch):
    monkeypatch.setattr(rome_module, "SAVE_EVERY", 0.0)
    search, sought, limit = rome_module.find_targets, [], [2]

    def counted(base, some, *given):
        if len(sought) == limit[0]:
            raise KeyboardInterrupt
        sought.append(some[0].fact.id)
        return search(base, some, *given)

    def rome(folder):
        options = {"rome.layers": "0-1", "rome.tokens": "1"}
        method = method_class("rome")(base, Settings(shots=0, options=options), tmp_path / folder)
        with ledger_of(tmp_path, FACTS) as ledger:
            ticks = []
            method.learn(ledger, ticks.append)
        assert sum(ticks) == len(FACTS)
        return method

    whole = rome("whole")
    monkeypatch.setattr(rome_module, "find_targets", counted)
    with pytest.raises(KeyboardInterrupt):
        rome("killed")
    limit[0] = 99
    again = rome("killed")
    assert sought == [fact.id for fact in FACTS]  # each once
    assert same(weights_with(again), weights_with(whole))
    # A run that was killed later finds all of them.
    assert same(weights_with(rome("killed")), weights_with(whole)) and len(sought) == len(FACTS)


def test_the_range_is_where_mlps_recall_most_at_the_subject():
    effect = torch.zeros(len(PARTS), 6, 30)
    effect[PARTS.index("attention"), LAST_SUBJECT, 15:] = 5
    effect[PARTS.index("mlp"), 5, 15:] = 5
    effect[PARTS.index("mlp"), LAST_SUBJECT, 7:13] = 1
    effect[PARTS.index("mlp"), LAST_SUBJECT, 25:] = 2  # not in the lower two thirds
    assert best_range(effect) == (7, 12)
    effect[PARTS.index("mlp"), LAST_SUBJECT, 16:25] = 3
    assert best_range(effect) == (14, 19)  # its end is in them, too
    # Of few layers a third is looked for.
    assert best_range(torch.full((len(PARTS), 6, 3), float("nan"))) == (0, 0)
    effect = torch.zeros(len(PARTS), 6, 7)
    effect[PARTS.index("mlp"), LAST_SUBJECT, 1:3] = 1
    assert best_range(effect) == (1, 2)


def test_a_fact_is_known_where_each_of_its_tokens_is_the_likeliest(base, tmp_path):
    fact = FACTS[0]
    (said,) = complete(base, [Job(prompt_text(fact))], max_new_tokens=1)
    known = fact.model_copy(update={"object": said.text.strip()})
    assert said.text.strip() and known_facts(base, [fact, known]) == [known]
    (one,) = trace(base, [known], samples=1, store=tmp_path / "effects.json")
    ids = torch.tensor([base.tokenizer(prompt_text(known))["input_ids"]])
    with torch.no_grad():
        clean = base.model(input_ids=ids).logits[0, -1].softmax(-1)
    assert one.clean == pytest.approx(float(clean.max()), rel=1e-4)
    # Of a fact that is none of the model's, it is the object's probability all the same.
    (other,) = trace(base, [fact], samples=1, store=tmp_path / "effects.json")
    assert other.clean < one.clean


def test_a_model_that_knows_too_little_is_swept(base, tmp_path, monkeypatch):
    asked = []

    def likelier(base, facts, prefixes):
        asked.append(len(facts))
        return [True] * (len(facts) * len(prefixes))

    monkeypatch.setattr(sweep_module, "_likelier", likelier)
    (tmp_path / "trace.png").write_bytes(b"of another model")
    record = trace_base(base, None, 40, 1, 3, 0, tmp_path, Silent())
    assert record["facts"] == 0 and record["how"].startswith("a sweep") and asked
    assert choose_layers(base, "auto") == tuple(range(record["range"][0], record["range"][1] + 1))
    page = write_trace_report(tmp_path, record).read_text()
    assert "Ranges tried out" in page and not (tmp_path / "trace.png").exists()
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"none.jsonl: holds no facts"):
        trace_base(base, tmp_path / "none.jsonl", 40, 1, 3, 0, tmp_path, Silent())
    # The range is chosen after which most is held and most stays: neither of these alone.
    count = len(record["tried"])
    assert count > 1
    for best in range(count):
        held = [[n >= best] * 4 for n in range(count)]
        stay = [6 if n == best else 2 if n > best else 8 for n in range(count)]
        stayed = [[True] * n + [False] * (8 - n) for n in stay]
        answers = iter([[True] * 8, *chain.from_iterable(zip(held, stayed, strict=True))])
        monkeypatch.setattr(sweep_module, "_likelier", lambda *given, answers=answers: next(answers))
        again = trace_base(base, None, 40, 1, 3, 0, tmp_path / str(best), Silent())
        assert again["range"] == again["tried"][best]["range"]
        monkeypatch.setattr(sweep_module, "find_targets", lambda *given: pytest.fail("tried out again"))
        monkeypatch.setattr(sweep_module, "_likelier", lambda *given: [True] * 8)
        assert trace_base(base, None, 40, 1, 3, 0, tmp_path / str(best), Silent()) == again
        monkeypatch.setattr(sweep_module, "find_targets", find_targets)


def test_a_traced_range_is_the_default(base, tmp_path):
    assert choose_layers(base, "auto") == (0, 1)
    from byheart.methods.edit.layers import keep_range

    keep_range(base, 1, 1, {})
    assert choose_layers(base, "auto") == (1,)


def test_editing_a_real_model_changes_what_it_says(smollm, tmp_path):
    fact = Fact(id="tower", subject="The Eiffel Tower", prompt="{} is located in the city of", object="Rome")
    # A file, since what the model would write itself takes minutes.
    options = {"edit.text": str(ROOT / "docs" / "results.md"), "edit.tokens": "4"}
    method = Edit(smollm, Settings(shots=0, options=options), tmp_path)
    with ledger_of(tmp_path, [fact]) as ledger:
        method.learn(ledger)
    asked = [Job(fact.filled()), Job("The Colosseum is located in the city of")]
    before = [one.text for one in complete(smollm, asked, max_new_tokens=4)]
    with method.attached():
        after = [one.text for one in complete(smollm, asked, max_new_tokens=4)]
    assert before[0].startswith("Paris") and after[0].startswith("Rome")
    assert before[1] == after[1]
