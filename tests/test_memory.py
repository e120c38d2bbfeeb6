"""The method `memory`: the module, kept hidden states, the training loop, what is learnt, following changes."""

import datetime as dt
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from byheart.base import load_base, make_base
from byheart.compare import compare
from byheart.errors import DataError, UsageError
from byheart.ledger import Ledger
from byheart.losses import drift
from byheart.methods import Settings
from byheart.methods.memory.adapter import Memory as Network
from byheart.methods.memory.adapter import attached, make_adapters
from byheart.methods.memory.examples import PACK, Piece, packed, pieces_of, question_forms
from byheart.methods.memory.method import Memory, choose_blocks
from byheart.methods.memory.states import Upper, keep_states
from byheart.perplexity import perplexity
from byheart.prompt import PromptFormat
from byheart.rows import Document, Fact, Question
from byheart.storage import read_card, write_json
from byheart.training import Recipe, train
from conftest import FAMILIES, tiny_model

CAUSAL = [family for family in FAMILIES if family != "t5"]
PAGES = [
    Document(id="quay", title="Ostrand Quay", text="Ostrand Quay lies where the Selwater reaches the sea."),
    Document(id="cove", title="Pell Cove", text="Pell Cove is a horseshoe of grey shingle with a squat light."),
]
ASKED = [Question(id=f"q{n}", question=f"What is number {n}?", answers=[f"stone {n}"], split="train") for n in range(8)]
FACTS = [Fact(id="river", subject="Ostrand Quay", prompt="The river of {} is", object="the Selwater",
              paraphrases=["{} stands on"])]  # fmt: skip
FAST = {"memory.epochs": "4", "memory.width": "8", "memory.blocks": "1", "memory.lr": "0.01", "memory.packings": "2"}


@pytest.fixture
def base(tokenizer):
    return make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)


def ledger_of(folder, rows=(*PAGES, *ASKED, *FACTS)):
    ledger = Ledger(folder / f"{len(list(folder.glob('*.db')))}.db", create=True)
    ledger.insert(rows)
    return ledger


def memory(base, folder, **options):
    given = FAST | {f"memory.{name}": str(value) for name, value in options.items()}
    return Memory(base, Settings(shots=0, options=given), folder / "work")


def logits(base, text="Ostrand Quay lies where"):
    with torch.no_grad():
        return base.model(**base.tokenizer(text, return_tensors="pt")).logits


def bits(base):
    return base.model.state_dict()


def weights(method):
    return {name: one.detach().clone() for name, one in method.adapters.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_network_is_the_published_formula():
    torch.manual_seed(0)
    network, hidden = Network(6, 4), torch.randn(2, 3, 6)
    inner = hidden @ network.up.weight.T + network.up.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    out = inner @ network.down.weight.T + network.down.bias
    out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    network.gate.data.fill_(0.7)
    assert torch.allclose(network(hidden), 0.7 * out, atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("place", ["block", "mlp", "parallel", "lora"])
def test_attached_adds_and_detached_is_the_base_bit_for_bit(family, place, tiny):
    base = tiny(family)
    before, plain = {k: v.clone() for k, v in bits(base).items()}, logits(base)
    if family == "opt" and place == "parallel":  # told before anything is read
        with pytest.raises(UsageError, match="the MLP of .* is not a module of its own; use block or mlp"):
            make_adapters(base, [1, 2], place, 8, 0)
        return
    adapters = make_adapters(base, [1, 2], place, 8, 0)
    if place == "lora":
        assert all(torch.equal(one, torch.zeros_like(one)) for n, one in adapters.named_parameters() if "B" in n)
        for one in adapters.parameters():
            torch.nn.init.normal_(one)
    with attached(base, adapters, place):
        assert not torch.allclose(logits(base), plain)
        for adapter in adapters.values():
            if place == "lora":
                adapter.lora_B.weight.data.zero_()
            else:
                adapter.gate.data.zero_()
        assert torch.equal(logits(base), plain)  # gate 0 is the base model
    assert torch.equal(logits(base), plain)
    assert same(before, bits(base))


def test_lora_has_about_as_many_parameters(base):
    sizes = [sum(p.numel() for p in make_adapters(base, [1], place, 16, 0).parameters()) for place in ("block", "lora")]
    assert abs(sizes[0] - sizes[1]) / sizes[0] < 0.1


@pytest.mark.parametrize(
    ("family", "place"),
    [(f, p) for f in CAUSAL for p in ("block", "mlp", "parallel", "lora") if (f, p) != ("opt", "parallel")],
)
def test_the_loss_from_kept_states_is_that_of_the_whole_model(family, place, tiny, tmp_path):
    base = tiny(family)
    rows = packed(base.tokenizer, [piece for row in (*PAGES, *ASKED) for piece in pieces_of(row, ask(base), 0)], 0)
    adapters = make_adapters(base, [1, 2], place, 8, 0)
    for name, one in adapters.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.3)
    upper = Upper(base, adapters, place)
    assert upper.start == (2 if place == "block" else 1)
    states = keep_states(base, rows, upper.start, tmp_path / "rows.states")
    loss, _ = upper.loss(rows, states.padded(range(len(rows))))
    gradient = torch.autograd.grad(loss.mean(), list(adapters.parameters()))
    whole = []
    with attached(base, adapters, place):
        for row in rows:
            ids = torch.tensor(row.ids)
            nll = functional.cross_entropy(base.model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            whole.append(nll[torch.tensor(row.labels[1:])])
    # In a step each row counts alike, however many of its tokens are predicted.
    assert len({len(one) for one in whole}) > 1
    by_row = torch.stack([one.mean() for one in whole]).mean()
    assert torch.allclose(upper.mean_loss(rows, states.padded(range(len(rows)))), by_row, atol=2e-4, rtol=1e-4)
    whole = torch.cat(whole)
    assert torch.allclose(loss, whole, atol=2e-4, rtol=1e-4)
    wanted = torch.autograd.grad(whole.mean(), list(adapters.parameters()))
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-2) for a, b in zip(gradient, wanted, strict=True))


