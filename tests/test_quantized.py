"""Weights in 8 bits: near the model they came from, half its size, and gradients go through them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from byheart import kv
from byheart.base import load_base, make_base
from byheart.errors import DataError, UsageError
from byheart.methods import Settings, method_class
from byheart.methods.prefix.behind import Sample, answer_logits, shared
from byheart.methods.prefix.slots import Slots
from byheart.quantized import Int8Linear
from conftest import tiny_model


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_near_its_own_and_gradients_are_those_of_what_it_computes(bias):
    torch.manual_seed(0)
    linear = nn.Linear(32, 24, bias=bias)
    packed = Int8Linear(linear)
    inputs = torch.randn(3, 5, 32, requires_grad=True)
    found = packed(inputs)
    assert float((found - linear(inputs)).abs().max()) < 0.02
    assert packed.weight.dtype == torch.int8 and int(packed.weight.abs().amax()) == 127
    direction = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * direction).sum(), inputs)
    unpacked = packed.weight.float() * packed.scale
    assert torch.allclose(gradient, direction @ unpacked, atol=1e-5)
    # A row of zeros, as padded vocabularies have, stays one.
    nn.init.zeros_(linear.weight)
    assert not Int8Linear(linear)(inputs).isnan().any()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "opt", "gpt2"])
def test_a_packed_model_is_found_read_and_learnt_through(tokenizer, family):
    plain = make_base(family, tiny_model(family, len(tokenizer)), tokenizer)
    base = make_base(family, tiny_model(family, len(tokenizer)), tokenizer, packed=True)
    assert base.hash != plain.hash and base.dtype == torch.float32
    assert any(isinstance(module, Int8Linear) for module in base.parts.blocks[0].module.modules())
    ids = tokenizer("the harbour of Vell holds nine boats")["input_ids"]
    with torch.no_grad():
        one, two = (each.model(input_ids=torch.tensor([ids])).logits.softmax(-1) for each in (base, plain))
    assert 0 < float((one - two).abs().max()) < 0.2
    kv.check(base)
    slots = Slots(kv.read(base, [ids])[0])
    logits, label = answer_logits(base, shared(slots.kv(base.dtype), 1), [Sample((), (5, 6), (7,), len(ids))])
    logits.log_softmax(-1)[0, label[0]].backward()
    # The way back through packed weights is that of the model which they make.
    name, place = "keys.0", (0, 1, 2)
    parameter = dict(slots.named_parameters())[name]
    with torch.no_grad():
        values = []
        for by in (1e-2, -1e-2):
            parameter[place] += by
            logits, _ = answer_logits(base, shared(slots.kv(base.dtype), 1), [Sample((), (5, 6), (7,), len(ids))])
            values.append(float(logits.log_softmax(-1)[0, label[0]]))
            parameter[place] -= by
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(parameter.grad[place]), rel=0.05, abs=1e-4)


def test_a_packed_model_is_not_edited(tokenizer, tmp_path):
    base = make_base("llama", tiny_model("llama", len(tokenizer)), tokenizer, packed=True)
    for name in ("edit", "ft", "rome"):
        with pytest.raises(DataError, match="keeps its weights in 8 bits; editing needs --dtype bfloat16"):
            method_class(name)(base, Settings(), tmp_path)


def test_the_real_model_in_8_bits(smollm):
    base = load_base("smollm2-135m", dtype="int8")
    assert base.dtype == smollm.dtype and base.hash != smollm.hash
    size = [sum(t.numel() * t.element_size() for t in one.model.state_dict().values()) for one in (base, smollm)]
    assert size[0] < 0.7 * size[1]
    ids = torch.tensor([base.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert base.tokenizer.decode(base.model(input_ids=ids).logits[0, -1].argmax()) == " Paris"
    with pytest.raises(UsageError, match="--dtype int4: unknown; one of .* int8"):
        load_base("smollm2-135m", dtype="int4")
