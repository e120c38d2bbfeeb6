"""Load a language model - embedded alias, folder, Hub id or GGUF file - with its tokeniser, parts and hash."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from byheart import embedded
from byheart.errors import DataError, UsageError, first_line
from byheart.loading import load_folder, load_gguf
from byheart.parts import Parts, find_parts
from byheart.quantized import quantize
from byheart.storage import sha256
from byheart.surgery import observed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Not a type to compute in: the weights are packed, and computed with in the type that would be chosen without it.
INT8 = "int8"


@dataclass
class Base:
    """A loaded language model.

    Attributes:
        name: as the user gave it.
        kind: ``causal`` or ``seq2seq``.
        model: the transformers model, in eval mode.
        tokenizer: its tokeniser, with a padding token.
        parts: where its blocks, attention, MLPs, norm and head are.
        folder: where its files lie; None for a model made in memory.
        packed: whether the weights are kept in 8 bits; such a model is read and learnt through, never changed.
    """

    name: str
    kind: Literal["causal", "seq2seq"]
    model: Any
    tokenizer: Any
    parts: Parts
    folder: Path | None = None
    packed: bool = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def dtype_name(self) -> str:
        """The type that the model runs in, as ``--dtype`` takes it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def wide(self) -> torch.dtype:
        """The type to compute in where the weights' own is too coarse: fp32, or fp64 for a model in fp64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def behind(self, cache: Any) -> dict[str, Any]:
        """The arguments of a forward that reads behind ``cache`` and adds to it; of a plain one, where it is None."""
        return {self._cache_argument: cache, "use_cache": cache is not None}

    @cached_property
    def _cache_argument(self) -> str:
        # transformers renamed it in 5.24, and drops the old name in 5.40; models with code of their own keep that.
        new = "cache" in inspect.signature(self.model.forward).parameters
        return "cache" if new else "past_key_values"

    @cached_property
    def gives_tuples(self) -> bool:
        """Whether the model's blocks give tuples; some families' do."""
        kinds: list[bool] = []
        block = self.parts.blocks[0].module
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad(), observed([block], lambda module, args, kwargs, out: kinds.append(type(out) is tuple)):
            self.model(input_ids=ids, use_cache=False)
        return kinds[0]

    @property
    def positions(self) -> int | None:
        """How many positions the model has; None where it does not say."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return found

    def check_positions(self, needed: int, what: str) -> None:
        """See that the model has so many positions.

        Args:
            what: needs them, verb and all.

        Raises:
            DataError: where it has not.
        """
        if self.positions is not None and needed > self.positions:
            raise DataError(
                f"{self.name}: {what} {needed} positions, the model has {self.positions}; use fewer passages (--k), "
                "fewer examples (--shots) or shorter segments (--segment)"
            )

    @cached_property
    def line_ends(self) -> frozenset[int]:
        """The tokens whose text holds a line break."""
        return frozenset(i for i, text in enumerate(self._token_texts) if "\n" in text)

    @cached_property
    def blanks(self) -> frozenset[int]:
        """The tokens whose text is nothing but white space."""
        return frozenset(i for i, text in enumerate(self._token_texts) if not text.strip())

    @cached_property
    def _token_texts(self) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return texts

    @cached_property
    def hash(self) -> str:
        """A hash of weights, tokeniser and configuration, for manifests: the same files give the same hash."""
        digest = hashlib.sha256()
        if self.folder is None:
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            for file in [self.folder] if self.folder.is_file() else model_files(self.folder):
                digest.update(sha256(file).encode())
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _PLACE_AND_VERSION}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        if self.packed:
            digest.update(INT8.encode())
        return digest.hexdigest()[:32]


# Differ between two loads of the same weights, so they say nothing about what the model computes.
_PLACE_AND_VERSION = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"}


def choose_device(name: str | None = None) -> torch.device:
    """The device to run on: the one named, else CUDA where there is one, else the CPU.

    Raises:
        UsageError: where the named device is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f'--device {name}: not a device (for example "cpu" or "cuda:0")') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no CUDA device is there")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # one too many, or of another machine
        raise UsageError(f"--device {name}: is not there ({first_line(error)})") from None
    return device


def for_device(sizes: Mapping[str, int], device: torch.device) -> int:
    """Of sizes for ``cpu`` and ``cuda`` the one for a device; what is no CPU is taken for a graphics card."""
    return sizes["cpu" if device.type == "cpu" else "cuda"]


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type to compute in: the one named, else bf16 where the processor computes in it, else fp32.

    Raises:
        UsageError: where the name is unknown.
    """
    if name not in (None, INT8):
        if name not in DTYPES:
            raise UsageError(f"--dtype {name}: unknown; one of {', '.join([*DTYPES, INT8])}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    # bf16 without the instructions for it is emulated and slower than fp32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def digest_of(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of what tensors hold, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_base(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Base:
    """Load a model by embedded alias, folder, Hub id or GGUF file, and check that byheart can work on it.

    Raises:
        DataError: where the model cannot be loaded, or a part of it cannot be found (the message says which).
        UsageError: where the device or the type is unknown.
    """
    target = choose_device(device)
    wanted = choose_dtype(dtype, target)
    if name in embedded.EMBEDDED and embedded.EMBEDDED[name].role != "language model":
        raise DataError(f"{name}: an {embedded.EMBEDDED[name].role}, not a language model")
    path = Path(name) if name.endswith(".gguf") else model_folder(name, say)
    try:
        if path.suffix == ".gguf":
            if not path.is_file():
                raise DataError(f"{path}: no such file")
            model, tokenizer = load_gguf(path, wanted)
        else:
            model, tokenizer = load_folder(path, wanted)
    except DataError:
        raise
    # transformers raises many types for files that are wrong in many ways; each ends in the same one sentence.
    except Exception as error:
        raise DataError(f"{name}: cannot be loaded as a model ({first_line(error)})") from error
    return make_base(name, model.to(target), tokenizer, folder=path, packed=dtype == INT8)


def model_folder(name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of a model by embedded alias, folder or Hub id; fetches what is not here yet.

    Raises:
        DataError: where there is no such model, or it cannot be fetched.
    """
    if name in embedded.EMBEDDED:
        return embedded.ensure(name, say)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors", "*.model"]))
    except Exception as error:  # a name that is no id, no network, no such model: each has types of its own
        raise DataError(
            f"{name}: no such file or folder, and the Hub does not give it ({first_line(error)})"
        ) from error


def model_files(folder: Path) -> list[Path]:
    """The files that decide what a model computes: weights, tokeniser and chat template."""
    patterns = ("*.safetensors", "tokenizer*.json", "vocab*", "merges.txt", "*.model", "*.jinja")
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def make_base(name: str, model: Any, tokenizer: Any, *, folder: Path | None = None, packed: bool = False) -> Base:
    """Wrap a loaded transformers model; finds and checks its parts.

    Args:
        packed: keep the weights in 8 bits from here on.

    Raises:
        DataError: where a part cannot be found (the message names it).
    """
    model.eval().requires_grad_(False)
    if packed:
        quantize(model)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        parts = find_parts(model)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    kind: Literal["causal", "seq2seq"] = "seq2seq" if model.config.is_encoder_decoder else "causal"
    return Base(name=name, kind=kind, model=model, tokenizer=tokenizer, parts=parts, folder=folder, packed=packed)
