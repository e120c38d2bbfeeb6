"""Metrics that need a model: BERTScore against its formula, BLEURT from a folder."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from byheart.errors import DataError
from byheart.judges import BertScore, Bleurt


def test_bertscore_is_its_formula(minilm):
    judge = BertScore(minilm)
    answers = ["Mara Tole", "the old keeper of the light", "", "nine boats"]
    golds = [["Mara Tole"], ["lighthouse keeper", "a boat"], ["anything"], ["nine boats in the harbour of Vell"]]
    found = judge.scores(answers, golds)
    assert found[0] == pytest.approx(1, abs=0.01) and found[2] == 0
    assert found[0] > found[1] > judge.scores(["1931"], [["lighthouse keeper"]])[0]
    # By hand, one pair, without padding beside it: precision over the answer's tokens, recall over the right one's.
    states = []
    for text in (answers[3], golds[3][0]):
        hidden, _ = minilm.states([text])
        states.append(torch.nn.functional.normalize(hidden[0, 1:-1].float(), dim=-1))
    cosine = states[0] @ states[1].T
    precision, recall = float(cosine.max(1).values.mean()), float(cosine.max(0).values.mean())
    assert precision > recall
    assert found[3] == pytest.approx(2 * precision * recall / (precision + recall), abs=0.01)
    # Texts of nothing in common stay within bounds: cosines of this encoder are negative there.
    odd = judge.scores(["7", "of", "(", "xq"], [["Vell"], ["1931"], ["boats in the harbour"], ["the"]])
    assert all(0 <= score <= 1 for score in odd)
    # The best of several right ones counts.
    both = [judge.scores([answers[1]], [[gold]])[0] for gold in golds[1]]
    assert found[1] == pytest.approx(max(both), abs=0.01) and both[0] != pytest.approx(both[1], abs=0.01)


def test_bleurt_rates_with_the_checkpoint_it_is_given(minilm, tmp_path):
    config = BertConfig(
        vocab_size=len(minilm.tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "rater")
    minilm.tokenizer.save_pretrained(tmp_path / "rater")
    found = Bleurt(str(tmp_path / "rater"), "cpu").scores(["nine", "boats"], [["nine boats", "9"], ["the harbour"]])
    with torch.no_grad():
        by_hand = [
            float(model(**minilm.tokenizer(gold, answer, return_tensors="pt")).logits)
            for gold, answer in (("nine boats", "nine"), ("9", "nine"), ("the harbour", "boats"))
        ]
    assert found == pytest.approx([max(by_hand[:2]), by_hand[2]], abs=1e-5)
    config.num_labels = 2
    BertForSequenceClassification(config).save_pretrained(tmp_path / "rater")
    with pytest.raises(DataError, match="2 numbers, not one"):
        Bleurt(str(tmp_path / "rater"))
    with pytest.raises(DataError, match="--bleurt"):
        Bleurt(str(tmp_path))
