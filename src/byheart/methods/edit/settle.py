"""All facts together: what each must add at every layer to be said beside all the others, with text as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain, count, pairwise
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from byheart.attention import fast_attention
from byheart.base import Base
from byheart.blocks import Stretch
from byheart.decode import batches, token_ids
from byheart.losses import drift, token_loss
from byheart.methods.edit.ends import closing_tokens
from byheart.methods.edit.others import about_others
from byheart.methods.edit.prompts import Prepared, Row, prompt_text
from byheart.methods.edit.weights import changed_by
from byheart.methods.edit.write import Written
from byheart.padding import right_padded
from byheart.progress import scaled
from byheart.rows import Fact
from byheart.surgery import widened
from byheart.training import Recipe, Trained, train

# Tokens a step, of prompts and of ordinary text: small enough for many steps an epoch, and for memory.
_TOKENS, _TEXT_ROWS, _TEXT_TOKENS = 512, 4, 64
# A step's prompts about others, of which what follows is to stay. A fact is put about so many, and of all this share is
# held, that which the edit changes most: the rest would say that all is well.
_BESIDE, _EACH, _HELD = 16, 8, 0.25
# Of an epoch, the prompts of a fact that are read behind prefixes; the bare one is always.
_OTHERS = 1
# A few facts take few steps an epoch; so many are taken all the same. Below so many times as many, facts begin whole.
_LEAST_STEPS, _FEW, _WARMUP = 12, 2, 10
# A fact's prompts come twice an epoch, and their gradients are large at first only; by the end that is forgotten.
_BETA2 = 0.99
# Of the longest residual, what counts as none.
_HARDLY = 0.01
# Counts up with whatever else changes is made of the same options: finished work of before is not taken for this.
VERSION = 7


@dataclass(frozen=True)
class SettleOptions:
    """How residuals are settled.

    Attributes:
        settle: epochs at least; 0: as published, each fact's residuals follow from its own target alone.
        settle_runs: how many times new facts settle, each time with draws of their own (in which order, behind which
            prefixes, beside which text and names); the mean is taken, in which what one draw alone asked for fades.
        settle_lr: Adam's step size, times the length of an ordinary sum of a fact's residuals over the root of d_model.
        settle_kl: weight of KL(before || now) on ordinary text.
        settle_beside: weight of the same behind the facts' prompts about other subjects, of those that ask no question.
        settle_held: how many times as much of both each step holds; more is surer, and slower on a CPU.
        settle_end: weight of -log p that the target's last word ends there ("Max Wolf" is not to be said as "Max
            Wolfram"), beside that of the target itself.
        settle_stop: a prompt pulls no more once -log p of its whole target, and of its end, is below it.
        settle_from: the share of what its target says that a new fact whose target is one token begins with, where
            there are many (of few: all); the rest it takes as it needs it. A target of n tokens lacks an nth as much.
    """

    settle: int = 4
    settle_runs: int = 2
    settle_lr: float = 0.015
    settle_kl: float = 3.0
    settle_beside: float = 3.0
    settle_held: int = 1
    settle_end: float = 1.0
    settle_stop: float = 0.05
    settle_from: float = 0.5


def text_pieces(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of ordinary text in the pieces that residuals are settled beside."""
    cut = (list(row[n : n + _TEXT_TOKENS]) for row in rows for n in range(0, len(row), _TEXT_TOKENS))
    return [piece for piece in cut if len(piece) > 1]