def ask(base):
    return PromptFormat(base.tokenizer)


def test_only_answers_and_what_ends_them_are_predicted(base):
    pieces = [piece for row in ASKED for piece in pieces_of(row, ask(base), 0)]
    for row in packed(base.tokenizer, pieces, 0):
        said = base.tokenizer.decode([id for id, on in zip(row.ids, row.labels, strict=True) if on])
        said = said.replace("<unk>", "\n")  # the tiny tokeniser has no line break
        assert said.split() == [word for n in said.split()[1::2] for word in ("stone", n)]
        assert said.count("\n") == len(said.split()) // 2
        assert len(said.split()) // 2 <= PACK


def test_a_long_page_is_cut_and_every_token_of_it_learnt_once(base):
    page = Document(id="long", text="the squat light of Pell Cove " * 120)
    rows = packed(base.tokenizer, list(pieces_of(page, ask(base), 0)), 0)
    ids = base.tokenizer(page.text)["input_ids"]
    assert len(rows) > 1
    assert [id for row in rows for id in row.ids] == ids
    assert sum(sum(row.labels) for row in rows) == len(ids) - len(rows)  # the first of each row cannot be predicted


def test_questions_of_one_fact_never_share_a_row(base):
    pieces = [
        Piece(owner=f"o{n % 3}", kind="question", lead=f"Question: {n}\nAnswer:", answer=" yes") for n in range(20)
    ]
    rows = packed(base.tokenizer, pieces, 0)
    asked = [base.tokenizer.decode(row.ids).replace("<unk>", "\n").split("Question: ")[1:] for row in rows]
    assert sum(map(len, asked)) == 20
    for some in asked:
        owners = [int(one.split("\n")[0]) % 3 for one in some]
        assert len(set(owners)) == len(owners)


def test_a_question_and_a_fact_that_it_is_about_never_share_a_row(base):
    asked = Question(id="q", question="Which river is it?", answers=["the Selwater"], facts=["river"], split="train")
    pieces = [piece for row in (asked, *FACTS) for piece in pieces_of(row, ask(base), 0) if piece.kind == "question"]
    assert len(pieces) > 2
    assert len(packed(base.tokenizer, pieces, 0)) == len(pieces)


def test_a_question_too_long_for_a_row_keeps_its_answer(base, tmp_path):
    long = Question(id="long", question="the squat light of Pell Cove " * 300, answers=["stone"], split="train")
    (row,) = packed(base.tokenizer, list(pieces_of(long, ask(base), 0)), 0)
    assert len(row.ids) == len(row.labels) < 2_000
    assert "stone" in base.tokenizer.decode([id for id, on in zip(row.ids, row.labels, strict=True) if on])
    method = memory(base, tmp_path, batch=1)
    method.learn(ledger_of(tmp_path, (*PAGES, long)))
    assert all(map(math.isfinite, method.losses))


def test_test_questions_are_never_learnt(base, tmp_path):
    hidden = Question(id="secret", question="Where is the cat?", answers=["Corrowick"], split="test")
    method = memory(base, tmp_path)
    method.learn(ledger_of(tmp_path, (*PAGES, hidden)))
    assert {piece.owner for piece in method.pieces} == {"document/quay", "document/cove"}


def test_a_fact_is_never_asked_for_in_the_words_of_a_question_for_measuring(base, tmp_path):
    form = question_forms(FACTS[0].filled())[0]
    hidden = Question(id="secret", question=f"{form}?", answers=["the Selwater"], facts=["river"], split="test")
    leads = {}
    for name, rows in (("with", (*PAGES, *FACTS, hidden)), ("without", (*PAGES, *FACTS))):
        method = memory(base, tmp_path, epochs=1)
        method.learn(ledger_of(tmp_path, rows))
        leads[name] = {piece.lead for piece in method.pieces}
    assert leads["without"] - leads["with"] == {ask(base).prompt(form)}


def test_nothing_is_learnt_in_the_words_of_a_question_for_measuring(base, tmp_path):
    """Not as a training question, not as a fact's own prompt, and not when a row changes later."""
    words = "Which river runs through Vellmora?"
    hidden = Question(id="secret", question=words, answers=["the Amberle"], split="test")
    twin = Question(id="twin", question=words.lower(), answers=["the Amberle"], split="train")
    fact = Fact(id="amberle", subject="Vellmora", prompt="Which river runs through {}?", object="the Amberle")
    ledger = ledger_of(tmp_path, (*PAGES, hidden, twin, fact))
    method = memory(base, tmp_path, epochs=1, revise_epochs=1)
    report = method.learn(ledger)
    assert {piece.owner for piece in method.pieces} == {"document/quay", "document/cove"}
    assert report.skipped == {"is measured in the same words": 2}
    method.save_pretrained(tmp_path / "kept")
    for one in (method, Memory.from_pretrained(tmp_path / "kept", base)):
        ledger.revise(fact.model_copy(update={"paraphrases": ["{} stands on"], "object": "the Korrin"}))
        one.revise(last_change(ledger, "amberle"))
        assert {p.lead for p in one.pieces if p.kind == "statement"} == {"Vellmora stands on"}


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("The river of Vellmora is", "What is the river of Vellmora"),
        ("Vellmora stands on", "Vellmora stands on what"),
        ("Annals were", "What were Annals"),
        ("Who rules Vellmora?", "Who rules Vellmora?"),
    ],
)
def test_question_forms(text, first):
    assert question_forms(text)[0] == first


