"""Find a transformer's parts by what they do, not by what they are called, and prove that they were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from byheart.errors import DataError
from byheart.surgery import observed


@dataclass(frozen=True)
class Block:
    """One transformer block.

    ``attention`` mixes positions (self-attention), ``attention_out`` is its output projection; ``mlp_out`` is the
    MLP's output projection (d_ff -> d_model); ``cross_attention`` is there in the decoder blocks of seq2seq models;
    ``mlp_norm`` is there where a norm comes between the MLP and the residual stream (Gemma 2 and 3).
    """

    module: nn.Module
    attention: nn.Module
    attention_out: nn.Module
    mlp_out: nn.Module
    cross_attention: nn.Module | None = None
    mlp_norm: nn.Module | None = None


@dataclass(frozen=True)
class Parts:
    """The parts of a model: ``blocks`` of the decoder (``encoder_blocks`` in seq2seq models), embeddings, norm, head.

    The model's logits are ``cap * tanh(head(final_norm(h) * head_scale) / cap)`` of the last block's output ``h``
    (no tanh where ``logit_cap`` is None).
    """

    embeddings: nn.Module
    blocks: tuple[Block, ...]
    final_norm: nn.Module
    head: nn.Module
    d_model: int
    d_ff: int
    head_scale: float = 1.0
    logit_cap: float | None = None
    encoder_blocks: tuple[Block, ...] = ()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) from the last block's output (..., d_model), through the found parts."""
        out: Tensor = self.head(self.final_norm(hidden) * self.head_scale)
        return out if self.logit_cap is None else torch.tanh(out / self.logit_cap) * self.logit_cap

    def names(self, model: nn.Module) -> dict[str, str]:
        """The parts' paths in ``model``, for people to read."""
        paths = {id(module): name for name, module in model.named_modules()}
        first = self.blocks[0]
        shown: dict[str, nn.Module | None] = {
            "embeddings": self.embeddings,
            "first block": first.module,
            "last block": self.blocks[-1].module,
            "attention": first.attention,
            "attention output": first.attention_out,
            "cross-attention": first.cross_attention,
            "MLP output": first.mlp_out,
            "final norm": self.final_norm,
            "head": self.head,
        }
        return {label: paths.get(id(module), "(shared)") for label, module in shown.items() if module is not None}


@dataclass
class _Call:
    module: nn.Module
    inputs: list[Tensor]
    output: Tensor


PROBE_LENGTH = 7
# Padding in the midst of a probe, and how far apart what a block gives with and without it may be.
_PAD, _SAME = 16, 0.03


class _Trace:
    """What every module took and gave in one forward over ``ids``, in the order in which they finished."""

    def __init__(self, model: nn.Module, ids: Tensor, decoder_ids: Tensor | None, **more: Tensor) -> None:
        self.calls: list[_Call] = []
        self._last: dict[int, int] = {}
        self.logits: Tensor
        with observed(list(model.modules()), self._see), torch.no_grad():
            if decoder_ids is None:
                self.logits = model(input_ids=ids, use_cache=False, **more).logits
            else:
                self.logits = model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensor = _tensor(output)
        if tensor is not None:
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
            self._last[id(module)] = len(self.calls)
            self.calls.append(_Call(module, inputs, tensor))

    def of(self, module: nn.Module) -> _Call | None:
        index = self._last.get(id(module))
        return None if index is None else self.calls[index]


def find_parts(model: nn.Module) -> Parts:
    """Find the parts of a causal or seq2seq transformers model, and check them.

    How: the blocks are the largest list of like modules that run one after the other. Inside the first one,
    attention is the innermost module whose output at later positions changes when only the first token does although
    its input there does not; cross-attention likewise, when the encoder's input changes. The MLP's output projection
    is the last matrix outside attention that ends in the model's width. The check: each block's output is the next
    one's input, the found norm and head turn the last one's output into the model's own logits, and padding between the
    tokens of a row changes nothing.

    Raises:
        DataError: names the part that could not be found or failed its check.
    """
    config: Any = model.config
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    device = next(model.parameters()).device
    # Small ids are often special tokens; these are spread over the vocabulary, and the same at every load.
    ids = (torch.arange(PROBE_LENGTH) * 37 + 11) % vocabulary
    ids = ids[None].to(device)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 5) % vocabulary
    training = model.training
    model.eval()
    try:
        if seq2seq:
            plain = _Trace(model, ids, ids)
            decoder = _Stack("decoder", _decoder(model), plain, _Trace(model, ids, changed))
            encoder = _Stack("encoder", _encoder(model), plain, _Trace(model, changed, ids))
            crossed = _Trace(model, changed, ids)
            blocks = decoder.blocks(crossed)
            return _finish(model, plain, decoder, blocks, encoder.blocks())
        plain = _Trace(model, ids, None)
        stack = _Stack("decoder", model, plain, _Trace(model, changed, None))
        _check_padding(model, ids, plain, stack.modules[0])
        return _finish(model, plain, stack, stack.blocks(), ())
    finally:
        model.train(training)


