"""What training adds to cross-entropy, self-study, and the retriever that learns from the reader."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from byheart import kv
from byheart.decode import Job, complete
from byheart.errors import DataError, UsageError
from byheart.ledger import Ledger
from byheart.methods import Settings, method_class, parse_methods
from byheart.methods.prefix import learnt, tuning
from byheart.methods.prefix.behind import Sample, answer_logits
from byheart.methods.prefix.cache import Cache
from byheart.methods.prefix.instances import Instance, Instances, hardness, interpolated, votes
from byheart.methods.prefix.marginal import learn_turn, marginal_loss
from byheart.methods.prefix.method import Prefix
from byheart.methods.prefix.tuning import Batch, Lesson
from byheart.prompt import Example
from byheart.retrieve import searchable
from byheart.rows import Document, Question
from byheart.segment import Passage
from byheart.storage import resumed
from byheart.training import steps_done

PAGES = {
    "quay": "Ostrand Quay lies on the Tessary Coast, and its lamp was lit in 1931.",
    "vell": "The harbour of Vell holds nine boats and a lifeboat.",
    "orl": "The Orl rises in Lake Sennet and reaches the sea at Port Averil.",
    "flag": "The flag of Dunmore Vale is made of wool.",
}
ASKED = [
    ("When was the lamp lit?", "1931", "quay", "direct"),
    ("How many boats does Vell hold?", "nine", "vell", "direct"),
    ("Where does the Orl rise?", "Lake Sennet", "orl", "place"),
    ("What is the flag made of?", "wool", "flag", "direct"),
]


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "small.db", create=True)
    made.insert(Document(id=name, text=text) for name, text in PAGES.items())
    made.insert(
        Question(id=f"t{n}", question=text, answers=[answer], documents=[page], kind=kind, split="train")
        for n, (text, answer, page, kind) in enumerate(ASKED)
    )
    return made


def prefix(base, work, shots=0, **options):
    return Prefix(base, Settings(shots=shots, options={f"prefix.{k}": str(v) for k, v in options.items()}), work)


# -- the retriever ---------------------------------------------------------------------------------------------


def test_the_marginals_gradient_is_realms():
    torch.manual_seed(0)
    relevance = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    likelihood = torch.randn(1, 5, dtype=torch.float64) - 2
    loss = marginal_loss(relevance, likelihood)
    (gradient,) = torch.autograd.grad(loss, relevance)
    p = relevance.softmax(-1)
    answer = (p * likelihood.exp()).sum()
    assert loss.item() == pytest.approx(-answer.log().item())
    r = likelihood.exp() / answer - 1
    assert torch.allclose(-gradient, r * p, atol=1e-12)


def test_questions_turn_to_what_the_reader_can_use(tmp_path):
    draw = np.random.default_rng(0)
    unit = lambda rows: (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)  # noqa: E731
    questions, passages = unit(draw.normal(size=(200, 8))), unit(draw.normal(size=(200, 4, 8)))
    # What the reader can use lies where the question would lie if its first two numbers changed places.
    target = questions[:, [1, 0, *range(2, 8)]]
    told = 8 * np.einsum("nd,nkd->nk", target, passages)

    def best_first(vectors):
        return float((np.einsum("nd,nkd->nk", vectors, passages).argmax(1) == told.argmax(1)).mean())

    some = slice(0, 150)
    turn, trained = learn_turn(questions[some], passages[some], told[some].tolist(), 300, 0, tmp_path / "t.safetensors")
    assert trained.losses[-1] < trained.losses[0]
    found = turn.turned(questions)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    rest = slice(150, 200)
    right = [
        (np.einsum("nd,nkd->nk", vectors[rest], passages[rest]).argmax(1) == told[rest].argmax(1)).mean()
        for vectors in (questions, found)
    ]
    assert right[1] > right[0] and best_first(found) > best_first(questions)


def test_a_retriever_that_learnt_is_kept(tiny, ledger, tmp_path, monkeypatch):
    base = tiny("llama")
    monkeypatch.setattr(learnt, "_AT_ONCE", 2)
    method = prefix(base, tmp_path / "work", realm=3, epochs=40)
    report = method.learn(ledger)
    assert "learnt from 4 questions with 3 passages each" in report.notes[-1]
    # The likelihoods are those of the answers behind each passage, as when they are asked for.
    (kept,) = (tmp_path / "work").glob("read-*.json")
    asked = Question(id="a", question=ASKED[0][0], answers=[ASKED[0][1] + "\n\n"])
    plain = prefix(base, tmp_path / "plain")
    plain.learn(ledger)
    hits = plain._retriever.retrieve([asked.question], 3)[0]
    rows = resumed(kept, kept.stem.removeprefix("read-"), range(4), 2, lambda some: pytest.fail("all are kept"))
    for value, hit in zip(rows[0], hits, strict=True):
        (answer,) = plain.read([asked], [[hit]], lambda count: None)
        tokens = len(tuning.lesson(base, plain.form, asked, ASKED[0][1], [hit]).answer)
        assert value == pytest.approx(answer.reference * tokens, rel=1e-3)
    before, after = (one._retriever.retrieve([q for q, *_ in ASKED], 4) for one in (plain, method))
    assert [[hit.score for hit in hits] for hits in before] != [[hit.score for hit in hits] for hits in after]
    method.save_pretrained(tmp_path / "saved")
    again = Prefix.from_pretrained(tmp_path / "saved", base)
    assert again._retriever.retrieve([q for q, *_ in ASKED], 4) == after
    # What follows a change of the ledger keeps what was learnt.
    stand = ledger.revision
    ledger.insert([Document(id="new", text="Nothing of that.")])
    (change,) = ledger.history(since=stand)
    again.revise(change)
    assert again._retriever.turn is not None
    for wrong, why in (({"realm": 1}, "use 2 or more"), ({"realm": 2, "passages": "none", "slots": 2}, "no passages")):
        with pytest.raises(UsageError, match=why):
            prefix(base, tmp_path, **wrong)
    # Another reader is asked anew, the same is not.
    other = prefix(base, tmp_path / "other", realm=3, epochs=1, slots=2)
    report = other.learn(ledger)
    for count in (1, 2):
        other._follow_reader(ledger, report)
        assert len(list((tmp_path / "other").glob("read-*.json"))) == count
        other.slots.keys[0].data += 1
    with pytest.raises(UsageError, match="bm25"):
        Prefix(base, Settings(retriever="bm25", options={"prefix.realm": "2"}), tmp_path)
    with pytest.raises(DataError, match="9 passages are found"):
        prefix(base, tmp_path / "many", realm=9).learn(ledger)


# -- terms -----------------------------------------------------------------------------------------------------


def test_spread_is_vicregs_formula():
    torch.manual_seed(0)
    states = torch.randn(6, 2, 5, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1, 2, 3])
    each = [states[:, n].numpy() for n in range(2)]  # what one query says of all passages
    variance = np.mean([np.maximum(0, 1 - np.sqrt(rows.var(0) + 1e-4)).mean() for rows in each])
    covariance = sum(np.cov(rows.T) for rows in each) / 2
    off = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    assert float(tuning.spread(states)) == pytest.approx(variance + off / 5)
    # Queries that say different things, but of all passages the same, are the collapse that it is there to see.
    assert float(tuning.spread(torch.randn(1, 2, 5).expand(6, 2, 5))) == pytest.approx(0.99)
    assert float(tuning.spread(torch.zeros(3, 1, 4))) == pytest.approx(0.99)


def test_the_gap_is_between_the_groups_means():
    losses = [torch.tensor(x, requires_grad=True) for x in (1.0, 3.0, 5.0, 2.0)]
    found = tuning.gap(losses, ["a", "a", "b", "c"])
    assert found.item() == 3.0  # b at 5, and a and c at 2
    found.backward()
    assert losses[2].grad == 1
    assert tuning.gap(losses, ["a"] * 4).item() == 0
    assert tuning.gap(losses, ["a", "a", "", "c"]).item() == 0  # of the third nothing is known
    assert tuning.gap(losses, [""] * 4).item() == 0


@pytest.mark.parametrize("how", [{}, {"encoder": "compressed", "columns": 3}, {"encoder": "selected", "columns": 3}])
def test_what_an_answer_keeps_behind_a_wrong_passage(tiny, ledger, tmp_path, how):
    base = tiny("llama")
    method = prefix(base, tmp_path, slots=3, epochs=1, **how)
    method.learn(ledger)
    pairs, _ = tuning.held(ledger, method.form, method._retriever, "288/64", 1, 0)
    found, _ = tuning.lessons(pairs, base, method.form, method.beside)

    def distribution(one, passages):
        batch = method._batch([Lesson(passages, one.asked, one.answer)], method.heads)
        logits, _ = tuning.answer_logits(base, batch.first, batch.samples)
        return logits[0].softmax(-1)

    batch = method._batch(found, method.heads)
    logits, _ = tuning.answer_logits(base, batch.first, batch.samples)
    kept = tuning._kept(base, lambda some: method._batch(some, method.heads), found, logits)
    by_hand = [
        torch.minimum(distribution(one, one.passages), distribution(one, other.passages)).sum()
        for one, other in zip(found, [*found[1:], found[0]], strict=True)
    ]
    assert float(kept) == pytest.approx(float(torch.stack(by_hand).mean()), abs=1e-4) and 0 < float(kept) < 1
    # The same page cannot be its own wrong one.
    same = [found[0], found[0]]
    assert float(tuning._kept(base, lambda some: pytest.fail("nothing to read"), same, logits[:4])) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"encoder": "text", "columns": 4, "vicreg": 1.0},
        {"slots": 6, "fair": 1.0},
        {"slots": 6, "wrong": 5.0},
        {"encoder": "compressed", "columns": 4, "slots": 6, "wrong": 5.0, "fair": 0.5, "distil": 0.5},
    ],
    ids=["vicreg", "fair", "wrong", "all"],
)
def test_each_term_lowers_what_it_names(tiny, ledger, tmp_path, monkeypatch, options):
    """Against the same training without it."""
    base = tiny("llama")
    term = next(name for name in ("vicreg", "wrong", "fair") if name in options)
    seen = {"vicreg": [], "fair": [], "wrong": []}
    for name, function in (("vicreg", "spread"), ("fair", "gap"), ("wrong", "_kept")):
        plain = getattr(tuning, function)

        def noted(*args, plain=plain, name=name):
            found = plain(*args)
            seen[name].append(float(found))
            return found

        monkeypatch.setattr(tuning, function, noted)
    last = []
    for weight in (options[term], 1e-9):
        method = prefix(base, tmp_path / str(weight), **options | {term: weight, "epochs": 30, "lr": 0.05, "batch": 4})
        method.learn(ledger)
        last.append(sum(seen[term][-5:]) / 5)
    assert last[0] < last[1]


def test_a_gap_needs_questions_of_two_kinds(tiny, ledger, tmp_path):
    for question in list(ledger.questions(["train"])):
        ledger.revise(question.model_copy(update={"kind": "direct"}))
    with pytest.raises(DataError, match='every question to learn from is of kind "direct"'):
        prefix(tiny("llama"), tmp_path, slots=2, fair=1).learn(ledger)


def test_a_gap_is_between_what_a_named_attribute_says(tiny, ledger, tmp_path, monkeypatch):
    seen, plain = [], tuning.gap
    monkeypatch.setattr(tuning, "gap", lambda losses, groups: seen.extend(groups) or plain(losses, groups))

    def learn(**how):
        prefix(tiny("llama"), tmp_path, slots=2, fair=1, epochs=1, **how).learn(ledger)

    with pytest.raises(DataError, match="every question to learn from has no attribute coast"):
        learn(fair_by="coast")
    with pytest.raises(UsageError, match="fair_by=coast: nothing goes by it"):
        prefix(tiny("llama"), tmp_path, slots=2, fair_by="coast")
    first, second, *others = list(ledger.questions(["train"]))
    ledger.revise(first.model_copy(update={"attributes": {"coast": "north"}}))
    with pytest.raises(DataError, match='every question to learn from is of coast "north"'):
        learn(fair_by="coast")
    ledger.revise(second.model_copy(update={"attributes": {"coast": "south", "kind": "none"}}))
    learn(fair_by="coast")
    assert sorted(seen) == [*[""] * len(others), "north", "south"] and others


def test_a_question_beyond_the_models_positions_is_named_and_padding_stands_nowhere(tiny, ledger, tmp_path):
    base = tiny("gpt2")
    past = kv.read(base, [[4, 5, 6]])
    long, late = Sample((*past,), (5,) * 20, (6, 7), 3), Sample((*past,), (5,) * 3, (6, 7), base.positions - 4)
    both, _ = answer_logits(base, (), [long, late])  # the padding of the second would stand behind the last position
    alone, _ = answer_logits(base, (), [late])
    assert torch.allclose(both[2:], alone, atol=1e-5)
    with pytest.raises(DataError, match=r"needs 1025 positions, the model has 1024"):
        answer_logits(base, (), [replace(late, start=base.positions - 3)])


def test_terms_that_cannot_be_are_refused(tiny, tmp_path):
    for options, why in (
        ({"vicreg": 1, "slots": 2}, "encoder=text"),
        ({"wrong": 1, "passages": "none", "slots": 2}, "no passages"),
        ({"wrong": 1, "batch": 1, "slots": 2}, "2 or more"),
        ({"vicreg": 1, "batch": 1, "encoder": "text"}, "2 or more"),
        ({"store": "disk", "passages": "none", "slots": 2}, "no passages to keep"),
        ({"hard": 1}, r"prefix\.hard=1\.0: nothing is trained"),
        ({"study": 1}, "nothing is trained"),
        ({"lr": 0.1}, "nothing is trained"),
        ({"encoder": "tokens", "rank": 8}, "nothing is trained"),
        ({"epochs": 2, "encoder": "selected"}, "nothing is trained"),
    ):
        with pytest.raises(UsageError, match=why):
            prefix(tiny("llama"), tmp_path, **options)


@pytest.mark.parametrize("answering", [{}, {"interpolate": 0.3}])
def test_a_training_that_is_done_reads_no_passage_again(tiny, ledger, tmp_path, monkeypatch, answering):
    base = tiny("llama")
    first, again = (prefix(base, tmp_path, slots=3, epochs=2, **options) for options in ({}, answering))
    first.learn(ledger)
    monkeypatch.setattr(Cache, "fresh", lambda self, passages: pytest.fail("read again"))
    again.learn(ledger)
    assert all(torch.equal(one, other) for one, other in zip(first.slots.keys, again.slots.keys, strict=True))


@pytest.mark.parametrize("how", [{"slots": 3}, {"encoder": "text", "columns": 3, "vicreg": 0.1}])
def test_a_killed_training_goes_on_to_the_same_weights(tiny, ledger, tmp_path, monkeypatch, how):
    monkeypatch.setattr("byheart.training.SAVE_EVERY", 0.0)
    base, given = tiny("llama"), how | {"epochs": 4, "batch": 2}
    whole, killed, again = (prefix(base, tmp_path / name, **given) for name in ("one", "two", "two"))
    whole.learn(ledger)

    def kill(count):
        if count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.learn(ledger, kill)
    assert steps_done(next((tmp_path / "two").glob("learnt-*.safetensors"))) > 0
    again.learn(ledger)
    one, other = whole._learnt.state_dict(), again._learnt.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("encoder", "count"), [("cache", 2), ("text", 1)])
def test_questions_are_learnt_behind_what_they_are_asked_behind(tiny, ledger, tmp_path, monkeypatch, encoder, count):
    settings = Settings(shots=0, k=2, options={"prefix.slots": "3", "prefix.epochs": "1", "prefix.encoder": encoder})
    method, seen, plain = Prefix(tiny("llama"), settings, tmp_path), [], learnt.tune
    monkeypatch.setattr(
        learnt, "tune", lambda base, own, found, *rest: seen.extend(found) or plain(base, own, found, *rest)
    )
    method.learn(ledger)
    ranked = method._retriever.retrieve([question for question, *_ in ASKED], count)
    assert [list(one.passages) for one in seen] == ranked and all(len(one.passages) == count for one in seen)
    if encoder == "cache":  # and so it is read, each passage in its place
        asked = list(ledger.questions(["train"]))
        samples = method._batch(seen, None).samples
        for sample, job in zip(samples, method._jobs(asked, ranked), strict=True):
            assert sample.start == job.past[-1].end
            for mine, other in zip(sample.past, job.past[1:], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine.keys, other.keys, strict=True))


def test_a_passage_that_holds_the_answer_is_put_anywhere_among_those_that_do_not(tiny, ledger, tmp_path, monkeypatch):
    method = prefix(tiny("llama"), tmp_path)
    method.learn(ledger)
    retriever = method._retriever
    wrong = [Passage(name, "", "Nothing of the kind.", 0, 20) for name in "xyz"]
    monkeypatch.setattr(type(retriever), "retrieve", lambda self, questions, k: [wrong[:k] for _ in questions])
    places = set()
    for seed in range(8):
        pairs, _ = tuning.held(ledger, method.form, retriever, "288/64", 3, seed)
        for question, passages in pairs:
            (place,) = [n for n, one in enumerate(passages) if tuning.holds(one, question)]
            assert passages[place].document == question.documents[0]
            assert passages[:place] + passages[place + 1 :] == tuple(wrong[:place] + wrong[place + 1 :])
            places.add(place)
    assert places == {0, 1, 2}
    ledger.insert([Question(id="none", question="Who?", answers=["nobody here"], documents=["quay"], split="train")])
    (*_, (_, nothing)), _ = tuning.held(ledger, method.form, retriever, "288/64", 3, 0)
    assert nothing == ()  # what is found does not help where the answer is nowhere


# -- self-study ------------------------------------------------------------------------------------------------


def test_a_corpus_in_one_cache_learns_from_what_the_model_asks_itself(tiny, ledger, tmp_path, monkeypatch):
    base = tiny("llama")
    made = []

    def fake(model, form, passages, count, seed):
        made.extend(passages)
        yield from ((one, f"What is said of {one.document}?", one.text.split()[-1]) for one in passages)

    monkeypatch.setattr(learnt, "ask_itself", fake)
    monkeypatch.setattr(learnt, "_AT_ONCE", 3)
    seen: list[Batch] = []
    plain = Prefix._batch
    monkeypatch.setattr(Prefix, "_batch", lambda *args: seen.append(plain(*args)) or seen[-1])
    given = {"passages": "none", "slots": 6, "begin": "pages", "study": 1, "distil": 1, "epochs": 30, "lr": 0.1}
    method = prefix(base, tmp_path / "work", **given)
    told = []
    report = method.learn(ledger, told.append)
    assert "8 questions to learn from" in report.notes[0] and len(made) == len(PAGES)
    assert sum(told) == len(PAGES) and told[:3] == [0, 1, 1]  # half of it by study, three passages and one
    # The columns see no passage; what they are told by stands behind the whole one.
    start = len(method.slots)
    for batch in seen:
        assert all(one.past == () and one.start == start for one in batch.samples)
        assert len(batch.whole) == len(batch.samples) and all(one.past for one in batch.whole)
    # Begun again, it asks nothing anew.
    prefix(base, tmp_path / "work", **given).learn(ledger)
    assert len(made) == len(PAGES)
    texts = {searchable(one) for one in made}
    assert texts == set(PAGES.values())


def test_columns_that_begin_as_pages_forget_a_retracted_one(tiny, ledger, tmp_path):
    base = tiny("llama")
    found = []
    for gone in (None, "flag"):
        if gone:
            ledger.retract("document", gone)
        method = prefix(base, tmp_path, passages="none", slots=6, begin="pages", epochs=1)
        method.learn(ledger)
        found.append(method.slots.keys[0].detach())
    assert not torch.equal(*found)
    assert not list((tmp_path / "prefix").rglob("*.safetensors"))


def test_what_was_made_before_a_kill_is_not_made_again(tmp_path):
    calls = []

    def make(some, last=99):
        calls.append(list(some))
        if last in some:
            raise KeyboardInterrupt
        return [n * n for n in some]

    path = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        resumed(path, "a", range(7), 2, lambda some: make(some, 5))
    told = []
    assert resumed(path, "a", range(7), 2, make, told.append) == [0, 1, 4, 9, 16, 25, 36]
    assert told == [4, 2, 1]
    assert calls == [[0, 1], [2, 3], [4, 5], [4, 5], [6]]
    assert resumed(path, "b", range(2), 2, make) == [0, 1]


# -- the store of instances ------------------------------------------------------------------------------------


def instance(id, question, answer, passage=None):
    return Instance(id, Example(question, answer, passage), (answer,))


def test_votes_hardness_and_interpolation_are_the_papers(minilm):
    near = [(instance("a", "q", "The Orl"), 0.5), (instance("b", "r", "orl"), 0.3), (instance("c", "s", "Vell"), 0.2)]
    assert votes(near) == pytest.approx({"orl": 0.8, "vell": 0.2})
    assert hardness(near, ["Orl", "the orl"]) == pytest.approx(-np.log(0.8))
    assert hardness(near, ["elsewhere"]) == pytest.approx(-np.log(0.01)) == hardness([], ["Orl"])
    # p_LM is 0.75 for Vell and 0.25 for Orl.
    likelihoods, candidates = [np.log(0.6), np.log(0.2)], ["Vell", "Orl"]
    assert [interpolated(likelihoods, candidates, near, share) for share in (0.0, 0.4, 0.5, 1.0)] == [0, 0, 1, 1]


def test_the_nearest_are_near_and_never_the_question_itself(minilm):
    page = Passage("p", "", "The Orl rises in Lake Sennet.", 0, 29)
    rows = [
        instance("a", "where does the orl rise", "Lake Sennet", page),
        instance("b", "what is the source of the river Orl", "Lake Sennet"),
        instance("c", "who sang the song of the year", "nobody", page),
    ]
    store = Instances(minilm, rows)
    (near,) = store.nearest(["Where does the Orl rise?"], 5)
    assert [one.id for one, _ in near] == ["b", "c"] and near[0][1] > near[1][1]
    assert sum(share for _, share in near) == pytest.approx(1)
    (shown,) = store.nearest(["Whence comes the Orl?"], 1, shown=True)
    assert shown[0][0] == rows[0] and shown[0][1] == pytest.approx(1)
    store.drop("b")
    assert store.nearest(["where does the orl rise"], 1)[0][0][0].id == "c"
    assert Instances(minilm).nearest(["anything"], 3) == [[]]


def test_instances_are_shown_vote_and_follow_the_ledger(tiny, ledger, tmp_path):
    base = tiny("llama")
    ledger.insert([Question(id="c", question="Is Vell a harbour?", choices=["yes", "no"], answers=["yes"])])
    asked = [
        Question(id="a", question="When was it that the lamp was lit?", answers=["1931"]),
        Question(id="c", question="Is Vell a harbour?", choices=["yes", "no"], answers=["yes"]),
    ]
    method = prefix(base, tmp_path / "shown", demonstrations=2)
    method.learn(ledger)
    (shown, weight), _ = method.beside(asked)
    assert len(shown) == 2 and shown[-1].question == ASKED[0][0] and weight == 1
    # One block behind the other, each read alone, turned to its place; the question reads them all.
    (answer, _) = method.answer(asked)
    whole = [*shown, *answer.evidence]
    blocks = method.whole.encode(whole, kept=False)
    past = method.whole.past(whole, blocks)
    tail = method.form.pieces(asked[0].question, ())[2]
    (plain,) = complete(base, [Job(tail, (" 1931",), past)], max_new_tokens=0)
    assert answer.reference == pytest.approx(plain.options[0], abs=1e-5)
    # With all the weight on the neighbours the answer is theirs; the choice of a question with choices stays one.
    voting = prefix(base, tmp_path / "voting", interpolate=1.0)
    voting.learn(ledger)
    first, second = voting.answer(asked)
    assert first.text == "1931" and second.choice in ("yes", "no")
    voting.save_pretrained(tmp_path / "saved")
    again = Prefix.from_pretrained(tmp_path / "saved", base)
    assert [(a.text, a.choice) for a in again.answer(asked)] == [
        (first.text, first.choice),
        (second.text, second.choice),
    ]
    # A retracted page is shown no more, and a retracted question votes no more.
    for kind, id in (("document", "quay"), ("question", "t0")):
        stand = ledger.revision
        ledger.retract(kind, id)
        (change,) = ledger.history(since=stand)
        method.revise(change)
        left = method.instances.nearest([asked[0].question], 4)[0]
        assert all(one.example.passage is None or one.example.passage.document != "quay" for one, _ in left)
        assert ("t0" in {one.id for one, _ in left}) == (kind == "document")
    # What comes is shown and votes; a page that comes back is shown again, whichever of its answers it holds.
    assert all(one.example.passage is None for one in method.instances.all.values() if one.id == "t0")
    again = Question(id="t7", question="When did they light the lamp?", answers=["in 1930", "1931"], split="train")
    for row in (again, Document(id="back", text="In 1931 the lamp of the quay was lit.")):
        stand = ledger.revision
        ledger.insert([row])
        (change,) = ledger.history(since=stand)
        method.revise(change)
    shown = method.instances.all["t7"].example
    assert (shown.passage.document, shown.answer) == ("back", "1931")
    # Nothing of what is shown stays on disk.
    kept = prefix(base, tmp_path / "disk", demonstrations=2, slots=2, store="disk", epochs=1)
    kept.learn(ledger)
    files = set((tmp_path / "disk" / "prefix").rglob("*.safetensors"))
    assert files == {kept.cache.path(one) for _, one in kept._retriever.index.all_passages()}
    with pytest.raises(DataError, match=r"no prefix\.demonstrations"):
        prefix(tiny("gpt2"), tmp_path, demonstrations=1)
    with pytest.raises(UsageError, match=r"needs prefix\.encoder=cache or prefix\.encoder=selected"):
        prefix(base, tmp_path, demonstrations=1, encoder="text")
    (tmp_path / "saved" / "instances.jsonl").write_text('{"id": "x", "example": 3}\n')
    with pytest.raises(DataError, match=r"instances\.jsonl"):
        Prefix.from_pretrained(tmp_path / "saved", base)


@pytest.mark.parametrize("encoder", ["selected", "compressed", "tokens"])
def test_examples_that_are_shown_are_read_whole_before_passages_that_are_not(tiny, ledger, tmp_path, encoder):
    base = tiny("llama")
    few = {"columns": 3} if encoder != "tokens" else {}
    method = prefix(base, tmp_path, demonstrations=1, slots=2, encoder=encoder, epochs=1, store="disk", **few)
    method.learn(ledger)
    kept = {method.cache.path(one) for _, one in method._retriever.index.all_passages()}
    assert set((tmp_path / "prefix").rglob("*.safetensors")) == kept
    asked = Question(id="a", question="When was it that the lamp was lit?", answers=["1931"])
    (answer,) = method.answer([asked])
    ((shown,), _) = method.beside([asked])[0]
    assert method.cache.path(shown) == method.whole.path(shown)  # where training puts it, and looks for it
    example, passage = method.cache.encode([shown, *answer.evidence], kept=True)
    (whole,) = method.whole.fresh([shown])
    torch.testing.assert_close(example.keys[1], whole.keys[1])  # what is on disk was read in another batch
    assert example.columns == method.cache.columns(shown)
    (own,) = method.cache.fresh(answer.evidence)
    torch.testing.assert_close(passage.keys[1], own.keys[1])
    assert passage.columns == few.get("columns", method.whole.columns(answer.evidence[0]))
    past = (*method.learnt(), *method.cache.past([shown, *answer.evidence], [example, passage]))
    tail = method.form.pieces(asked.question, ())[2]
    (plain,) = complete(base, [Job(tail, (" 1931",), past)], max_new_tokens=0)
    assert answer.reference == pytest.approx(plain.options[0], abs=1e-5)


def test_how_well_a_passage_was_found_says_nothing_of_what_it_is(tiny, ledger, tmp_path, monkeypatch):
    """A page more moves all scores, and must not train anew, nor count a passage twice."""
    method = prefix(tiny("llama"), tmp_path, slots=2, epochs=1)
    method.learn(ledger)
    (kept,) = tmp_path.glob("learnt-*.safetensors")
    plain = type(method._retriever).retrieve
    monkeypatch.setattr(
        type(method._retriever),
        "retrieve",
        lambda *given: [[replace(p, score=p.score * (1 + 1e-6)) for p in some] for some in plain(*given)],
    )
    again = prefix(tiny("llama"), tmp_path, slots=2, epochs=1)
    again.learn(ledger)
    assert [*tmp_path.glob("learnt-*.safetensors")] == [kept]
    one = Passage("d", "", "Text.", 0, 5, 0.5)
    assert len({one, replace(one, score=0.7)}) == 1


def test_where_no_question_names_a_document_what_is_found_is_learnt_from(tiny, tmp_path):
    ledger = Ledger(tmp_path / "open.db", create=True)
    ledger.insert(Document(id=name, text=text) for name, text in PAGES.items())
    asked = [Question(id=f"t{n}", question=q, answers=[a], split="train") for n, (q, a, *_) in enumerate(ASKED)]
    lost = Question(id="lost", question="Who lives at the quay?", answers=["nobody"], split="train")
    ledger.insert([*asked, lost])
    method = prefix(tiny("llama"), tmp_path, slots=2, epochs=1)
    report = method.learn(ledger)
    assert report.skipped == {"no passage holds its answer": 1} and report.notes[-1].startswith("4 questions to learn")


def test_what_would_do_nothing_or_could_not_be_is_refused(tiny, ledger, tmp_path):
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    for options, why in (
        ({"slots": 2, "lr": 0}, "prefix.lr=0: must be above 0"),
        ({"slots": 2, "width": 64}, "prefix.width=64: needs prefix.encoder=text"),
        ({"encoder": "text", "width": 62}, "prefix.width=62: must be a multiple of 4"),
    ):
        with pytest.raises(UsageError, match=why):
            prefix(llama, tmp_path, **options)
    several = {"prefix.passages": "none", "prefix.slots": "2"}
    with pytest.raises(UsageError, match=r"prefix.blend=0.5: blends several passages; there are none here"):
        Prefix(llama, Settings(shots=0, k=2, options=several | {"prefix.blend": "0.5"}), tmp_path)
    Prefix(gpt2, Settings(shots=0, k=3, options=several), tmp_path)  # it stands behind no passage at all
    with pytest.raises(DataError, match="has sliding windows; use prefix.blend=0"):
        Prefix(tiny("mistral"), Settings(shots=0, k=2, options={"prefix.blend": "0.5"}), tmp_path)
    bare = Ledger(tmp_path / "bare.db", create=True)
    bare.insert([Document(id="quay", text=PAGES["quay"])])
    for options in ({"interpolate": 0.5}, {"demonstrations": 1}):
        with pytest.raises(DataError, match="go by training questions with answers, and the ledger has none"):
            prefix(llama, tmp_path / "bare", **options).learn(bare)
    bare.insert([Question(id="t", question="Who lit it?", answers=["Ann"], split="train")])
    with pytest.raises(DataError, match="and none was found for any"):
        prefix(llama, tmp_path / "bare", demonstrations=1).learn(bare)
    empty = Ledger(tmp_path / "empty.db", create=True)
    empty.insert([Question(id="t", question="Who lit it?", answers=["Ann"], split="train")])
    with pytest.raises(DataError, match="prefix.begin=pages, and the ledger has no document"):
        prefix(llama, tmp_path / "empty", passages="none", slots=2, begin="pages").learn(empty)


def test_what_training_puts_on_disk_is_said_before(tiny, ledger, tmp_path):
    said = prefix(tiny("llama"), tmp_path, slots=2).estimate(ledger)
    assert said.startswith("prefix: up to 4 passages of about") and said.endswith("on disk while training lasts")
    assert prefix(tiny("llama"), tmp_path).estimate(ledger) is None
    ledger.insert(Document(id=f"more-{n}", text=f"Hill {n} is bare.") for n in range(6))
    for options, count in (
        ({"study": 1}, 10),
        ({"demonstrations": 1}, 8),
        ({"passages": "none", "begin": "pages", "study": 1, "distil": 1}, 10),
    ):
        assert f"up to {count} passages" in prefix(tiny("llama"), tmp_path, slots=2, **options).estimate(ledger)
    # Questions that name no document are not learnt from where others do.
    ledger.insert(Question(id=f"open-{n}", question=f"Who? {n}", answers=["x"], split="train") for n in range(5))
    assert "up to 4 passages" in prefix(tiny("llama"), tmp_path, slots=2).estimate(ledger)


def test_hard_questions_count_more(tiny, ledger, tmp_path):
    like = "In which year was the lamp lit?"
    ledger.insert([Question(id="t9", question=like, answers=["1931"], documents=["quay"], split="train")])
    method = prefix(tiny("llama"), tmp_path, slots=4, hard=0.5, epochs=1)
    method.learn(ledger)
    asked, _ = tuning.to_learn_from(ledger, method.form)
    weights = {q.id: weight for q, (_, weight) in zip(asked, method.beside(asked), strict=True)}
    # Its neighbour gives the first away; nobody else has the second's answer.
    assert 1 < weights["t0"] < weights["t1"] == pytest.approx(1 - 0.5 * np.log(0.01))
    one = Lesson((), (5,), (6, 7), weight=1.0)
    each = torch.tensor([1.0, 2.0, 4.0])
    assert [float(x) for x in tuning.of_lessons(each, [one, Lesson((), (5,), (6,))])] == [3, 4]


def test_what_is_measured_in_the_same_words_is_not_learnt(tiny, ledger, tmp_path, monkeypatch):
    base = tiny("llama")
    ledger.insert([Question(id="asked", question=ASKED[0][0].upper().replace("?", " ?!"), answers=["x"], split="test")])
    found, left_out = tuning.to_learn_from(ledger, prefix(base, tmp_path).form)
    assert ASKED[0][0] not in {one.question for one in found} and left_out["is measured in the same words"] == 1
    said = [(ASKED[0][0], "1931"), ("When did the lamp burn?", "1931")]
    monkeypatch.setattr(
        learnt, "ask_itself", lambda base, form, passages, count, seed: [(passages[0], *one) for one in said]
    )
    seen, plain = [], learnt.lesson
    monkeypatch.setattr(
        learnt, "lesson", lambda base, form, one, *rest: seen.append(one.question) or plain(base, form, one, *rest)
    )
    prefix(base, tmp_path / "study", slots=2, epochs=1, study=1).learn(ledger)
    assert set(seen) == {"When did the lamp burn?"}


def test_the_controls_have_the_same_columns_and_other_passages(tiny, ledger, tmp_path):
    base = tiny("llama")
    asked = [
        Question(id=f"a{n}", question=f"Say: {q}", answers=[a], documents=[page])
        for n, (q, a, page, _) in enumerate(ASKED)
    ]
    ledger.insert(asked)
    found = {}
    for name in ("prefix", "prefix-gold", "prefix-shuffled"):
        settings = Settings(shots=0, options={"prefix.slots": "4", "prefix.epochs": "3"})
        method = method_class(name)(base, settings, tmp_path / "work")
        method.learn(ledger)
        found[name] = method, method.answer(asked)
    plain, gold, shuffled = (found[name] for name in found)
    for other in (gold, shuffled):
        pairs = zip(plain[0].slots.parameters(), other[0].slots.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert len(list((tmp_path / "work").glob("learnt-*"))) == 1  # trained once
    for question, right, wrong in zip(asked, gold[1], shuffled[1], strict=True):
        assert [one.document for one in right.evidence] == question.documents
        assert [one.document for one in wrong.evidence] != question.documents
        assert right.ranked is None and wrong.ranked is None  # nothing was searched for
    with pytest.raises(UsageError, match="cannot be kept"):
        gold[0].save_pretrained(tmp_path / "saved")
    none = Settings(shots=0, options={"prefix.slots": "4", "prefix.passages": "none"})
    with pytest.raises(UsageError, match="no passages for prefix-shuffled"):
        method_class("prefix-shuffled")(base, none, tmp_path / "none")
    with pytest.raises(UsageError, match="controls take the options of prefix"):
        method_class("prefix")(base, Settings(options={"prefix-gold.slots": "4"}), tmp_path)
    # Two right pages where keys cannot be moved: the first.
    both = asked[0].model_copy(update={"documents": ["quay", "vell"]})
    alone = method_class("prefix-gold")(tiny("gpt2"), Settings(shots=0), tmp_path / "alone")
    alone.learn(ledger)
    assert [one.document for one in alone.answer([both])[0].evidence] == ["quay"]
    assert "prefix-gold" not in parse_methods("all") and "prefix" in parse_methods("all")
