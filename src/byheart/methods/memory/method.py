"""The method ``memory``: networks in the residual stream, trained on a ledger's pages, questions and facts."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from byheart.base import Base
from byheart.errors import DataError, UsageError, first_line
from byheart.ledger import Change, Ledger
from byheart.methods.contract import LearnReport, Progress, Settings, parse_options
from byheart.methods.controls import Closed
from byheart.methods.memory.adapter import Place, attached, make_adapters
from byheart.methods.memory.examples import PACK, PLAIN, Frame, Piece, What, packed, pieces_of, to_learn
from byheart.methods.memory.states import Row, States, Upper, keep_states
from byheart.peft_layout import CONFIG, PREFIX, TENSORS, lora_config, path_of
from byheart.prompt import PromptFormat
from byheart.rows import Kind
from byheart.storage import read_json, write_json, write_text
from byheart.training import Recipe, Trained, train

_PIECES = "pieces.jsonl"


@dataclass(frozen=True)
class MemoryOptions:
    """What ``--set memory.NAME=VALUE`` takes; the defaults are those of FIELD's first seed.

    Attributes:
        blocks: ``FIRST-LAST``, several numbers with ``+`` between them, or ``auto``: 70 to 80 % of the depth.
        place: ``block`` adds to a block's output, ``mlp`` behind the MLP, ``parallel`` beside it; ``lora`` is a
            low-rank change of the MLP's last matrix with as many parameters.
        width: of the networks.
        learn: ``doc`` (pages), ``temp`` (questions and facts in the form in which they are asked), ``doctemp`` (both).
        wordings: of each fact, how many of its wordings are learnt; 0: all.
        epochs: how often everything is seen.
        batch: sequences a step.
        lr, warmup, decay, clip: see :class:`byheart.training.Recipe`.
        packings: in how many ways questions are put together to sequences, in turn; each is kept on disk.
        revise_epochs: after a change, how often the changed rows are seen, each beside as many others.
    """

    blocks: str = "auto"
    place: Place = "block"
    width: int = 128
    learn: What = "doctemp"
    wordings: int = 0
    epochs: int = 25
    batch: int = 4
    lr: float = 1e-3
    warmup: int = 10
    decay: float = 0.05
    clip: float = 10.0
    packings: int = 3
    revise_epochs: int = 12


class Memory(Closed):
    """Trained memories (FIELD.md, section 1): the base stays frozen, what is learnt sits in a few small networks."""

    name = "memory"
    learns: ClassVar[Kind] = "document"

    def __init__(self, base: Base, settings: Settings, work: Path) -> None:
        if base.kind != "causal":
            raise DataError(f"{self.name}: {base.name} is an encoder-decoder model; memory needs a decoder-only one")
        super().__init__(base, settings, work)
        self.options = parse_options(MemoryOptions, self.name, settings.options)
        for name in ("width", "epochs", "batch", "packings"):
            if getattr(self.options, name) < 1:
                raise UsageError(f"--set memory.{name}={getattr(self.options, name)}: must be at least 1")
        self.blocks = choose_blocks(self.options.blocks, len(base.parts.blocks))
        self.adapters = self._fresh()
        self.pieces: list[Piece] = []
        self.losses: list[float] = []

    # -- the contract ----------------------------------------------------------------------------------------

    def learn(self, ledger: Ledger, progress: Progress = lambda count: None) -> LearnReport:
        """Train on the ledger's pages, training questions and facts; ``progress`` is told of epochs' worth of pages."""
        super().learn(ledger)
        self.pieces = list(to_learn(ledger, self.options.learn, self._asking(), self.options.wordings))
        self.adapters = self._fresh()
        if not self.pieces:
            return LearnReport(notes=(f"nothing to learn with memory.learn={self.options.learn}",))
        documents = len({piece.owner for piece in self.pieces if piece.kind == "page"})
        trained, notes = self.train(self.pieces, progress, documents)
        self.losses = trained.losses
        return self._report(trained.seconds, documents, notes)

    def revise(self, change: Change) -> LearnReport:
        """Go on from what is learnt: the changed rows are learnt, what they replace is trained away.

        Away means towards what the base model itself would say there. As many other rows are seen beside them.
        """
        began = time.perf_counter()
        old = [piece for piece in self.pieces if piece.owner == change.id]
        known = {"document": ("page",), "fact": ("question", "statement"), "question": ("question",)}[change.kind]
        old = [piece for piece in old if piece.kind in known]
        kept = [piece for piece in self.pieces if piece not in old]
        new = self._pieces_of(change)
        gone = [piece for piece in old if piece not in new]
        new = [piece for piece in new if piece not in old]
        if not gone and not new:
            return LearnReport()
        before = self._likelihoods(gone)
        self._follow(change, new, gone, kept)
        self.pieces = [*kept, *(piece for piece in old if piece not in gone), *new]
        notes = self._what_is_left(gone, before)
        return self._report(time.perf_counter() - began, int(change.kind == "document"), notes)

    def attached(self) -> AbstractContextManager[None]:
        """The base with the networks' outputs added."""
        return attached(self.base, self.adapters, self.options.place)

    # -- training --------------------------------------------------------------------------------------------

    def train(
        self,
        pieces: Sequence[Piece],
        progress: Progress = lambda count: None,
        count: int = 0,
        frame: Frame = PLAIN,
    ) -> tuple[Trained, tuple[str, ...]]:
        """Train fresh networks on pieces; what is begun in the working folder goes on.

        Args:
            count: what ``progress`` shall have been told of in the end.
            frame: what stands around questions.
        """
        options, seed = self.options, self.settings.seed
        began = time.perf_counter()
        upper = Upper(self.base, self.adapters, options.place)
        several = [
            packed(self.base.tokenizer, pieces, n, frame, 1 if self.settings.chat else PACK)
            for n in range(options.packings)
        ]
        kept = [self._states(rows, upper.start) for rows in several]
        ready = time.perf_counter() - began
        orders = _Orders([len(rows) for rows in several], options.batch, options.epochs, seed)
        told = 0

        def loss(step: int) -> Tensor:
            packing, numbers = orders.batch(step)
            rows = [several[packing][n] for n in numbers]
            found, _ = upper.loss(rows, kept[packing].padded(numbers))
            return found.mean()

        def tell(steps: int) -> None:
            nonlocal told
            told += steps
            progress(told * count // orders.steps - (told - steps) * count // orders.steps)

        mark = _mark([self.base.hash, str(self.base.dtype), asdict(options), self.blocks, seed, several])
        recipe = Recipe(orders.steps, options.lr, options.warmup, options.decay, options.clip)
        trained = train(self.adapters, loss, recipe, self._folder / f"{mark}.safetensors", tell)
        tail = trained.losses[-max(1, orders.steps // options.epochs) :]
        note = (
            f"{orders.steps} steps, {sum(len(r.ids) for r in several[0]):,} tokens an epoch; loss "
            f"{trained.losses[0]:.3f} at the start, {sum(tail) / len(tail):.3f} in the last epoch; {ready:.0f} s for "
            "hidden states"
        )
        return Trained(trained.losses, trained.seconds + ready), (note,)

    def _follow(self, change: Change, new: Sequence[Piece], gone: Sequence[Piece], kept: Sequence[Piece]) -> None:
        options = self.options
        upper = Upper(self.base, self.adapters, options.place)
        draw = random.Random(f"{self.settings.seed}/{change.mark}")
        beside = draw.sample(list(kept), min(len(kept), 4 * PACK + len(new) + len(gone)))
        learnt = packed(self.base.tokenizer, [*new, *beside], self.settings.seed)
        away = [packed(self.base.tokenizer, [piece], 0)[0] for piece in gone]
        states = self._states(learnt, upper.start)
        away_states = self._states(away, upper.start) if away else None
        plain: list[Tensor] = []
        if away_states:
            with torch.no_grad():
                for n, row in enumerate(away):
                    logits, _ = upper.labelled([row], away_states.padded([n]), plain=True)
                    plain.append(logits.float().log_softmax(-1))
        orders = _Orders([len(learnt)], options.batch, options.revise_epochs, self.settings.seed)
        turns = (
            [random.Random(f"{self.settings.seed}/{step}").randrange(len(away)) for step in range(orders.steps)]
            if away
            else []
        )

        def loss(step: int) -> Tensor:
            _, numbers = orders.batch(step)
            found, _ = upper.loss([learnt[n] for n in numbers], states.padded(numbers))
            total = found.mean()
            if away_states:
                n = turns[step]
                logits, _ = upper.labelled([away[n]], away_states.padded([n]))
                total = total + functional.kl_div(
                    logits.float().log_softmax(-1), plain[n], log_target=True, reduction="batchmean"
                )
            return total

        mark = _mark([self.base.hash, asdict(options), change.mark, learnt, away, _digest(self.adapters)])
        recipe = Recipe(orders.steps, options.lr / 2, options.warmup, options.decay, options.clip)
        train(self.adapters, loss, recipe, self._folder / f"{mark}.safetensors")

    def accuracy(self, pieces: Sequence[Piece]) -> float:
        """The share of the pieces' tokens that are the likeliest where they are to be predicted."""
        rows = [row for piece in pieces for row in packed(self.base.tokenizer, [piece], 0)]
        upper = Upper(self.base, self.adapters, self.options.place)
        states = self._states(rows, upper.start)
        with torch.no_grad():
            hits = [upper.loss([row], states.padded([n]))[1] for n, row in enumerate(rows)]
        return float(torch.cat(hits).double().mean())

    def _likelihoods(self, pieces: Sequence[Piece], *, plain: bool = False) -> list[float]:
        """Of each piece the mean probability of a token of its answer."""
        rows = [packed(self.base.tokenizer, [piece], 0)[0] for piece in pieces]
        if not rows:
            return []
        upper = Upper(self.base, self.adapters, self.options.place)
        states = self._states(rows, upper.start)
        found = []
        with torch.no_grad():
            for n, row in enumerate(rows):
                logits, label = upper.labelled([row], states.padded([n]), plain=plain)
                logprob = logits.float().log_softmax(-1).gather(1, label[:, None])
                found.append(float(logprob.mean().exp()))
        return found

    def _what_is_left(self, gone: Sequence[Piece], before: Sequence[float]) -> tuple[str, ...]:
        if not gone:
            return ()
        after, base = self._likelihoods(gone), self._likelihoods(gone, plain=True)
        one, two, three = (sum(some) / len(some) for some in (before, after, base))
        return (
            f"what was taken back ({len(gone)} texts): p of a token {one:.3f} before, {two:.3f} now, {three:.3f} in "
            "the base model",
        )

    def _pieces_of(self, change: Change) -> list[Piece]:
        if change.after is None:
            return []
        if change.kind == "document" and self.options.learn == "temp":
            return []
        if change.kind != "document" and self.options.learn == "doc":
            return []
        return list(pieces_of(change.after, self._asking(), self.options.wordings))

    def _states(self, rows: Sequence[Row], start: int) -> States:
        mark = _mark([self.base.hash, str(self.base.dtype), start, [row.ids for row in rows]])
        return keep_states(self.base, rows, start, self._folder / f"{mark}.states")

    @property
    def _folder(self) -> Path:
        folder = self.work / "memory"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _asking(self) -> PromptFormat:
        return PromptFormat(self.base.tokenizer, (), chat=self.settings.chat)

    def _fresh(self) -> nn.ModuleDict:
        return make_adapters(self.base, self.blocks, self.options.place, self.options.width, self.settings.seed)

    def _report(self, seconds: float, documents: int, notes: tuple[str, ...]) -> LearnReport:
        size = sum(4 * one.numel() for one in self.adapters.parameters())
        facts = len({piece.owner for piece in self.pieces if piece.kind == "statement"})
        return LearnReport(seconds=seconds, bytes=size, documents=documents, facts=facts, notes=notes)

    # -- keeping ---------------------------------------------------------------------------------------------

    def _save_into(self, folder: Path) -> None:
        super()._save_into(folder)
        save_file(
            {self._key(name): one.detach().cpu().contiguous() for name, one in self.adapters.named_parameters()},
            folder / TENSORS,
        )
        config: dict[str, Any] = {"peft_type": "BYHEART_MEMORY", "base_model_name_or_path": self.base.name}
        if self.options.place == "lora":
            modules = [self.base.parts.blocks[number].mlp_out for number in self.blocks]
            config = lora_config(self.base, modules, len(next(self.adapters.parameters())))
        write_json(folder / CONFIG, config)
        own = {"blocks": self.blocks, "options": asdict(self.options), "losses": self.losses}
        write_json(folder / f"{self.name}.json", own)
        write_text(folder / _PIECES, "".join(piece.model_dump_json() + "\n" for piece in self.pieces))

    def _key(self, name: str) -> str:
        """A parameter's name in the file: in a LoRA that of PEFT, else under its block."""
        number, rest = name.split(".", 1)
        block = self.base.parts.blocks[int(number)]
        if self.options.place == "lora":
            return f"{PREFIX}{path_of(self.base, block.mlp_out)}.{rest}"
        return f"{PREFIX}{path_of(self.base, block.module)}.memory.{rest}"

    @classmethod
    def from_pretrained(cls, path: Path, base: Base) -> Self:
        """Settings, examples, networks and what they learnt."""
        method = super().from_pretrained(path, base)
        record = read_json(path / f"{cls.name}.json")
        try:
            tensors = load_file(path / TENSORS)
            state = {name: tensors[method._key(name)] for name, _ in method.adapters.named_parameters()}
            method.adapters.load_state_dict(state)
            lines = (path / _PIECES).read_text(encoding="utf-8").splitlines()
            method.pieces = [Piece.model_validate_json(line) for line in lines]
            method.losses = [float(one) for one in record["losses"]]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, ValidationError) as error:
            raise DataError(f"{path}: not what byheart writes there ({first_line(error)})") from None
        return method


class _Orders:
    """Which rows each step sees: every epoch all of one packing, in an order that only its number and the seed give."""

    def __init__(self, sizes: Sequence[int], batch: int, epochs: int, seed: int) -> None:
        self._plan = [
            (epoch % len(sizes), start, epoch)
            for epoch in range(epochs)
            for start in range(0, sizes[epoch % len(sizes)], batch)
        ]
        self._sizes, self._batch, self._seed = sizes, batch, seed
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def steps(self) -> int:
        return len(self._plan)

    def batch(self, step: int) -> tuple[int, list[int]]:
        """The packing and the rows of one step."""
        packing, start, epoch = self._plan[step]
        if self._order[0] != epoch:
            order = list(range(self._sizes[packing]))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return packing, self._order[1][start : start + self._batch]


def choose_blocks(text: str, depth: int) -> list[int]:
    """Block numbers from ``auto``, ``FIRST-LAST`` or ``A+B+C``.

    Raises:
        UsageError: where they are none, or not in the model.
    """
    if text == "auto":
        first = min(math.ceil(0.7 * depth), depth - 1)
        return list(range(first, max(math.ceil(0.8 * depth), first + 1)))
    span = re.fullmatch(r"(\d+)-(\d+)", text)
    numbers = (
        list(range(int(span[1]), int(span[2]) + 1)) if span else [int(one) for one in text.split("+") if one.isdigit()]
    )
    if not numbers or max(numbers) >= depth or (not span and len(numbers) != len(text.split("+"))):
        raise UsageError(f"--set memory.blocks={text}: must be auto, FIRST-LAST or A+B with numbers below {depth}")
    return sorted(set(numbers))


def _mark(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=lambda one: [one.ids, one.labels]).encode()).hexdigest()[:24]


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for one in module.parameters():
        digest.update(one.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