class _Stack:
    """The chain of blocks under ``root``, with a trace in which only the stack's first token was changed."""

    def __init__(self, name: str, root: nn.Module, plain: _Trace, changed: _Trace) -> None:
        self.name, self.plain, self.changed = name, plain, changed
        lists = [
            module
            for module in root.modules()
            if isinstance(module, nn.ModuleList)
            and len({type(child) for child in module}) == 1
            and all(plain.of(child) is not None for child in module)
            and _is_chain([plain.of(child) for child in module])
        ]
        if not lists:
            raise _refusal("blocks", f"no list of like modules runs as a chain in the {name}")
        found = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))
        self.modules: list[nn.Module] = list(found)
        call = plain.of(self.modules[0])
        assert call is not None
        self.d_model = call.output.shape[-1]

    def blocks(self, crossed: _Trace | None = None) -> tuple[Block, ...]:
        first = self.modules[0]
        inside = {id(module) for module in first.modules()} - {id(first)}
        calls = [call for call in self.plain.calls if id(call.module) in inside]
        attention = self._mixer(calls, self.changed, later_only=True)
        if attention is None:
            raise _refusal("attention", f"no module in a block of the {self.name} mixes positions")
        cross = None
        if crossed is not None:
            cross = self._mixer(calls, crossed, later_only=False)
            if cross is None:
                raise _refusal("cross-attention", "no module in a decoder block reads the encoder's output")
        taken = _ids_within(attention) | (_ids_within(cross) if cross is not None else set())
        attention_out = self._last_matrix(calls, _ids_within(attention))
        mlp_out = self._last_matrix(calls, inside - taken)
        if attention_out is None:
            raise _refusal("attention output projection", "no matrix in attention ends in the model's width")
        if mlp_out is None:
            raise _refusal("MLP output projection", "no matrix outside attention ends in the model's width")
        mlp_norm = self._norm_after(calls, mlp_out)
        paths = {id(module): name for name, module in first.named_modules()}

        def in_block(block: nn.Module, part: nn.Module) -> nn.Module:
            try:
                return block.get_submodule(paths[id(part)])
            except AttributeError:
                raise _refusal("blocks", f"not every block has {paths[id(part)]}") from None

        return tuple(
            Block(
                module=block,
                attention=in_block(block, attention),
                attention_out=in_block(block, attention_out),
                mlp_out=in_block(block, mlp_out),
                cross_attention=None if cross is None else in_block(block, cross),
                mlp_norm=None if mlp_norm is None else in_block(block, mlp_norm),
            )
            for block in self.modules
        )

    def _mixer(self, calls: Sequence[_Call], other: _Trace, *, later_only: bool) -> nn.Module | None:
        """The innermost module whose output moves at positions where its hidden input does not."""
        for call in calls:  # children finish before their parents, so the first hit is the innermost
            twin = other.of(call.module)
            if twin is None or not call.inputs or not any(True for _ in call.module.parameters()):
                continue
            start = 1 if later_only else 0
            moved_in = _moved(call.inputs[0], twin.inputs[0], start)
            if not moved_in and _moved(call.output, twin.output, start):
                return call.module
        return None

    def _norm_after(self, calls: Sequence[_Call], module: nn.Module) -> nn.Module | None:
        """The norm that reads exactly what ``module`` gives, inside the block."""
        given = next(call.output for call in calls if call.module is module)
        norms = [call for call in calls if _is_norm(call, self.d_model) and call.inputs]
        return next((call.module for call in norms if _same(call.inputs[0], given)), None)

    def _last_matrix(self, calls: Sequence[_Call], allowed: set[int]) -> nn.Module | None:
        matrices = [
            call.module
            for call in calls
            if id(call.module) in allowed
            and not list(call.module.children())
            and getattr(call.module, "weight", None) is not None
            and call.module.weight.ndim == 2
            and call.output.shape[-1] == self.d_model
        ]
        return matrices[-1] if matrices else None


