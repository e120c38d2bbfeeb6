"""Targets z: for each fact the hidden state at the subject's last token from which the model says the new object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from byheart.attention import fast_attention
from byheart.base import Base, for_device
from byheart.blocks import Stretch, read_context, shared_beginnings, take_rows
from byheart.decode import batches
from byheart.losses import token_loss
from byheart.methods.edit.prompts import Prepared, Row
from byheart.padding import left_padded, right_padded
from byheart.parts import Parts
from byheart.progress import Progress, untold

# Tail tokens of a batch: enough for products at full speed, few enough that what the gradient needs stays near 1 GB
# (on a graphics card: 2.7 GB at the peak of a run of SmolLM2-135M in float32; more of a larger model).
BATCH_TOKENS = {"cpu": 512, "cuda": 8_192}
# So many times that with padding, at most.
_PADDED = 4
# Facts that share a target have the sum of their steps, up to so many of them: each step grows with them, too.
_SHARING = 10
# Counts up with how targets are sought: finished work of before is not taken for this.
VERSION = 3
Stop = Literal["fit", "loss", "argmax"]


@dataclass(frozen=True)
class TargetOptions:
    """How targets are sought (Meng et al. 2023, section 4.1 and appendix; the names are the published ones).

    Lengths and the original distribution are those of the model at hand, whatever is written in it already.

    Attributes:
        steps: evaluations of the loss at most; there is one step of Adam less. A delta that facts share has as many
            again for each of them, up to ten times as many.
        lr: Adam's step size, times the hidden state's length over the root of d_model.
        clamp: the longest delta, as a share of the hidden state's length (see :func:`find_targets`).
        kl: weight of KL(edited || original) after ``{subject} is a``.
        weight_decay: weight of ``|delta| / |h|^2``.
        stop: end a fact when the target's own part of the loss is below ``stop_loss`` (``fit``), when all of it is
            (``loss``, as published), or as soon as the target is the likeliest continuation in every prompt
            (``argmax``: most-probable early stopping, ENCORE).
        anchor: give z the length of the hidden state it replaces, only its direction is sought (norm anchoring).
    """

    steps: int = 25
    lr: float = 0.15
    clamp: float = 1.0
    kl: float = 0.015
    weight_decay: float = 0.5
    stop: Stop = "fit"
    stop_loss: float = 0.05
    anchor: bool = False


@dataclass(frozen=True)
class Targets:
    """Targets of facts: ``z`` (facts, d_model) in fp32 or wider, the last ``loss`` and the ``steps`` of each."""

    z: Tensor
    loss: Tensor
    steps: Tensor


def find_targets(
    base: Base,
    prepared: Sequence[Prepared],
    layer: int,
    options: TargetOptions,
    groups: Sequence[int] | None = None,
    on_done: Progress = untold,
) -> Targets:
    """Seek z for each fact at the output of block ``layer``.

    For every fact a delta is added to the block's output at the lookup token, in the fact's prompt bare and behind
    each prefix and in ``{subject} is a``; it minimises

        mean over prompts and target tokens of -log p  +  kl · KL  +  weight_decay · |delta| / |h|²

    by Adam from zero, projected to ``|delta| <= clamp · |h|`` after each step; z = h + delta, where h is the hidden
    state in the bare prompt, and its length |h| the median over the fact's prompts. What cannot depend on delta is
    computed once: everything up to ``layer``, and the keys and values of all tokens before the lookup token. Facts
    share batches and leave them when they are done.

    Args:
        groups: facts of one group share one delta (MEMIT-Merge); by default each has its own.

    Returns:
        Targets in the order of ``prepared``.
    """
    group_of = list(groups) if groups is not None else list(range(len(prepared)))
    members: dict[int, list[int]] = {}
    for place, group in enumerate(group_of):
        members.setdefault(group, []).append(place)
    sets = list(members.values())
    sizes = [sum(len(row.tail) for n in some for row in _rows(prepared[n])) for some in sets]
    widths = [max(len(row.tail) for n in some for row in _rows(prepared[n])) for some in sets]
    wide = base.wide
    found = Targets(
        torch.zeros(len(prepared), base.parts.d_model, dtype=wide),
        torch.zeros(len(prepared), dtype=wide),
        torch.zeros(len(prepared), dtype=torch.long),
    )
    limit = for_device(BATCH_TOKENS, base.device)
    average = sum(sizes) / max(len(sizes), 1)
    most = max((sum(len(_rows(prepared[n])) for n in some) for some in sets), default=0)
    with fast_attention(base.model):
        # By what facts have on average, and by what they come to once a long one among them pads all.
        for batch in batches(
            widths, lambda count, longest: count * average <= limit and count * most * longest <= _PADDED * limit
        ):
            places = [n for one in batch for n in sets[one]]
            local = [number for number, one in enumerate(batch) for _ in sets[one]]
            z, loss, steps = _search(base, [prepared[n] for n in places], torch.tensor(local), layer, options)
            index = torch.tensor(places)
            found.z[index], found.loss[index], found.steps[index] = z.cpu(), loss.cpu(), steps.cpu()
            on_done(len(places))
    return found


def _rows(one: Prepared) -> tuple[Row, ...]:
    return (*one.rows, one.essence)


def _search(
    base: Base, prepared: Sequence[Prepared], group: Tensor, layer: int, options: TargetOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """z (facts, d_model), the last loss and the number of evaluations, of each fact of one batch."""
    device = base.device
    wide = base.wide
    group = group.to(device)
    count = int(group.max()) + 1
    batch = _Batch.read(base, prepared, group, layer, wide)
    hidden = batch.hidden[batch.bare, 0].to(wide)  # h of each fact
    # Where facts share a delta, it starts from the mean of their hidden states.
    start = torch.zeros(count, hidden.shape[1], dtype=wide, device=device).index_add(0, group, hidden)
    start /= torch.bincount(group)[:, None]
    # The first tokens of a text can have states many times longer than all others; an edit of that length there
    # would spoil ordinary text. So lengths are measured by the median over a fact's prompts, bare and behind prefixes.
    length = torch.zeros(count, dtype=wide, device=device).index_add(0, group, batch.length)
    length /= torch.bincount(group)
    most = options.steps * torch.bincount(group).clamp(max=_SHARING)
    best = torch.zeros_like(start)
    loss_of, steps_of = start.new_zeros(count), torch.zeros(count, dtype=torch.long, device=device)
    live = torch.arange(count, device=device)
    delta, first, second = torch.zeros_like(start), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, int(most.max()) + 1):
        here = start[live]
        delta.requires_grad_(True)
        loss, fit, likeliest = batch.loss(_applied(delta, here, options), length[live], options)
        done = likeliest if options.stop == "argmax" else (fit if options.stop == "fit" else loss) < options.stop_loss
        done = done | (step >= most[live])
        best[live[done]], loss_of[live[done]], steps_of[live[done]] = delta.detach()[done], loss.detach()[done], step
        if done.all():
            break
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        with torch.no_grad():
            rate = options.lr * length[live, None] / here.shape[1] ** 0.5
            delta, first, second = _adam(delta, gradient, first, second, step, rate)
            longest = options.clamp * length[live, None]
            delta = delta * (longest / delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
            if done.any():
                live, delta, first, second = live[~done], delta[~done], first[~done], second[~done]
                batch = batch.take(~done)
    return hidden + _applied(best, start, options)[group], loss_of[group], steps_of[group]


def _applied(delta: Tensor, start: Tensor, options: TargetOptions) -> Tensor:
    """What is added to the hidden state: delta, or what turns the state as delta does but keeps its length."""
    if not options.anchor:
        return delta
    target = start + delta
    turned: Tensor = target * (start.norm(dim=1, keepdim=True) / target.norm(dim=1, keepdim=True)) - start
    return turned


def _adam(
    delta: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, lr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam (Kingma and Ba 2015), written out since rows come and go between steps."""
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient.square()
    root = (second / (1 - 0.999**step)).sqrt() + 1e-8
    return delta.detach() - lr / (1 - 0.9**step) * first / root, first, second


