"""What tests share: tiny models of every family, a tiny tokeniser, the example world, embedded models, real rows."""

from __future__ import annotations

import datetime as dt
import os
from datetime import date
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from byheart.base import Base, load_base, make_base
from byheart.encoder import Encoder, load_encoder
from byheart.formats import import_files
from byheart.ledger import Ledger

ROOT = Path(__file__).parent.parent
WORLD = ROOT / "examples" / "world"

_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    "gpt_neox": _SMALL,
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 16},
    "gemma2": _GROUPED | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": _GROUPED | {"head_dim": 16, "sliding_window": 8},
    "phi": _SMALL,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "t5": {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0},
}


def _train_tokenizer() -> PreTrainedTokenizerFast:
    engine = Tokenizer(models.BPE(unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "</s>"], show_progress=False)
    engine.train_from_iterator((WORLD / "documents.jsonl").read_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=engine, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _train_tokenizer()


def tiny_model(family: str, vocabulary: int, dtype: torch.dtype = torch.float32, **config_of_its_own):
    """A random model of a family, the same at every call."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(family, vocab_size=vocabulary, **(ends | FAMILIES[family] | config_of_its_own))
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_config(config).to(dtype)
    # Random weights give nearly even logits; spread, so that greedy choices do not hang on rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return model


@pytest.fixture(scope="session")
def tiny(tokenizer):
    made: dict[str, Base] = {}

    def get(family: str) -> Base:
        if family not in made:
            made[family] = make_base(family, tiny_model(family, len(tokenizer)), tokenizer)
        return made[family]

    return get


@pytest.fixture
def base(tokenizer, tmp_path, monkeypatch):
    """A tiny Llama to edit, with nothing traced or counted before."""
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path / "home"))
    return make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)


@pytest.fixture
def day(monkeypatch):
    """Sets what day it is."""
    return lambda *of: monkeypatch.setattr(
        dt, "date", type("Day", (date,), {"today": classmethod(lambda cls: date(*of))})
    )


@pytest.fixture
def world(tmp_path) -> Ledger:
    ledger = Ledger(tmp_path / "world.db", create=True)
    import_files(ledger, [WORLD / f"{name}.jsonl" for name in ("documents", "facts", "questions")])
    return ledger


@pytest.fixture(scope="session")
def smollm() -> Base:
    return load_base("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Encoder:
    return load_encoder("minilm")


@pytest.fixture(scope="session")
def data() -> Path:
    """The real benchmark rows: BYHEART_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("BYHEART_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no benchmark rows in {folder}; name them with BYHEART_DATA")
    return folder
