"""Texts cut into passages: nothing lost, nothing doubled."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byheart.errors import UsageError
from byheart.gold import gold_passages
from byheart.retrieve import distinct
from byheart.rows import Document, Question
from byheart.segment import Passage, parse_preset, segment, windows


@given(st.integers(0, 300), st.integers(1, 60), st.data())
def test_windows_cover_every_token_and_no_more_than_needed(count, size, data):
    step = data.draw(st.integers(1, size))
    offsets = [(3 * n, 3 * n + 2) for n in range(count)]
    spans = windows(offsets, size, step)
    covered = {n for a, b in spans for n, (x, y) in enumerate(offsets) if a <= x and y <= b}
    assert covered == set(range(count))
    assert all(b - a <= 3 * size - 1 for a, b in spans)
    # Only the last window ends with the text.
    assert sum(b == offsets[-1][1] for _, b in spans) == 1 if count else spans == []


@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=1, max_size=400).filter(str.strip))
def test_spans_are_exact_for_any_text(tokenizer, text):
    document = Document(id="d", title="T", text=text)
    passages = list(segment([document], tokenizer.backend_tokenizer, "16/8"))
    assert passages
    for p in passages:
        assert p.text == text[p.start : p.end]
        assert (p.document, p.title) == ("d", "T")


def test_presets():
    assert parse_preset("288/64") == (288, 64)
    assert parse_preset("512/512") == (512, 512)
    for bad in ("64", "0/0", "64/128", "a/b", "-1/1"):
        with pytest.raises(UsageError, match="--segment"):
            parse_preset(bad)


def test_hits_on_the_same_stretch_are_kept_once():
    def hit(document, start, end):
        return Passage(document, "", "", start, end)

    hits = [hit("a", 0, 100), hit("a", 40, 140), hit("b", 0, 100), hit("a", 60, 160), hit("a", 90, 190)]
    assert distinct(hits, 5) == [hits[0], hits[2], hits[3]]
    assert distinct(hits, 1) == hits[:1]


def test_the_gold_window_is_the_one_with_the_fact(world, tokenizer):
    for question in list(world.questions())[:60]:
        for passage in gold_passages(world, question, tokenizer.backend_tokenizer, "64/16"):
            facts = [f for f in (world.get("fact", id) for id in question.facts) if f.document == passage.document]
            assert any(f.object in passage.text for f in facts) or not facts
    lost = Question(id="x", question="?", answers=["a"], documents=["nowhere"])
    assert gold_passages(world, lost, tokenizer.backend_tokenizer, "64/16") == []
