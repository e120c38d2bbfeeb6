"""The second moment C = E[k kᵀ] of the keys of MLPs over ordinary text: what an edit must leave alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.decode import Job, Sampling, complete
from byheart.errors import DataError, UsageError
from byheart.padding import right_padded
from byheart.storage import home, replacing
from byheart.surgery import observed, stopped_at

OWN = "own"
# Tokens of a row; a row's first ones stand for the beginnings of texts.
ROW = 128
_ROWS = 16
_TOP_K = 50
# What texts of many kinds begin with; the model continues each to make the text that nobody gave it.
_OPENINGS = (
    "The city lies on the banks of", "In the early years of the war,", "The film was directed by", "She was born in",
    "The album was released in", "According to the report,", "The species is found in", "He played as a midfielder for",
    "The church was built in the", "During the nineteenth century,", "The company was founded by", "In mathematics, a",
    "The river flows through", "The first season of the series", "The game was developed by",
    "In an interview, he said", "The battle took place near", "A recent study has shown that",
    "The novel tells the story of", "The storm moved north", "The population of the town was",
    "After graduating from university,", "The road begins at", "The song reached number", "The law was passed by the",
    "Scientists have long believed that", "The museum holds a collection of", "My grandmother",
    "To make the dough, mix", "The patient was treated with", "The ship was launched in", "He was elected to the",
    "The painting shows a woman", "In the third quarter, the company", "The bird has a long tail and",
    "It was a cold morning", "The language is spoken by", "The team won the championship",
    "On the morning of the attack,", "The island is part of", "The king married the daughter of",
    "The bridge was designed by", "Critics praised the performance", "The court ruled", "The mineral is used in",
    "The airport serves", "The festival is held every year", "The word comes from the Latin",
    "As a child, he learned to", "The engine produces", "The treaty was signed in", "The disease is caused by",
    "The episode was watched by", "The house stands at the end", "Her first book was published",
    "The railway line runs", "The tree grows to a height of", "In computer science, an", "The party won the election",
    "The temple is dedicated to", "The mountain was first climbed", "The newspaper reported that",
    "The character first appears in", "The school has about",

)  # fmt: skip


def second_moments(
    base: Base,
    layers: Sequence[int],
    texts: Sequence[str] | None,
    tokens: int,
    seed: int = 0,
    *,
    source: str | None = None,
) -> dict[int, Tensor]:
    """C (d_ff, d_ff) in fp64 of each layer's MLP output projection's input, over at least ``tokens`` tokens of text.

    Computed once a model, text and number, and kept in byheart's cache folder.

    Args:
        texts: ordinary text; None lets the model write it. What is short of ``tokens`` is written by the model, too.
        source: what :func:`text_source` gave for the texts, where they are no longer at hand themselves.

    Raises:
        DataError: where the texts are not at hand, and nothing of them is kept.
    """
    source = source or text_source(texts)
    folder = home() / "covariance" / base.hash
    name = f"{source}-{tokens}-{seed}-{str(base.dtype).removeprefix('torch.')}"
    found = {layer: _read(folder / f"{name}-{layer}.safetensors") for layer in layers}
    missing = [layer for layer, moment in found.items() if moment is None]
    if missing:
        if texts is None and source != OWN:
            raise DataError(
                "edit: the second moment of this edit's text is no longer kept; learn from the ledger again"
            )
        rows = list(text_rows(base, texts, tokens, seed))
        for layer, moment in moments_of(base, missing, rows).items():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"{name}-{layer}.safetensors") as path:
                save_file({"moment": moment.float()}, path)
            found[layer] = moment.float()
    return {layer: moment.double() for layer, moment in found.items() if moment is not None}


def ordinary_text(option: str, method: str, documents: Sequence[str] | None = None) -> Sequence[str] | None:
    """The texts that a method's option ``text`` names; None where the model is to write them.

    Args:
        option: ``own``, ``ledger`` or a file.
        documents: the ledger's, where it is at hand.

    Raises:
        UsageError: where it names nothing that is there.
    """
    if option == "own":
        return None
    if option == "ledger":
        if documents is None:
            raise UsageError(f"{method}.text=ledger: the documents are not at hand here; learn from the ledger again")
        return documents
    path = Path(option)
    if not path.is_file():
        raise UsageError(f"--set {method}.text={path}: must be own, ledger or a text file")
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8") from None


def text_source(texts: Sequence[str] | None) -> str:
    """What tells texts from others: a hash, or :data:`OWN` where the model writes them."""
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:16] if texts else OWN


def token_count(base: Base, option: int, source: str) -> int:
    """How many tokens to take: ``option`` times d_ff; where it is 0, 100 times of a given text, 10 of the model's own.

    The more tokens, the less an edit disturbs text (300 facts: neighbours' margins by 6 % from 40 to 120 times); but
    what no text is given for the model must write, and that takes minutes.
    """
    return (option or (10 if source == OWN else 100)) * base.parts.d_ff


def _read(path: Path) -> Tensor | None:
    try:
        moment: Tensor = load_file(path)["moment"]
        return moment
    except (OSError, SafetensorError, KeyError):
        return None  # not there, or cut off by a kill of an older kind of writer: made anew


def text_rows(base: Base, texts: Sequence[str] | None, tokens: int, seed: int) -> Iterator[list[int]]:
    """Rows of up to :data:`ROW` tokens, together at least ``tokens``: from ``texts``, then written by the model."""
    left = tokens
    for row in _cut(base, texts or ()):
        if left <= 0:
            return
        yield row
        left -= len(row)
    if left > 0:
        count = -(-left // ROW)
        jobs = [Job(_OPENINGS[n % len(_OPENINGS)]) for n in range(count)]
        for job, one in zip(
            jobs, complete(base, jobs, max_new_tokens=ROW, sampling=Sampling(_TOP_K, seed), whole=True), strict=True
        ):
            yield list(base.tokenizer(job.prompt + one.text)["input_ids"])[:ROW]


def _cut(base: Base, texts: Sequence[str]) -> Iterator[list[int]]:
    for text in texts:
        ids = list(base.tokenizer(text)["input_ids"]) if text.strip() else []
        yield from (ids[start : start + ROW] for start in range(0, len(ids), ROW))


def moments_of(base: Base, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """E[k kᵀ] (d_ff, d_ff) over all tokens of ``rows``, a layer."""
    blocks = base.parts.blocks
    number = {blocks[layer].mlp_out: layer for layer in layers}
    width = base.parts.d_ff
    sums = {layer: torch.zeros(width, width, dtype=torch.float64) for layer in layers}
    count = 0
    wide = base.wide
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), _ROWS):
        some = ordered[start : start + _ROWS]
        ids, mask, _ = right_padded(some, base.device)
        real = mask.flatten().bool()
        count += int(real.sum())

        def see(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: object, output: object, real: Tensor = real
        ) -> None:
            keys = args[0].reshape(-1, width)[real].to(wide)
            sums[number[module]] += (keys.T @ keys).double().cpu()

        after = blocks[max(layers) + 1].module if max(layers) + 1 < len(blocks) else base.parts.final_norm
        with torch.no_grad(), fast_attention(base.model), observed(list(number), see), stopped_at(after):
            base.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return {layer: total / count for layer, total in sums.items()}
