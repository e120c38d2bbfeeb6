"""Columns by what is known of tokens without reading them: heads that make them, and which few to take."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from byheart import kv
from byheart.errors import DataError, UsageError
from byheart.gold import gold_passages
from byheart.ledger import Ledger
from byheart.methods import Settings
from byheart.methods.prefix import known, select, tokens
from byheart.methods.prefix.method import Prefix
from byheart.rows import Document, Question
from byheart.segment import Passage

PAGES = {
    "d0": "Ostrand Quay lies on the Tessary Coast.",
    "d1": "Its lamp was lit by Orla Fenn.",
    "d2": "Vell has nine boats.",
}
ASKED = [("Who lit the lamp?", "Orla Fenn", "d1"), ("How many boats has Vell?", "nine", "d2")]


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "small.db", create=True)
    made.insert(Document(id=name, title=f"Page {name}", text=text) for name, text in PAGES.items())
    made.insert(
        Question(id=f"{split}{n}", question=how + text, answers=[answer], documents=[page], split=split)
        for n, (text, answer, page) in enumerate(ASKED)
        for split, how in (("train", ""), ("validation", "Say: "))
    )
    return made


def prefix(base, work, shots=0, **options):
    settings = Settings(shots=shots, options={f"prefix.{name}": str(value) for name, value in options.items()})
    return Prefix(base, settings, work)


def told(method):
    asked = [Question(id=f"q{n}", question=text, answers=[answer]) for n, (text, answer, _) in enumerate(ASKED)]
    return [answer.reference for answer in method.answer(asked)]


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3", "phi"])
def test_keys_turn_each_by_its_own_positions(tiny, family):
    base = tiny(family)
    rotation = kv.check(base)
    one = kv.read(base, [[5, 9, 30, 44]], start=7)[0]
    by = torch.tensor([3, 0, -7, 40])
    found = rotation.turned(one.keys, by)
    for n, number in enumerate(by.tolist()):
        for key, alone in zip(found, rotation.moved(one, 7 + number).keys, strict=True):
            assert torch.allclose(key[:, n], alone[:, n], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_heads_that_know_enough_answer_as_the_model_that_read(tiny, ledger, tmp_path, monkeypatch, family):
    """Of fewer tokens than there is known of each a linear map can say nearly all; of other pages, less."""
    monkeypatch.setattr(tokens, "_RIDGE", 1e-9)
    base = tiny(family)
    read, made = prefix(base, tmp_path / "read", 1), prefix(base, tmp_path / "made", 1, encoder="tokens")
    read.learn(ledger)
    ticks = []
    report = made.learn(ledger, ticks.append)
    assert report.notes == ("heads fitted to 3 passages",) and sum(ticks) == report.documents == 3
    assert told(made) == pytest.approx(told(read), abs=0.1)
    less = prefix(base, tmp_path / "less", 1, encoder="tokens", fit=1)
    less.learn(ledger)
    passages = [passage for _, passage in made._retriever.index.all_passages()]

    def off(method):
        """The largest share of a block's keys or values that is not the model's."""
        worst = 0.0
        for own, one in zip(read.cache.fresh(passages), method.cache.fresh(passages), strict=True):
            assert (own.start, own.end, own.columns) == (one.start, one.end, one.columns)
            pairs = zip((*own.keys, *own.values), (*one.keys, *one.values), strict=True)
            worst = max(worst, *(float((a - b).norm() / a.norm()) for a, b in pairs))
        return worst

    assert 4 * off(made) < 0.6 < off(less)


def test_it_is_the_ridge_regression_of_the_models_own_columns(tiny, ledger, tmp_path):
    base = tiny("llama")
    method = prefix(base, tmp_path, encoder="tokens")
    method.learn(ledger)
    passages = [passage for _, passage in method._retriever.index.all_passages()]
    each = tokens.known_of(method.whole, method.encoder, passages)
    for passage, one in zip(passages, each, strict=True):
        own = base.parts.embeddings(torch.tensor(method.whole.ids(passage)))
        width = own.shape[1]
        assert torch.equal(one[:, :width], own) and torch.equal(one[1:, width : 2 * width], own[:-1])
        assert not one[0, width : 2 * width].any() and bool((one[:, -1] == 1).all())
    told = torch.cat(each).double()
    own = torch.cat(
        [torch.stack(one.values).flatten(0, 1).transpose(0, 1).flatten(1) for one in method.whole.fresh(passages)]
    )
    scale = told.square().mean(0).sqrt().clamp(min=1e-6)
    assert torch.allclose(method.tokens.scale.double(), scale, rtol=1e-4)
    weight = method.tokens.weight.double() / scale[:, None]
    slope = told.T @ (told @ weight) + 1e-3 * len(told) * scale.square()[:, None] * weight
    size = own.shape[1] // 3  # of three blocks, keys and values in turn
    values = torch.cat([slope[:, (2 * n + 1) * size : (2 * n + 2) * size] for n in range(3)], 1)
    assert torch.allclose(values, told.T @ own.double(), atol=1e-3)


def test_tokens_and_what_the_encoder_saw_are_matched_by_place():
    ours = np.array([(0, 2), (2, 3), (3, 9), (9, 10)])
    theirs = np.array([(0, 1), (1, 2), (3, 6), (6, 9)])
    wanted = [[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]
    assert known._shares(ours, theirs).tolist() == wanted
    assert known._shares(np.array([(0, 1)]), np.array([(2, 5)])).tolist() == [[1.0]]


def test_the_encoder_tells_where_its_tokens_stand(minilm):
    texts = ["The lamp of Ostrand Quay", "Vell"]
    found = minilm.described(texts)
    for text, (states, places) in zip(texts, found, strict=True):
        assert states.shape == (len(places), 2 * minilm.card.dim)
        assert "".join(text[a:b] for a, b in places) == text.replace(" ", "")
    top, _ = minilm.states(texts[1:])
    assert torch.allclose(found[1][0][:, minilm.card.dim :].float(), top[0, 1:-1].float(), atol=5e-2)


def test_a_killed_fit_goes_on_to_the_same(tiny, ledger, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_AT_ONCE", 1)
    monkeypatch.setattr(tokens, "SAVE_EVERY", 0.0)
    base = tiny("llama")
    whole = prefix(base, tmp_path / "whole", encoder="tokens")
    whole.learn(ledger)
    killed = prefix(base, tmp_path / "killed", encoder="tokens")
    seen = []

    def stop(count):
        seen.append(count)
        if sum(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.learn(ledger, stop)
    given = []
    plain = tokens.known_of
    monkeypatch.setattr(tokens, "known_of", lambda *args: given.extend(args[2]) or plain(*args))
    again = prefix(base, tmp_path / "killed", encoder="tokens")
    again.learn(ledger)
    assert len(given) == 2  # the second had not been saved yet
    assert torch.equal(again.tokens.weight, whole.tokens.weight)


def test_they_are_kept_learnt_behind_and_follow_the_ledger(tiny, ledger, tmp_path, monkeypatch):
    base = tiny("llama")
    method = prefix(base, tmp_path / "made", encoder="tokens", slots=3, epochs=30, batch=2, lr=0.1, store="disk")
    ticks = []
    report = method.learn(ledger, ticks.append)
    assert sum(ticks) == report.documents and "2 questions to learn from" in report.notes[1]
    assert len(list((tmp_path / "made" / "prefix").rglob("*.safetensors"))) == 3
    answers = told(method)
    method.save_pretrained(tmp_path / "saved")
    inside = load_file(tmp_path / "saved" / "learnt.safetensors")
    assert set(inside) >= {"tokens.weight", "tokens.up", "slots.keys.0"} and float(inside["tokens.up"].abs().max()) > 0
    again = Prefix.from_pretrained(tmp_path / "saved", base)
    with monkeypatch.context() as patched:  # all passages are on disk, under names that a loaded one finds
        patched.setattr(tokens.Imitated, "fresh", lambda self, passages: pytest.fail("made anew"))
        assert told(again) == pytest.approx(answers, abs=1e-4)
    # A page that changes is made anew by the same heads; the model does not read it.
    ledger.revise(Document(id="d1", title="Page d1", text="Its lamp was lit by Vell, and by Anna Kestle before."))
    *_, change = ledger.history()
    monkeypatch.setattr(again.whole, "fresh", lambda passages: pytest.fail("read by the model"))
    assert "what was learnt stays" in again.revise(change).notes[-1]
    assert told(again)[0] != pytest.approx(answers[0], abs=1e-2)


def test_training_moves_the_heads_unless_their_rank_is_none(tiny, ledger, tmp_path):
    base, losses = tiny("llama"), {}
    for rank in (0, 8):
        method = prefix(base, tmp_path / str(rank), encoder="tokens", rank=rank, slots=1, epochs=30, batch=2, lr=0.05)
        fitted = prefix(base, tmp_path / "fitted", encoder="tokens")
        fitted.learn(ledger)
        *_, note = method.learn(ledger).notes
        losses[rank] = [float(word) for word in re.findall(r"\d+\.\d+", note)]
        assert torch.allclose(method.tokens.weight, fitted.tokens.weight, atol=1e-3)
        assert (method.tokens.up is None) == (rank == 0)
        assert not any(one.requires_grad for one in method.tokens.parameters())
    assert losses[0][0] == pytest.approx(losses[8][0], abs=1e-3)  # they begin as they are fitted
    assert losses[8][1] < losses[0][1] - 0.1


def read(method, passages):
    return select.read_of(method.whole, method.encoder, passages, method.whole.encode(passages, kept=False))


def passage_of(text):
    return Passage("d", "Vell", text, 0, len(text))


def test_words_are_taken_whole_the_likeliest_first_and_each_once():
    tokens = ["\n", " Ann", "a", " sailed", " in", " 1", "9", " with", " ann", "A", "."]
    words = [[1, 2], [3], [4], [5, 6], [7], [8, 9], [10]]
    #        \n   Ann  a   sailed in   1    9   with ann  A    .
    told = [0.95, 0.2, 0.4, 0.5, 0.0, 1.0, 0.4, 0.1, 0.7, 0.9, 0.3]  # anna .3 and .8, 19 .7, sailed .5

    def taken(count):
        return select.likeliest(tokens, words, told, count)

    assert taken(2) == [8, 9]  # where anna is likelier; not the likeliest two tokens
    assert taken(4) == [5, 6, 8, 9] and taken(5) == [3, 5, 6, 8, 9]
    assert taken(3) == [3, 8, 9]  # 19 does not fit any more
    assert taken(1) == [3]  # the likeliest word of one token
    assert taken(8) == [3, 4, 5, 6, 7, 8, 9, 10]  # all words, the other anna left out
    assert taken(9) == [0, 3, 4, 5, 6, 7, 8, 9, 10] and taken(10) == [0, *range(2, 11)]  # and then what is left
    assert taken(500) == list(range(11))


def test_words_are_what_stands_between_spaces_and_marks(tiny, tmp_path):
    whole = prefix(tiny("llama"), tmp_path, encoder="selected").whole

    def words(text):
        block = whole.form.block(passage_of(text))
        places = known.places_of(whole, [block])[0][1].tolist()
        tokens, found = select.words_of(whole, passage_of(text))
        assert tokens == [block[a:b] for a, b in places]
        return [block[places[word[0]][0] : places[word[-1]][1]].strip() for word in found]

    expected = ["In", "1986", ",", "Bergström", "sailed", "(", "twice", ")."]
    assert words("In 1986, Bergström sailed (twice).")[-len(expected) :] == expected
    long = "honorificabilitudinitatibus" * 3
    last = select.words_of(whole, passage_of(long))[1][-len(whole.base.tokenizer.tokenize(long)) + 1 :]
    assert {len(word) for word in last} == {1}  # too long for a word: token by token
    assert "".join(words(long)).endswith(long)


def test_the_words_that_are_taken_keep_their_own_columns(tiny, tmp_path):
    method = prefix(tiny("llama"), tmp_path, 1, encoder="selected")
    whole, passage = method.whole, passage_of("The boats of Vell are nine boats, and the boats of Ostrand are seven.")
    told = read(method, [passage])[0]
    likely = select.Likely(torch.randn(told.shape[1], generator=torch.Generator().manual_seed(3)))
    (own,) = whole.fresh([passage])
    for count in (1, 8, 500):
        made = select.Selected(whole, count, likely, method.encoder)
        (one,) = made.fresh([passage])
        places = select.likeliest(*select.words_of(whole, passage), likely(told).tolist(), count)
        assert one.columns == len(places) == made.columns(passage) == min(count, len(whole.ids(passage)))
        for found, all_of_it in zip((*one.keys, *one.values), (*own.keys, *own.values), strict=True):
            assert torch.equal(found, all_of_it[:, places])
        assert (one.start, one.end) == (own.start, own.end)
    # What is on disk is that of one form and one count.
    paths = {
        select.Selected(whole, count, form, method.encoder).path(passage)
        for count in (1, 8)
        for form in (likely, select.Likely(-likely.weight))
    }
    assert len(paths) == 4


def test_what_is_known_of_a_token_that_was_read(tiny, tmp_path):
    """The values of the blocks above the middle, of a token and of the next, before what is known without reading."""
    method = prefix(tiny("llama"), tmp_path, encoder="selected")
    passage = passage_of("The boats of Vell are nine.")
    (told,), (block,) = read(method, [passage]), method.whole.encode([passage], kept=False)
    (plain,) = known.known_of(method.whole, method.encoder, [passage])
    width = 2 * block.values[0].shape[0] * block.values[0].shape[2]
    assert len(block.values) == 3 and told.shape == (len(plain), 2 * width + plain.shape[1])
    assert torch.equal(told[:, 2 * width :], plain) and torch.equal(told[:-1, width : 2 * width], told[1:, :width])
    assert not told[-1, width : 2 * width].any()
    for n in range(len(told)):
        assert torch.equal(told[n, :width], torch.cat([block.values[layer][:, n].flatten() for layer in (2, 1)]))


def test_what_is_likely_is_the_ridge_regression_of_where_answers_stand(tiny, tmp_path):
    method = prefix(tiny("llama"), tmp_path, encoder="selected")
    some = [
        (passage_of("Its lamp was lit by orla fenn (Orla Fenn)."), ["Orla Fenn", "nobody"]),
        (passage_of("Vell has nine boats."), ["nine", "Vell has", "boat", " "]),
        (passage_of("Nothing is said here."), ["C++ (a language)"]),
    ]
    inside = []
    for passage, answers in some:
        flags = select._answered(method.whole, passage, answers)
        text = method.whole.form.block(passage)
        (_, places), *_ = known.places_of(method.whole, [text])
        inside.append(torch.from_numpy(flags))
        stretches = "".join(text[a:b] if flag else "|" for flag, (a, b) in zip(flags, places, strict=True))
        found = [one.strip() for one in stretches.split("|") if one.strip()]
        assert found == [["orla fenn", "Orla Fenn"], ["Vell has nine"], []][len(inside) - 1]
    likely = select.fit_likely(method.whole, method.encoder, some)
    told = torch.cat(read(method, [passage for passage, _ in some])).double()
    size = told.square().mean(0).clamp(min=1e-12)
    weight = likely.weight.double()
    slope = told.T @ (told @ weight) + select._RIDGE * len(told) * size * weight
    assert torch.allclose(slope, told.T @ torch.cat(inside).double(), atol=1e-3)


def test_where_answers_stand_is_learnt_from_other_pages(tiny, world, minilm, tmp_path):
    """Among the sixteen tokens taken of a page that was not learnt from, far more are an answer's than of any."""
    method = prefix(tiny("llama"), tmp_path, encoder="selected")
    pairs = [
        (passage, question.answers)
        for question in world.questions()
        for passage in gold_passages(world, question, minilm.splitter, "288/64")
        if question.answers
    ]
    pages = sorted({passage.document for passage, _ in pairs})
    seen = [one for one in pairs if one[0].document in pages[::2]]
    likely = select.fit_likely(method.whole, method.encoder, seen)
    taken, any_of_it = [], []
    for passage, answers in (one for one in pairs if one[0].document in pages[1::2]):
        flags = torch.from_numpy(select._answered(method.whole, passage, answers))
        if flags.any():
            (told,) = read(method, [passage])
            first = select.likeliest(*select.words_of(method.whole, passage), likely(told).tolist(), 16)
            taken.append(float(flags[first].float().mean()))
            any_of_it.append(float(flags.float().mean()))
    assert len(taken) > 40
    assert np.mean(taken) > 2 * np.mean(any_of_it)


