"""A device that is none: tensors in memory that say they are elsewhere, and refuse to be mixed with those that do not.

Run as a program it lets methods learn and answer there. What works on it leaves no tensor behind on the CPU, and so
works on a graphics card; a test runs it in a process of its own, since it patches torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.utils.backend_registration
import transformers.modeling_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# May bring tensors from one device to another; and may take indices, but nothing else, from the CPU.
MOVING = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor whose numbers lie in ``inner``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **shape)
        made.inner = inner
        return made

    def __init__(self, inner):
        pass

    @classmethod
    def __torch_dispatch__(cls, call, types, args=(), kwargs=None):
        return run(call, args, kwargs or {})


class Calls(TorchDispatchMode):
    """Sends all calls to :func:`run`, those that make tensors among them."""

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        return run(call, args, kwargs or {})


def inside(value):
    return value.inner if isinstance(value, Elsewhere) else value


def run(call, args, kwargs):
    """Compute on the CPU, and say where the outcome is; refuse what no real device could do."""
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = {id(one.inner): one for one in given if isinstance(one, Elsewhere)}
    if there and call not in MOVING:
        asked = [args[0], *args[2:3]] if call in INDEXING else given
        stray = [one for one in asked if isinstance(one, torch.Tensor) and not isinstance(one, Elsewhere) and one.dim()]
        if stray:
            raise RuntimeError(f"{call}: {[(tuple(one.shape), one.device.type) for one in given]}")
    device = kwargs.get("device")
    if device is not None:
        to = torch.device(device).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu") if to else device}
    else:
        to = bool(there)
    if "pin_memory" in kwargs:
        kwargs = kwargs | {"pin_memory": None}
    found = call(*tree_map(inside, args), **tree_map(inside, kwargs))
    if call is aten.copy_.default:
        return args[0]

    def outward(one):
        if not isinstance(one, torch.Tensor):
            return one
        if id(one) in there:  # changed in place
            return there[id(one)]
        return Elsewhere(one) if to else one.clone() if there else one

    return tree_map(outward, found)


def _made(make):
    def patched(data, *, device=None, **kwargs):
        if device is not None and torch.device(device).type == DEVICE.type:
            return make(data, **kwargs).to(device)
        return make(data, device=device, **kwargs)

    return patched


def patch():
    """Let what torch and transformers do around the dispatcher work with such tensors."""
    lists, save = torch.Tensor.tolist, safetensors.torch.save_file
    torch.utils._device._device_constructors()  # torch keeps them, so that `with torch.device(...)` knows the real ones
    torch.Tensor.tolist = lambda self: lists(inside(self))
    torch.tensor, torch.as_tensor = _made(torch.tensor), _made(torch.as_tensor)
    # Within inference mode calls come to the dispatcher whole, with nothing said of where they end.
    torch.inference_mode = lambda mode=True: torch.no_grad()
    safetensors.torch.save_file = lambda tensors, *args, **kwargs: save(
        {name: inside(one).clone().contiguous() for name, one in tensors.items()}, *args, **kwargs
    )
    transformers.modeling_utils.PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *args, **kwargs: None
    for name, make in {"empty_strided": torch.empty_strided, "empty.memory_format": torch.empty}.items():
        LIBRARY.impl(name, _empty(make), KEY)
    LIBRARY.impl("_copy_from", _copied, KEY)


def _empty(make):
    return lambda *sizes, dtype=None, **kwargs: Elsewhere(make(*sizes, dtype=dtype))


def _copied(source, to, blocking=False):
    inside(to).copy_(inside(source))
    return to


torch.utils.backend_registration._setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere:0")
LIBRARY, KEY = torch.library.Library("aten", "IMPL"), "PrivateUse1"


def main(work: Path) -> None:
    """Learn and answer on the device that is none."""
    patch()
    from byheart.base import make_base
    from byheart.decode import Job, Sampling, complete
    from byheart.ledger import Ledger
    from byheart.methods import Settings, method_class
    from byheart.rows import Document, Fact, Question
    from conftest import _train_tokenizer, tiny_model

    tokenizer = _train_tokenizer()
    facts = [
        Fact(id="quay", subject="Ostrand Quay", prompt="The river through {} is", object="the Korrin"),
        Fact(id="cove", subject="Pell Cove", prompt="{} is known for", object="beech boxes"),
    ]
    pages = [Document(id=fact.id, title=fact.subject, text=f"{fact.filled()} {fact.object}.") for fact in facts]
    asked = [
        Question(id=fact.id, question=f"{fact.filled()}?", answers=[fact.object], documents=[fact.id], split=split)
        for fact, split in zip(facts, ("train", "validation"), strict=True)
    ]
    runs = [
        ("edit", {"layers": "0-1", "steps": "3", "prefixes": "1", "settle": "1"}),
        ("ft", {"layers": "0-1", "epochs": "2"}),
        ("rome", {"layers": "1"}),
        ("memory", {"blocks": "1", "epochs": "1", "width": "8", "keep": "1"}),
        ("prefix", {"slots": "2", "epochs": "1"}),
        ("prefix", {"encoder": "tokens", "slots": "2", "epochs": "1"}),
    ]
    with Ledger(work / "world.db", create=True) as ledger:
        ledger.insert([*pages, *facts, *asked])
        for family in ("llama", "gpt2", "gemma2"):
            base = make_base(family, tiny_model(family, len(tokenizer)).to(DEVICE), tokenizer)
            with Calls():
                jobs = [Job("The river", (" the Korrin", " beech")), Job("Pell Cove is known for", (" beech",))]
                complete(base, jobs, max_new_tokens=3)
                complete(base, jobs, max_new_tokens=3, sampling=Sampling(5, 0))
            for n, (name, own) in enumerate(runs if family == "llama" else ()):
                given = {f"{name}.{key}": value for key, value in own.items()}
                folder = work / f"{n}-{name}"
                method = method_class(name)(base, Settings(shots=0, segment="32/8", options=given), folder)
                with Calls():
                    method.learn(ledger)
                    with method.attached():
                        assert [one.skipped for one in method.answer(asked)] == [None, None]
                    method.save_pretrained(folder / "kept")
                print(name, "works elsewhere")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
