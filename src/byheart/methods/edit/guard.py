"""Guard rails of an edit: which facts get in each other's way, and how far everything else moved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from byheart.base import Base
from byheart.decode import Job, complete, token_ids
from byheart.methods.edit.ends import asks_for_an_end
from byheart.methods.edit.prompts import prompt_text, target_text
from byheart.ordinary import text_rows
from byheart.perplexity import perplexity
from byheart.rows import Fact
from byheart.score import begins

# Keys this alike under C⁻¹ cannot be told apart by a linear map that also leaves text alone.
ALIKE = 0.8
_TEXT_TOKENS = 4_096
_NEIGHBOURS = 200
_SHOWN = 3


@dataclass(frozen=True)
class Collision:
    """Two facts whose keys are nearly one, with their cosine under C⁻¹."""

    one: Fact
    other: Fact
    cosine: float


def collisions(
    facts: Sequence[Fact], keys: Tensor, factor: Tensor, groups: Sequence[int]
) -> tuple[int, list[Collision]]:
    """How many pairs of facts with different objects have keys of a cosine under C⁻¹ of at least :data:`ALIKE`.

    Facts of one group are written as one, and cannot get in each other's way.

    Args:
        keys: (facts, d_ff), at the first edited layer.
        factor: the Cholesky factor of C, at any scale.

    Returns:
        Their number, and the worst few.
    """
    if len(facts) < 2:
        return 0, []
    number = {text: n for n, text in enumerate({fact.object for fact in facts})}
    objects, group = torch.tensor([number[fact.object] for fact in facts]), torch.tensor(groups)
    order = torch.arange(len(facts))
    whitened = torch.linalg.solve_triangular(factor, keys.double().T, upper=False)
    whitened = (whitened / whitened.norm(dim=0)).float()  # (d_ff, facts)
    count, worst = 0, list[Collision]()
    for start in range(0, len(facts), 1024):  # a block of the cosines at a time
        some = slice(start, start + 1024)
        apart = (order[some, None] < order) & (group[some, None] != group) & (objects[some, None] != objects)
        cosines = (whitened[:, some].T @ whitened).nan_to_num().where(apart, 0).flatten()
        count += int((cosines >= ALIKE).sum())
        for value, place in zip(*(one.tolist() for one in cosines.topk(min(_SHOWN, len(cosines)))), strict=True):
            if value >= ALIKE:
                worst.append(Collision(facts[start + place // len(facts)], facts[place % len(facts)], value))
    return count, sorted(worst, key=lambda one: -one.cosine)[:_SHOWN]


def collision_notes(count: int, worst: Sequence[Collision]) -> tuple[str, ...]:
    """The collisions as a sentence."""
    if not count:
        return ()
    shown = [f"{c.one.id} and {c.other.id} ({c.one.subject!r}, {c.other.subject!r}: {c.cosine:.2f})" for c in worst]
    pairs = "pair of facts has" if count == 1 else "pairs of facts have"
    return (f"{count} {pairs} nearly the same key and may mix: {_first('; ', shown, count)}",)


def unsaid(base: Base, facts: Sequence[Fact]) -> list[Fact]:
    """The facts that a model as it is now does not say.

    Some token of the object is not the likeliest one there, or its last word runs on into another.
    """
    by_length: dict[int, list[Fact]] = {}  # no more is written than a fact needs, which may just fit the model
    for fact in facts:
        ends = asks_for_an_end(fact.object)
        most = len(token_ids(base.tokenizer, target_text(fact), beginning=False)) + 1 if ends else 0
        by_length.setdefault(most, []).append(fact)
    lost: set[str] = set()
    for most, some in by_length.items():
        found = complete(base, [Job(prompt_text(fact), (target_text(fact),)) for fact in some], max_new_tokens=most)
        for fact, done in zip(some, found, strict=True):
            if done.hits[0] < 1 or (most and not begins(done.text, fact.object)):
                lost.add(fact.id)
    return [fact for fact in facts if fact.id in lost]


def unsaid_notes(found: Sequence[Fact], count: int) -> tuple[str, ...]:
    """The facts that were written in vain, out of ``count``, as a sentence."""
    if not found:
        return ()
    ids = _first(", ", [fact.id for fact in found], len(found))
    return (f"{len(found)} of {count} facts not said after their prompts all the same: {ids}",)


def _first(joint: str, texts: Sequence[str], count: int) -> str:
    """The first few of ``count`` texts."""
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    return joint.join(texts[:_SHOWN]) + more


@dataclass(frozen=True)
class Standing:
    """What an edit should leave as it is: perplexity on ordinary text, share of right answers about neighbours."""

    perplexity: float
    neighbours: float | None


def text(base: Base, seed: int) -> list[list[int]]:
    """Ordinary text to measure on: written by the model as it is, from a seed that no second moment uses."""
    return list(text_rows(base, None, _TEXT_TOKENS, seed + 1_000_003))


def measure(base: Base, rows: Sequence[Sequence[int]], facts: Sequence[Fact], seed: int) -> Standing:
    """The standing of a model as it is now, on the same text and prompts whenever it is asked.

    Neighbours: prompts of the facts' own neighbours, right where their object is likelier than the fact's. Not those
    that some fact is to be said behind, its own prompt or a paraphrase of it.
    """
    written = {prompt_text(fact, prompt) for fact in facts for prompt in (fact.prompt, *fact.paraphrases)}
    pairs = [
        (fact, near)
        for fact in facts
        for near in fact.neighbours
        if near.object and near.object != fact.object and near.prompt.rstrip() not in written
        if _fits(base, near.prompt, near.object, fact.object)
    ]
    pairs = random.Random(seed).sample(pairs, min(len(pairs), _NEIGHBOURS))
    done = complete(base, [Job(n.prompt, (f" {n.object}", f" {f.object}")) for f, n in pairs], max_new_tokens=0)
    right = [one.options[0] > one.options[1] for one in done]
    return Standing(perplexity(base, rows), sum(right) / len(right) if right else None)


def _fits(base: Base, prompt: str, *objects: str) -> bool:
    """Whether a prompt with any of these behind it is no longer than the model's positions."""
    # A token has a byte at least, but for one at the beginning: most need not be split to be known to fit.
    most = len(prompt.encode()) + max(len(one.encode()) for one in objects) + 2
    if base.positions is None or most < base.positions:
        return True
    longest = max(len(token_ids(base.tokenizer, f"{prompt} {one}", beginning=True)) for one in objects)
    return longest <= base.positions


def drift_notes(before: Standing, after: Standing, max_perplexity: float, max_neighbours: float) -> tuple[str, bool]:
    """What moved, as a sentence, and whether it stayed within the limits."""
    rise = after.perplexity / before.perplexity - 1
    said = f"perplexity on ordinary text {before.perplexity:.2f} -> {after.perplexity:.2f} ({rise:+.1%})"
    within = rise <= max_perplexity
    if before.neighbours is not None and after.neighbours is not None:
        said += f", right about neighbours {before.neighbours:.3f} -> {after.neighbours:.3f}"
        # Shares of some hundred: a drop that is the limit is not past it by a rounding.
        within = within and before.neighbours - after.neighbours <= max_neighbours + 1e-9
    else:
        said += ", neighbours not measured: the facts name none with an object"
    return said, within