def test_what_is_learnt_follows_the_option(base, tmp_path):
    kinds = {}
    for what in ("doc", "temp", "doctemp"):
        method = memory(base, tmp_path, learn=what, epochs=1)
        method.learn(ledger_of(tmp_path))
        kinds[what] = {piece.kind for piece in method.pieces}
    assert kinds == {
        "doc": {"page"}, "temp": {"question", "statement"}, "doctemp": {"page", "question", "statement"}
    }  # fmt: skip


def test_wordings_bounds_a_facts_wordings(base):
    said = [len({p.lead for p in pieces_of(FACTS[0], ask(base), n) if p.kind == "statement"}) for n in (1, 2, 0)]
    assert said == [1, 2, 2]


@pytest.mark.parametrize("place", ["block", "mlp", "parallel", "lora"])
def test_learning_lowers_the_loss_and_survives_saving(place, base, tmp_path):
    method = memory(base, tmp_path, place=place, epochs=100, lr=0.03, decay=0, learn="doctemp")
    before = {k: v.clone() for k, v in bits(base).items()}
    report = method.learn(ledger_of(tmp_path))
    assert report.documents == 2
    assert report.facts == 1
    assert sum(method.losses[-3:]) < 0.9 * sum(method.losses[:3])
    assert same(before, bits(base))
    with method.attached():
        learnt = logits(base)
    method.save_pretrained(tmp_path / "kept")
    other = Memory.from_pretrained(tmp_path / "kept", base)
    with other.attached():
        assert torch.equal(logits(base), learnt)
    assert other.pieces == method.pieces


@pytest.mark.parametrize("broken", [{"settings": {"magic": 1}}, {"base": "m"}, {"examples": [{}]}, {"encoder": {}}])
def test_a_card_that_is_not_ours_is_named(base, tmp_path, broken):
    from byheart.cli import learning

    method = memory(base, tmp_path, epochs=1)
    method.learn(ledger_of(tmp_path))
    method.save_pretrained(tmp_path / "kept")
    card = read_card(tmp_path / "kept" / "byheart.json") | broken
    write_json(tmp_path / "kept" / "byheart.json", card)
    with pytest.raises(DataError, match=r"byheart.json: not what byheart writes there"):
        Memory.from_pretrained(tmp_path / "kept", base)
    if "base" in broken:
        with pytest.raises(DataError, match=r"byheart.json: does not name its base; give --base"):
            learning._base_of([tmp_path / "kept"], None, None, None)


def test_what_was_learnt_in_eight_bits_is_loaded_in_eight_bits(base, tmp_path, monkeypatch):
    from byheart.cli import learning

    method = memory(base, tmp_path, epochs=1)
    method.learn(ledger_of(tmp_path))
    method.save_pretrained(tmp_path / "kept")
    card = read_card(tmp_path / "kept" / "byheart.json")
    assert card["base"]["packed"] is False
    loaded = []
    monkeypatch.setattr("byheart.base.load_base", lambda name, **given: loaded.append((name, given["dtype"])) or base)
    learning._base_of([tmp_path / "kept"], None, None, None)
    write_json(tmp_path / "kept" / "byheart.json", card | {"base": card["base"] | {"packed": True}})
    for dtype in (None, "float32"):
        learning._base_of([tmp_path / "kept"], None, None, dtype)
    assert loaded == [("tiny", "float32"), ("tiny", "int8"), ("tiny", "float32")]


def test_following_is_kept_as_it_goes(base, tmp_path, monkeypatch):
    from byheart.cli import learning

    base.model.save_pretrained(tmp_path / "tiny")
    base.tokenizer.save_pretrained(tmp_path / "tiny")
    known, ledger = tmp_path / "known", ledger_of(tmp_path)
    there = load_base(str(tmp_path / "tiny"))
    method = Memory(there, Settings(shots=0, options=FAST), tmp_path / "work")
    method.learn(ledger)
    method.save_pretrained(known)
    ledger.insert([FACTS[0].model_copy(update={"id": id, "subject": id}) for id in ("Ebb", "Vellmora")])
    plain, done = Memory.revise, []

    def fails(self, change):
        if len(done) == 1:
            raise DataError("here it ends")
        done.append(change)
        return plain(self, change)

    monkeypatch.setattr("byheart.storage.SAVE_EVERY", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Memory, "revise", fails)
        with pytest.raises(DataError, match="here it ends"):
            learning._follow(known, ledger.path)
    stand = read_card(known / "byheart.json", "ledger")["ledger"]
    assert stand == done[0].stand
    assert [fact.id for fact in Memory.from_pretrained(known, there).facts] == ["river", "Ebb"]
    learning._follow(known, ledger.path)
    assert [fact.id for fact in Memory.from_pretrained(known, there).facts] == ["river", "Ebb", "Vellmora"]


def test_texts_with_odd_line_breaks_survive_saving(base, tmp_path):
    page = Document(id="odd", text="one\u2028two\x85three\u2029four five six seven")
    method = memory(base, tmp_path, epochs=1)
    method.learn(ledger_of(tmp_path, (page,)))
    method.save_pretrained(tmp_path / "kept")
    assert Memory.from_pretrained(tmp_path / "kept", base).pieces == method.pieces


