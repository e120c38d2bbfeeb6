"""Keys and values: read, moved, put behind each other, kept on disk, and answered from."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from byheart import kv
from byheart.attention import replaced_attention, tiled_attention
from byheart.base import make_base
from byheart.decode import Job, complete
from byheart.errors import DataError, UsageError
from byheart.ledger import Ledger
from byheart.losses import token_loss
from byheart.methods import Settings, method_class
from byheart.methods.prefix import compress, heads, slots
from byheart.methods.prefix.behind import Sample, answer_logits, shared
from byheart.methods.prefix.blend import blended
from byheart.methods.prefix.export import export_cartridge
from byheart.methods.prefix.method import Prefix
from byheart.methods.prefix.store import Store
from byheart.padding import right_padded
from byheart.prompt import PromptFormat
from byheart.rows import Document, Question
from byheart.segment import Passage
from byheart.storage import bytes_under
from conftest import FAMILIES, tiny_model

DECODERS = [name for name in FAMILIES if name != "t5"]
ROTARY = ["gpt_neox", "llama", "mistral", "qwen3", "gemma3_text", "phi"]
TEXTS = ["Ostrand Quay lies on the Tessary Coast", "Its lamp was lit", "and the harbour of Vell holds nine boats"]
ASKED = ["Who lit the lamp?", "How many boats does the harbour hold?", "Where?"]


def ids_of(base, text):
    return base.tokenizer(text, add_special_tokens=False)["input_ids"]


def close(a, b, by=2e-5):
    return float((a - b).detach().abs().max()) <= by * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("family", DECODERS)
def test_behind_kept_keys_and_values_a_prompt_reads_as_in_one_go(tiny, family):
    base = tiny(family)
    kv.check(base)
    # Pasts and prompts of different length in one batch, so that both kinds of padding are there.
    pasts = [kv.read(base, [ids_of(base, text)])[0] for text in TEXTS]
    behind = complete(
        base,
        [Job(asked, (" nine boats", " Vell"), (past,)) for asked, past in zip(ASKED, pasts, strict=True)],
        max_new_tokens=4,
    )
    whole = [ids_of(base, text) + ids_of(base, asked) for text, asked in zip(TEXTS, ASKED, strict=True)]
    for ids, asked, found in zip(whole, ASKED, behind, strict=True):
        with torch.no_grad():
            for option, mean in zip((" nine boats", " Vell"), found.options, strict=True):
                more = ids_of(base, asked + option)[len(ids_of(base, asked)) :]
                logits = base.model(input_ids=torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, torch.tensor(more)[:, None]).mean()
                assert abs(float(expected) - mean) < 1e-4
        assert found.prompt_tokens == len(ids_of(base, asked))


@pytest.mark.parametrize("family", ROTARY)
def test_moved_keys_are_those_of_a_fresh_reading(tiny, family):
    base = tiny(family)
    rotation = kv.check(base)
    assert rotation is not None
    row = [ids_of(base, TEXTS[0])]
    here, there = (kv.read(base, row, start=start)[0] for start in (3, 41))
    for moved, fresh in ((rotation.moved(here, 41), there), (rotation.moved(there, 3), here)):
        assert (moved.start, moved.end) == (fresh.start, fresh.end)
        assert all(close(a, b) for a, b in zip(moved.keys, fresh.keys, strict=True))
        assert all(close(a, b) for a, b in zip(moved.values, fresh.values, strict=True))
    assert not all(close(a, b) for a, b in zip(here.keys, there.keys, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt"])
def test_what_cannot_be_moved_is_not(tiny, family, tmp_path):
    base = tiny(family)
    assert kv.check(base) is None
    blocks = kv.read(base, [ids_of(base, text) for text in TEXTS[:2]])
    with pytest.raises(DataError, match="cannot be moved"):
        kv.placed(blocks, 0, None)
    with pytest.raises(DataError, match="use --k 1"):
        Prefix(base, Settings(k=2), tmp_path)
    Prefix(base, Settings(k=1), tmp_path)


def test_a_model_that_fails_its_test_is_refused(tokenizer, tmp_path, monkeypatch):
    model = tiny_model("llama", len(tokenizer))
    base = make_base("odd", model, tokenizer)
    attention = base.parts.blocks[1].attention
    # Looks at how much it was handed: not the same behind a cache.
    handle = attention.register_forward_hook(lambda m, args, out: (out[0] * out[0].shape[1], *out[1:]))
    with pytest.raises(DataError, match="prefix: odd: reads otherwise"):
        Prefix(base, Settings(), tmp_path)
    handle.remove()
    # Keys that are not where they should be are found out, and nothing is moved then.
    monkeypatch.setattr(kv, "_turned", lambda key, cos, sin: key)
    assert kv.check(base) is None


def test_blocks_see_the_head_and_not_each_other(tiny):
    base = tiny("llama")
    head = kv.read(base, [ids_of(base, TEXTS[0])])[0]
    alone = [kv.read(base, [ids_of(base, text)], head)[0] for text in TEXTS[1:]]
    together = kv.read(base, [ids_of(base, text) for text in TEXTS[1:]], head)
    for a, b in zip(alone, together, strict=True):
        assert (a.start, a.end, a.columns) == (b.start, b.end, b.columns)
        assert all(close(x, y) for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True))
    first, second = kv.placed(together, head.end, kv.check(base))
    assert second.start == first.end == head.end + first.columns
    # The first stands where the same text stands in one go.
    whole = kv.read(base, [ids_of(base, TEXTS[0]) + ids_of(base, TEXTS[1])])[0]
    both = kv.joined([head, first])
    assert all(close(a, b) for a, b in zip(both.keys, whole.keys, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_all_tokens_blended_are_a_reading_in_one_go(tiny, family):
    base = tiny(family)
    rows = [ids_of(base, text) for text in TEXTS]
    for head in (None, kv.read(base, [ids_of(base, ASKED[0])])[0]):
        start = 0 if head is None else head.end
        blocks = kv.placed(kv.read(base, rows, head), start, kv.check(base))
        whole = kv.read(base, [[one for row in rows for one in row]], head)[0]
        first = len(rows[0])

        def off(found, whole=whole):
            return sum(float(((a - b) ** 2).sum()) for a, b in zip(found.keys, whole.keys, strict=True))

        none, some, all_of_it = (blended(base, head, blocks, rows, share) for share in (0.0, 0.4, 1.0))
        assert close(torch.stack(all_of_it.keys), torch.stack(whole.keys))
        assert close(torch.stack(all_of_it.values), torch.stack(whole.values))
        assert 0 < off(some) < off(none)
        assert all(torch.equal(a[:, :first], b[:, :first]) for a, b in zip(some.keys, none.keys, strict=True))


def test_a_store_gives_back_what_was_put(tiny, tmp_path):
    base = tiny("qwen3")
    one = kv.read(base, [ids_of(base, TEXTS[0])])[0]
    like = one.keys[0]
    for precision, by in (("model", 0.0), ("int8", 0.01)):
        store = Store(tmp_path, precision)
        path = store.path("a", "b")
        assert store.get(path, like) is None
        store.put(path, one)
        found = store.get(path, like)
        assert (found.start, found.end) == (one.start, one.end)
        for a, b in zip((*found.keys, *found.values), (*one.keys, *one.values), strict=True):
            assert float((a - b).abs().max()) <= by * float(b.abs().max())
    assert len({tuple(sorted(load_file(p))) for p in tmp_path.rglob("*.safetensors")}) == 2
    path.write_bytes(path.read_bytes()[:100])
    assert store.get(path, like) is None
    with pytest.raises(DataError, match="GiB may be filled"):
        store.check_room(shutil.disk_usage(tmp_path).total * 2)
    for precision in ("model", "int8"):  # what a passage of few columns takes is mostly scales and names
        store = Store(tmp_path, precision)
        fixed, column = store.sizes(kv.read(base, [[0]])[0])
        for text in ("Vell", TEXTS[0]):
            one = kv.read(base, [ids_of(base, text)])[0]
            path = store.path("size", text)
            store.put(path, one)
            assert path.stat().st_size == pytest.approx(fixed + column * one.columns, rel=0.03)


@pytest.fixture
def small(tmp_path):
    ledger = Ledger(tmp_path / "small.db", create=True)
    documents = [Document(id=f"d{n}", title=f"Title {n}", text=text) for n, text in enumerate(TEXTS)]
    asked = [Question(id=f"q{n}", question=text, answers=["Vell"]) for n, text in enumerate(ASKED)]
    ledger.insert([*documents, *asked])
    return ledger


def asked_of(method):
    with method.attached():
        return method.answer([Question(id=f"q{n}", question=text, answers=["Vell"]) for n, text in enumerate(ASKED)])


def test_one_passage_answers_as_the_same_text_in_the_prompt(tiny, small, tmp_path):
    base = tiny("llama")
    method = Prefix(base, Settings(shots=3), tmp_path)
    method.learn(small)
    for answer in asked_of(method):
        question = ASKED[int(answer.question[1:])]
        head, blocks, tail = method.form.pieces(question, answer.evidence)
        assert len(blocks) == 1
        (plain,) = complete(base, [Job(head + blocks[0] + tail, (" Vell",))], max_new_tokens=24)
        assert answer.text == plain.text and answer.reference == pytest.approx(plain.options[0], abs=1e-4)
        assert answer.prompt_tokens < plain.prompt_tokens / 4


def test_what_is_on_disk_answers_alike_and_follows_the_ledger(tiny, small, tmp_path, monkeypatch):
    base = tiny("llama")
    fresh = Prefix(base, Settings(k=2), tmp_path / "fresh")
    kept = Prefix(base, Settings(k=2, options={"prefix.store": "disk"}), tmp_path / "kept")
    assert fresh.estimate(small) is None and "3 passages" in kept.estimate(small)
    fresh.learn(small)
    ticks = []
    report = kept.learn(small, ticks.append)
    assert sum(ticks) == report.documents == 3
    assert report.bytes > fresh.learn(small).bytes and "a passage on disk" in report.notes[0]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "prefix").rglob("*.safetensors")}
    assert len(files) == 3
    kept.learn(small)
    assert files == {path: path.stat().st_mtime_ns for path in files}  # nothing is read again

    def plain(answers):
        return [(a.text, a.evidence, pytest.approx(a.reference, abs=1e-5)) for a in answers]

    # What is on disk is used: while asking, only the other one reads its head and the passages.
    calls = []
    original = kv.read
    monkeypatch.setattr(kv, "read", lambda base, rows, *a, **b: calls.append(rows) or original(base, rows, *a, **b))
    assert plain(asked_of(fresh)) == plain(asked_of(kept))
    assert len(calls) == 2
    small.revise(Document(id="d1", title="Title 1", text="Its lamp was lit by Anna Kestle, who lived in Vell"))
    *_, changed = small.history()
    for method in (fresh, kept):
        method.revise(changed)
    now = set((tmp_path / "kept" / "prefix").rglob("*.safetensors"))
    assert len(now) == 3 and len(now & set(files)) == 2
    assert plain(asked_of(fresh)) == plain(asked_of(kept))
    kept.save_pretrained(tmp_path / "saved")
    again = Prefix.from_pretrained(tmp_path / "saved", base)
    calls.clear()
    assert plain(asked_of(again)) == plain(asked_of(kept))
    assert {len(rows) for rows in calls} == {1}  # the self-test and the head


def test_what_other_options_left_on_disk_is_neither_counted_nor_kept(tiny, small, tmp_path):
    base = tiny("llama")
    for precision in ("model", "int8"):
        options = {"prefix.store": "disk", "prefix.precision": precision}
        method = Prefix(base, Settings(options=options), tmp_path / "work")
        report = method.learn(small)
    assert len(list((tmp_path / "work" / "prefix").rglob("*.safetensors"))) == 6
    own = {method.cache.path(passage) for _, passage in method._retriever.index.all_passages()}
    assert report.bytes == bytes_under(tmp_path / "work" / "index") + sum(path.stat().st_size for path in own)
    method.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").rglob("??/*.safetensors")} == {path.name for path in own}
    with Ledger(tmp_path / "empty.db", create=True) as empty:
        method = Prefix(base, Settings(options=options), tmp_path / "none")
        method.learn(empty)
    method.save_pretrained(tmp_path / "nothing")
    assert Prefix.from_pretrained(tmp_path / "nothing", base).options.store == "disk"


def test_more_tokens_than_the_model_has_positions_for_are_refused(tokenizer):
    base = make_base("small", tiny_model("gpt2", len(tokenizer)), tokenizer)
    limit = base.model.config.max_position_embeddings
    assert kv.read(base, [[5] * 9], start=limit - 9)[0].end == limit
    with pytest.raises(DataError, match=rf"small: 9 tokens from position {limit - 8} on need {limit + 1} positions"):
        kv.read(base, [[5] * 9], start=limit - 8)


@pytest.mark.parametrize("name", ["context", "prefix"])
def test_choices_are_calibrated_behind_the_same_passage(tiny, small, tmp_path, name):
    """What a choice gains by the question, not by the passage (Zhao et al. 2021)."""
    base, choices = tiny("llama"), ["Vell", "the lamp", "a horseshoe", "Anna Kestle"]
    asked = [Question(id=f"q{n}", question=text, answers=["Vell"], choices=choices) for n, text in enumerate(ASKED)]
    method = method_class(name)(base, Settings(shots=1), tmp_path)
    method.learn(small)
    free = "N/A"
    for question, answer in zip(asked, method.answer(asked), strict=True):
        scores = {}
        for text in (question.question, free):
            if name == "prefix":
                head, blocks, tail = method.form.pieces(text, answer.evidence, choices)
                prompt = head + "".join(blocks) + tail
            else:
                prompt = method.form.prompt(text, answer.evidence, choices)
            job = Job(prompt, tuple(map(method.form.continuation, choices)))
            scores[text] = complete(base, [job], max_new_tokens=0)[0].options
        gains = [a - b for a, b in zip(scores[question.question], scores[free], strict=True)]
        assert answer.choice_calibrated == choices[max(range(len(choices)), key=gains.__getitem__)]


@pytest.mark.parametrize("gone", [("document", "d1"), ("question", "t1")])
def test_an_example_goes_with_its_page_or_question(tiny, small, tmp_path, gone):
    """It stands before every passage and every question, so that all are read again without it."""
    base = tiny("llama")
    for n, text in enumerate(TEXTS):
        said = {"question": f"what is said {n}", "answers": [text.split()[0]]}
        small.insert([Question(id=f"t{n}", **said, documents=[f"d{n}"], split="train")])
    method = Prefix(base, Settings(shots=3, options={"prefix.store": "disk"}), tmp_path / "kept")
    method.learn(small)
    shown = [example.question for example in method.form.examples]
    assert "what is said 1" in shown
    small.retract(*gone)
    *_, change = small.history()
    method.revise(change)
    assert [example.question for example in method.form.examples] == [one for one in shown if one != "what is said 1"]
    fresh = Prefix(base, Settings(shots=3), tmp_path / "fresh")
    fresh.learn(small)
    fresh.form = method.form
    kept = {path.name for path in (tmp_path / "kept" / "prefix").rglob("*.safetensors")}
    assert kept == {method.cache.path(one).name for _, one in method._retriever.index.all_passages()}
    for one, other in zip(asked_of(method), asked_of(fresh), strict=True):
        assert (one.text, one.evidence) == (other.text, other.evidence)
        assert one.reference == pytest.approx(other.reference, abs=1e-5)


def test_a_full_disk_is_seen_whatever_lies_beside(tiny, small, tmp_path, monkeypatch):
    method = Prefix(tiny("llama"), Settings(options={"prefix.store": "disk"}), tmp_path)
    method.learn(small)
    _, each, there = method.whole.size([p for _, p in method._retriever.index.all_passages()])
    assert there == sum(path.stat().st_size for path in method._kept())
    asked = []
    monkeypatch.setattr(Store, "check_room", lambda store, size: asked.append(size))
    (tmp_path / "prefix" / "other.safetensors").write_bytes(b"0" * 10_000_000)
    method.estimate(small)
    assert abs(asked[0]) < each  # all of it is there
    Prefix(tiny("llama"), Settings(shots=1, options={"prefix.store": "disk"}), tmp_path).estimate(small)
    assert asked[1] > 2 * each  # nothing of it is
    # Who comes again after a kill needs room for no more than is lacking.
    Prefix(tiny("llama"), Settings(options={"prefix.store": "disk"}), tmp_path).estimate(small)
    assert asked[2] == asked[0]


def test_blending_and_bad_options(tiny, small, tmp_path, monkeypatch):
    base = tiny("llama")
    answers = {}
    for share in ("0", "1"):
        method = Prefix(base, Settings(k=3, shots=1, options={"prefix.blend": share}), tmp_path / share)
        method.learn(small)
        answers[share] = asked_of(method)
    for answer in answers["1"]:
        head, blocks, tail = method.form.pieces(ASKED[int(answer.question[1:])], answer.evidence)
        (plain,) = complete(base, [Job(head + "".join(blocks) + tail, (" Vell",))], max_new_tokens=0)
        assert answer.reference == pytest.approx(plain.options[0], abs=1e-4)
    assert [a.reference for a in answers["0"]] != [a.reference for a in answers["1"]]
    with pytest.raises(UsageError, match="at most 1"):
        Prefix(base, Settings(options={"prefix.blend": "1.5"}), tmp_path)
    with pytest.raises(UsageError, match=r"prefix.blend=0.5: blends several passages; use --k 2"):
        Prefix(base, Settings(options={"prefix.blend": "0.5"}), tmp_path)
    with pytest.raises(UsageError, match=r"prefix.precision=int8: nothing is on disk"):
        Prefix(base, Settings(options={"prefix.precision": "int8"}), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("byheart.methods.prefix.learnt.BLENDED", 4)
        with pytest.raises(DataError, match="the second of 4 blocks or more; llama has 3"):
            Prefix(base, Settings(k=2, options={"prefix.blend": "0.5"}), tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    full = Prefix(base, Settings(options={"prefix.store": "disk"}), tmp_path / "full")
    for work in (full.estimate, full.learn):
        with pytest.raises(DataError, match="GiB may be filled"):
            work(small)
    assert not list(tmp_path.joinpath("full").rglob("prefix/**/*.safetensors"))


def test_learnt_columns_answer_better_and_are_kept(tiny, small, tmp_path):
    base = tiny("llama")
    wanted = [("Who lit the lamp of the quay?", "lamp", "d1"), ("What holds nine boats?", "harbour", "d2")]
    small.insert(
        Question(id=f"t{n}", question=text, answers=["missing", answer], documents=[document], split="train")
        for n, (text, answer, document) in enumerate(wanted)
    )
    small.insert(
        [
            Question(id="t2", question="What is nowhere?", answers=["nothing"], documents=["d0"], split="train"),
            Question(id="t3", question="Whose is it?", answers=["Vell"], split="train"),
        ]
    )
    options = {"prefix.slots": "8", "prefix.epochs": "60", "prefix.batch": "2", "prefix.lr": "0.3"}
    method = Prefix(base, Settings(shots=0, options=options), tmp_path / "work")
    told = []
    report = method.learn(small, told.append)
    assert report.skipped == {"no passage holds its answer": 1, "names no document": 1}
    assert sum(told) == 3 and "2 questions to learn from, 60 steps" in report.notes[0]
    first, last = (float(word) for word in re.findall(r"\d+\.\d+", report.notes[0]))
    assert last < 0.9 * first
    assert not list((tmp_path / "work").rglob("prefix/**/*.safetensors"))  # none was to be kept

    def learnt(method):
        asked = [Question(id=f"t{n}", question=text, answers=[answer]) for n, (text, answer, _) in enumerate(wanted)]
        return method.answer(asked)

    plain = Prefix(base, Settings(shots=0), tmp_path / "plain")
    plain.learn(small)
    now, before = learnt(method), learnt(plain)
    assert all(a.reference > b.reference + 0.3 for a, b in zip(now, before, strict=True))
    method.save_pretrained(tmp_path / "saved")
    again = learnt(Prefix.from_pretrained(tmp_path / "saved", base))
    assert [(a.text, a.reference) for a in again] == [(a.text, a.reference) for a in now]
    # A run that finds its training done gives the same columns.
    once_more = Prefix(base, Settings(shots=0, options=options), tmp_path / "work")
    once_more.learn(small)
    assert all(torch.equal(a, b) for a, b in zip(once_more.slots.parameters(), method.slots.parameters(), strict=True))
    (tmp_path / "saved" / "learnt.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not what byheart writes there"):
        Prefix.from_pretrained(tmp_path / "saved", base)
    with pytest.raises(UsageError, match=r"prefix\.batch=0"):
        Prefix(base, Settings(options={"prefix.batch": "0"}), tmp_path)


def test_slots_without_a_lesson_are_refused(tiny, small, tmp_path):
    with pytest.raises(DataError, match="the ledger has no training question"):
        Prefix(tiny("llama"), Settings(options={"prefix.slots": "4"}), tmp_path).learn(small)


def given_behind(base, past, rows):
    """By layer, what attention gets where rows are read behind a past, and what it gives."""
    ids, mask, places = right_padded(rows, base.device)
    given = []

    def noted(*args):
        given.append((args, tiled_attention(*args)))
        return given[-1][1]

    with torch.no_grad(), replaced_attention(base.model, noted):
        base.model(
            input_ids=ids,
            attention_mask=torch.cat([mask.new_ones(len(rows), past.columns), mask], 1),
            position_ids=places + past.end,
            **base.behind(kv.begun(base, past, len(rows))),
        )
    return mask.bool(), given


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_what_queries_find_is_the_models_own_attention(tiny, family):
    """With and without the passage, the parts add up to what a forward gives the output projection."""
    base = tiny(family)
    head, text = ids_of(base, ASKED[0]), ids_of(base, TEXTS[0])
    before = kv.read(base, [head])[0]
    block = kv.read(base, [text], before)[0]
    rows, leads = [ids_of(base, ASKED[1]), ids_of(base, TEXTS[1])], [2, 0]
    used, given = given_behind(base, kv.joined([before, block]), rows)
    for n, lead in enumerate(leads):
        used[n, :lead] = False
    first, there = before.columns, before.columns + block.columns
    found = [compress.look(*states, output, used, first, there) for states, output in given]
    # Deeper layers have seen the passage in the layers below; a window would reach further without it.
    alike = {True: len(found), False: 0 if family == "gemma3_text" else 1}
    for past, whole in (((before, block), True), ((before,), False)):
        alone = [attended(base, kv.joined(past), row, lead, block.end) for row, lead in zip(rows, leads, strict=True)]
        for n in range(alike[whole]):
            ours = found[n].rest + (found[n].toward if whole else 0)
            assert close(ours, torch.cat([one[n] for one in alone], 1), 1e-4)
    # What all columns do is what they are wanted to do, so that they miss nothing; a window hides some from some.
    for seen, ((_, key, value, *_), _) in zip(found, given, strict=True):
        if family != "gemma3_text":
            assert float(compress.error(seen, *(one[0, :, first:there] for one in (key, value))).max()) < 1e-6


def attended(base, past, row, lead, start):
    """By layer (kv_heads, n, head_dim), what transformers' own attention gives a row's tokens from ``lead`` on."""
    given = []

    def noted(module, query, *args, **kwargs):
        output = sdpa_attention_forward(module, query, *args, **kwargs)  # (1, n, heads, dim)
        groups = past.keys[0].shape[0]
        given.append(output[0][0, lead:].unflatten(1, (groups, -1)).movedim(1, 0).flatten(1, 2))
        return output

    AttentionInterface.register("noted", noted)
    AttentionMaskInterface.register("noted", sdpa_mask)
    base.model.set_attn_implementation("noted")
    try:
        with torch.no_grad():
            base.model(
                input_ids=torch.tensor([row]),
                attention_mask=torch.ones(1, past.columns + len(row), dtype=torch.long),
                position_ids=torch.arange(start, start + len(row))[None],
                **base.behind(kv.begun(base, past)),
            )
    finally:
        base.model.set_attn_implementation("sdpa")
    return given


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_layer_is_fitted_behind_what_the_layers_below_were_fitted_to(tiny, family):
    """To the queries that it gets there, and to what it gives where the whole passage stands there."""
    base = tiny(family)
    head = kv.read(base, [ids_of(base, ASKED[0])])[0]
    block = kv.read(base, [ids_of(base, TEXTS[0])], head)[0]
    rows, count = [ids_of(base, ASKED[1]), ids_of(base, TEXTS[1])], 4
    found = compress.fitted(base, head, block, rows, [0, 0], count)
    used, wanted = given_behind(base, kv.joined([head, block]), rows)
    _, drifted = given_behind(base, kv.joined([head, found]), rows)
    first, there = head.columns, head.columns + block.columns
    for n, ((*_, may, scaling), output) in enumerate(wanted):
        query, *both = drifted[n][0][:3]
        key, value = (
            torch.cat([one[:, :, :first], whole[n].expand(len(rows), -1, -1, -1), one[:, :, first + count :]], 2)
            for one, whole in zip(both, (block.keys, block.values), strict=True)
        )
        seen = compress.look(query, key, value, may, scaling, output, used, first, there)
        keys, values = compress.fit(seen, block.keys[n], block.values[n], count)
        assert close(found.keys[n], keys, 1e-3) and close(found.values[n], values, 1e-3)


def test_fitted_columns_say_what_the_passage_says(tiny):
    torch.manual_seed(0)
    heads, n, columns, dim, count = 2, 90, 24, 8, 6
    keys, values = torch.randn(heads, columns, dim), torch.randn(heads, columns, dim)
    queries, rest, mass = torch.randn(heads, n, dim), torch.randn(heads, n, dim), torch.randn(heads, n) + 1
    given = torch.cat([queries @ keys.mT, mass[..., None]], -1).softmax(-1)[..., :-1]
    toward = given @ values - given.sum(-1, keepdim=True) * rest
    seen = compress.Looks(queries, rest, toward, mass, given.square().sum(1))
    assert float(compress.error(seen, keys, values).max()) < 1e-9  # all columns miss nothing
    fitted = compress.error(seen, *compress.fit(seen, keys, values, count))
    begin, chosen = compress._clusters(keys, values, seen.weight, count)
    now = compress._given(seen, begin)
    regressed = compress.error(seen, begin, compress._best_values(seen, now, chosen))
    most = seen.weight.topk(count, -1).indices[..., None].expand(-1, -1, dim)
    picked = compress.error(seen, keys.gather(1, most), values.gather(1, most))
    assert bool((fitted < 0.8 * regressed).all() and (regressed < 0.8 * picked).all())
    # A column that nothing looks at keeps the value that it began with.
    unseen = now.clone()
    unseen[..., 2] = 0
    assert close(compress._best_values(seen, unseen, chosen)[:, 2], chosen[:, 2], 1e-3)
    # The gradient written out is autograd's, and the best values are where the one in the values is nothing.
    moving, best = begin.clone().requires_grad_(), compress._best_values(seen, now, chosen).requires_grad_()
    compress._missed(seen, compress._given(seen, moving), best).square().sum().mul(0.5).backward()
    assert close(moving.grad, compress._slope(seen, now, best.detach()), 1e-4)
    assert float(best.grad.abs().max()) < 1e-2 * float(moving.grad.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compressed_passage_is_nearer_to_the_whole_one_than_none(tiny, small, tmp_path, family):
    base = tiny(family)
    whole, few = (
        Prefix(base, Settings(shots=0, options=options), tmp_path / str(len(options)))
        for options in ({}, {"prefix.encoder": "compressed", "prefix.columns": "8"})
    )
    for method in (whole, few):
        method.learn(small)
    passage = next(iter(few._retriever.index.all_passages()))[1]
    (block,), (short,) = (one.cache.encode([passage], kept=False) for one in (whole, few))
    assert short.columns == few.cache.columns(passage) == 8 < block.columns
    assert (short.start, short.end) == (block.start, block.end)
    ids = ids_of(base, passage.text)[4:12]

    def logits(*past):
        with torch.inference_mode():
            there = kv.joined(past) if past else None
            return base.model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids) + kv.length(past), dtype=torch.long),
                position_ids=torch.arange(block.end, block.end + len(ids))[None],
                **base.behind(kv.begun(base, there)),
            ).logits.log_softmax(-1)

    head = [] if few.cache.head is None else [few.cache.head]
    right, ours, none = logits(*head, block), logits(*head, short), logits(*head)
    assert float((right - ours).square().mean()) < 0.5 * float((right - none).square().mean())
    # A passage of no more tokens than that stays as it is.
    short = Passage("p", "", "one", 0, 3)
    assert few.cache.columns(short) == few.cache.encode([short], kept=False)[0].columns < 8


def test_attention_that_cannot_be_replaced_compresses_nothing(tiny, tmp_path):
    base = tiny("gemma2")
    base.model.set_attn_implementation("eager")
    with pytest.raises(DataError, match="cannot be replaced"):
        Prefix(base, Settings(shots=0, options={"prefix.encoder": "compressed"}), tmp_path)


def test_heads_begin_at_real_text_and_emit_for_each_passage(tiny, minilm):
    base = tiny("qwen3")
    begin = slots.chosen_columns(kv.read(base, [ids_of(base, TEXTS[0])])[0], 5)
    one = heads.Heads(begin, minilm.card.dim, 64, 0)
    passages = [Passage(f"p{n}", "", text, 0, len(text)) for n, text in enumerate(TEXTS)]
    for (key, value), a, b in zip(heads.emitted(base, one, minilm, passages), begin.keys, begin.values, strict=True):
        assert torch.equal(key, a.expand_as(key)) and torch.equal(value, b.expand_as(value))
    with torch.no_grad():
        one.gates.fill_(0.5)
    together = heads.emitted(base, one, minilm, passages)
    for n, passage in enumerate(passages):
        alone = heads.emitted(base, one, minilm, [passage])
        for (key, value), (k, v) in zip(together, alone, strict=True):
            assert close(key[n], k[0], 2e-2) and close(value[n], v[0], 2e-2)  # the encoder runs in bf16
            assert not close(key[n], key[n - 1], 2e-2)
    # What is added is half as long as what is there, all heads of a block together or each.
    added = (together[0][0][0] - begin.keys[0]).norm(dim=-1)
    assert torch.allclose(added, 0.5 * begin.keys[0].norm(dim=-1), rtol=1e-3)
    states, mask = minilm.states(TEXTS)
    pooled = functional.normalize((states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert np.allclose(pooled.numpy(), minilm.encode(TEXTS), atol=2e-2)


@pytest.mark.parametrize(
    ("encoder", "distil", "along"),
    [("compressed", "0", "false"), ("compressed", "0.5", "false"), ("text", "0", "false"), ("text", "0", "true")],
)
def test_few_columns_a_passage_are_learnt_and_kept(tiny, small, tmp_path, encoder, distil, along):
    base = tiny("llama")
    small.insert(
        [
            Question(id="t0", question="Who lit it?", answers=["lamp"], documents=["d1"], split="train"),
            Question(id="t1", question="What holds boats?", answers=["harbour"], documents=["d2"], split="train"),
        ]
    )
    given = {"encoder": encoder, "columns": "4", "epochs": "40", "batch": "2", "lr": "0.1", "distil": distil}
    options = {f"prefix.{name}": value for name, value in given.items()} | {"prefix.tune_encoder": along}
    options |= {"prefix.slots": "3"}
    fresh = Prefix(base, Settings(shots=0, options=options), tmp_path / "fresh")
    report = fresh.learn(small)
    first, last = (float(word) for word in re.findall(r"\d+\.\d+", report.notes[0]))
    assert last < 0.95 * first and not list((tmp_path / "fresh").rglob("prefix/**/*.safetensors"))
    if along == "true":  # a copy moved, and the one that finds passages did not
        ours, theirs = fresh.heads.text.state_dict(), fresh.encoder.model.state_dict()
        assert any(not torch.equal(ours[name].to(theirs[name]), theirs[name]) for name in theirs)
        again = Prefix(base, Settings(), tmp_path / "other").encoder.model.state_dict()
        assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    kept = Prefix(base, Settings(shots=0, options=options | {"prefix.store": "disk"}), tmp_path / "kept")
    assert "3 passages" in kept.estimate(small)
    kept.learn(small)
    files = list((tmp_path / "kept").rglob("prefix/**/*.safetensors"))
    assert len(files) == 3  # whole passages, which it was trained on, are gone
    assert {load_file(path)["k0"].shape[1] for path in files} == {4}
    for method in (fresh, kept):
        answers = asked_of(method)
        method.save_pretrained(tmp_path / f"saved-{method.work.name}")
        again = asked_of(Prefix.from_pretrained(tmp_path / f"saved-{method.work.name}", base))
        assert [(a.text, a.reference) for a in again] == [(a.text, a.reference) for a in answers]
    with pytest.raises(UsageError, match="none of them can be blended"):
        Prefix(base, Settings(options=options | {"prefix.blend": "0.5"}), tmp_path)


@pytest.mark.parametrize(("family", "shots", "begin"), [("llama", 2, "examples"), ("gpt2", 0, "pages")])
def test_columns_without_passages_load_in_peft(tiny, small, tmp_path, family, shots, begin):
    base = tiny(family)
    small.insert(
        Question(id=f"t{n}", question=f"{text} then", answers=["Vell"], split="train") for n, text in enumerate(ASKED)
    )
    given = {"passages": "none", "slots": "5", "begin": begin, "epochs": "2", "batch": "2"}
    options = {f"prefix.{name}": value for name, value in given.items()}
    method = Prefix(base, Settings(shots=shots, options=options), tmp_path / "work")
    report = method.learn(small)
    assert report.skipped == ({"stands among the examples": 2} if shots else {})
    answers = asked_of(method)
    assert not any(answer.evidence or answer.ranked for answer in answers)
    method.save_pretrained(tmp_path / "saved")
    assert asked_of(Prefix.from_pretrained(tmp_path / "saved", base))[0].reference == answers[0].reference
    columns = export_cartridge(method, tmp_path / "adapter")["columns"]
    past = [*method.learnt(), *([method.cache.head] if shots else [])]
    assert columns == kv.length(past) == past[-1].end > 5 * bool(shots)

    asked = method.form.pieces(ASKED[0], ())[2]
    (ours,) = complete(base, [Job(asked, (" Vell",), tuple(past))], max_new_tokens=0)
    loaded = PeftModel.from_pretrained(tiny_model(family, len(base.tokenizer)).eval(), tmp_path / "adapter")
    ids, option = ids_of(base, asked), ids_of(base, asked + " Vell")[len(ids_of(base, asked)) :]
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([ids + option])).logits[0, len(ids) - 1 : -1]
    mean = logits.log_softmax(-1).gather(1, torch.tensor(option)[:, None]).mean()
    assert float(mean) == pytest.approx(ours.options[0], abs=1e-4)


def test_what_cannot_be_a_cartridge_is_refused(tiny, small, tmp_path):
    method = Prefix(tiny("llama"), Settings(), tmp_path)
    method.learn(small)
    with pytest.raises(UsageError, match="passages=none"):
        export_cartridge(method, tmp_path / "out")
    with pytest.raises(UsageError, match="leaves nothing to answer from"):
        Prefix(tiny("llama"), Settings(options={"prefix.passages": "none"}), tmp_path)
    many = {"prefix.passages": "none", "prefix.slots": "9999"}
    small.insert([Question(id="t", question="Whose?", answers=["Vell"], split="train")])
    with pytest.raises(DataError, match="has only"):
        Prefix(tiny("llama"), Settings(shots=0, options=many), tmp_path / "many").learn(small)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_answer_loss_is_that_of_one_row_at_a_time(tiny, family):
    base = tiny(family)
    head = kv.read(base, [ids_of(base, ASKED[2])])[0]
    columns = slots.Slots(slots.chosen_columns(kv.read(base, [ids_of(base, TEXTS[0])])[0], 3))
    pasts = kv.read(base, [ids_of(base, text) for text in TEXTS[1:]], head)
    given = list(zip(pasts, ASKED[:2], (" nine boats", " Vell"), strict=True))
    samples = [
        Sample((head, past), tuple(ids_of(base, asked)), tuple(ids_of(base, answer)), past.end)
        for past, asked, answer in given
    ]

    def losses(some):
        return token_loss(*answer_logits(base, shared(columns.kv(base.dtype), len(some)), some))[0]

    together = losses(samples)
    assert close(together, torch.cat([losses([sample]) for sample in samples]), 1e-4)
    # And it is what answering scores.
    jobs = [Job(asked, (answer,), (columns.kv(base.dtype), head, past)) for past, asked, answer in given]
    done = complete(base, jobs, max_new_tokens=0)
    sizes = [len(sample.answer) for sample in samples]
    for mean, part in zip(done, together.split(sizes), strict=True):
        assert -mean.options[0] == pytest.approx(float(part.mean()), abs=1e-4)
    together.mean().backward()
    assert all(float(one.grad.abs().max()) > 0 for one in columns.values)


def test_a_window_looks_back_over_no_padding(tokenizer, monkeypatch):
    monkeypatch.setitem(FAMILIES, "mistral", FAMILIES["mistral"] | {"sliding_window": 16})
    base = make_base("mistral", tiny_model("mistral", len(tokenizer)), tokenizer)
    columns = shared(kv.read(base, [[5, 6, 7]])[0], 2)
    pasts = [kv.read(base, [list(range(10, 10 + n))], start=3)[0] for n in (4, 20)]
    samples = [Sample((past,), (8, 9), (11, 12), past.end) for past in pasts]
    together, _ = answer_logits(base, columns, samples)
    alone = [answer_logits(base, [(k[:1], v[:1]) for k, v in columns], [one])[0] for one in samples]
    assert close(together, torch.cat(alone))


def test_an_example_is_not_asked(tiny, small, tmp_path):
    small.insert([Question(id="t", question=ASKED[0], answers=["Vell"], documents=["d2"], split="train")])
    method = Prefix(tiny("llama"), Settings(shots=1), tmp_path)
    method.learn(small)
    assert [bool(a.skipped) for a in asked_of(method)] == [True, False, False]


def test_a_chat_template_stands_around_the_pieces(tokenizer):
    tokenizer.chat_template = "<u>{{ messages[0]['content'] }}</u><a>"
    try:
        head, _, tail = PromptFormat(tokenizer, chat=True).pieces("who", ())
        assert head == "<u>" and tail.endswith("Answer:</u><a>")
        # White space at the ends is not the text's own; without examples it begins with some.
        tokenizer.chat_template = "<u>{{ messages[0]['content'] | trim }}</u><a>"
        assert PromptFormat(tokenizer, chat=True).pieces("who", ()) == (head, [], tail)
        tokenizer.chat_template = "<u>{{ messages[0]['content'] | upper }}</u><a>"
        with pytest.raises(UsageError, match="--chat"):
            PromptFormat(tokenizer, chat=True).pieces("who", ())
    finally:
        tokenizer.chat_template = None
