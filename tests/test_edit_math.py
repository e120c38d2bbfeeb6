"""MEMIT against a plain double-precision implementation of the paper's formulas, and the solves against each other."""

from dataclasses import replace

import pytest
import torch

from byheart.base import make_base
from byheart.methods.edit import guard, solve
from byheart.methods.edit.covariance import second_moments
from byheart.methods.edit.export import low_rank
from byheart.methods.edit.prompts import prepare
from byheart.methods.edit.targets import TargetOptions, find_targets
from byheart.methods.edit.weights import product
from byheart.methods.edit.write import WriteOptions, Writer, _means, _numbered
from byheart.rows import Fact
from byheart.surgery import changed, matrix
from conftest import tiny_model

PREFIXES = ("The keeper of the light wrote that. ", "In the morning, ")
FACTS = [
    Fact(id="a", subject="Ostrand Quay", prompt="The river that runs through {} is", object="the Korrin"),
    Fact(id="b", subject="Pell Cove", prompt="{} is known for its", object="beech boxes"),
    Fact(
        id="c",
        subject="Vellmora",
        prompt="Anyone who asks in Hathersund hears that the mayor of {} is called",
        object="Ann",
    ),
]
OPTIONS = TargetOptions(steps=6, lr=0.3, clamp=0.4, kl=0.5, weight_decay=0.7, stop="loss", stop_loss=1e-9)
LAYERS = (0, 1)
# Who the first and the last fact are put about; nobody the second, as if it asked a question.
OTHERS = [
    [FACTS[n].model_copy(update={"subject": name}) for name in names]
    for n, names in enumerate((("Tole",), (), ("Holm", "Hathersund")))
]


