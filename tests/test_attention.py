"""The attention kernel against plain attention, in every shape that models and batches give it."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from byheart import attention
from byheart.attention import fast_attention, tiled_attention


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["row by row", "at once"])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "n", "m"), [(3, 6, 2, 5, 9), (1, 4, 4, 7, 7), (2, 4, 1, 1, 12), (4, 9, 3, 6, 6)]
)
def test_it_is_softmax_attention(monkeypatch, small, batch, heads, groups, n, m):
    monkeypatch.setattr(attention, "_SMALL", small)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, n, 16, generator=generator)
    key, value = (torch.randn(batch, groups, m, 16, generator=generator) for _ in range(2))
    causal = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    padded = causal.expand(batch, 1, n, m).clone()
    padded[1:, :, :, 0] = False
    for given, used in ((None, causal), (causal[None, None], causal), (padded, padded)):
        ours = tiled_attention(query, key, value, given, scaling=0.3)
        repeated = (t.repeat_interleave(heads // groups, 1) for t in (key, value))
        theirs = scaled_dot_product_attention(query, *repeated, attn_mask=used, scale=0.3)
        assert ours.shape == (batch, n, heads, 16)
        seen = used.any(-1).expand(batch, 1, n).transpose(1, 2)[..., None].expand_as(ours)  # rows that may look at all
        assert torch.allclose(ours[seen], theirs.transpose(1, 2)[seen], atol=1e-5)
        assert ours.isfinite().all()


def test_the_model_gets_its_own_attention_back(tiny):
    for family, taken in (("llama", True), ("gemma2", False), ("t5", False)):
        model = tiny(family).model
        before = model.config._attn_implementation
        with fast_attention(model):
            assert (model.config._attn_implementation != before) == taken
        assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError), fast_attention(tiny("gpt2").model):
        raise RuntimeError
    assert tiny("gpt2").model.config._attn_implementation == "sdpa"
