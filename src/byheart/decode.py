"""The model's hot path: many prompts continued greedily in batches, and options scored, from one prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from byheart import __version__
from byheart.attention import fast_attention
from byheart.base import Base, for_device
from byheart.errors import DataError
from byheart.kv import KV, length
from byheart.padding import right_padded
from byheart.parts import slides
from byheart.progress import Progress, untold
from byheart.surgery import exact

# Two sizes, since they pull apart: reading is bound by arithmetic and is fastest while a layer's activations stay in
# the processor's cache; writing is bound by fetching the weights, once a token for all rows, so it wants many rows.
READ_TOKENS = {"cpu": 2_048, "cuda": 65_536}
WRITE_ROWS = {"cpu": 64, "cuda": 256}
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to continue, and continuations to score behind it (written as they follow it, space included).

    Attributes:
        past: keys and values that the prompt stands behind, in the order of their positions; the prompt is then the
            middle of a text, and gets no tokens of a beginning.
    """

    prompt: str
    options: tuple[str, ...] = ()
    past: tuple[KV, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of one job.

    Attributes:
        text: the greedy continuation, up to the end of its first line that holds text.
        logprob: mean natural log-probability of a generated token, the stopping one included; 0 where none was asked.
        options: mean natural log-probability of a token, for each of the job's options.
        hits: share of each option's tokens that the model would have chosen itself, given those before.
        prompt_tokens, new_tokens: what was read and written.
        seconds: the batch's wall time divided by its rows, the shared beginning included.
    """

    text: str
    logprob: float
    options: tuple[float, ...]
    hits: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """Draw each token from the ``top_k`` likeliest, instead of always taking the likeliest.

    What a job draws depends on the seed and its place among the jobs, not on the batch.
    """

    top_k: int
    seed: int = 0


class _Buffer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in a buffer taken once: a step writes its own columns and copies nothing else."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._k, self._v = (_blank(t, t.shape[0], self._capacity) for t in (key_states, value_states))
        self.cut(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.keys.shape[-2]
        new = old + key_states.shape[-2]
        self._k[:, :, old:new] = key_states
        self._v[:, :, old:new] = value_states
        self.cut(new)
        return self.keys, self.values

    @property
    def column_bytes(self) -> int:
        """Bytes of one row's keys and values at one position."""
        return (self._k[0, :, 0].numel() + self._v[0, :, 0].numel()) * self._k.element_size()

    def repeated(self, rows: int, capacity: int) -> _Buffer:
        """The same columns for ``rows`` rows (from a batch of one), with room for ``capacity``."""
        length = self.keys.shape[-2]
        k, v = _blank(self._k, rows, capacity), _blank(self._v, rows, capacity)
        k[:, :, :length] = self.keys
        v[:, :, :length] = self.values
        return self._over(k, v, length)

    def part(self, rows: slice, length: int) -> _Buffer:
        """Some rows of the same memory, with ``length`` columns taken."""
        return self._over(self._k[rows], self._v[rows], length)

    def _over(self, k: Tensor, v: Tensor, length: int) -> _Buffer:
        other = _Buffer(k.shape[-2])
        other.dtype, other.device, other.is_initialized = self.dtype, self.device, True
        other._k, other._v = k, v
        other.cut(length)
        return other

    def fill(self, rows: Sequence[Sequence[tuple[Tensor, Tensor]]], length: int) -> None:
        """Write each row's stretches of keys and values so that they end at column ``length``."""
        for n, stretches in enumerate(rows):
            column = length
            for key, value in reversed(stretches):
                first = column - key.shape[1]
                self._k[n, :, first:column], self._v[n, :, first:column] = key, value
                column = first

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        length = self.keys.shape[-2]
        self._k, self._v = self._k[rows], self._v[rows]
        self.cut(length)

    def cut(self, length: int) -> None:
        """Take the first ``length`` columns as written, and no more."""
        self.keys, self.values = self._k[:, :, :length], self._v[:, :, :length]


def _blank(like: Tensor, rows: int, capacity: int) -> Tensor:
    # Zeros, not garbage: masked columns still meet a probability of 0, and 0 times NaN is NaN.
    return torch.zeros(rows, like.shape[1], capacity, like.shape[-1], dtype=like.dtype, device=like.device)


def complete(
    base: Base,
    jobs: Sequence[Job],
    *,
    max_new_tokens: int = 24,
    sampling: Sampling | None = None,
    whole: bool = False,
    on_done: Progress = untold,
) -> list[Completion]:
    """Continue and score many prompts, in their order.

    The beginning that all prompts share (instruction, examples) is read once; the rest goes in batches of like
    length; a row ends at the end of its first line that holds text, or at the model's end token once it holds text, and
    leaves its batch. With ``whole`` nothing ends a row: each is ``max_new_tokens`` long, line breaks included.
    ``max_new_tokens=0`` only scores. The result does not depend on the batch up to the rounding of ``base.dtype``.

    Raises:
        DataError: where a prompt with its answer does not fit the model's positions.
    """
    if not jobs:
        return []
    if base.kind == "seq2seq" and any(job.past for job in jobs):
        raise DataError(f"{base.name} is an encoder-decoder model; keys and values need a decoder-only one")
    prompts: list[list[int]] = [[]] * len(jobs)
    for beginning in (True, False):
        places = [n for n, job in enumerate(jobs) if bool(job.past) != beginning]
        found = base.tokenizer([jobs[n].prompt for n in places], add_special_tokens=beginning) if places else {}
        for n, ids in zip(places, found.get("input_ids", ()), strict=True):
            prompts[n] = list(map(int, ids))
    if base.kind == "seq2seq":
        work: _Causal | _Seq2Seq = _Seq2Seq(base, jobs, prompts, max_new_tokens, sampling, whole)
    else:
        work = _Causal(base, jobs, prompts, max_new_tokens, sampling, whole)
    _check_lengths(base, work)
    done: list[Completion | None] = [None] * len(jobs)
    with torch.inference_mode(), fast_attention(base.model):
        work.start()
        for batch in batches([len(ids) for ids in prompts], work.fits):
            began = time.perf_counter()
            results = work.batch(batch)
            seconds = (time.perf_counter() - began) / len(batch) + work.shared_seconds / len(jobs)
            for index, (tokens, logprobs, options) in zip(batch, results, strict=True):
                text = base.tokenizer.decode(tokens, skip_special_tokens=True)
                done[index] = Completion(
                    text=text if whole else first_line(text),
                    logprob=sum(logprobs) / len(logprobs) if logprobs else 0.0,
                    options=tuple(mean for mean, _ in options),
                    hits=tuple(share for _, share in options),
                    prompt_tokens=len(prompts[index]),
                    new_tokens=len(tokens),
                    seconds=seconds,
                )
            on_done(len(batch))
    return [completion for completion in done if completion is not None]


def first_line(text: str) -> str:
    """The first line that holds text, without the space around it; empty where there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def token_ids(tokenizer: Any, text: str, *, beginning: bool) -> list[int]:
    """The tokens of a text; with what the tokeniser puts at the beginning of one where it is a beginning."""
    return list(map(int, tokenizer(text, add_special_tokens=beginning)["input_ids"]))


def option_ids(tokenizer: Any, prompt: str, prompt_ids: list[int], option: str, *, beginning: bool = True) -> list[int]:
    """The tokens of ``option`` as it follows ``prompt``.

    Tokenised together with the prompt, since some tokenisers strip a leading space or add a BOS to a text of its own;
    where the border between the two is no token border, by itself.
    """
    together = token_ids(tokenizer, prompt + option, beginning=beginning)
    eos = tokenizer.eos_token_id
    if together and together[-1] == eos and prompt_ids and prompt_ids[-1] == eos:
        together, prompt_ids = together[:-1], prompt_ids[:-1]
    if together[: len(prompt_ids)] == prompt_ids and len(together) > len(prompt_ids):
        return together[len(prompt_ids) :]
    return token_ids(tokenizer, option, beginning=False)


_Scored = tuple[float, float]  # an option's mean log-probability, and the share of its tokens that are the likeliest
_Result = tuple[list[int], list[float], tuple[_Scored, ...]]


class _Work:
    """What both kinds of model share: options, stopping and the greedy loop."""

    def __init__(
        self, base: Base, jobs: Sequence[Job], prompts: list[list[int]], max_new_tokens: int,
        sampling: Sampling | None, whole: bool,
    ) -> None:  # fmt: skip
        self.base, self.prompts, self.max_new = base, prompts, max_new_tokens
        self.pasts = [job.past for job in jobs]
        self.sampling, self.whole = sampling, whole
        self.luck = (
            torch.rand(len(jobs), max_new_tokens, generator=torch.Generator().manual_seed(sampling.seed))
            if sampling
            else None
        )
        self.shared_seconds = 0.0
        self.options = [
            [option_ids(base.tokenizer, job.prompt, ids, option, beginning=not job.past) for option in job.options]
            for job, ids in zip(jobs, prompts, strict=True)
        ]
        self.read_tokens, self.write_rows = (for_device(sizes, base.device) for sizes in (READ_TOKENS, WRITE_ROWS))
        self.cache_bytes = for_device(CACHE_BYTES, base.device)
        self.ends = end_tokens(base)
        self.line_ends = base.line_ends if max_new_tokens else frozenset()
        self.blanks = base.blanks if max_new_tokens else frozenset()

    def longest_option(self, rows: Sequence[int]) -> int:
        return max((len(ids) for row in rows for ids in self.options[row]), default=0)

    def score(
        self, rows: Sequence[int], read: Callable[[], Tensor], step: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, list[list[_Scored]]]:
        """The logits after each prompt; mean log-probability and share of arg-max tokens of each row's options.

        ``read()`` gives the logits (rows, vocabulary) after the prompt; ``step(ids, mask)`` those after each of ``ids``
        (rows, n), and leaves the cache as it found it.
        """
        with exact(self.base.parts.head) if any(self.options[row] for row in rows) else nullcontext():
            first = read()
            return first, self._scored(rows, first, step)

    def _scored(
        self, rows: Sequence[int], first: Tensor, step: Callable[[Tensor, Tensor], Tensor]
    ) -> list[list[_Scored]]:
        scores: list[list[_Scored]] = [[] for _ in rows]
        for place in range(max((len(self.options[row]) for row in rows), default=0)):
            chosen = [self.options[row][place] if place < len(self.options[row]) else [] for row in rows]
            width = max(len(ids) for ids in chosen)
            if width == 0:
                continue
            padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in chosen], device=first.device)
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in chosen], device=first.device)
            logits = first[:, None]
            if width > 1:
                logits = torch.cat([logits, step(padded[:, :-1], mask[:, :-1])], dim=1)
            logprobs = logits.float().log_softmax(-1).gather(-1, padded[..., None])[..., 0] * mask
            hits = (logits.argmax(-1) == padded) * mask
            means, shares = ((part.sum(1) / mask.sum(1).clamp(min=1)).tolist() for part in (logprobs, hits))
            for index, ids in enumerate(chosen):
                if ids:
                    scores[index].append((means[index], shares[index]))
        return scores

    def greedy(
        self, rows: Sequence[int], logits: Tensor, step: Callable[[Tensor], Tensor], keep: Callable[[Tensor], None]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Greedy (or drawn) tokens of each row, and their log-probabilities.

        ``logits`` (rows, vocabulary) come after the prompt; ``step(ids)`` takes the newest token of each row still in
        the batch; ``keep(index)`` drops the other rows.
        """
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        begun = [self.whole] * len(rows)
        live = list(range(len(rows)))  # the row behind each place in the batch
        finished: set[int] = set()
        ends = torch.tensor(sorted(self.ends), device=logits.device, dtype=torch.long)
        for position in range(self.max_new):
            scores = logits.float().log_softmax(-1)
            # An instruct model would often rather end at once; an empty answer says nothing about what it knows.
            silent = torch.tensor([self.whole or not begun[row] for row in live], device=logits.device)
            scores[silent[:, None] & torch.isin(torch.arange(scores.shape[1], device=logits.device), ends)] = -torch.inf
            best, ids = self._choose(scores, [rows[row] for row in live], position)
            for row, token, logprob in zip(live, ids.tolist(), best.tolist(), strict=True):
                if row in finished:
                    continue
                logprobs[row].append(logprob)
                if token in self.ends:
                    finished.add(row)
                    continue
                tokens[row].append(token)
                # A line break ends the answer once there is one; before, it is only a slow start.
                begun[row] = begun[row] or token not in self.blanks
                if token in self.line_ends and begun[row] and not self.whole:
                    finished.add(row)
            left = [place for place, row in enumerate(live) if row not in finished]
            if not left or position == self.max_new - 1:
                break
            if len(left) <= len(live) // 2:
                index = torch.tensor(left, device=ids.device)
                keep(index)
                ids, live = ids[index], [live[place] for place in left]
            logits = step(ids)
        return tokens, logprobs

    def _choose(self, scores: Tensor, rows: Sequence[int], position: int) -> tuple[Tensor, Tensor]:
        if self.sampling is None or self.luck is None:
            best, ids = scores.max(-1)
            return best, ids
        likeliest, ids = scores.topk(self.sampling.top_k)
        reached = likeliest.softmax(-1).cumsum(-1)
        place = (reached < self.luck[rows, position, None].to(reached)).sum(-1, keepdim=True)
        place = place.clamp(max=self.sampling.top_k - 1)
        return likeliest.gather(-1, place)[:, 0], ids.gather(-1, place)[:, 0]


class _Causal(_Work):
    """Decoder-only models: [shared beginning or past][padding][rest of the prompt][option or answer] in one cache."""

    def start(self) -> None:
        """Read what all prompts begin with, once."""
        began = time.perf_counter()
        # A sliding window counts columns, and the padding behind a shared beginning would use it up.
        self.slides = slides(self.base.model.config)
        self.shared = 0 if self.slides or any(self.pasts) else _common_length(self.prompts)
        self.longest_past = max(map(length, self.pasts))
        # Shapes come from a real forward, never from the configuration: where nothing is shared, of one token.
        ids = torch.tensor([self.prompts[0][: max(self.shared, 1)]], device=self.base.device)
        layers = [_Buffer(ids.shape[1]) for _ in self.base.parts.blocks]
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        self._forward(ids, torch.ones_like(ids), places, Cache(layers=layers))
        for layer in layers:
            layer.cut(self.shared)
        self.layers = layers
        self.column_bytes = sum(layer.column_bytes for layer in layers)
        self.shared_seconds = time.perf_counter() - began

    def fits(self, rows: int, longest: int) -> bool:
        """Whether so many rows with prompts up to ``longest`` may be one batch."""
        if self.slides and self.longest_past:
            return rows <= 1  # padding between a past and its prompt would use the window up
        columns = self.longest_past + longest + self.max_new
        return rows <= self.write_rows and rows * columns * self.column_bytes <= self.cache_bytes

    def batch(self, rows: Sequence[int]) -> list[_Result]:
        """Read, score and continue the prompts of ``rows``, longest first."""
        device, pasts = self.base.device, [self.pasts[row] for row in rows]
        rest = [self.prompts[row][self.shared :] for row in rows]
        behind = [self.shared + length(past) for past in pasts]  # columns that each row's rest stands behind
        before, width = max(behind), len(rest[0])
        capacity = before + width + max(self.max_new, self.longest_option(rows))
        cache = Cache(layers=[layer.repeated(len(rows), capacity) for layer in self.layers])
        for number, layer in enumerate(cache.layers if self.longest_past else ()):
            layer.fill([[(one.keys[number], one.values[number]) for one in past] for past in pasts], before)
        mask = torch.tensor(
            [
                [0] * (before - b) + [1] * b + [0] * (width - len(r)) + [1] * len(r)
                for b, r in zip(behind, rest, strict=True)
            ],
            device=device,
        )
        starts = [past[-1].end if past else self.shared for past in pasts]
        ends = torch.tensor([start + len(r) for start, r in zip(starts, rest, strict=True)], device=device)

        def read() -> Tensor:
            found = []
            for part in batches([len(r) for r in rest], lambda n, longest: n * longest <= self.read_tokens):
                here, wide = slice(part[0], part[-1] + 1), len(rest[part[0]])
                ids = torch.tensor([[0] * (wide - len(rest[n])) + rest[n] for n in part], device=device)
                places = (torch.arange(wide, device=device)[None] - wide + ends[here, None]).clamp(min=0)
                memory = Cache(layers=[layer.part(here, before + width - wide) for layer in cache.layers])
                found.append(self._forward(ids, mask[here], places, memory)[:, -1])
            for layer in cache.layers:
                layer.cut(before + width)
            return torch.cat(found)

        def peek(option: Tensor, option_mask: Tensor) -> Tensor:
            # Padding stands at 0: behind a prompt that just fits a model may have no position for it.
            after = (torch.arange(option.shape[1], device=device)[None] + ends[:, None]) * option_mask
            out = self._forward(option, torch.cat([mask, option_mask], 1), after, cache, last=False)
            for layer in cache.layers:
                layer.cut(before + width)
            return out

        logits, scores = self.score(rows, read, peek)

        def step(newest: Tensor) -> Tensor:
            nonlocal mask, ends
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = self._forward(newest[:, None], mask, ends[:, None], cache)[:, -1]
            ends = ends + 1
            return out

        def keep(index: Tensor) -> None:
            nonlocal mask, ends
            mask, ends = mask[index], ends[index]
            for layer in cache.layers:
                layer.keep(index)

        tokens, logprobs = self.greedy(rows, logits, step, keep)
        return [(t, lp, tuple(s)) for t, lp, s in zip(tokens, logprobs, scores, strict=True)]

    def _forward(self, ids: Tensor, mask: Tensor, places: Tensor, cache: Cache, *, last: bool = True) -> Tensor:
        # A list of one place, not "the last 1": that would be a strided view, which the product with the vocabulary
        # first copies the whole matrix for, once a row (a third of the time of a batch).
        width = ids.shape[1]
        kept = torch.tensor([width - 1] if last else range(width), device=ids.device)
        out: Tensor = self.base.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            **self.base.behind(cache),
            logits_to_keep=kept,
        ).logits
        return out


