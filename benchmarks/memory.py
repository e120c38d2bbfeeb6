"""Training a memory from kept hidden states against plain training of the same rows: steps a second, losses, memory.

    python benchmarks/memory.py

Plain: the whole model forward from the tokens at every step, the networks as hooks, transformers' own attention, and
torch's cross-entropy over all positions. The same rows, order, recipe and threads; one run.
"""

from __future__ import annotations

import datetime as dt
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, peak_memory
from torch.nn import functional

from byheart.base import load_base
from byheart.formats import import_files
from byheart.ledger import Ledger
from byheart.methods.memory.adapter import attached, make_adapters
from byheart.methods.memory.examples import packed, to_learn
from byheart.methods.memory.method import choose_blocks
from byheart.methods.memory.states import Upper, keep_states
from byheart.padding import right_padded
from byheart.prompt import PromptFormat
from byheart.training import Recipe, train

WORLD = ROOT / "examples" / "world"
STEPS, BATCH = 40, 4


def main() -> None:
    base = load_base("smollm2-135m")
    blocks = choose_blocks("auto", len(base.parts.blocks))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with Ledger(work / "w.db", create=True) as ledger:
            import_files(ledger, [WORLD / "documents.jsonl", WORLD / "facts.jsonl", WORLD / "questions.jsonl"])
            pieces, _ = to_learn(ledger, "doctemp", PromptFormat(base.tokenizer), 0, dt.date.today(), set())
        rows = packed(base.tokenizer, pieces, 0)
        torch.manual_seed(0)
        order = [torch.randperm(len(rows))[:BATCH].tolist() for _ in range(STEPS)]
        recipe = Recipe(steps=STEPS)

        ours = make_adapters(base, blocks, "block", 128, 0)
        upper = Upper(base, ours, "block")
        began = time.perf_counter()
        states = keep_states(base, rows, upper.start, work / "rows.states")
        ready = time.perf_counter() - began
        size = (work / "rows.states").stat().st_size

        def fast(step: int) -> torch.Tensor:
            some = [rows[n] for n in order[step]]
            return upper.loss(some, states.padded(order[step]))[0].mean()

        began = time.perf_counter()
        our_losses = train(ours, fast, recipe, work / "ours.safetensors").losses
        quick = time.perf_counter() - began

        plain = make_adapters(base, blocks, "block", 128, 0)

        def slow(step: int) -> torch.Tensor:
            some = [rows[n] for n in order[step]]
            ids, mask, places = right_padded([row.ids for row in some], base.device)
            labels = torch.full_like(ids, -100)
            for n, row in enumerate(some):
                labels[n, : len(row.ids)] = torch.where(torch.tensor(row.labels), ids[n, : len(row.ids)], -100)
            with attached(base, plain, "block"):
                logits = base.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
            return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())

        began = time.perf_counter()
        their_losses = train(plain, slow, recipe, work / "plain.safetensors").losses
        long = time.perf_counter() - began
    apart = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
    print(
        f"{STEPS} steps of {BATCH} rows: byheart {STEPS / quick:.2f} a second, plain {STEPS / long:.2f}, ratio "
        f"{long / quick:.2f}x; losses {our_losses[0]:.3f} to {our_losses[-1]:.3f} and {their_losses[0]:.3f} to "
        f"{their_losses[-1]:.3f}, at most {apart:.3f} apart\n"
        f"hidden states of {len(rows)} rows ({sum(len(r.ids) for r in rows):,} tokens): {ready:.1f} s once, "
        f"{size / 2**20:.0f} MiB on disk; {peak_memory()}"
    )


if __name__ == "__main__":
    main()
