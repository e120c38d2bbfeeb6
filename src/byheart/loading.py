"""Models and tokenisers from transformers' folders and GGUF files, without its bars and warnings on the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from byheart.errors import DataError


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal model and its tokeniser from a GGUF file, unpacked to ``dtype`` so that it can be trained and saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # Left packed, every product would unpack its weights anew, and the model could not be saved.
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    return model.to(dtype), tokenizer


def load_folder(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its tokeniser from a folder in transformers' form.

    Raises:
        DataError: where weights are missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    name = str(path)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(name)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        # use_safetensors: pickled weights could run code, so they are not read at all.
        model, info = loader.from_pretrained(name, dtype=dtype, use_safetensors=True, output_loading_info=True)
        if info["missing_keys"]:
            # transformers would fill them with random numbers, and every figure would be wrong without a word.
            raise DataError(
                f"{name}: the weights lack {len(info['missing_keys'])} tensors, such as {min(info['missing_keys'])}"
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model, tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal while a model loads or is saved."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        # The GGUF reader draws a bar that no switch turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