def test_the_few_are_kept_learnt_behind_and_follow_the_ledger(tiny, ledger, tmp_path, monkeypatch):
    base = tiny("llama")
    options = {"encoder": "selected", "columns": 4, "slots": 3, "epochs": 30, "batch": 2, "lr": 0.1, "store": "disk"}
    method = prefix(base, tmp_path / "made", **options)
    ticks = []
    report = method.learn(ledger, ticks.append)
    assert sum(ticks) == report.documents and report.notes[0] == "where answers stand learnt from 2 questions"
    assert len(list((tmp_path / "made" / "prefix").rglob("*.safetensors"))) == 3
    answers = told(method)
    method.save_pretrained(tmp_path / "saved")
    assert "likely.weight" in load_file(tmp_path / "saved" / "learnt.safetensors")
    again = Prefix.from_pretrained(tmp_path / "saved", base)
    # Kept answers are known by what is learnt, and by how columns are chosen.
    assert again.digest == method.digest != ""
    with monkeypatch.context() as patched:
        patched.setattr(again.cache, "mark", "chosen otherwise")
        assert again.digest != method.digest
        patched.undo()
        patched.setattr(again.slots.values[0], "data", 0 * again.slots.values[0].data)
        assert again.digest != method.digest
    assert again.digest == method.digest and prefix(base, tmp_path / "other").digest == ""
    with monkeypatch.context() as patched:
        patched.setattr(select.Selected, "fresh", lambda self, passages: pytest.fail("made anew"))
        assert told(again) == pytest.approx(answers, abs=1e-4)
    ledger.revise(Document(id="d1", title="Page d1", text="Its lamp was lit by Vell, and by Anna Kestle before."))
    *_, change = ledger.history()
    assert "what was learnt stays" in again.revise(change).notes[-1]
    assert told(again)[0] != pytest.approx(answers[0], abs=1e-3)


