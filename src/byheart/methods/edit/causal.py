"""Causal tracing: which layers a model recalls a fact from, measured by corrupting the subject and restoring states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byheart import __version__
from byheart.attention import fast_attention
from byheart.base import Base
from byheart.blocks import Stretch
from byheart.decode import Job, complete, option_ids
from byheart.methods.edit.layers import WIDTH
from byheart.methods.edit.prompts import find_lookup, prompt_text, target_text, tokenize
from byheart.progress import Progress, untold
from byheart.rows import SUBJECT_PLACE, Fact
from byheart.storage import fingerprint, resumed
from byheart.surgery import altered, observed

Part = Literal["hidden", "mlp", "attention"]
PARTS: tuple[Part, ...] = ("hidden", "mlp", "attention")
# Where in a prompt states are restored, as the published heat maps have it; middle and further stand for one token of
# theirs each.
PLACES = ("first subject", "middle subject", "last subject", "next", "further", "last")
LAST_SUBJECT = PLACES.index("last subject")


@dataclass(frozen=True)
class Traced:
    """Effects of one fact.

    Attributes:
        clean, corrupted: probability of the object's first token, as it is and with the subject corrupted.
        effect: (parts, places, layers), by how much restoring raises the corrupted probability; NaN where the prompt
            has no such place.
    """

    fact: Fact
    clean: float
    corrupted: float
    effect: Tensor


def known_facts(base: Base, facts: Sequence[Fact]) -> list[Fact]:
    """The facts whose object the model says by itself right after the prompt: each of its tokens is the likeliest."""
    done = complete(base, [Job(prompt_text(fact), (target_text(fact),)) for fact in facts], max_new_tokens=0)
    return [fact for fact, one in zip(facts, done, strict=True) if one.hits[0] == 1]


def trace(
    base: Base,
    facts: Sequence[Fact],
    *,
    samples: int = 3,
    window: int = 5,
    noise: float = 3.0,
    seed: int = 0,
    store: Path,
    on_done: Progress = untold,
) -> list[Traced]:
    """Causal tracing of facts that the model knows (Meng et al. 2022, section 2.1).

    The embeddings of the subject's tokens get Gaussian noise of ``noise`` times the standard deviation of the
    embeddings of all facts' subjects. Then one state is put back as it was without noise: a block's output, or what
    MLPs or attention write over ``window`` layers around one, at one token.

    Args:
        samples: draws of the noise a fact.
        store: where effects are kept as they are found: what goes on after a kill takes them from there.
    """
    rows = [_Subject.find(base, fact) for fact in facts]
    found = [row for row in rows if row is not None]
    table = base.parts.embeddings
    with torch.no_grad():
        used = torch.cat([table(row.ids[row.first : row.last + 1]) for row in found])
    sigma = noise * float(used.float().std())
    scale = _embedding_scale(base)

    def make(numbers: Sequence[int]) -> list[Any]:
        with fast_attention(base.model), torch.no_grad():
            return [_trace_one(base, found[n], samples, window, sigma, scale, seed + n) for n in numbers]

    told = [row.fact.model_dump_json() for row in found]
    mark = fingerprint(__version__, base.hash, str(base.dtype), told, samples, window, noise, seed)
    done = resumed(store, mark, range(len(found)), 1, make, on_done)
    return [
        Traced(row.fact, clean, corrupted, torch.tensor(effect))
        for row, (clean, corrupted, effect) in zip(found, done, strict=True)
    ]


@dataclass(frozen=True)
class _Subject:
    fact: Fact
    ids: Tensor
    first: int
    last: int
    token: int  # the object's first

    @classmethod
    def find(cls, base: Base, fact: Fact) -> _Subject | None:
        text = prompt_text(fact)
        start = fact.prompt.index(SUBJECT_PLACE)
        ((ids, offsets),) = tokenize(base.tokenizer, [text])
        last = find_lookup(base.tokenizer, text, start + len(fact.subject.rstrip()), ids, offsets)
        first = find_lookup(base.tokenizer, text, start + 1, ids, offsets)
        if first is None or last is None:
            return None
        token = option_ids(base.tokenizer, text, list(ids), target_text(fact))[0]
        return cls(fact, torch.tensor(ids, device=base.device), first, last, token)

    def places(self) -> list[int | None]:
        """The token of each of :data:`PLACES`; None where there is none."""
        end = len(self.ids) - 1
        middle = (self.first + self.last) // 2 if self.last - self.first > 1 else None
        after = self.last + 1 if self.last + 1 < end else None
        further = (self.last + 1 + end) // 2 if end - self.last > 2 else None
        first = self.first if self.first < self.last else None
        return [first, middle, self.last, after, further, end if end > self.last else None]


def _trace_one(
    base: Base, row: _Subject, samples: int, window: int, sigma: float, scale: float, seed: int
) -> tuple[float, float, list[Any]]:
    """What :class:`Traced` says of a fact, as JSON holds it."""
    parts = base.parts
    depth = len(parts.blocks)
    generator = torch.Generator().manual_seed(seed)
    width = len(row.ids)
    shape = (samples, row.last - row.first + 1, parts.d_model)
    embeddings = parts.embeddings(row.ids)
    bent = torch.randn(shape, generator=generator).to(embeddings) * sigma
    noisy = embeddings.repeat(samples, 1, 1)
    noisy[:, row.first : row.last + 1] += bent

    places = [(n, token) for n, token in enumerate(row.places()) if token is not None]
    count = len(places) * samples
    ids = row.ids.repeat(count, 1)
    mask, positions = torch.ones_like(ids), torch.arange(width, device=ids.device).repeat(count, 1)
    stretch = Stretch(base, ids, mask, positions, 0, depth - 1)

    def states(hidden: Tensor) -> dict[Part, list[Tensor]]:
        """Every block's, MLP's and attention's output on the way up, for the first rows."""
        seen: dict[Part, list[Tensor]] = {"hidden": [], "mlp": [], "attention": []}

        def keep(part: Part) -> Callable[..., None]:
            def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                seen[part].append(
                    (output[0] if isinstance(output, (tuple, list)) else output).reshape(len(hidden), width, -1)
                )

            return see

        with ExitStack() as stack:
            stack.enter_context(observed([b.module for b in parts.blocks], keep("hidden")))
            stack.enter_context(observed([b.mlp_out for b in parts.blocks], keep("mlp")))
            stack.enter_context(observed([b.attention_out for b in parts.blocks], keep("attention")))
            stretch.take(torch.arange(len(hidden))).run(hidden, 0, depth - 1)
        return seen

    def answer(hidden: Tensor) -> Tensor:
        return parts.logits(hidden[:, -1]).float().softmax(-1)

    # The first block's own input: some models scale embeddings or add positions to them, so noise goes in as a change.
    start = stretch.hidden[:1]
    clean = states(start)
    token = row.token
    corrupted_start = start.repeat(samples, 1, 1) + scale * (noisy - embeddings)
    corrupted = states(corrupted_start)
    low = float(answer(corrupted["hidden"][-1])[:, token].mean())

    effect = torch.full((len(PARTS), len(PLACES), depth), float("nan"))
    where = torch.tensor([token_at for _, token_at in places for _ in range(samples)], device=ids.device)
    every = torch.arange(count, device=ids.device)
    for number, part in enumerate(PARTS):
        for layer in range(depth):
            half = window // 2
            span = (
                range(layer, layer + 1)
                if part == "hidden"
                else range(max(0, layer - half), min(depth, layer - half + window))
            )
            below = corrupted["hidden"][span[0] - 1] if span[0] else corrupted_start
            hidden = below.repeat(len(places), 1, 1)
            with ExitStack() as stack:
                for one in span:
                    block = parts.blocks[one]
                    module = {"hidden": block.module, "mlp": block.mlp_out, "attention": block.attention_out}[part]
                    kept = clean[part][one][0]

                    def put_back(output: Tensor, kept: Tensor = kept) -> Tensor:
                        restored = output.reshape(count, width, -1).clone()
                        restored[every, where] = kept[where]
                        return restored.reshape(output.shape)

                    stack.enter_context(altered(module, put_back))
                out = stretch.run(hidden, span[0], depth - 1)
            raised = answer(out)[:, token].view(len(places), samples).mean(1) - low
            for (place, _), value in zip(places, raised.tolist(), strict=True):
                effect[number, place, layer] = value
    return float(answer(clean["hidden"][-1])[0, token]), low, effect.tolist()


