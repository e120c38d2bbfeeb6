"""The index of passages: what is added, removed and found is what a plain search would find."""

import copy
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from byheart.encoder import EncoderCard, load_encoder
from byheart.errors import DataError, UsageError
from byheart.index import Index
from byheart.ledger import Ledger
from byheart.retrieve import Retriever, follow, fuse, index_ledger
from byheart.rows import Document
from byheart.segment import Passage, segment
from conftest import WORLD

CARD = EncoderCard(name="e", hash="h", dim=8, pooling="mean", normalize=True, max_tokens=256, limit=512)
GENERATOR = np.random.default_rng(0)


def passages(document, count):
    return [Passage(document, document.upper(), f"{document} {n}", 10 * n, 10 * n + 9) for n in range(count)]


def vectors(count):
    return GENERATOR.standard_normal((count, 8)).astype(np.float32)


def test_search_is_exact_also_over_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("byheart.index._BLOCK_ROWS", 7)
    index = Index(tmp_path / "i", CARD, "288/64", create=True)
    stored = vectors(50)
    index.change(passages=passages("a", 50), vectors=stored)
    queries = vectors(6)
    scores, rows = index.search(queries, 9)
    expected = np.argsort(-(queries @ stored.T), axis=1)[:, :9]
    assert (rows == expected).all()
    assert np.allclose(scores, np.take_along_axis(queries @ stored.T, expected, 1), atol=1e-6)
    assert index.search(queries, 500)[1].shape == (6, 50)


def test_removed_documents_are_not_found_and_replaced_ones_are_found_once(tmp_path):
    index = Index(tmp_path / "i", CARD, "288/64", create=True)
    a, b = vectors(3), vectors(2)
    index.change(passages=passages("a", 3), vectors=a)
    index.change(passages=passages("b", 2), vectors=b, state={"n": 1})
    index.change(remove=["a"], passages=passages("a", 1), vectors=a[:1])
    assert len(index) == 3 and index.documents == 2 and index.state("n") == 1
    _, rows = index.search(a, 10)
    assert {index.passages([r])[r].document for r in rows[0].tolist()} == {"a", "b"} and rows.shape == (3, 3)
    again = Index(tmp_path / "i", CARD, "288/64")
    assert (again.search(a, 3)[1] == rows).all()


def test_two_that_write_at_once_do_not_spoil_each_others_vectors(tmp_path):
    one, other = Index(tmp_path / "i", CARD, "288/64", create=True), Index(tmp_path / "i", CARD, "288/64")
    there = vectors(3)
    one.change(passages=passages("a", 3), vectors=there)
    with pytest.raises(DataError, match="another run writes there"):
        other.change(passages=passages("b", 1), vectors=vectors(1))
    one.change(passages=passages("c", 1), vectors=there[:1])
    again = Index(tmp_path / "i", CARD, "288/64")
    assert np.allclose(again._vectors, [*there, there[0]]) and again.documents == 2


def test_vectors_without_rows_do_not_count_and_missing_ones_are_noticed(tmp_path):
    index = Index(tmp_path / "i", CARD, "288/64", create=True)
    index.change(passages=passages("a", 3), vectors=vectors(3))
    with (tmp_path / "i" / "vectors.f32").open("ab") as stream:
        stream.write(b"half a step that a kill left behind")
    again = Index(tmp_path / "i", CARD, "288/64")
    assert len(again) == 3
    more = vectors(2)
    again.change(passages=passages("b", 2), vectors=more)
    assert again.search(more[:1], 1)[1].tolist() == [[3]]
    (tmp_path / "i" / "vectors.f32").write_bytes(b"1234")
    with pytest.raises(DataError, match="shorter than its 5 rows need"):
        Index(tmp_path / "i", CARD, "288/64")


@pytest.mark.parametrize(
    ("change", "segment", "said"),
    [
        ({"hash": "other"}, "288/64", "another encoder"),
        ({"pooling": "cls"}, "288/64", "another pooling"),
        ({"normalize": False}, "288/64", "another normalisation"),
        ({"metric": "cosine"}, "288/64", "another metric"),
        ({}, "512/512", "holds segments of 288/64"),
    ],
)
def test_an_index_refuses_what_it_was_not_made_with(tmp_path, change, segment, said):
    Index(tmp_path / "i", CARD, "288/64", create=True)
    with pytest.raises(DataError, match=said):
        Index(tmp_path / "i", EncoderCard(**CARD.to_dict() | change), segment)
    with pytest.raises(DataError, match="missing"):
        Index(tmp_path / "nothing", CARD, "288/64")


def test_fusion_keeps_the_dense_order_where_words_say_nothing():
    assert [r for r, _ in fuse({1: 0.9, 2: 0.5}, {})] == [1, 2]
    # The best BM25 hit gains the weight, whatever the scale of BM25's scores.
    assert fuse({1: 0.9, 2: 0.8}, {2: 40.0, 1: 20.0}, 0.4)[0][0] == 2
    assert fuse({1: 0.9, 2: 0.8}, {2: 4.0, 1: 2.0}, 0.4) == fuse({1: 0.9, 2: 0.8}, {2: 40.0, 1: 20.0}, 0.4)
    # A row that only BM25 found counts as the worst dense one.
    assert dict(fuse({1: 0.9, 2: 0.5}, {3: 1.0}, 0.2))[3] == pytest.approx(0.7)


