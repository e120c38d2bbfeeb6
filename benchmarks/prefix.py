"""Time to the first token with stored passages against the same in the prompt, and time to make them, in one run."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from common import peak_memory, questions, race, texts

from byheart import kv
from byheart.base import load_base
from byheart.decode import Job, complete, token_ids
from byheart.encoder import load_encoder
from byheart.methods.prefix.cache import Cache
from byheart.methods.prefix.store import Precision, Store
from byheart.methods.prefix.tokens import Imitated, fit_heads
from byheart.prompt import PromptFormat
from byheart.segment import Passage

TOKENS, REPEATS, COUNTS = 288, 5, (1, 3, 5)


def main() -> None:
    base = load_base("smollm2-135m")
    form = PromptFormat(base.tokenizer)
    like = next(base.model.parameters())
    rotation = kv.check(base)
    # Real text, cut to exactly as many tokens a passage.
    ids = base.tokenizer(" ".join(texts(4 * max(COUNTS))))["input_ids"]
    cut = [base.tokenizer.decode(ids[n * TOKENS : (n + 1) * TOKENS]) for n in range(max(COUNTS))]
    passages = [Passage(f"p{n}", "", text, 0, len(text)) for n, text in enumerate(cut)]
    (asked,) = questions(1)
    _, blocks, tail = form.pieces(asked, passages)
    rows = [token_ids(base.tokenizer, block, beginning=False) for block in blocks]
    found = kv.read(base, rows)
    print(f"prefix: passages of {TOKENS} tokens, {torch.get_num_threads()} threads, {base.dtype}")
    with tempfile.TemporaryDirectory() as name:
        stores: dict[Precision, Store] = {one: Store(Path(name), one) for one in ("model", "int8")}
        for precision, store in stores.items():
            for n, one in enumerate(found):
                store.put(store.path(str(n)), one)
            size = sum(store.path(str(n)).stat().st_size for n in range(len(found))) / len(found)
            print(f"  on disk, {precision:6} {size / 1e6:8.2f} MB a passage")

        encoder = load_encoder(dtype=str(base.dtype).removeprefix("torch."))
        whole = Cache(base, form, stores["model"], rotation)
        # How well heads are fitted takes no time: to these few passages will do.
        heads = Imitated(whole, fit_heads(whole, encoder, passages, Path(name) / "fit.safetensors"), encoder)

        def stored(count: int, precision: Precision) -> object:
            store = stores[precision]
            there = [store.get(store.path(str(n)), like) for n in range(count)]
            past = kv.placed([one for one in there if one is not None], 0, rotation)
            return complete(base, [Job(tail, past=tuple(past))], max_new_tokens=1)

        def prompted(count: int) -> object:
            return complete(base, [Job("".join(blocks[:count]) + tail)], max_new_tokens=1)

        for count in COUNTS:
            seconds = race(
                REPEATS,
                prompt=partial(prompted, count),
                stored=partial(stored, count, "model"),
                int8=partial(stored, count, "int8"),
                encode=partial(kv.read, base, rows[:count]),
                heads=partial(heads.fresh, passages[:count]),
            )
            shown = ", ".join(f"{name} {taken * 1000:.0f} ms" for name, taken in seconds.items())
            ratios = ", ".join(f"{name} {seconds['prompt'] / seconds[name]:.1f}x" for name in ("stored", "int8"))
            print(f"  {count} passages: {shown}; first token sooner: {ratios}")
            print(f"    made by heads on the text encoder {seconds['encode'] / seconds['heads']:.1f}x as fast as read")
    print(f"  {peak_memory()}")


if __name__ == "__main__":
    main()