def _embedding_scale(base: Base) -> float:
    """By what a model multiplies its embeddings before the first block (Gemma's √d); 1 for most."""
    ids = torch.tensor([[5, 9]], device=base.device)
    places, mask = torch.arange(2, device=base.device)[None], torch.ones_like(ids)
    first = Stretch(base, ids, mask, places, 0, 1 if len(base.parts.blocks) > 1 else 0).hidden
    plain = base.parts.embeddings(ids)
    ratio = (first * plain).sum() / plain.square().sum()
    # Learnt positions are added, not multiplied: only a clear factor counts.
    return float(ratio) if float(ratio) > 1.5 else 1.0


def average_effects(traced: Sequence[Traced]) -> Tensor:
    """AIE: the mean over facts (parts, places, layers), of those that have the place."""
    return torch.stack([one.effect for one in traced]).nanmean(0)


def best_range(effect: Tensor, width: int = WIDTH) -> tuple[int, int]:
    """The ``width`` layers in the lower two thirds whose MLPs recall most at the subject's last token.

    Of a model that is not three times as deep, a third of its layers, so that there is something to choose.

    Args:
        effect: AIE as :func:`average_effects` gives it.
    """
    row = effect[PARTS.index("mlp"), LAST_SUBJECT].nan_to_num()
    depth = len(row)
    width = min(width, max(1, depth // 3))
    sums = [float(row[start : start + width].sum()) for start in range(2 * depth // 3 - width + 1)]
    first = max(range(len(sums)), key=lambda start: sums[start])
    return first, first + width - 1