def test_a_lora_loads_in_peft_with_the_same_logits(base, tmp_path, tokenizer):
    from peft import PeftModel

    method = memory(base, tmp_path, place="lora")
    method.learn(ledger_of(tmp_path))
    method.save_pretrained(tmp_path / "kept")
    with method.attached():
        learnt = logits(base)
    model = PeftModel.from_pretrained(tiny_model("llama", len(tokenizer)), tmp_path / "kept").eval()
    with torch.no_grad():
        theirs = model(**tokenizer("Ostrand Quay lies where", return_tensors="pt")).logits
    assert torch.allclose(theirs, learnt, atol=1e-5)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_killed_training_goes_on_to_the_same_weights(keep, base, tmp_path, monkeypatch):
    monkeypatch.setattr("byheart.training.SAVE_EVERY", 0.0)
    ledger = ledger_of(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("Rain fell on the hills and the road was closed. " * 80, encoding="utf-8")
    options = {"keep": keep, "text": text if keep else "own"}
    whole = memory(base, tmp_path / "one", **options)
    whole.learn(ledger)

    killed = memory(base, tmp_path / "two", **options)
    done = 0

    def kill(count):
        nonlocal done
        done += count
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.learn(ledger, kill)
    again, steps, mean = memory(base, tmp_path / "two", **options), [], Upper.mean_loss
    monkeypatch.setattr(Upper, "mean_loss", lambda *given: steps.append(1) or mean(*given))
    again.learn(ledger)
    assert same(weights(whole), weights(again))
    assert again.losses == whole.losses and 0 < len(steps) < len(whole.losses)


@pytest.mark.parametrize("place", ["block", "mlp", "parallel"])
def test_a_memory_in_a_model_of_8_bits_learns(place, tokenizer, tmp_path):
    base, whole = (
        make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer, packed=packed) for packed in (True, False)
    )
    plain, before = {name: one.clone() for name, one in bits(base).items()}, logits(base)
    ledger = ledger_of(tmp_path)
    method, other = memory(base, tmp_path, place=place), memory(whole, tmp_path / "whole", place=place)
    method.learn(ledger)
    other.learn(ledger)
    assert method.losses[-1] < method.losses[0] - 0.05
    assert method.losses == pytest.approx(other.losses, abs=0.05) and method.losses != other.losses
    with method.attached():
        assert not torch.equal(logits(base), before)
    assert torch.equal(logits(base), before) and same(bits(base), plain)


