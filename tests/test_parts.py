"""Blocks, attention, MLPs and heads are found in every family, and what cannot be used is refused."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoConfig, MistralConfig

from byheart.base import make_base
from byheart.errors import DataError
from byheart.parts import slides
from conftest import FAMILIES, tiny_model

# What a person who knows each architecture would point at.
EXPECTED = {
    "gpt2": ("transformer.h.0.attn", "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.ln_f"),
    "gptj": ("transformer.h.0.attn", "transformer.h.0.attn.out_proj", "transformer.h.0.mlp.fc_out", "transformer.ln_f"),
    "gpt_neox": (
        "gpt_neox.layers.0.attention",
        "gpt_neox.layers.0.attention.dense",
        "gpt_neox.layers.0.mlp.dense_4h_to_h",
        "gpt_neox.final_layer_norm",
    ),
    "phi": (
        "model.layers.0.self_attn",
        "model.layers.0.self_attn.dense",
        "model.layers.0.mlp.fc2",
        "model.final_layernorm",
    ),
    "opt": (
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.self_attn.out_proj",
        "model.decoder.layers.0.fc2",
        "model.decoder.final_layer_norm",
    ),
    "t5": (
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention.o",
        "decoder.block.0.layer.2.DenseReluDense.wo",
        "decoder.final_layer_norm",
    ),
}
_LLAMA_LIKE = (
    "model.layers.0.self_attn",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.down_proj",
    "model.norm",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_taken_apart_by_structure(family, dtype, tokenizer):
    model = tiny_model(family, len(tokenizer), dtype)
    parts = make_base(family, model, tokenizer).parts
    names = parts.names(model)
    found = (names["attention"], names["attention output"], names["MLP output"], names["final norm"])
    assert found == EXPECTED.get(family, _LLAMA_LIKE)
    assert len(parts.blocks) == 3 and parts.d_model == 32
    assert parts.d_ff == (128 if family in ("gpt2", "gptj") else 64)
    assert bool(parts.encoder_blocks) == (family == "t5")
    if family == "t5":
        assert names["cross-attention"] == "decoder.block.0.layer.1.EncDecAttention"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_give_the_models_own_logits(family, tiny):
    base = tiny(family)
    seen = []
    handle = base.parts.blocks[-1].module.register_forward_hook(lambda m, a, out: seen.append(out))
    ids = torch.tensor([[5, 9, 40, 2, 77, 130, 7, 7, 31]])
    with torch.no_grad():
        extra = {"decoder_input_ids": ids} if base.kind == "seq2seq" else {}
        logits = base.model(input_ids=ids, **extra).logits
        handle.remove()
        hidden = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
        assert torch.allclose(base.parts.logits(hidden), logits, atol=1e-4)


def test_the_search_leaves_no_hook_and_no_gradient(tiny):
    base = tiny("llama")
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in base.model.modules())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training


class _Recurrent(nn.Module):
    """Blocks without attention: nothing in them mixes positions."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, **kwargs):
        return (hidden_states * 0.5, None)


def test_a_model_it_cannot_handle_is_refused_by_part(tokenizer):
    model = tiny_model("llama", len(tokenizer))
    for layer in model.model.layers:
        layer.self_attn = _Recurrent(layer.self_attn.o_proj)
    with pytest.raises(DataError, match="cannot use this model: attention"):
        make_base("odd", model, tokenizer)

    # What counts columns would answer otherwise beside other rows.
    config = AutoConfig.for_model("mpt", vocab_size=len(tokenizer), d_model=32, n_layers=3, n_heads=4)
    with pytest.raises(DataError, match="cannot use this model: positions: it counts padding"):
        make_base("mpt", AutoModelForCausalLM.from_config(config), tokenizer)

    model = tiny_model("llama", len(tokenizer))
    norm = model.model.norm
    model.model.norm = nn.Sequential(norm, nn.Dropout(0.0))  # the norm is still found inside it
    assert make_base("wrapped", model, tokenizer).parts.final_norm is norm

    model = tiny_model("llama", len(tokenizer))
    inner = model.forward
    model.forward = lambda **kw: type("Out", (), {"logits": inner(**kw).logits.flip(-1)})()
    with pytest.raises(DataError, match="do not give the model's own logits"):
        make_base("flipped", model, tokenizer)


def test_windows_are_known_by_each_familys_name_for_them():
    assert slides(GPTNeoConfig(attention_types=[[["global", "local"], 1]], num_layers=2))
    assert not slides(GPTNeoConfig(attention_types=[[["global"], 2]], num_layers=2))
    assert slides(MistralConfig(sliding_window=8)) and not slides(MistralConfig(sliding_window=None))