@dataclass
class _Batch:
    """The rows of some groups of facts, and what is fixed about them while their deltas are sought.

    Attributes:
        stretch: the blocks above the edited layer, with the keys and values of all tokens before the lookup token.
        hidden: (rows, n, d_model), the edited layer's output from the lookup token on.
        group: of each row, its group among those that are left.
        bare: the row of each fact's bare prompt.
        length: of each fact, the median length of the hidden states over its prompts.
        row, column, label, share: one entry a token to predict, with its weight in its group's loss.
        essence_row, essence_column, essence_share: one entry a ``{subject} is a``.
        original: (essences, vocabulary), log-probabilities after it in the model as it is.
    """

    parts: Parts
    stretch: Stretch
    hidden: Tensor
    group: Tensor
    bare: Tensor
    length: Tensor
    row: Tensor
    column: Tensor
    label: Tensor
    share: Tensor
    essence_row: Tensor
    essence_column: Tensor
    essence_share: Tensor
    original: Tensor

    @classmethod
    def read(cls, base: Base, prepared: Sequence[Prepared], group: Tensor, layer: int, wide: torch.dtype) -> Self:
        """Read all prompts once and keep what does not depend on any delta."""
        device = base.device
        rows = [row for one in prepared for row in _rows(one)]
        fact = torch.tensor([n for n, one in enumerate(prepared) for _ in _rows(one)], device=device)
        stretch = _read_tails(base, rows, layer)
        members = torch.bincount(group).to(wide)
        entries = [
            (n, at, label, len(row.labels) * len(prepared[int(fact[n])].rows))
            for n, row in enumerate(rows)
            for at, label in row.places
        ]
        row, column, label, parts_of = torch.tensor(entries, device=device).T
        essence_row = torch.tensor([n for n, one in enumerate(rows) if not one.labels], device=device)
        essence_column = torch.tensor([len(one.tail) - 1 for one in rows if not one.labels], device=device)
        of_row = group[fact]
        lengths = stretch.hidden[:, 0].to(wide).norm(dim=1)
        made = cls(
            parts=base.parts,
            stretch=stretch,
            hidden=stretch.hidden,
            group=of_row,
            bare=torch.tensor([0, *_starts(prepared)[:-1]], device=device),
            length=torch.stack([part[:-1].median() for part in lengths.split([len(_rows(one)) for one in prepared])]),
            row=row,
            column=column,
            label=label,
            share=1 / (parts_of * members[of_row[row]]),
            essence_row=essence_row,
            essence_column=essence_column,
            essence_share=1 / members[of_row[essence_row]],
            original=torch.empty(0),
        )
        with torch.no_grad():
            alone = stretch.take(essence_row)
            out = alone.run(alone.hidden, alone.first, alone.last)
            last = out[torch.arange(len(essence_row), device=device), essence_column]
            made.original = base.parts.logits(last).to(wide).log_softmax(-1)
        return made

    def loss(self, delta: Tensor, norm: Tensor, options: TargetOptions) -> tuple[Tensor, Tensor, Tensor]:
        """Of each group the loss, its part for the target, and whether all target tokens are the likeliest."""
        lookup = self.hidden[:, 0] + delta[self.group].to(self.hidden.dtype)
        hidden = torch.cat([lookup[:, None], self.hidden[:, 1:]], 1)
        out = self.stretch.run(hidden, self.stretch.first, self.stretch.last)
        nll, hit = token_loss(self.parts.logits(out[self.row, self.column]), self.label, delta.dtype)
        missed = (~hit).to(delta.dtype)
        now = self.parts.logits(out[self.essence_row, self.essence_column]).to(delta.dtype).log_softmax(-1)
        divergence = (now.exp() * (now - self.original)).sum(1)
        of_entry, of_essence = self.group[self.row], self.group[self.essence_row]
        total = delta.new_zeros(len(delta)).index_add(0, of_entry, nll * self.share)
        fit = total.detach()
        total = total.index_add(0, of_essence, options.kl * divergence * self.essence_share)
        misses = delta.new_zeros(len(delta)).index_add(0, of_entry, missed)
        # The root has no gradient at zero, where the first step starts from.
        length = delta.square().sum(1).clamp(min=1e-24).sqrt()
        return total + options.weight_decay * length / norm.square(), fit, misses == 0

    def take(self, groups: Tensor) -> Self:
        """The batch without the other groups; ``groups`` is a mask over those that are left."""
        number = torch.where(groups, groups.cumsum(0) - 1, -1)
        group = number[self.group]
        rows = (group >= 0).nonzero()[:, 0]
        place = torch.full_like(group, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        entries, essences = (place[self.row] >= 0), (place[self.essence_row] >= 0)
        stretch = self.stretch.take(rows)
        return replace(
            self,
            stretch=stretch,
            hidden=stretch.hidden,
            group=group[rows],
            bare=place[self.bare],
            row=place[self.row[entries]],
            column=self.column[entries],
            label=self.label[entries],
            share=self.share[entries],
            essence_row=place[self.essence_row[essences]],
            essence_column=self.essence_column[essences],
            essence_share=self.essence_share[essences],
            original=self.original[essences],
        )


def _starts(prepared: Sequence[Prepared]) -> list[int]:
    """Behind each fact, how many rows there are so far."""
    return list(accumulate(len(_rows(one)) for one in prepared))


def _read_tails(base: Base, rows: Sequence[Row], layer: int) -> Stretch:
    """The blocks above ``layer`` over the tails, with what comes before them as frozen keys and values."""
    device = base.device
    tails, mask, places = right_padded([row.tail for row in rows], device)
    lengths = mask.sum(1, keepdim=True)
    # Padding counts no further than its row: a model may have no position there.
    places = places.clamp(max=lengths - 1) + torch.tensor([len(row.context) for row in rows], device=device)[:, None]
    cache = None
    if any(row.context for row in rows):
        cache, before = _read_contexts(base, [row.context for row in rows])
        mask = torch.cat([before, mask], 1)
    return Stretch(base, tails, mask, places, layer + 1, len(base.parts.blocks) - 1, cache)


def _read_contexts(base: Base, contexts: Sequence[tuple[int, ...]]) -> tuple[Cache, Tensor]:
    """Keys and values of all contexts, and their mask; what many of them begin with (the prefixes) is read once."""
    beginnings, of_row = shared_beginnings(base, contexts)
    rest = [context[len(beginnings[n]) :] for context, n in zip(contexts, of_row, strict=True)]
    cache, mask, index = None, None, torch.tensor(of_row, device=base.device)
    if any(beginnings):
        ids, begun, places = left_padded(beginnings, base.device)
        cache, mask = take_rows(read_context(base, ids, begun, places), index), begun[index]
    if any(rest):
        ids, here, _ = left_padded(rest, base.device)
        mask = here if mask is None else torch.cat([mask, here], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        cache = read_context(base, ids, mask, places, cache)
    assert cache is not None and mask is not None
    return cache, mask
