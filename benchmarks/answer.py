"""Questions a second: byheart's batches against a loop that calls generate once a question, same prompts, one run."""

from __future__ import annotations

import torch
from common import peak_memory, questions, race, texts

from byheart.base import load_base
from byheart.decode import Job, complete, end_tokens, first_line
from byheart.prompt import Example, PromptFormat
from byheart.segment import Passage

COUNT, REPEATS, SHOTS, NEW = 48, 2, 5, 24


def main() -> None:
    base = load_base("smollm2-135m")
    passages = [Passage(f"p{n}", "", text, 0, len(text)) for n, text in enumerate(texts(COUNT + SHOTS))]
    asked = questions(COUNT)
    shown = [
        Example(q, "an answer", p) for q, p in zip(questions(COUNT + SHOTS)[COUNT:], passages[COUNT:], strict=True)
    ]
    form = PromptFormat(base.tokenizer, shown)
    prompts = [form.prompt(q, [p]) for q, p in zip(asked, passages[:COUNT], strict=True)]
    # The loop ends at a line break too: it shall not lose by writing on.
    ends = sorted(end_tokens(base) | base.line_ends)

    def loop() -> list[str]:
        said = []
        for prompt in prompts:
            ids = base.tokenizer(prompt, return_tensors="pt")
            out = base.model.generate(**ids, max_new_tokens=NEW, do_sample=False, eos_token_id=ends)
            said.append(
                first_line(base.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
            )
        return said

    def batches() -> list[str]:
        return [done.text for done in complete(base, [Job(p) for p in prompts], max_new_tokens=NEW)]

    alike = sum(a == b for a, b in zip(loop(), batches(), strict=True))
    seconds = race(REPEATS, byheart=batches, generate_loop=loop)
    print(f"answer: {COUNT} questions, {SHOTS} examples, {torch.get_num_threads()} threads, {base.dtype}")
    for name, taken in seconds.items():
        print(f"  {name:22} {COUNT / taken:8.2f} questions/s")
    print(
        f"  ratio {seconds['generate_loop'] / seconds['byheart']:.2f}x; {alike} of {COUNT} answers alike "
        f"(bf16 rounds differently in a batch); {peak_memory()}"
    )


if __name__ == "__main__":
    main()