def settle(
    base: Base,
    prepared: Sequence[Prepared],
    written: Written,
    group_of: Sequence[int],
    places: Sequence[int],
    new: Collection[int],
    text: Sequence[Sequence[int]],
    names: Sequence[str],
    options: SettleOptions,
    seed: str,
    store: Path,
    progress: Callable[[int], None],
) -> tuple[Tensor, Trained]:
    """Change the residuals of some facts so that their prompts are followed by their targets in the edited model.

    A target is sought as if nothing but the state at its own lookup token changed. Hundreds of edits also move all
    other tokens, and what one fact adds leaks into the prompts of others. Here the maps A of an edit stay (Δ = RᵀA, so
    that what a fact adds goes where its own key is and ordinary text is not), and the residuals R of all layers follow
    the gradient of

        mean over prompts of -log p of the whole target, and of its last word's end
            +  settle_kl · KL(before || now) on ordinary text
            +  settle_beside · the same behind the facts' prompts about other subjects, where the edit changes most

    through the model with all of them written. Resumes from ``store``.

    Args:
        group_of: of each fact the row of the maps that it shares with others.
        places: facts whose prompts count, and whose residuals may change.
        new: those of them that have never settled.
        text: pieces of ordinary text.
        names: of other subjects.
        progress: is told of facts, once an epoch each.

    Returns:
        Changes of residuals (groups, layers, d_model), and what training came to.
    """
    layers = sorted(written.maps)
    groups = len(written.maps[layers[0]])
    pieces, beside = options.settle_held * _TEXT_ROWS, options.settle_held * _BESIDE
    chosen = sorted({group_of[n] for n in places})
    index = torch.tensor(chosen, device=base.device)
    plan = _plan(prepared, places, options.settle, seed)
    # Few facts are hardly in each other's way, and take too few steps to make up for what they began without.
    fresh = {group_of[n] for n in new} if len(plan) >= _FEW * _LEAST_STEPS else set()
    less = -_lacking(prepared, places, group_of, chosen, fresh, options.settle_from)[:, None]
    shifts = nn.ParameterDict({str(layer): less * written.residuals[layer][chosen].float() for layer in layers})
    shifts.to(base.device)
    inside = {
        layer: (written.maps[layer].to(base.device, base.dtype), written.residuals[layer].to(base.device, base.wide))
        for layer in layers
    }

    @contextmanager
    def edited() -> Iterator[None]:
        with ExitStack() as attached:
            for layer, (into, residual) in inside.items():
                now = residual.index_add(0, index, shifts[str(layer)].to(residual)).to(base.dtype)
                attached.enter_context(widened(base.parts.blocks[layer].mlp_out, _adding(into, now)))
            yield

    @cache  # not before it is needed: where all is settled already, nothing is asked
    def others() -> list[list[int]]:
        if not options.settle_beside:
            return []
        facts, there = [prepared[n].fact for n in places], [one.fact.subject for one in prepared]
        rows = _behind_others(base, facts, there, names, seed, ceil(beside / _HELD))
        # By the edit as written, so that one who goes on after a kill holds the same.
        return _changed_most(base, rows, lambda: changed_by(base, written.deltas), layers[0]) if rows else []

    closing = cache(lambda: closing_tokens(base) if options.settle_end else None)

    def loss(step: int) -> Tensor:
        draw = random.Random(f"{seed}/{step}")
        held = [
            (weight, _said(base, draw.sample(rows, min(some, len(rows))), layers[0], last))
            for weight, rows, some, last in (
                (options.settle_kl, text, pieces, False),
                (options.settle_beside, others(), beside, True),
            )
            if rows and weight
        ]
        with fast_attention(base.model):
            with torch.no_grad():
                before = [said() for _, said in held]
            with edited():
                total = _fit(base, plan[step], layers[0], closing(), options)
                for (weight, said), old in zip(held, before, strict=True):
                    total = total + weight * drift(said(), old, base.wide)
                return total

    lengths = _lengths(written, chosen)
    longest = max(lengths.values()) or 1.0
    lr = options.settle_lr * longest / base.parts.d_model**0.5
    recipe = Recipe(len(plan), lr, min(_WARMUP, len(plan) // 2), decay=0.0, clip=0.0, beta2=_BETA2)
    tell = scaled(progress, len(plan), len(places) * options.settle)
    trained = train(shifts, loss, recipe, store, tell, lambda name: lengths[name] / longest)
    found = torch.zeros(groups, len(layers), base.parts.d_model)
    for place, layer in enumerate(layers):
        found[chosen, place] = shifts[str(layer)].detach().float().cpu()
    return found, trained


def _lacking(
    prepared: Sequence[Prepared], places: Sequence[int], group_of: Sequence[int], chosen: Sequence[int],
    fresh: Collection[int], share: float,
) -> Tensor:  # fmt: skip
    """The share of its residuals that each of the ``chosen`` groups begins without (groups,), those not fresh 0.

    A target of several tokens is further off without half of its residuals than one of a single token: it lacks less.
    """
    tokens: dict[int, int] = {}
    for n in places:
        tokens[group_of[n]] = max(tokens.get(group_of[n], 0), len(prepared[n].rows[0].labels))
    return torch.tensor([(1 - share) / tokens[group] if group in fresh else 0.0 for group in chosen])


def _behind_others(
    base: Base, facts: Sequence[Fact], there: Sequence[str], names: Sequence[str], seed: str, least: int
) -> list[list[int]]:
    """The facts' prompts about others, as tokens; of few facts more each, so that there are ``least``."""
    some = chain.from_iterable(about_others(facts, there, names, seed, _EACH, least))
    rows = [token_ids(base.tokenizer, prompt_text(one), beginning=True) for one in some]
    return [row for row in rows if base.positions is None or len(row) <= base.positions]


def _lengths(written: Written, chosen: Sequence[int]) -> dict[str, float]:
    """By layer, the length of an ordinary residual of the chosen groups, times the number of layers.

    What the model said before has hardly any residual, and is not ordinary.
    """
    layers = sorted(written.maps)
    own = torch.stack([written.residuals[layer][chosen].norm(dim=1) for layer in layers])
    whole = own.sum(0)
    ordinary = len(layers) * own[:, whole >= _HARDLY * whole.max()].median(1).values
    return {str(layer): float(length) for layer, length in zip(layers, ordinary, strict=True)}


def _adding(into: Tensor, residuals: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Δ's part of a layer, given A (groups, d_ff) and R (groups, d_model)."""
    return lambda given, output: (given @ into.T) @ residuals


def _plan(prepared: Sequence[Prepared], places: Sequence[int], epochs: int, seed: str) -> list[list[Row]]:
    """The prompts of each step: in an epoch every fact's bare one and one behind a prefix, like lengths together."""
    steps: list[list[Row]] = []
    for epoch in count():
        if epoch >= epochs and len(steps) >= _LEAST_STEPS:
            break
        draw = random.Random(f"{seed}/{epoch}")
        rows: list[Row] = []
        for n in places:
            bare, *others = prepared[n].rows
            rows += [bare, *draw.sample(others, min(_OTHERS, len(others)))]
        # Not quite by length, so that the same prompts do not always stand together.
        rows.sort(key=lambda row: len(row.tokens) + 4 * draw.random())
        cuts, widest = [0], 0
        for n, row in enumerate(rows):
            widest = max(widest, len(row.tokens))
            if n > cuts[-1] and (n + 1 - cuts[-1]) * widest > _TOKENS:
                cuts.append(n)
                widest = len(row.tokens)
        made = [rows[start:end] for start, end in pairwise([*cuts, len(rows)])]
        draw.shuffle(made)
        steps += made
    return steps


def _fit(base: Base, rows: Sequence[Row], first: int, closing: Tensor | None, options: SettleOptions) -> Tensor:
    """The mean over rows of -log p of the whole target and of its end; rows below ``settle_stop`` do not pull.

    The sum over a target's tokens, since it is said only where each of them is the likeliest: by their mean a target of
    six would pull on each a sixth as much as a target of one, against the same that holds.

    Args:
        closing: tokens that close a word; None: whatever follows a target is let be.
    """
    stretch, _ = _read(base, [(*row.tokens, row.labels[-1]) for row in rows], first)
    out = stretch.run(stretch.hidden, first, stretch.last)
    entries = [(n, len(row.context) + at, label) for n, row in enumerate(rows) for at, label in row.places]
    number, column, label = torch.tensor(entries, device=base.device).T
    nll, _ = token_loss(base.parts.logits(out[number, column]), label, base.wide)
    each = torch.zeros(len(rows), dtype=base.wide, device=base.device).index_add(0, number, nll)
    ended = [(n, len(row.tokens)) for n, row in enumerate(rows) if row.ends]
    if closing is not None and ended:
        number, column = torch.tensor(ended, device=base.device).T
        found = base.parts.logits(out[number, column]).to(base.wide)
        nll = found.logsumexp(1) - found[:, closing[closing < found.shape[1]]].logsumexp(1)
        each = each.index_add(0, number, options.settle_end * nll)
    return torch.where(each.detach() > options.settle_stop, each, each.detach()).mean()


def _changed_most(
    base: Base, rows: Sequence[list[int]], edited: Callable[[], AbstractContextManager[None]], first: int
) -> list[list[int]]:
    """Of prompts the share :data:`_HELD` behind which the edit changes most what is said, by KL(before || now)."""
    changes = torch.zeros(len(rows))
    with fast_attention(base.model), torch.no_grad():
        for batch in batches([len(row) for row in rows], lambda count, longest: count * longest <= _TOKENS):
            said = _said(base, [rows[n] for n in batch], first, True)
            before = said()
            with edited():
                pairs = zip(said()[:, None], before[:, None], strict=True)
            changes[batch] = torch.stack([drift(now, old, base.wide) for now, old in pairs]).float().cpu()
    return [rows[n] for n in changes.argsort(descending=True)[: ceil(_HELD * len(rows))]]


def _said(base: Base, rows: Sequence[Sequence[int]], first: int, last: bool) -> Callable[[], Tensor]:
    """What gives the logits at every token, or at the last one of each row, by the model as it is when called."""
    stretch, mask = _read(base, rows, first)
    real = mask.bool()
    if last:
        real = real & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return lambda: base.parts.logits(stretch.run(stretch.hidden, first, stretch.last)[real])


def _read(base: Base, rows: Sequence[Sequence[int]], first: int) -> tuple[Stretch, Tensor]:
    """The blocks from ``first`` up over rows, and their mask; what is below no edit changes."""
    ids, mask, places = right_padded(rows, base.device)
    return Stretch(base, ids, mask, places, first, len(base.parts.blocks) - 1), mask