def plain_forward(base, ids, layer, place, delta):
    """Logits (n, vocabulary) of one row from the model's own forward, with delta added after ``layer`` at ``place``."""

    def add(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        moved = hidden.clone()
        moved[0, place] = moved[0, place] + delta
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = base.parts.blocks[layer].module.register_forward_hook(add)
    logits = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits


def plain_states(base, ids, place):
    """Keys of every layer and outputs of every block at one token, from one forward of one row."""
    keys, outs, handles = {}, {}, []
    for n, block in enumerate(base.parts.blocks):
        handles.append(
            block.mlp_out.register_forward_pre_hook(
                lambda m, args, n=n: keys.__setitem__(n, args[0].reshape(len(ids), -1)[place])
            )
        )
        handles.append(
            block.module.register_forward_hook(
                lambda m, args, out, n=n: outs.__setitem__(n, (out[0] if isinstance(out, tuple) else out)[0, place])
            )
        )
    with torch.no_grad():
        base.model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return keys, outs


def plain_rows(base, fact):
    """(ids with the target, place of the subject's last token, target ids) of each prompt, found by counting words."""
    found = []
    for prefix in ("", *PREFIXES):
        text = prefix + fact.filled()
        before = prefix + fact.prompt.split("{}")[0] + fact.subject
        ids, target = base.tokenizer(text)["input_ids"], base.tokenizer(" " + fact.object)["input_ids"]
        found.append((ids, len(base.tokenizer(before)["input_ids"]) - 1, target))
    return found


def plain_target(base, fact, layer):
    """z by torch's own Adam on the loss as written in the paper."""
    rows = plain_rows(base, fact)
    essence = base.tokenizer(f"{fact.subject} is a")["input_ids"]
    essence_place = len(base.tokenizer(fact.subject)["input_ids"]) - 1
    states = [plain_states(base, ids, place)[1][layer] for ids, place, _ in rows]
    h, length = states[0], torch.stack([state.norm() for state in states]).median()
    before = plain_forward(base, essence, layer, essence_place, torch.zeros_like(h))[-1].log_softmax(-1).detach()
    delta = torch.zeros_like(h, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=OPTIONS.lr * float(length) / len(h) ** 0.5)
    for step in range(OPTIONS.steps):
        nll = 0
        for ids, place, target in rows:
            logprobs = plain_forward(base, ids + target[:-1], layer, place, delta)[-len(target) :].log_softmax(-1)
            nll = nll - logprobs[torch.arange(len(target)), target].mean() / len(rows)
        now = plain_forward(base, essence, layer, essence_place, delta)[-1].log_softmax(-1)
        kl = (now.exp() * (now - before)).sum()
        moved = delta.norm() if step else delta.square().sum() * 0  # the norm has no gradient at zero
        loss = nll + OPTIONS.kl * kl + OPTIONS.weight_decay * moved / length**2
        if step == OPTIONS.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > OPTIONS.clamp * length:
                delta *= OPTIONS.clamp * length / delta.norm()
    return (h + delta).detach(), loss.item()


def plain_write(base, targets, moments, weight, scatter, beside):
    """K and Δ layer by layer with an explicit inverse, weights written in place; the model is left changed.

    ``beside`` times the mean over a fact's others of k kᵀ stands in the inverse for each fact.
    """
    keys_of, delta_of = {}, {}
    for place, layer in enumerate(LAYERS):
        keys, residuals, spread = [], [], 0
        for fact, z in zip(FACTS, targets, strict=True):
            states = [plain_states(base, ids, at) for ids, at, _ in plain_rows(base, fact)]
            behind = torch.stack([k[layer] for k, _ in states[1:]]).mean(0)
            keys.append((states[0][0][layer] + behind) / 2)
            shares = [0.5, *[0.5 / len(PREFIXES)] * len(PREFIXES)]
            apart = [k[layer] - keys[-1] for k, _ in states]
            spread = spread + scatter * sum(s * torch.outer(one, one) for s, one in zip(shares, apart, strict=True))
            residuals.append((z - states[0][1][LAYERS[-1]]) / (len(LAYERS) - place))
        for others in OTHERS:
            for fact in others:
                ids = base.tokenizer(fact.prompt.split("{}")[0] + fact.subject)["input_ids"]
                one = plain_states(base, ids, len(ids) - 1)[0][layer]
                spread = spread + beside / len(others) * torch.outer(one, one)
        k, r = torch.stack(keys, 1), torch.stack(residuals, 1)
        size = len(k)
        c = moments[layer] + solve.RIDGE * moments[layer].trace() / size * torch.eye(size, dtype=torch.float64)
        delta_of[layer] = r @ k.T @ torch.linalg.inv(weight * size * c + spread + k @ k.T)
        keys_of[layer] = k.T
        matrix(base.parts.blocks[layer].mlp_out).add_(delta_of[layer])
    return keys_of, delta_of


@pytest.mark.parametrize(("scatter", "beside"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (0.0, 2.0)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_targets_keys_and_deltas_are_those_of_the_plain_formulas(family, scatter, beside, tokenizer):
    base = make_base(family, tiny_model(family, len(tokenizer), torch.float64), tokenizer)
    prepared, skipped = prepare(base, FACTS, PREFIXES)
    assert not skipped
    found = find_targets(base, prepared, LAYERS[-1], OPTIONS)
    plain = [plain_target(base, fact, LAYERS[-1]) for fact in FACTS]
    for n, (z, loss) in enumerate(plain):
        assert torch.allclose(found.z[n], z, rtol=1e-7, atol=1e-8)
        assert found.loss[n].item() == pytest.approx(loss, rel=1e-7)

    torch.manual_seed(1)
    text = torch.randn(400, base.parts.d_ff, dtype=torch.float64)
    moments = dict.fromkeys(LAYERS, text.T @ text / 400)
    before = [matrix(block.mlp_out).clone() for block in base.parts.blocks]
    writer = Writer(base, moments, WriteOptions(weight=0.05, scatter=scatter, others=beside))
    others = [prepare(base, of_fact, ())[0] for of_fact in OTHERS] if beside else []
    written = writer.write(prepared, found.z, others=others)
    for block, old in zip(base.parts.blocks, before, strict=True):
        assert torch.equal(matrix(block.mlp_out), old)
    # Shifts go through the same maps, and change nothing else.
    shifts = torch.randn(len(FACTS), len(LAYERS), base.parts.d_model, dtype=torch.float64)
    again = written.shifted(shifts)
    for place, layer in enumerate(LAYERS):
        (left, right), (old_left, old_right) = again.deltas[layer], written.deltas[layer]
        assert torch.equal(again.keys[layer], written.keys[layer])
        assert torch.equal(written.shifted(0 * shifts).shifted(shifts).residuals[layer], again.residuals[layer])
        assert torch.allclose(left @ right, old_left @ old_right + shifts[:, place].T @ written.maps[layer])
    keys, deltas = plain_write(base, [z for z, _ in plain], moments, 0.05, scatter, beside)
    for layer in LAYERS:
        # Llama norms its states in single precision whatever the model runs in.
        assert torch.allclose(written.keys[layer], keys[layer], rtol=1e-5, atol=1e-7)
        left, right = written.deltas[layer]
        assert torch.allclose(left @ right, deltas[layer], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("scatter", "beside"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (0.0, 2.0)])
def test_facts_written_as_one_count_as_many(scatter, beside, tokenizer):
    base = make_base("llama", tiny_model("llama", len(tokenizer), torch.float64), tokenizer)
    one, _ = prepare(base, FACTS, PREFIXES)
    torch.manual_seed(1)
    text = torch.randn(400, base.parts.d_ff, dtype=torch.float64)
    options = WriteOptions(weight=0.05, scatter=scatter, others=beside)
    writer = Writer(base, dict.fromkeys(LAYERS, text.T @ text / 400), options)
    # The third fact three times over: the least squares with three equal keys, or with one that counts three times.
    prepared, groups = [one[0], one[2], one[2], one[1], one[2]], [0, 1, 1, 2, 1]
    some = [prepare(base, of_fact, ())[0] if beside else [] for of_fact in OTHERS]
    others = [some[0], some[2], some[2], some[1], some[2]]
    z = torch.randn(3, base.parts.d_model, dtype=torch.float64)[groups]
    apart, together = (writer.write(prepared, z, how, others=others) for how in (None, groups))
    writer.options = replace(writer.options, counted=False)
    once = writer.write(prepared, z, groups, others=others)
    # Counting once is the same, whatever share of its others each of three equal facts brings.
    alone = writer.write([one[0], one[2], one[1]], z[[0, 1, 3]], others=[some[0], some[2], some[1]])
    for layer in LAYERS:
        (left, right), (merged, into), (_, other) = (one.deltas[layer] for one in (apart, together, once))
        assert len(into) == len(other) == 3
        assert torch.allclose(left @ right, merged @ into, rtol=1e-5, atol=1e-7)
        assert other[1].norm() < 0.99 * into[1].norm()
        assert torch.allclose(once.maps[layer], alone.maps[layer], rtol=1e-5, atol=1e-7)


def random_problem(facts, size=24, out=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(200, size, generator=g, dtype=torch.float64)
    keys = torch.randn(facts, size, generator=g, dtype=torch.float64)
    return text.T @ text / 200, keys, torch.randn(facts, out, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("facts", [1, 7, 24, 60])
def test_woodbury_is_the_dense_solve(facts):
    moment, keys, residuals = random_problem(facts)
    c = solve.regularizer(moment, 0.3)
    left, right = solve.woodbury(solve.cholesky(c), keys, residuals)
    assert torch.allclose(left @ right, solve.dense(c, keys, residuals), rtol=0, atol=1e-9)


def test_equality_meets_every_target_and_least_squares_does_not():
    moment, keys, residuals = random_problem(7)
    factor = solve.cholesky(solve.regularizer(moment, 1.0))
    left, right = solve.equality(factor, keys, residuals)
    assert torch.allclose(keys @ (left @ right).T, residuals, atol=1e-9)
    left, right = solve.woodbury(factor, keys, residuals)
    assert not torch.allclose(keys @ (left @ right).T, residuals, atol=1e-2)


def test_the_weight_means_the_same_at_any_scale_of_keys():
    moment, keys, residuals = random_problem(5)
    small = solve.woodbury(solve.cholesky(solve.regularizer(moment, 0.5)), keys, residuals)
    large = solve.woodbury(solve.cholesky(solve.regularizer(moment * 1e6, 0.5)), keys * 1e3, residuals)
    assert torch.allclose(small[0] @ small[1], 1e3 * (large[0] @ large[1]), rtol=1e-8)


def test_null_space_leaves_the_directions_of_text_alone():
    g = torch.Generator().manual_seed(0)
    text = torch.randn(300, 8, generator=g, dtype=torch.float64) @ torch.randn(8, 24, generator=g, dtype=torch.float64)
    _, keys, residuals = random_problem(4)
    moment = text.T @ text / 300
    projector = solve.null_space(moment, 0.999999)
    delta = solve.projected(projector, moment, keys[:0], keys, residuals, 1e-6)
    assert (text @ delta.T).abs().max() < 1e-4 * (keys @ delta.T).abs().max()
    assert torch.allclose(keys @ delta.T, residuals, atol=1e-2)


def test_behind_a_norm_the_direction_of_the_target_is_met():
    g = torch.Generator().manual_seed(0)
    gain = torch.rand(16, generator=g, dtype=torch.float64) + 0.5

    def norm(x):
        return gain * x / x.square().mean(-1, keepdim=True).sqrt()

    values, residuals = torch.randn(5, 16, generator=g).double(), torch.randn(5, 16, generator=g).double()
    wanted = norm(values) + residuals
    reached = norm(values + solve.before_norm(values, residuals, norm))
    assert torch.allclose(torch.nn.functional.cosine_similarity(reached, wanted), torch.ones(5).double())


def test_shares_of_the_residual():
    def written(how, layers):
        left = 1.0
        for place in range(layers):
            left -= left * solve.share(how, place, layers)
        return left

    assert written("even", 5) == pytest.approx(0)
    assert written("ends", 5) == pytest.approx(0)
    assert [solve.share("even", n, 4) for n in range(4)] == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert [solve.share("sqrt", n, 4) for n in range(4)] == pytest.approx([1 / 2, 3**-0.5, 2**-0.5, 1])
    assert [solve.share("ends", n, 4) for n in range(4)] == [0.5, 0, 0, 1]


def test_one_layer_moves_the_value_by_delta(tokenizer, tiny):
    base = tiny("llama")
    block = base.parts.blocks[1].mlp_out
    old = block.weight.data.clone()
    delta = torch.randn(base.parts.d_model, 2), torch.randn(2, base.parts.d_ff)
    x = torch.randn(3, base.parts.d_ff)
    with torch.no_grad():
        before = block(x)
        with changed([(block, product(delta))]):
            assert torch.allclose(block(x) - before, x @ product(delta).T, atol=1e-3)
        assert torch.equal(block.weight.data, old)


def test_what_was_written_before_stands_in_the_solve(tokenizer, monkeypatch, tmp_path):
    """Δ = R Kᵀ (λC + K_p K_pᵀ + K Kᵀ)⁻¹; with little text, keys of before then get next to nothing."""
    base = make_base("llama", tiny_model("llama", len(tokenizer), torch.float64), tokenizer)
    prepared, _ = prepare(base, FACTS, PREFIXES)
    moment, past, _ = random_problem(5, base.parts.d_ff, seed=3)
    z = torch.randn(3, base.parts.d_model, dtype=torch.float64)
    for constraint in ("none", "equality", "nullspace"):
        options = WriteOptions(weight=1e-3, scatter=0.0, others=0.0, constraint=constraint, energy=0.3)
        writer = Writer(base, {0: moment}, options)
        written, before = writer.write(prepared, z, past={0: past}), writer.write(prepared, z)
        delta, alone = product(written.deltas[0]), product(before.deltas[0])
        keys, residuals = written.keys[0], written.residuals[0]
        if constraint == "none":
            inside = solve.regularizer(moment, 1e-3) + past.T @ past + keys.T @ keys
            assert torch.allclose(delta, (residuals.T @ keys @ torch.linalg.inv(inside)).float(), atol=1e-5)
        assert (past @ delta.double().T).norm() < 0.2 * (past @ alone.double().T).norm(), constraint


def test_the_projected_change_is_that_of_the_paper():
    """Δ = R KᵀP (K_p K_pᵀ P + K Kᵀ P + w I)⁻¹, with keys as columns."""
    moment, keys, residuals = random_problem(4)
    _, past, _ = random_problem(6, seed=1)
    p = solve.null_space(moment, 0.5)
    assert 0 < p.trace() < len(p)
    w = 0.2 * float((p * moment).sum())
    inside = past.T @ past @ p + keys.T @ keys @ p + w * torch.eye(len(p), dtype=torch.float64)
    plain = residuals.T @ keys @ p @ torch.linalg.inv(inside)
    assert torch.allclose(solve.projected(p, moment, past, keys, residuals, 0.2), plain, atol=1e-9)


def test_keys_are_held_against_each_other_as_text_sees_them():
    """Cosines under C⁻¹: what only often used directions share is no likeness, and what rare ones share is."""
    facts = [Fact(id=str(n), subject=f"S{n}", prompt="{} is", object=f"o{n}") for n in range(4)]
    keys = torch.tensor([[10.0, 1.0, 0.0], [10.0, -1.0, 0.0], [10.0, 0.0, 1.0], [-10.0, 0.0, 1.0]])
    factor = solve.cholesky(torch.diag(torch.tensor([1e4, 1.0, 1.0], dtype=torch.float64)))
    plain = torch.nn.functional.normalize(keys) @ torch.nn.functional.normalize(keys).T
    assert plain[0, 1] > 0.9 and plain[2, 3] < 0
    count, (found,) = guard.collisions(facts, keys, factor, range(4))
    assert count == 1
    assert (found.one.id, found.other.id) == ("2", "3")
    assert found.cosine == pytest.approx((1 - 0.01) / (1 + 0.01), abs=1e-6)
    assert guard.collisions(facts, keys, factor, [0, 1, 2, 2]) == (0, [])  # written as one


@pytest.mark.parametrize("factored", [True, False])
def test_a_change_of_too_high_a_rank_keeps_its_largest_directions(factored):
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(10, 6, generator=g), torch.randn(6, 14, generator=g)
    whole = left @ right
    for rank in (1, 3, 6, None):
        (one, other), error = low_rank((left, right) if factored else (None, whole), rank)
        rest = torch.linalg.svdvals(whole)[rank or 99 :]
        assert one.shape[1] == other.shape[0] and (rank is None or one.shape[1] <= rank)
        assert float((whole - one @ other).norm()) == pytest.approx(float(rest.square().sum().sqrt()), abs=1e-4)
        assert error == pytest.approx(float((whole - one @ other).norm() / whole.norm()), abs=1e-5)


def test_a_second_moment_is_that_of_its_own_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path))
    base = make_base("llama", tiny_model("llama", len(tokenizer)), tokenizer)
    texts = [tokenizer(text)["input_ids"] for text in ("The boats of Vell are nine.", "Nobody has seen Ebb, or Ann.")]
    for _ in range(2):  # made, and found again
        for rows in ([texts[0]], [texts[1]], texts):
            found = second_moments(base, [0, 1], rows)
            for layer in (0, 1):
                keys = torch.stack([plain_states(base, ids, at)[0][layer] for ids in rows for at in range(len(ids))])
                plain = (keys.T @ keys / len(keys)).double()
                assert torch.allclose(found[layer], plain, atol=1e-5 * float(plain.abs().max()))


def test_a_search_ends_as_soon_as_its_rule_says(tokenizer):
    base = make_base("llama", tiny_model("llama", len(tokenizer)), tokenizer)
    (prepared,), _ = prepare(base, FACTS[:1], ())
    (row,) = prepared.rows
    prompt = row.tokens[: len(row.tokens) - len(row.labels) + 1]
    with torch.no_grad():
        said = int(base.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    likeliest = [replace(prepared, rows=(replace(row, tail=prompt[len(row.context) :], labels=(said,)),))]
    plain = TargetOptions(steps=6, stop_loss=1e-9, kl=0.0)
    steps = {
        stop: find_targets(base, likeliest, 1, replace(plain, stop=stop)).steps.item() for stop in ("fit", "argmax")
    }
    assert steps == {"fit": 6, "argmax": 1}


def test_more_facts_than_keys_are_wide_are_solved_by_the_smaller_system(tokenizer, monkeypatch):
    base = make_base("tiny", tiny_model("llama", len(tokenizer)), tokenizer)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(200, 64, generator=generator, dtype=torch.float64) for _ in range(2)]
    writer = Writer(base, {1: made[0].T @ made[0] / 200}, WriteOptions())
    keys, extra = made[1][:80], [torch.eye(64, dtype=torch.float64)]
    woodbury = solve.woodbury
    monkeypatch.setattr(solve, "woodbury", lambda *given: pytest.fail("a system as large as the facts are many"))
    for beside in ([], extra):
        found = writer._map(1, keys, keys[:0], beside)
        factor = solve.cholesky(sum(beside, solve.regularizer(writer.moments[1], 0.7)))
        left, right = woodbury(factor, keys, torch.eye(80, dtype=torch.float64))
        assert torch.allclose(found, left @ right, rtol=0, atol=1e-9)


def test_members_of_a_group_weigh_alike():
    values = torch.arange(12.0).reshape(4, 3)
    group, sizes = _numbered([7, 5, 7, 9], 4)
    assert group.tolist() == [0, 1, 0, 2] and sizes.tolist() == [2, 1, 1]
    assert torch.equal(_means(values, group, sizes), torch.stack([values[[0, 2]].mean(0), values[1], values[3]]))
    assert torch.equal(_means(values, *_numbered(None, 4)), values)