class _Seq2Seq(_Work):
    """Encoder-decoder models: the prompt is encoded once, the decoder starts from its start token."""

    def start(self) -> None:
        """Nothing is shared: an encoder reads in both directions, so every prompt is read whole."""

    def fits(self, rows: int, longest: int) -> bool:
        """Whether so many rows with prompts up to ``longest`` may be one batch."""
        return rows <= self.write_rows and rows * longest <= 4 * self.read_tokens

    def batch(self, rows: Sequence[int]) -> list[_Result]:
        base, device = self.base, self.base.device
        ids, mask, _ = right_padded([self.prompts[row] for row in rows], device)
        encoded = base.model.get_encoder()(input_ids=ids, attention_mask=mask)
        hidden = encoded.last_hidden_state
        start = torch.full((len(rows), 1), base.model.config.decoder_start_token_id, device=device)

        def forward(decoder_ids: Tensor) -> Tensor:
            out: Tensor = base.model(
                encoder_outputs=(hidden,), attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
            ).logits
            return out

        logits, scores = self.score(
            rows, lambda: forward(start)[:, -1], lambda option, _: forward(torch.cat([start, option], 1))[:, 1:]
        )
        written = start

        def step(newest: Tensor) -> Tensor:
            nonlocal written
            written = torch.cat([written, newest[:, None]], 1)
            return forward(written)[:, -1]

        def keep(index: Tensor) -> None:
            nonlocal written, hidden, mask
            written, hidden, mask = written[index], hidden[index], mask[index]

        tokens, logprobs = self.greedy(rows, logits, step, keep)
        return [(t, lp, tuple(s)) for t, lp, s in zip(tokens, logprobs, scores, strict=True)]