@pytest.mark.real
def test_vectors_are_those_of_a_plain_forward(minilm):
    texts = ["Ostrand Quay is a port.", "a", "word " * 400, "Who is the harbour master of Pell Cove?"]
    ours = minilm.encode(texts)
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    reference = copy.deepcopy(minilm.model).float()
    for text, vector in zip(texts, ours, strict=True):
        tokens = minilm.tokenizer(text, return_tensors="pt", truncation=True, max_length=minilm.card.max_tokens)
        with torch.no_grad():
            hidden = reference(**tokens).last_hidden_state[0].mean(0)
        assert float(torch.nn.functional.normalize(hidden, dim=0) @ torch.from_numpy(vector)) >= 0.999


def test_an_encoder_with_fewer_positions_than_it_says_is_cut_in_time(tokenizer, tmp_path):
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1, **sizes)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 32
    short.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert encoder.card.limit == encoder.card.max_tokens == 32
    assert np.isfinite(encoder.encode(["the boats of Vell " * 40])).all()


def test_an_encoder_that_would_give_other_vectors_is_refused(tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))  # a pooler that is not there is missed by nobody
    with (
        Ledger(tmp_path / "l.db", create=True) as ledger,
        pytest.raises(UsageError, match="--segment 64/32: .* reads 32 tokens at once"),
    ):
        index_ledger(ledger, tmp_path / "index", encoder, "64/32")
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "attention.self.query.weight" in name)
    save_file(
        {name: one for name, one in weights.items() if name != gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(DataError, match="the weights lack 1 tensors, such as .*query"):
        load_encoder(str(tmp_path))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in ("Pooling", "Dense")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(DataError, match="has a Dense behind its encoder"):
        load_encoder(str(tmp_path))


@pytest.mark.real
def test_questions_find_their_pages_and_the_index_follows_the_ledger(world, minilm, tmp_path):
    index = index_ledger(world, tmp_path / "index", minilm)
    questions = [q for q in world.questions() if q.kind in ("direct", "paraphrased")][:60]
    for mode, least in (("dense", 0.75), ("bm25", 0.7), ("hybrid", 0.8)):
        hits = Retriever(index, minilm, mode).retrieve([q.question for q in questions], 5)
        right = sum(found[0].document in q.documents for q, found in zip(questions, hits, strict=True))
        assert right / len(questions) >= least, mode
    seconds = index.state("seconds")
    assert index_ledger(world, tmp_path / "index", minilm).state("seconds") == seconds  # nothing is encoded again

    new = Document(id="page-new", title="Quillet Stair", text="The glass bells of Quillet Stair are rung by Odo Fenn.")
    world.insert([new])
    index = index_ledger(world, tmp_path / "index", minilm)
    ask = "Who rings the glass bells of Quillet Stair?"
    assert Retriever(index, minilm).retrieve([ask], 1)[0][0].document == "page-new"
    world.retract("document", "page-new")
    follow(index, minilm, "288/64", list(world.history())[-1])
    assert all(hit.document != "page-new" for hit in Retriever(index, minilm).retrieve([ask], 10)[0])
    # The same id and number of events, but another history.
    with Ledger(tmp_path / "other.db", create=True) as other, pytest.raises(DataError, match="this ledger's history"):
        other.insert([Document(id="x", text="Another ledger's page.")])
        index_ledger(other, tmp_path / "index", minilm)


@pytest.mark.real
def test_a_ledger_without_words_finds_nothing_and_breaks_nothing(minilm, tmp_path):
    with Ledger(tmp_path / "l.db", create=True) as ledger:
        index = index_ledger(ledger, tmp_path / "i", minilm)
        assert Retriever(index, minilm).retrieve(["Who?"], 3) == [[]]
        ledger.insert([Document(id="x", text="!!!")])
        index = index_ledger(ledger, tmp_path / "i", minilm)
        assert Retriever(index, minilm, "bm25").retrieve(["Who?"], 3) == [[]]
        assert [p.document for p in Retriever(index, minilm).retrieve(["Who?"], 3)[0]] == ["x"]


_BUILD = """
import sys
from pathlib import Path
import byheart.retrieve as retrieve
from byheart.encoder import load_encoder
from byheart.ledger import Ledger
retrieve._DOCUMENTS_A_STEP = 4
ledger, folder = Ledger(sys.argv[1]), Path(sys.argv[2])
retrieve.index_ledger(ledger, folder, load_encoder("minilm"), on_done=lambda n: print(n, flush=True))
"""


@pytest.mark.real
def test_a_killed_build_goes_on_to_the_same_index(world, minilm, tmp_path):
    command = [sys.executable, "-c", _BUILD, str(world.path), str(tmp_path / "index")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        process.stdout.readline()
    process.kill()
    process.wait()
    time.sleep(0.1)
    half = Index(tmp_path / "index", minilm.card, "288/64")
    assert 0 < half.documents < 40
    half.close()
    counted = []
    index = index_ledger(world, tmp_path / "index", minilm, on_done=counted.append)
    assert index.documents == 40 and sum(counted) == 40 and counted[0] > 0
    whole = index_ledger(world, tmp_path / "whole", minilm)
    assert [p for _, p in index.all_passages()] == [p for _, p in whole.all_passages()]
    queries = minilm.encode([WORLD.name, "harbour master"])
    assert np.abs(index.search(queries, 5)[0] - whole.search(queries, 5)[0]).max() < 5e-3


@pytest.mark.real
def test_cutting_is_not_disturbed_by_encoding(minilm):
    # transformers leaves truncation switched on in the tokeniser that it encoded with.
    text = "word " * 2_000
    minilm.encode([text])
    found = list(segment([Document(id="d", text=text)], minilm.splitter, "288/64"))
    assert found[-1].end == len(text.rstrip())
