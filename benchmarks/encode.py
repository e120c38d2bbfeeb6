"""MiniLM passages a second: byheart against sentence-transformers' encode, same weights, same threads, one run."""

from __future__ import annotations

import numpy as np
import torch
from common import peak_memory, race, texts
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer

from byheart.embedded import ensure
from byheart.encoder import load_encoder

COUNT, REPEATS = 512, 3


def main() -> None:
    passages = texts(COUNT)
    ours = load_encoder("minilm")
    folder = str(ensure("minilm"))
    # As SentenceTransformer("all-MiniLM-L6-v2") is put together; float32, its default.
    body = Transformer(folder, max_seq_length=ours.card.max_tokens, model_kwargs={"dtype": torch.float32})
    theirs = SentenceTransformer(modules=[body, Pooling(ours.card.dim, "mean"), Normalize()], device="cpu")
    a, b = ours.encode(passages), np.asarray(theirs.encode(passages))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    seconds = race(
        REPEATS,
        byheart=lambda: ours.encode(passages),
        sentence_transformers=lambda: theirs.encode(passages),
    )
    print(f"encode: {COUNT} passages, {torch.get_num_threads()} threads, byheart in {ours.model.dtype}")
    for name, taken in seconds.items():
        print(f"  {name:22} {COUNT / taken:8.1f} passages/s")
    print(
        f"  ratio {seconds['sentence_transformers'] / seconds['byheart']:.2f}x; "
        f"smallest cosine {cosine.min():.5f}; {peak_memory()}"
    )


if __name__ == "__main__":
    main()
