"""Editing: targets z against a plain serial implementation of the published procedure, and where the time goes."""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from common import ROOT, peak_memory
from torch import Tensor

from byheart.base import Base, load_base
from byheart.benchmarks.editing import counterfact
from byheart.decode import Job, complete
from byheart.formats import read_json_lines
from byheart.ledger import Ledger
from byheart.methods import Settings
from byheart.methods.edit import method as edit_method
from byheart.methods.edit.covariance import moments_of
from byheart.methods.edit.layers import choose_layers
from byheart.methods.edit.method import Edit
from byheart.methods.edit.prompts import Prepared, make_prefixes, prepare, prompt_text, target_text
from byheart.methods.edit.targets import TargetOptions, find_targets
from byheart.methods.edit.weights import Deltas, changed_by
from byheart.methods.edit.write import WriteOptions, Writer
from byheart.methods.facts import choose_facts
from byheart.ordinary import text_rows
from byheart.rows import Fact

SERIAL, MANY = 24, 100


def facts(count: int) -> list[Fact]:
    """CounterFact rows where they are to be had (BYHEART_DATA, else ../shared/data), else the example's facts."""
    folder = os.environ.get("BYHEART_DATA") or ROOT.parent / "shared" / "data"
    path = (ROOT / folder) / "counterfact" / "counterfact_reduced.jsonl"
    if path.exists():
        return [case.fact for case in counterfact(path).cases[-count:]]
    example = [row for _, row in read_json_lines(ROOT / "examples" / "world" / "facts.jsonl") if isinstance(row, dict)]
    return [Fact(**{k: v for k, v in row.items() if k != "type"}) for row in example][:count]


def serial_target(base: Base, one: Prepared, layer: int, options: TargetOptions, lr: float) -> Tensor:
    """The published procedure for one fact: each step a full forward of all rows, from embeddings to all logits."""
    rows = [*one.rows, one.essence]
    whole = [list(row.tokens) for row in rows]
    width = max(map(len, whole))
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in whole])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in whole])
    place = torch.tensor([len(row.context) for row in rows])
    every = torch.arange(len(rows))
    delta = torch.zeros(base.parts.d_model, requires_grad=True)
    start: list[Tensor] = []
    before: list[Tensor] = []
    adam = torch.optim.Adam([delta], lr=lr)

    def add(module: object, args: object, output: Tensor) -> Tensor:
        if not start:
            start.append(output[0, place[0]].detach().clone())
        moved = output.clone()
        moved[every, place] = moved[every, place] + delta
        return moved

    handle = base.parts.blocks[layer].module.register_forward_hook(add)
    for step in range(options.steps):
        logprobs = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        nll = torch.stack(
            [
                -logprobs[n, len(whole[n]) - len(row.labels) : len(whole[n])]
                .gather(1, torch.tensor(row.labels)[:, None])
                .mean()
                for n, row in enumerate(one.rows)
            ]
        ).mean()
        now = logprobs[-1, len(whole[-1]) - 1]
        if not before:
            before.append(now.detach().clone())
        kl = (now.exp() * (now - before[0])).sum()
        loss = (
            nll
            + options.kl * kl
            + options.weight_decay * delta.square().sum().clamp(min=1e-24).sqrt() / start[0].norm() ** 2
        )
        if loss < options.stop_loss or step == options.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= (options.clamp * start[0].norm() / delta.norm()).clamp(max=1)
    handle.remove()
    return (start[0] + delta).detach()


def efficacy(base: Base, deltas: Deltas, some: Sequence[Fact]) -> tuple[float, float]:
    """Shares of facts whose new object is likelier than the former one, and whose every token is the likeliest."""
    with changed_by(base, deltas):
        jobs = [Job(prompt_text(fact), (target_text(fact), f" {fact.former_object or 'unknown'}")) for fact in some]
        done = complete(base, jobs, max_new_tokens=0)
    likelier = sum(one.options[0] > one.options[1] for one in done) / len(done)
    return likelier, sum(one.hits[0] == 1 for one in done) / len(done)


@contextmanager
def clocked(spent: dict[str, float], owner: object, name: str) -> Iterator[None]:
    """Adds the seconds that a function takes to ``spent``, under its name, whoever calls it."""
    plain = getattr(owner, name)

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(*given, **named)
        finally:
            spent[name] += time.perf_counter() - began

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def main() -> None:
    base = load_base("smollm2-135m")
    layers = choose_layers(base, "auto")
    chosen, _ = choose_facts(facts(MANY))
    prepared, _ = prepare(base, chosen[:SERIAL], make_prefixes(base, 5, 0))
    began = time.perf_counter()
    rows = list(text_rows(base, None, 10 * base.parts.d_ff, 0))
    written = time.perf_counter() - began
    began = time.perf_counter()
    moments = moments_of(base, layers, rows)
    counted = time.perf_counter() - began
    print(
        f"covariance of {len(layers)} layers over {sum(map(len, rows)):,} tokens: {counted:.1f} s, and {written:.1f} s "
        "to write the text where none is given"
    )
    began = time.perf_counter()
    ours = find_targets(base, prepared, layers[-1], TargetOptions())
    fast = (time.perf_counter() - began) / len(prepared)
    plain = load_base("smollm2-135m", dtype="float32")
    began = time.perf_counter()
    theirs = torch.stack([serial_target(plain, one, layers[-1], TargetOptions(), lr=0.5) for one in prepared])
    slow = (time.perf_counter() - began) / len(prepared)
    del plain
    writer = Writer(base, moments, WriteOptions())
    some = [one.fact for one in prepared]
    reached = [efficacy(base, writer.write(prepared, z).deltas, some) for z in (ours.z, theirs)]
    print(
        f"targets z, {len(prepared)} facts: byheart {fast:.2f} s a fact ({ours.steps.float().mean():.1f} steps), plain "
        f"serial {slow:.2f} s, ratio {slow / fast:.1f}x; written alike, likelier than the old object "
        f"{reached[0][0]:.3f} and {reached[1][0]:.3f}, likeliest of all {reached[0][1]:.3f} and {reached[1][1]:.3f}"
    )
    spent: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as clocks:
        for owner, what in ((edit_method, "find_targets"), (Writer, "write"), (edit_method, "settle")):
            clocks.enter_context(clocked(spent, owner, what))
        edit = Edit(base, Settings(shots=0), Path(folder))
        with Ledger(Path(folder) / "facts.db", create=True) as ledger:
            ledger.insert(chosen)
            seconds = edit.learn(ledger).seconds
    likelier, likeliest = efficacy(base, edit.deltas, edit.facts)
    many = len(edit.facts)
    print(
        f"{many} facts learnt in {seconds:.1f} s: targets {spent['find_targets']:.1f} s "
        f"({spent['find_targets'] / many:.2f} a fact), reading keys and solving {spent['write']:.1f} s, settling "
        f"{spent['settle']:.1f} s, the rest {seconds - sum(spent.values()):.1f} s; new object likelier {likelier:.3f}, "
        f"likeliest of all {likeliest:.3f}; {peak_memory()}"
    )


if __name__ == "__main__":
    main()