def end_tokens(base: Base) -> frozenset[int]:
    """The tokens that end a text for this model."""
    ids: set[int] = set()
    for source in (base.model.generation_config.eos_token_id, base.tokenizer.eos_token_id):
        ids |= set(source) if isinstance(source, (list, tuple)) else ({source} if source is not None else set())
    return frozenset(ids)


def speaker(base: Base) -> list[Any]:
    """What completions depend on besides their prompts, for kept ones: who speaks, in what precision, on what."""
    return [__version__, base.hash, str(base.dtype), base.device.type, sorted(end_tokens(base))]


def batches(lengths: Sequence[int], fits: Callable[[int, int], bool]) -> list[list[int]]:
    """Indices in batches of like length, longest first, so that memory peaks at the start and not near the end.

    ``fits(rows, longest)`` says whether a batch may be that large; one row always may.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if found and fits(len(found[-1]) + 1, lengths[found[-1][0]]):
            found[-1].append(index)
        else:
            found.append([index])
    return found


def _common_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, short of any prompt's last token."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(common, min(map(len, prompts)) - 1)


def _check_lengths(base: Base, work: _Work) -> None:
    if not all(work.prompts):
        raise DataError("a prompt is blank, and the model has no token that a text begins with")
    if base.kind == "seq2seq":
        return
    lengths = [len(ids) + (past[-1].end if past else 0) for ids, past in zip(work.prompts, work.pasts, strict=True)]
    needed, longest = max((n + max(work.max_new, work.longest_option([row])), n) for row, n in enumerate(lengths))
    base.check_positions(needed, f"a prompt of {longest} tokens with its answer needs")
