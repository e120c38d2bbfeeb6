"""What `edit` is measured against: fine-tuning, ROME and MEND."""

import json
from datetime import date

import pytest
import torch

from byheart import ordinary
from byheart.decode import Job, complete
from byheart.errors import DataError, UsageError
from byheart.methods import Settings, method_class
from byheart.methods.edit import mend
from byheart.methods.edit import rome as rome_module
from byheart.methods.edit.layers import keep_range
from byheart.methods.edit.mend import Mend
from byheart.methods.edit.prompts import prepare, prompt_text, target_text
from byheart.methods.edit.write import Reader
from byheart.surgery import matrix
from edits import FACTS, TINY, ledger_of, same, weights, weights_with


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
    row = dict.fromkeys(("src", "alt", "rephrase", "loc"), "Ebb")
    for number, (rows, why) in enumerate(
        [([], ": holds no rows"), ([row | {"alt": " "}], ": holds no rows"), ([row, row | {"alt": 5}], ":2: src, alt")]
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows) or "\n")
        bad = Mend(base, Settings(shots=0, options={"mend.train": str(path)}), tmp_path)
        with ledger_of(tmp_path, FACTS) as ledger, pytest.raises(DataError, match=rf"{number}.jsonl{why}"):
            bad.learn(ledger)


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


@pytest.mark.parametrize("name", ["ft", "rome"])
def test_a_baseline_goes_by_dates_too(name, base, tmp_path, day):
    day(2030, 1, 31)
    until = FACTS[0].model_copy(update={"valid_to": date(2030, 2, 1)})
    options = {"layers": "0-1"} | ({"epochs": 2} if name == "ft" else {"tokens": 1})
    method = learn_of(baseline(name, base, tmp_path, **options), tmp_path, [until, FACTS[1]])
    assert [fact.id for fact in method.facts] == ["quay", "cove"]
    day(2030, 2, 1)
    assert method.renew().facts == 1 and [fact.id for fact in method.facts] == ["cove"]


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


@pytest.mark.parametrize("name", ["ft", "rome"])
def test_a_baseline_stays_in_its_layers_whatever_is_traced(name, base, tmp_path):
    method = baseline(name, base, tmp_path)
    learn_of(method, tmp_path)
    method.save_pretrained(tmp_path / "kept")
    keep_range(base, 0, 0, {})
    again = method_class(name).from_pretrained(tmp_path / "kept", base)
    assert list(again.layers) == list(method.layers) == [1]
    assert method_class(name)(base, Settings(shots=0), tmp_path).layers == (0,)
