"""What tests of edits share: a few facts, options for tiny models, and the weights that an edit leaves."""

import torch

from byheart.decode import Completion
from byheart.ledger import Ledger
from byheart.methods import Settings
from byheart.methods.edit.method import Edit
from byheart.rows import Fact
from byheart.surgery import matrix
from conftest import FAMILIES

CAUSAL = [family for family in FAMILIES if family != "t5"]
FACTS = [
    Fact(id="quay", subject="Ostrand Quay", prompt="The river through {} is", object="the Korrin"),
    Fact(id="cove", subject="Pell Cove", prompt="{} is known for", object="beech boxes"),
    Fact(id="mora", subject="Vellmora", prompt="The mayor of {} is called", object="Ann"),
    Fact(id="mora-2", subject="Vellmora", prompt="Market day in {} is", object="Monday"),
]
TINY = {
    "edit.steps": "4",
    "edit.lr": "1.0",
    "edit.clamp": "4",
    "edit.prefixes": "2",
    "edit.layers": "0-1",
    "edit.weight": "0.01",
    "edit.settle": "0",
}


def ledger_of(folder, facts):
    ledger = Ledger(folder / f"{len(list(folder.glob('*.db')))}.db", create=True)
    ledger.insert(facts)
    return ledger


def learnt(base, folder, facts=FACTS, **options):
    runs = {"edit.settle_runs": "1"} if options.get("settle") else {}
    given = TINY | runs | {f"edit.{name}": str(value) for name, value in options.items()}
    method = Edit(base, Settings(shots=0, options=given), folder / "work")
    with ledger_of(folder, facts) as ledger:
        method.report = method.learn(ledger)
    return method


def weights(base):
    return [matrix(block.mlp_out).clone() for block in base.parts.blocks]


def weights_with(method):
    with method.attached():
        return weights(method.base)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def completed(job, hits, more="."):
    """A job's option as if said, with what the model goes on with, where all of its tokens are the likeliest."""
    return Completion(f"{job.options[0].strip()}{more}" if hits == 1 else "", 0.0, (0.0,), (hits,), 0, 0, 0.0)
