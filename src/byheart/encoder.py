"""Texts to vectors with a BERT-like encoder: batches of like length, bf16, pooled and normalised as its files say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from byheart import embedded
from byheart.base import choose_device, choose_dtype, for_device, model_files, model_folder
from byheart.errors import DataError, first_line
from byheart.loading import quiet_transformers
from byheart.progress import Progress, untold
from byheart.storage import read_json, sha256

BATCH_TOKENS = {"cpu": 2_048, "cuda": 65_536}
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class EncoderCard:
    """What vectors depend on; stamped into every index, and compared before a search.

    ``max_tokens`` is what the encoder was published with; ``limit`` what its positions allow.
    """

    name: str
    hash: str
    dim: int
    pooling: Pooling
    normalize: bool
    max_tokens: int
    limit: int
    metric: str = "inner product"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass
class Encoder:
    """A loaded text encoder."""

    card: EncoderCard
    model: Any
    tokenizer: Any

    @cached_property
    def splitter(self) -> Tokenizer:
        """The tokeniser to cut documents with: a copy that never truncates.

        transformers switches truncation on in the tokeniser itself, where it stays on for the next caller.
        """
        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        return copy

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int | None = None,
        on_done: Progress = untold,
    ) -> NDArray[np.float32]:
        """Vectors (len(texts), dim) in float32; a text over ``max_tokens`` (the card's by default) is cut there."""
        limit = min(max_tokens or self.card.max_tokens, self.card.limit)
        device = next(self.model.parameters()).device
        if not texts:
            return np.empty((0, self.card.dim), dtype=np.float32)
        rows = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        out = np.empty((len(rows), self.card.dim), dtype=np.float32)
        budget = for_device(BATCH_TOKENS, device)
        start = 0
        while start < len(order):
            width = len(rows[order[start]])
            batch = order[start : start + max(1, budget // width)]
            start += len(batch)
            out[batch] = self._forward([rows[i] for i in batch], width, device).float().cpu().numpy()
            on_done(len(batch))
        return out

    def tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.splitter.encode(text).ids)

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states (len(texts), tokens, dim) and their mask; a text over what positions allow is cut there."""
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.card.limit)["input_ids"]
        return self._hidden(rows, max(map(len, rows)), next(self.model.parameters()).device)

    @torch.no_grad()
    def described(self, texts: Sequence[str]) -> list[tuple[Tensor, NDArray[np.int64]]]:
        """What the encoder says of each text's tokens, in its middle and at its top, and where they stand.

        Returns:
            For each text states (tokens, 2 dim) and the characters from which and up to which each token reaches
            (tokens, 2), without the tokens that the encoder puts around a text. What is past what positions allow is
            not there.
        """
        found = self.tokenizer(list(texts), truncation=True, max_length=self.card.limit, return_offsets_mapping=True)
        rows = found["input_ids"]
        device = next(self.model.parameters()).device
        given, _ = self._batch(rows, max(map(len, rows)), device)
        layers = self.model(**given, output_hidden_states=True).hidden_states
        states = torch.cat([layers[len(layers) // 2], layers[-1]], -1)
        told = []
        for row, places in zip(states, found["offset_mapping"], strict=True):
            spans = np.array(places)
            real = spans[:, 0] < spans[:, 1]
            told.append((row[: len(spans)][torch.from_numpy(real).to(device)], spans[real]))
        return told

    def _hidden(self, rows: list[list[int]], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        given, mask = self._batch(rows, width, device)
        return self.model(**given).last_hidden_state, mask

    @staticmethod
    def _batch(rows: list[list[int]], width: int, device: torch.device) -> tuple[dict[str, Any], Tensor]:
        """Rows as the encoder takes them, and their mask."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = (torch.arange(width)[None] < lengths[:, None]).long().to(device)
        # No mask where nothing is padded: attention then takes its fastest path.
        padded = bool((lengths < width).any())
        return {"input_ids": ids.to(device), "attention_mask": mask if padded else None}, mask

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]], width: int, device: torch.device) -> Tensor:
        hidden, mask = self._hidden(rows, width, device)
        if self.card.pooling == "cls":
            vectors = hidden[:, 0].float()
        else:
            vectors = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.card.normalize else vectors


def load_encoder(
    name: str = "minilm",
    *,
    device: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Encoder:
    """Load an encoder by embedded alias, folder or Hub id.

    Pooling and normalisation come from byheart's ``encoder.json`` or sentence-transformers' ``modules.json``; a folder
    with neither is pooled by the mean and not normalised (Contriever's way).

    Raises:
        DataError: where it cannot be loaded, or pools in a way that byheart does not know.
    """
    from transformers import AutoModel, AutoTokenizer

    target = choose_device(device)
    wanted = choose_dtype(dtype, target)
    if name in embedded.EMBEDDED and embedded.EMBEDDED[name].role != "encoder":
        raise DataError(f"{name}: a {embedded.EMBEDDED[name].role}, not an encoder")
    folder = model_folder(name, say)
    try:
        with quiet_transformers():
            model, info = AutoModel.from_pretrained(
                folder, dtype=wanted, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
    # transformers raises many types for files that are wrong in many ways; each ends in the same one sentence.
    except Exception as error:
        raise DataError(f"{name}: cannot be loaded as an encoder ({first_line(error)})") from error
    # Nothing here looks at a pooler; any other would be filled with random numbers, and every vector wrong.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise DataError(f"{name}: the weights lack {len(missing)} tensors, such as {missing[0]}")
    model.to(target).eval().requires_grad_(False)
    # RoBERTa counts positions from behind its padding's, so that it has some more than it can use.
    limit = min(getattr(model.config, "max_position_embeddings", 512), tokenizer.model_max_length)
    settings = _settings(folder, limit)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in model_files(folder):
        digest.update(sha256(file).encode())
    card = EncoderCard(name=name, hash=digest.hexdigest()[:32], dim=model.config.hidden_size, limit=limit, **settings)
    return Encoder(card, model, tokenizer)


def _settings(folder: Path, limit: int) -> dict[str, Any]:
    if (folder / "encoder.json").exists():
        settings = read_json(folder / "encoder.json")
        return {key: settings[key] for key in ("pooling", "normalize", "max_tokens")}
    if not (folder / "modules.json").exists():
        return {"pooling": "mean", "normalize": False, "max_tokens": limit}
    modules = {
        module["type"].rsplit(".", 1)[-1]: folder / module["path"] for module in read_json(folder / "modules.json")
    }
    unknown = sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise DataError(f"{folder}: has a {unknown[0]} behind its encoder, which byheart does not know")
    pooling = read_json(modules["Pooling"] / "config.json") if "Pooling" in modules else {}
    chosen = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise DataError(f"{folder}: pools by {', '.join(chosen) or 'nothing'}; byheart knows mean and cls")
    limits = folder / "sentence_bert_config.json"
    max_tokens = read_json(limits).get("max_seq_length") if limits.exists() else None
    return {"pooling": known[chosen[0]], "normalize": "Normalize" in modules, "max_tokens": max_tokens or limit}
