"""The method `edit` as users meet it: learn, undo, revise, follow, keep, export."""

import datetime as dt
import json
from datetime import date

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from byheart import ordinary
from byheart.base import load_base, make_base
from byheart.cli import learning
from byheart.decode import Job, complete
from byheart.errors import DataError, UsageError
from byheart.methods import Settings, method_class
from byheart.methods.edit import guard
from byheart.methods.edit import settle as settle_module
from byheart.methods.edit.common_facts import common_facts
from byheart.methods.edit.covariance import token_counts
from byheart.methods.edit.export import export_merged, export_peft
from byheart.methods.edit.method import Edit
from byheart.methods.edit.prompts import prompt_text
from byheart.methods.edit.targets import find_targets
from byheart.rows import Document, Fact
from byheart.storage import read_json, write_json
from conftest import ROOT, tiny_model
from edits import FACTS, TINY, learnt, ledger_of, same, weights, weights_with


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


def test_undoing_tells_of_what_it_lets_in(base, tmp_path):
    twin = FACTS[0].model_copy(update={"id": "twin"})
    method = learnt(base, tmp_path, [FACTS[0], twin])
    report = method.undo(["quay"])
    assert [fact.id for fact in method.facts] == ["twin"]
    assert "written now: twin (until now: the same as quay)" in report.notes


def test_what_shares_a_change_with_what_is_sought_anew_is_sought_with_it(base, tmp_path):
    # The two of one subject come before and after the one that goes; neither keeps what it had.
    order = [FACTS[2], FACTS[0], FACTS[3]]
    given = {"merge": True, "sequence": "accumulate", "steps": 6}
    method = learnt(base, tmp_path, order, batch=1, **given)
    method.undo(["quay"])
    never = learnt(base, tmp_path, [FACTS[2], FACTS[3]], **given)
    for one, other in zip(weights_with(method), weights_with(never), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_nothing_settles_again_where_nothing_settles(base, tmp_path):
    method = learnt(base, tmp_path)
    with pytest.raises(UsageError, match="--settle: this edit was learnt with edit.settle=0"):
        method.undo(["quay"], settle=True)
    assert len(method.facts) == 4


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


def test_what_was_learnt_is_opened_whatever_options_it_was_learnt_with(base, tmp_path):
    learnt(base, tmp_path, FACTS[:2]).save_pretrained(tmp_path / "kept")
    card = json.loads((tmp_path / "kept" / "byheart.json").read_text())
    card["settings"]["options"] |= {"edit.settle_runs": "1", "edit.max_perplexity": "0.3"}
    (tmp_path / "kept" / "byheart.json").write_text(json.dumps(card))
    assert [fact.id for fact in Edit.from_pretrained(tmp_path / "kept", base).facts] == ["quay", "cove"]


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
