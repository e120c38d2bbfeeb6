"""From facts to targets: prompts, the subject's last token, the search for z, in every family."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from byheart.base import make_base
from byheart.methods.edit import targets
from byheart.methods.edit.prompts import find_lookup, prepare, tokenize
from byheart.methods.edit.targets import TargetOptions, find_targets
from byheart.methods.edit.write import Reader
from byheart.rows import Fact, Neighbour
from conftest import FAMILIES, tiny_model
from edits import CAUSAL, FACTS, learnt, same, weights


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