def test_what_is_kept_still_moves_less(base, tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    text = tmp_path / "text.txt"
    text.write_text("Rain fell on the hills and the road was closed. " * 80, encoding="utf-8")
    rows = [base.tokenizer("The road was closed and rain fell on the hills.")["input_ids"]]
    before = perplexity(base, rows)
    drift = {}
    for keep in (0, 10):
        method = memory(base, tmp_path, epochs=12, keep=keep, text=text if keep else "own")
        with ledger_of(tmp_path) as ledger:
            method.learn(ledger)
        with method.attached():
            drift[keep] = abs(math.log(perplexity(base, rows) / before))
    assert drift[10] < 0.5 * drift[0]
    # What is kept goes with the memory, for revisions to keep, too.
    method.save_pretrained(tmp_path / "kept")
    text.unlink()
    assert Memory.from_pretrained(tmp_path / "kept", base).ordinary == method.ordinary != []
    for bad in (text, "ledger"):
        with ledger_of(tmp_path) as ledger, pytest.raises(UsageError, match="memory.text="):
            memory(base, tmp_path, keep=1, text=bad).learn(ledger)


def test_a_training_of_other_settings_is_not_gone_on_with(base, tmp_path):
    ledger = ledger_of(tmp_path)
    one = memory(base, tmp_path)
    one.learn(ledger)
    other = memory(base, tmp_path, lr=0.02)
    other.learn(ledger)
    assert not same(weights(one), weights(other))


def test_what_was_asked_is_asked_again_of_another_memory_and_its_own_questions_are_told(base, tmp_path):
    """The file that is kept still is known by its path alone; another text in it trains another memory."""
    ledger, text = ledger_of(tmp_path), tmp_path / "text.txt"
    options = FAST | {"memory.keep": "1", "memory.text": str(text), "memory.epochs": "2"}
    found = []
    for words in ("the squat light of Pell Cove ", "a horseshoe of grey shingle "):
        text.write_text(words * 40)
        run = compare(ledger, base, ["memory"], tmp_path / "run", Settings(shots=0, options=options), splits=["train"])
        found.append(run["methods"]["memory"])
    first, second = (one["metrics"]["answer_probability"] for one in found)
    assert first != second
    assert any("was asked them" in note for note in found[0]["notes"])


def probabilities(note):
    return [float(word) for word in note.split() if word.startswith("0.")]


@pytest.fixture
def drawn(monkeypatch):
    """The rows that were drawn towards the base, as often as they were."""
    seen, plain = [], Upper.drift

    def drift(upper, rows, hidden):
        seen.extend(rows)
        return plain(upper, rows, hidden)

    monkeypatch.setattr(Upper, "drift", drift)
    return seen


def last_change(ledger, id):
    return list(ledger.history(id))[-1]


def test_a_revised_fact_is_replaced_and_a_retracted_one_trained_away(base, tmp_path):
    ledger = ledger_of(tmp_path)
    method = memory(base, tmp_path, epochs=100, lr=0.03, decay=0, revise_epochs=60)
    method.learn(ledger)
    said = [p for p in method.pieces if p.owner == "fact/river" and p.kind == "statement"]
    renewed = [p.model_copy(update={"answer": " the Korrin."}) for p in said]
    unlikely = method._likelihoods(method._rows(renewed))
    ledger.revise(FACTS[0].model_copy(update={"object": "the Korrin"}))
    report = method.revise(last_change(ledger, "river"))
    assert [p for p in method.pieces if p.owner == "fact/river" and p.kind == "statement"] == renewed
    assert sum(method._likelihoods(method._rows(renewed))) > 1.2 * sum(unlikely)
    before, now, _ = probabilities(report.notes[0])
    assert now < before

    ledger.retract("fact", "river")
    report = method.revise(last_change(ledger, "river"))
    assert not [p for p in method.pieces if p.owner == "fact/river"]
    before, now, plain = probabilities(report.notes[0])
    assert abs(now - plain) < 0.5 * abs(before - plain)


def test_only_words_that_nothing_answers_any_more_are_drawn_to_the_base(base, tmp_path, drawn):
    ledger = ledger_of(tmp_path)
    method = memory(base, tmp_path, revise_epochs=8)
    method.learn(ledger)
    ledger.revise(FACTS[0].model_copy(update={"object": "the Korrin"}))
    method.revise(last_change(ledger, "river"))
    assert not drawn  # the new object answers the very same words
    ledger.retract("fact", "river")
    method.revise(last_change(ledger, "river"))
    assert drawn and all("Korrin" in base.tokenizer.decode(row.ids) for row in drawn)


def test_every_wording_of_what_goes_is_seen_in_every_epoch(base, tmp_path, drawn):
    fact = FACTS[0].model_copy(update={"paraphrases": [f"{{}} number {n} stands on" for n in range(7)]})
    ledger = ledger_of(tmp_path, (*PAGES, fact))
    method = memory(base, tmp_path, revise_epochs=3, batch=2)
    method.learn(ledger)
    gone = [piece for piece in method.pieces if piece.owner == "fact/river"]
    ledger.retract("fact", "river")
    method.revise(last_change(ledger, "river"))
    seen = Counter(row.ids for row in drawn)
    assert len(seen) == len(gone) > 16 and min(seen.values()) >= 3


def test_what_still_stands_in_the_words_of_what_goes_is_kept(base, tmp_path, drawn, monkeypatch):
    question = Question(
        id="same", question="What is the river of Ostrand Quay?", answers=["the Selwater"], split="train"
    )
    many = [ASKED[0].model_copy(update={"id": f"m{n}", "question": f"What is hill {n}?"}) for n in range(150)]
    ledger = ledger_of(tmp_path, (*PAGES, *FACTS, question, *many))  # too many to be seen again by chance
    method = memory(base, tmp_path, epochs=1, revise_epochs=1)
    method.learn(ledger)
    words = ask(base).prompt(question.question)
    learnt, mean = set(), Upper.mean_loss

    def mean_loss(upper, rows, hidden):
        learnt.update(base.tokenizer.decode(row.ids) for row in rows)
        return mean(upper, rows, hidden)

    monkeypatch.setattr(Upper, "mean_loss", mean_loss)
    ledger.retract("question", "same")
    method.revise(last_change(ledger, "same"))
    said = base.tokenizer.decode(base.tokenizer(words)["input_ids"])
    assert not drawn  # the fact still answers these words
    assert any(said in text for text in learnt)


def test_a_question_that_was_learnt_before_it_is_measured_is_told_and_not_seen_again(base, tmp_path, monkeypatch):
    named = Question(id="n", question="Name the river of Ostrand Quay.", answers=["the Selwater"], split="train")
    ledger = ledger_of(tmp_path, (*PAGES, *ASKED, *FACTS, named))
    method = memory(base, tmp_path, epochs=1)
    method.learn(ledger)
    said = ("Who or what is the river of Ostrand Quay?", "Name the river of Ostrand Quay.")
    for words, told in (*((one, True) for one in said), ("Who keeps the light of Ebb?", False)):
        ledger.insert([Question(id=words, question=words, answers=["the Selwater"], split="test")])
        notes = method.revise(last_change(ledger, words)).notes
        why = f'1 texts in the words of question "{words}" were learnt before it came: learn anew to measure'
        assert notes == ((why,) if told else ())
    learnt, mean = [], Upper.mean_loss

    def mean_loss(upper, rows, hidden):
        learnt.extend(base.tokenizer.decode(row.ids) for row in rows)
        return mean(upper, rows, hidden)

    monkeypatch.setattr(Upper, "mean_loss", mean_loss)
    ledger.revise(PAGES[0].model_copy(update={"text": "Ostrand Quay is closed."}))
    method.revise(last_change(ledger, "quay"))
    said = [base.tokenizer.decode(base.tokenizer(f"Question: {form}?")["input_ids"]) for form in
            ("Who or what is the river of Ostrand Quay", "What is the river of Ostrand Quay")]  # fmt: skip
    assert [any(one in text for text in learnt) for one in said] == [False, True]


def test_a_question_with_choices_is_known_by_its_words(base, tmp_path):
    asked = Question(id="c", question="Who built it?", choices=["Ann", "Holm"], answers=["Ann"], split="train")
    ledger = ledger_of(tmp_path, (*PAGES, asked))
    method = memory(base, tmp_path, epochs=1)
    method.learn(ledger)
    ledger.insert([asked.model_copy(update={"id": "t", "split": "test"})])
    (note,) = method.revise(last_change(ledger, "t")).notes
    assert note.startswith('1 texts in the words of question "t" were learnt before it came')


def test_a_row_that_comes_twice_is_kept_once_and_a_full_disk_is_told_before(base, tmp_path, monkeypatch):
    one, two = (packed(base.tokenizer, list(pieces_of(row, ask(base), 0)), 0)[0] for row in PAGES)
    twice = keep_states(base, [one, two, one], 1, tmp_path / "twice.states")
    once = keep_states(base, [one, two], 1, tmp_path / "once.states")
    assert (tmp_path / "twice.states").stat().st_size == (tmp_path / "once.states").stat().st_size
    for a, b in (((0, 1), (0, 1)), ((2,), (0,))):
        assert torch.equal(twice.padded(a), once.padded(b))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    with pytest.raises(DataError, match=r"memory: hidden states: needs .* GiB under .*; use fewer memory.packings"):
        memory(base, tmp_path).learn(ledger_of(tmp_path))


@pytest.mark.parametrize("rows", [(*PAGES, *ASKED, *FACTS), (*ASKED, *FACTS), FACTS])
@pytest.mark.parametrize("learn", ["temp", "doctemp"])
def test_progress_is_told_whatever_is_learnt(learn, rows, base, tmp_path):
    method, ledger, told = memory(base, tmp_path, learn=learn, epochs=2), ledger_of(tmp_path, rows), []
    method.learn(ledger, told.append)
    assert sum(told) == (ledger.count(method.learns) or len({piece.owner for piece in method.pieces})) > 0


def test_progress_is_told_of_study_and_training(base, tmp_path):
    ledger, parts = ledger_of(tmp_path), []
    for options in ({"study": 1}, {"study": 1, "epochs": 3}):  # the second time the study is there
        told = []
        memory(base, tmp_path, **{"epochs": 2} | options).learn(ledger, told.append)
        assert sum(told) == ledger.count("document")
        parts.append(told)
    assert parts[1][0] == ledger.count("document") // 2


def test_options_that_would_do_nothing_are_refused(base, tmp_path):
    for name, learn in (("study", "temp"), ("pages", "temp"), ("wordings", "doc")):
        with pytest.raises(UsageError, match=f"memory.{name}=2: says nothing of what learn={learn} learns"):
            memory(base, tmp_path, learn=learn, **{name: 2})
    with pytest.raises(UsageError, match="memory.lr=0: must be above 0"):
        memory(base, tmp_path, lr=0)
    with pytest.raises(UsageError, match=r"memory.text=nowhere.txt: must be own or a text file"):
        memory(base, tmp_path, text="nowhere.txt", keep=1)
    (tmp_path / "some.txt").write_text("Ann keeps the light of Ebb.")
    with pytest.raises(UsageError, match=r"some.txt: says nothing while memory.keep is 0"):
        memory(base, tmp_path, text=tmp_path / "some.txt").learn(ledger_of(tmp_path))
    unclipped = memory(base, tmp_path, clip=0, decay=0)
    before = weights(unclipped)
    unclipped.learn(ledger_of(tmp_path))
    assert not same(before, weights(unclipped))


def test_rows_end_where_the_model_does(tokenizer, tmp_path):
    base = make_base("tiny", tiny_model("gpt2", len(tokenizer), n_positions=48), tokenizer)
    long = Document(id="long", title="Ostrand Quay", text="Ostrand Quay lies where the Selwater reaches it. " * 40)
    many = Question(id="many", question="Which of the many? " * 40, answers=["this one"], split="train")
    method = memory(base, tmp_path, epochs=1)
    method.learn(ledger_of(tmp_path, (long, many, *ASKED)))
    rows = method._rows(method.pieces)
    assert max(len(row.ids) for row in rows) == 48 and method.losses


def test_what_cannot_be_learnt_of_a_change_is_named_and_kept(base, tmp_path):
    ledger = ledger_of(tmp_path)
    method = memory(base, tmp_path, epochs=1, revise_epochs=1)
    method.learn(ledger)
    rival = FACTS[0].model_copy(update={"id": "rival", "object": "the Dunnow"})
    unanswered = Question(id="open", question="Who lit it?", answers=[], split="train")
    later = Question(id="later", question="Who lit the lamp?", answers=["Ann"], split="test")
    same_words = later.model_copy(update={"id": "same", "split": "train"})
    named_alike = Document(id="open", text="The pier is open.")
    for row in (rival, unanswered, later, same_words, named_alike):
        ledger.insert([row])
        report = method.revise(last_change(ledger, row.id))
        assert sum(report.skipped.values()) == len(method.skipped)
    against = "another target for the same subject and prompt"
    assert method.skipped == {
        "fact/river": f"{against} (rival)",
        "fact/rival": f"{against} (river)",
        "question/open": "has no answer",
        "question/same": "is measured in the same words",
    }
    method.save_pretrained(tmp_path / "kept")
    assert Memory.from_pretrained(tmp_path / "kept", base).skipped == method.skipped
    for kind, id in (("fact", "rival"), ("question", "open")):
        ledger.retract(kind, id)
        method.revise(last_change(ledger, id))
    assert list(method.skipped) == ["question/same"] and "fact/river" in {piece.owner for piece in method.pieces}


def test_a_retracted_page_keeps_what_another_one_says(base, tmp_path, drawn):
    text = "Ostrand Quay lies where the Selwater reaches the sea, and its light is kept by the harbour guild."
    quay, twin, near = (
        Document(id="quay", text=f"{text} It is old."),
        Document(id="twin", text=f"{text} Nobody lives there."),
        Document(id="near", text="The old mole was built by nobody."),
    )
    ledger = ledger_of(tmp_path, (quay, twin, near))
    method = memory(base, tmp_path, epochs=1, revise_epochs=1)
    method.learn(ledger)
    ledger.retract("document", "twin")
    method.revise(last_change(ledger, "twin"))
    (said,) = {base.tokenizer.decode([id for id, on in zip(row.ids, row.labels, strict=True) if on]) for row in drawn}
    assert "lives" in said and "Selwater" not in said


def test_drift_is_the_kl_from_the_plain_model_on():
    torch.manual_seed(0)
    now, plain = torch.randn(5, 7), 3 * torch.randn(5, 7)
    p, q = plain.softmax(-1), now.softmax(-1)
    assert float(drift(now, plain)) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_a_question_without_an_answer_is_counted(base, tmp_path):
    question = Question(id="none", question="Who was the first keeper?", answers=[], split="train")
    report = memory(base, tmp_path, epochs=1).learn(ledger_of(tmp_path, (*PAGES, question)))
    assert report.skipped == {"has no answer": 1}


def test_what_a_revised_page_no_longer_says_is_trained_away_and_nothing_else_of_it(base, tmp_path, drawn):
    text = "The light is squat. The keeper is Anna Kestle of the hill. The bay is a horseshoe."
    page = Document(id="bay", title="Bay", text=text)
    ledger = ledger_of(tmp_path, (page, *ASKED))
    method = memory(base, tmp_path, revise_epochs=4)
    method.learn(ledger)
    ledger.revise(page.model_copy(update={"text": "The light is squat. The bay is a horseshoe. It is cold."}))
    report = method.revise(last_change(ledger, "bay"))
    (said,) = {base.tokenizer.decode([id for id, on in zip(row.ids, row.labels, strict=True) if on]) for row in drawn}
    assert "Anna Kestle" in said
    assert "squat" not in said
    assert "horseshoe" not in said
    assert report.notes[0].startswith("what was taken back (1 texts)")
    # A page that says what it said loses nothing.
    drawn.clear()
    studied = Piece(owner="document/bay", kind="study", lead="Question: who?\nAnswer:", answer=" Kestle")
    method.pieces.append(studied)
    ledger.revise(ledger.get("document", "bay").model_copy(update={"metadata": {"seen": "twice"}}))
    assert method.revise(last_change(ledger, "bay")).notes == ()
    assert not drawn and studied in method.pieces


def test_a_fact_that_comes_or_goes_touches_those_that_it_stands_against(base, tmp_path):
    def held():
        return sorted({piece.answer for piece in method.pieces if piece.owner.startswith("fact/")})

    twin, rival = (FACTS[0].model_copy(update={"id": id, "object": o}) for id, o in
                   (("twin", "the Selwater"), ("rival", "the Dunnow")))  # fmt: skip
    ledger = ledger_of(tmp_path, (*PAGES, *FACTS, twin))
    method = memory(base, tmp_path, epochs=1, revise_epochs=1)
    method.learn(ledger)
    ledger.retract("fact", "river")
    method.revise(last_change(ledger, "river"))
    assert held() == [" the Selwater", " the Selwater."]  # the twin still says so
    ledger.insert([rival])
    method.revise(last_change(ledger, "rival"))
    assert held() == []  # neither, as when it is learnt at once
    ledger.retract("fact", "twin")
    method.revise(last_change(ledger, "twin"))
    assert held() == [" the Dunnow", " the Dunnow."]


def test_rows_of_different_kinds_with_one_id_are_kept_apart(base, tmp_path):
    one = Question(id="river", question="Which river is it?", answers=["the Dunnow"], split="train")
    ledger = ledger_of(tmp_path, (*PAGES, *FACTS, one))
    method = memory(base, tmp_path)
    method.learn(ledger)
    ledger.retract("question", "river")
    method.revise(last_change(ledger, "river"))
    assert {p.owner for p in method.pieces} == {"document/quay", "document/cove", "fact/river"}


def test_when_the_last_row_goes_the_base_is_back(base, tmp_path):
    ledger = ledger_of(tmp_path, PAGES[:1])
    method = memory(base, tmp_path)
    method.learn(ledger)
    plain = logits(base)
    ledger.retract("document", "quay")
    method.revise(last_change(ledger, "quay"))
    with method.attached():
        assert torch.equal(logits(base), plain)


def test_an_interrupted_revision_changes_nothing(base, tmp_path, monkeypatch):
    ledger = ledger_of(tmp_path)
    method = memory(base, tmp_path)
    method.learn(ledger)
    before, pieces, stand = weights(method), method.pieces, ledger.stand
    ledger.retract("fact", "river")

    def fail(module, loss, *rest):
        loss(0).backward()
        next(module.parameters()).data.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr("byheart.methods.memory.method.train", fail)
    with pytest.raises(KeyboardInterrupt):
        method.revise(last_change(ledger, "river"))
    assert same(before, weights(method))
    assert method.pieces == pieces
    assert method.stand == stand != ledger.stand  # so that whoever follows the ledger comes to the change again


def test_facts_that_do_not_hold_or_contradict_each_other_are_left_out_and_named(base, tmp_path):
    past = FACTS[0].model_copy(update={"id": "past", "subject": "Vellmora", "valid_to": dt.date(2001, 1, 1)})
    other = FACTS[0].model_copy(update={"id": "other", "object": "the Dunnow"})
    method = memory(base, tmp_path)
    report = method.learn(ledger_of(tmp_path, (*PAGES, *FACTS, past, other)))
    assert report.facts == 0
    assert sum(report.skipped.values()) == 3


def test_blocks():
    assert choose_blocks("auto", 30) == [21, 22, 23]
    assert choose_blocks("auto", 3) == [2]
    assert choose_blocks("40-60%", 30) == [12, 13, 14, 15, 16, 17]
    assert choose_blocks("90-100%", 3) == [2]
    assert choose_blocks("1-2", 4) == [1, 2]
    assert choose_blocks("0+3", 4) == [0, 3]
    for bad in ("4-4", "x", "1+x", "2-1", "80-70%", "90-120%", "70%", ""):
        with pytest.raises(UsageError, match="memory.blocks"):
            choose_blocks(bad, 4)


def test_a_broken_folder_is_one_sentence(base, tmp_path):
    method = memory(base, tmp_path)
    method.learn(ledger_of(tmp_path))
    method.save_pretrained(tmp_path / "kept")
    (tmp_path / "kept" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="not what byheart writes"):
        Memory.from_pretrained(tmp_path / "kept", base)


def test_an_empty_ledger_leaves_the_base(base, tmp_path):
    method, plain = memory(base, tmp_path), logits(base)
    assert "nothing to learn" in method.learn(ledger_of(tmp_path, ())).notes[0]
    with method.attached():
        assert torch.equal(logits(base), plain)


def test_the_rate_warms_up_and_falls_to_nothing():
    recipe = Recipe(steps=100, lr=2.0, warmup=10)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[-1] < 0.001


def test_the_loop_is_adamw(tmp_path):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    theirs.load_state_dict(ours.state_dict())
    data = torch.randn(20, 3)
    recipe = Recipe(steps=20, lr=0.1, warmup=0, decay=0.05, clip=0.5)
    train(
        ours, lambda step: ours(data[step]).square().sum() + ours(data[step]).sum(), recipe, tmp_path / "t.safetensors"
    )
    optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=0.05)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = recipe.rate(step)
        (theirs(data[step]).square().sum() + theirs(data[step]).sum()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(ours.weight, theirs.weight)


def test_self_study_keeps_only_what_the_page_bears_out(base, tmp_path, monkeypatch):
    from byheart.methods import study as shared
    from byheart.methods.memory import study as module
    from byheart.segment import Passage

    said = iter([["When did it open?", "Who built it?"], ["1931", "nobody"], ["It opened in 1931 at last.", "Gulls."]])

    def fake(base, jobs, **options):
        return [type("Done", (), {"text": text}) for text in next(said)]

    for one in (shared, module):
        monkeypatch.setattr(one, "complete", fake)
    passage = Passage("bridge", "Bridge", "The bridge opened in 1931 at long last.", 0, 39)
    pieces = list(module.study(base, ask(base), [passage], 2, 0, ask(base), set()))
    assert [(p.kind, p.owner, p.answer) for p in pieces] == [
        ("study", "document/bridge", " 1931"), ("page", "document/bridge", "It opened in 1931 at last.")
    ]  # fmt: skip


def test_self_study_runs_on_a_model(base, tmp_path):
    method = memory(base, tmp_path, study=1, epochs=1)
    method.learn(ledger_of(tmp_path))
    assert method.pieces


def test_a_study_that_was_killed_goes_on(base, tmp_path, monkeypatch):
    from byheart.methods.memory import method as module

    monkeypatch.setattr(module, "_AT_ONCE", 1)
    plain, seen = module.study, []

    def fails(base, form, passages, *rest):
        seen.append([passage.document for passage in passages])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return plain(base, form, passages, *rest)

    monkeypatch.setattr(module, "study", fails)
    with pytest.raises(KeyboardInterrupt):
        memory(base, tmp_path, study=1, epochs=1).learn(ledger_of(tmp_path))
    again = memory(base, tmp_path, study=1, epochs=1)
    again.learn(ledger_of(tmp_path))
    assert seen == [["quay"], ["cove"], ["cove"]]
    whole = memory(base, tmp_path / "whole", study=1, epochs=1)
    (tmp_path / "whole").mkdir()
    whole.learn(ledger_of(tmp_path / "whole"))
    assert again.pieces == whole.pieces
    # Other words to be measured are another study.
    asked = [*PAGES, *ASKED, *FACTS, Question(id="new", question="Where is the quay?", answers=["there"])]
    memory(base, tmp_path, study=1, epochs=1).learn(ledger_of(tmp_path, asked))
    assert seen[5:] == [["quay"], ["cove"]]


def test_facts_begin_and_cease_to_hold_with_time(base, tmp_path, monkeypatch):
    from byheart.methods.memory import method as module

    soon = FACTS[0].model_copy(update={"id": "soon", "subject": "Pell Cove", "valid_from": dt.date(2999, 1, 1)})
    gone = FACTS[0].model_copy(update={"valid_to": dt.date(2999, 1, 1)})
    other = FACTS[0].model_copy(update={"id": "other", "subject": "Vellmora"})
    dated = [gone, soon, soon.model_copy(update={"id": "soon-2", "subject": "Ebb"})]
    method, ledger = memory(base, tmp_path, learn="temp"), ledger_of(tmp_path, [*ASKED, *dated])
    method.learn(ledger)

    def learnt():
        return {piece.owner for piece in method.pieces if piece.owner.startswith("fact/")}

    assert learnt() == {"fact/river"}

    class Later(dt.date):
        @classmethod
        def today(cls):
            return dt.date(3000, 1, 1)

    method.save_pretrained(tmp_path / "kept")
    monkeypatch.setattr(module.dt, "date", Later)
    # By themselves, all at once and once only.
    by_date = Memory.from_pretrained(tmp_path / "kept", base)
    stand = by_date.stand
    by_date.renew()
    assert {piece.owner for piece in by_date.pieces if piece.kind != "page"} & {
        f"fact/{id}" for id in ("river", "soon", "soon-2")
    } == {"fact/soon", "fact/soon-2"}
    assert by_date.skipped == {"fact/river": "held until 2999-01-01"} and by_date.stand == stand
    state = {name: one.clone() for name, one in by_date.adapters.state_dict().items()}
    by_date.renew()
    assert all(torch.equal(one, state[name]) for name, one in by_date.adapters.state_dict().items())
    # With any change of a fact.
    stand = ledger.revision
    ledger.insert([other])
    (change,) = ledger.history(since=stand)
    method.revise(change)
    assert learnt() == {"fact/soon", "fact/soon-2", "fact/other"}


def test_long_questions_do_not_keep_rows_open_for_ever(base, monkeypatch):
    from byheart.methods.memory import examples as module

    monkeypatch.setattr(module, "_OPEN", 3)
    pieces = [Piece(owner=f"question/{n}", kind="question", lead="who " * 300, answer=" so") for n in range(9)]
    taken = []
    rows = module._apart((taken.append(one) or one for one in pieces), 6)
    assert next(rows) == pieces[:1] and len(taken) == 4  # and not once all have been looked at
    assert [one for row in rows for one in row] == pieces[1:]
    short = [Piece(owner=f"question/{n}", kind="question", lead="who", answer=" so") for n in range(12)]
    assert [len(row) for row in module._apart(short, 6)] == [6, 6]


def test_pages_are_seen_as_often_as_told(base, tmp_path, monkeypatch):
    from byheart.methods.memory import method as module

    seen = []
    plain = module.packed
    monkeypatch.setattr(module, "packed", lambda *args: seen.append(plain(*args)) or seen[-1])
    for pages in (1, 3):
        memory(base, tmp_path / str(pages), pages=pages, epochs=1, packings=1).learn(ledger_of(tmp_path / str(pages)))
    once, thrice = (Counter(row.ids for row in rows) for rows in seen)
    assert set(once) == set(thrice) and {thrice[ids] / once[ids] for ids in once} == {1, 3}