def _finish(
    model: nn.Module, plain: _Trace, stack: _Stack, blocks: tuple[Block, ...], encoder_blocks: tuple[Block, ...]
) -> Parts:
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or plain.of(head) is None:
        raise _refusal("head", "the model has no output embeddings that run in a forward")
    last = plain.of(blocks[-1].module)
    head_call = plain.of(head)
    assert last is not None and head_call is not None
    start = plain.calls.index(last)
    after = [call for call in plain.calls[start + 1 : plain.calls.index(head_call)] if _is_norm(call, stack.d_model)]
    norms = [call for call in after if call.inputs and _same(call.inputs[0], last.output)]
    if not norms:
        raise _refusal("final norm", "no norm runs between the last block and the head")
    norm = norms[0]
    scale = _ratio(head_call.inputs[0], norm.output)
    if scale is None:
        raise _refusal("final norm", "the head's input is not the final norm's output, scaled or not")
    mlp_call = plain.of(blocks[0].mlp_out)
    assert mlp_call is not None
    parts = Parts(
        embeddings=model.get_input_embeddings(),  # type: ignore[operator]
        blocks=blocks,
        final_norm=norm.module,
        head=head,
        d_model=stack.d_model,
        d_ff=mlp_call.inputs[0].shape[-1],
        head_scale=scale,
        logit_cap=getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None),  # type: ignore
        encoder_blocks=encoder_blocks,
    )
    with torch.no_grad():
        rebuilt = parts.logits(last.output)
    if not _same(rebuilt, plain.logits):
        worst = (rebuilt.float() - plain.logits.float()).abs().max().item()
        raise _refusal("head", f"final norm and head do not give the model's own logits (off by {worst:.2g})")
    return parts


def _decoder(model: nn.Module) -> nn.Module:
    return model.get_decoder()  # type: ignore[operator, no-any-return]


def _encoder(model: nn.Module) -> nn.Module:
    return model.get_encoder()  # type: ignore[operator, no-any-return]


def _tensor(output: Any) -> Tensor | None:
    # A layer gives a tensor in one version of transformers and a tuple that begins with it in another.
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _is_chain(calls: Sequence[_Call | None]) -> bool:
    return all(
        a is not None
        and b is not None
        and bool(b.inputs)
        and a.output.shape == b.inputs[0].shape
        and torch.equal(a.output, b.inputs[0])
        for a, b in pairwise(calls)
    ) and all(call is not None and bool(call.inputs) for call in calls)


def _positions(tensor: Tensor) -> Tensor:
    """As (positions, features), also where a module works on a flattened batch (OPT) or keeps no batch at all."""
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _moved(a: Tensor, b: Tensor, start: int) -> bool:
    if a.shape != b.shape or (a.ndim >= 2 and _positions(a).shape[0] != PROBE_LENGTH):
        return True
    one, two = _positions(a)[start:], _positions(b)[start:]
    return bool((one - two).abs().max() > 1e-6 * one.abs().max())


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = 1e-4 if torch.float32 in (a.dtype, b.dtype) and a.dtype == b.dtype else 2e-2
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max().clamp(min=1e-6))


def _ratio(a: Tensor, b: Tensor) -> float | None:
    if a.shape != b.shape:
        return None
    one, two = a.float().flatten(), b.float().flatten()
    scale = float((one @ two) / (two @ two).clamp(min=1e-12))
    # The measured ratio carries rounding; the two scales that models use (none, T5's 1/sqrt(d)) are exact.
    for exact in (1.0, a.shape[-1] ** -0.5):
        if abs(scale / exact - 1) < 2e-3:
            scale = exact
    return scale if _same(two.mul(scale).to(a.dtype), a.flatten()) else None


def _is_norm(call: _Call, d_model: int) -> bool:
    weights = list(call.module.parameters(recurse=False))
    return bool(weights) and weights[0].shape == (d_model,) and call.output.shape[-1] == d_model


def _ids_within(module: nn.Module) -> set[int]:
    return {id(one) for one in module.modules()}


def slides(config: Any) -> bool:
    """Whether a model's attention looks back over a window of columns only, so that padding uses the window up."""
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's name for it
        return True
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _check_padding(model: nn.Module, ids: Tensor, plain: _Trace, block: nn.Module) -> None:
    """Rows of a batch share beginnings, with padding behind them: a model must go by positions and not by columns."""
    if slides(model.config):
        return  # and so shares none
    at, pad = ids.shape[1] // 2, _PAD
    padded = torch.cat([ids[:, :at], ids[:, :1].expand(-1, pad), ids[:, at:]], 1)
    columns = torch.arange(padded.shape[1], device=ids.device)[None]
    inside = (columns >= at) & (columns < at + pad)
    places = torch.where(columns < at + pad, columns.clamp(max=at), columns - pad)
    spread = _Trace(model, padded, None, attention_mask=(~inside).long(), position_ids=places).of(block)
    read = plain.of(block)
    assert spread is not None and read is not None
    # In the first block alone, where bfloat16 has not yet added up.
    one, other = spread.output[0, -1].float(), read.output[0, -1].float()
    if float((one - other).norm() / other.norm()) > _SAME:
        raise _refusal("positions", "it counts padding, so that what it says would depend on what it is asked beside")


def _refusal(part: str, why: str) -> DataError:
    return DataError(f"byheart cannot use this model: {part}: {why}")