def test_what_cannot_be_is_said(tiny, tmp_path):
    with pytest.raises(UsageError, match=r"prefix\.fit=0: must be at least 1"):
        prefix(tiny("llama"), tmp_path, encoder="tokens", fit=0)
    with pytest.raises(UsageError, match="blended"):
        prefix(tiny("llama"), tmp_path, encoder="tokens", blend=0.5)
    for option, needed in (
        ({"fit": 10}, "needs prefix.encoder=tokens"),
        ({"rank": 0, "encoder": "text"}, "needs prefix.encoder=tokens"),
        ({"columns": 4}, "needs prefix.encoder=selected or prefix.encoder=compressed or prefix.encoder=text"),
        ({"tune_encoder": True, "encoder": "tokens"}, "needs prefix.encoder=text"),
    ):
        with pytest.raises(UsageError, match=re.escape(needed)):
            prefix(tiny("llama"), tmp_path, **option)
    prefix(tiny("llama"), tmp_path, columns=16)  # what it is anyway
    base = tiny("llama")
    slow = dataclasses.replace(base, tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(DataError, match="does not say where its tokens stand"):
        prefix(slow, tmp_path, encoder="tokens")
    empty = Ledger(tmp_path / "empty.db", create=True)
    with pytest.raises(DataError, match="no document to fit heads to"):
        prefix(tiny("llama"), tmp_path / "work", encoder="tokens").learn(empty)
    empty.insert([Document(id="d", title="Vell", text=PAGES["d2"])])
    with pytest.raises(DataError, match="no training question whose document holds its answer"):
        prefix(tiny("llama"), tmp_path / "work", encoder="selected").learn(empty)
