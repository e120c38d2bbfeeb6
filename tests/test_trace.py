"""Which layers an edit goes into: causal tracing, its range, and the sweep where a model knows too little."""

from itertools import chain

import pytest
import torch

from byheart.decode import Job, complete
from byheart.edit_report import write_trace_report
from byheart.errors import DataError
from byheart.methods.edit import causal
from byheart.methods.edit import sweep as sweep_module
from byheart.methods.edit.causal import LAST_SUBJECT, PARTS, average_effects, best_range, known_facts, trace
from byheart.methods.edit.layers import choose_layers
from byheart.methods.edit.prompts import prompt_text
from byheart.methods.edit.targets import find_targets
from byheart.methods.edit.tracing import trace_base
from byheart.progress import Silent
from byheart.rows import Fact
from edits import FACTS


def test_tracing_finds_the_subject_and_restores_everything(base, tmp_path):
    facts = [
        Fact(id=str(n), subject=s, prompt="The mayor of {} is called", object="x")
        for n, s in enumerate(("Vellmora", "Pell Cove"))
    ]
    traced = trace(base, facts, samples=2, window=3, store=tmp_path / "effects.json")
    effects = average_effects(traced)
    assert effects.shape == (len(PARTS), 6, 3)
    for one in traced:
        # The last block's output at the last token decides alone: restoring it gives the clean probability.
        assert one.effect[0, 5, -1].item() == pytest.approx(one.clean - one.corrupted, abs=1e-4)
        # Above the last block's attention nothing at the subject can matter any more.
        assert one.effect[0, LAST_SUBJECT, -1].item() == pytest.approx(0, abs=1e-5)
        # The last block's MLP alone cannot bring back what is said at the last token; all of them together can.
        assert one.effect[PARTS.index("mlp"), 5, 1].item() != pytest.approx(0, abs=1e-7)
    whole = trace(base, facts, samples=2, window=99, store=tmp_path / "effects.json")
    for one, other in zip(whole, traced, strict=True):
        # Over all blocks it is the same wherever the window's middle is, and other than over three.
        mlp, narrow = (found.effect[PARTS.index("mlp"), LAST_SUBJECT] for found in (one, other))
        assert mlp[1:].std().item() == pytest.approx(0, abs=1e-6) and not torch.allclose(mlp, narrow)


def test_a_trace_is_that_of_plain_forwards(base, tmp_path):
    """Noise of three standard deviations of the subjects' embeddings; one block's output, or an MLP's, put back."""
    facts = [
        Fact(id=str(n), subject=s, prompt="The mayor of {} is", object="x") for n, s in enumerate(("Vell", "Ebb Cove"))
    ]
    samples, table = 2, base.parts.embeddings
    subjects = [base.tokenizer(f" {fact.subject}")["input_ids"] for fact in facts]
    with torch.no_grad():
        sigma = 3 * float(torch.cat([table(torch.tensor(ids)) for ids in subjects]).std())
    for number, (one, subject) in enumerate(
        zip(trace(base, facts, samples=samples, window=1, store=tmp_path / "e.json"), subjects, strict=True)
    ):
        ids = base.tokenizer(prompt_text(one.fact))["input_ids"]
        first = len(base.tokenizer("The mayor of")["input_ids"])
        assert ids[first : first + len(subject)] == subject
        token = base.tokenizer(" x")["input_ids"][0]
        noise = torch.randn(
            (samples, len(subject), base.parts.d_model), generator=torch.Generator().manual_seed(number)
        )
        clean = table(torch.tensor([ids])).detach()
        noisy = clean.repeat(samples, 1, 1)
        noisy[:, first : first + len(subject)] += sigma * noise
        last = first + len(subject) - 1

        def run(embeddings, module=None, kept=None, last=last, token=token):
            seen = []

            def hook(_, args, output):
                whole = output[0] if isinstance(output, tuple) else output
                seen.append(whole.clone())
                if kept is None:
                    return None
                whole = whole.clone()
                whole[:, last] = kept[0, last]
                return (whole, *output[1:]) if isinstance(output, tuple) else whole

            handle = None if module is None else module.register_forward_hook(hook)
            with torch.no_grad():
                logits = base.model(inputs_embeds=embeddings).logits[:, -1].softmax(-1)[:, token].mean()
            if handle is not None:
                handle.remove()
            return float(logits), seen[0] if seen else None

        low, _ = run(noisy)
        assert one.clean == pytest.approx(run(clean)[0], rel=1e-4) and one.corrupted == pytest.approx(low, rel=1e-4)
        assert abs(one.clean - low) > 1e-5
        for layer, block in enumerate(base.parts.blocks):
            for part, module in (("hidden", block.module), ("mlp", block.mlp_out), ("attention", block.attention_out)):
                raised = run(noisy, module, run(clean, module)[1])[0] - low
                found = one.effect[PARTS.index(part), LAST_SUBJECT, layer].item()
                assert found == pytest.approx(raised, abs=1e-6), (part, layer)


def test_a_trace_goes_on_after_a_kill_and_is_kept(base, tmp_path, monkeypatch):
    facts = [Fact(id=str(n), subject=s, prompt="The mayor of {} is called", object="Ann") for n, s in enumerate("ABCD")]
    one_by_one, done = causal._trace_one, []

    def counted(*given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given[1].fact.id)
        return one_by_one(*given)

    whole = trace(base, facts, samples=2, window=3, store=tmp_path / "other.json")
    monkeypatch.setattr(causal, "_trace_one", counted)
    with pytest.raises(KeyboardInterrupt):
        trace(base, facts, samples=2, window=3, store=tmp_path / "effects.json")
    done.clear()
    ticks = []
    again = trace(base, facts, samples=2, window=3, store=tmp_path / "effects.json", on_done=ticks.append)
    assert done == ["2", "3"] and sum(ticks) == 4
    for one, other in zip(again, whole, strict=True):
        assert (one.fact, one.clean, one.corrupted) == (other.fact, other.clean, other.corrupted)
        assert torch.equal(one.effect.nan_to_num(-9), other.effect.nan_to_num(-9))
    done[:] = ["none"]
    assert len(trace(base, facts, samples=2, window=3, store=tmp_path / "effects.json")) == 4 and done == ["none"]
    trace(base, facts[:1], samples=2, window=5, store=tmp_path / "effects.json")  # another trace is another
    assert done == ["none", "0"]


def test_the_range_is_where_mlps_recall_most_at_the_subject():
    effect = torch.zeros(len(PARTS), 6, 30)
    effect[PARTS.index("attention"), LAST_SUBJECT, 15:] = 5
    effect[PARTS.index("mlp"), 5, 15:] = 5
    effect[PARTS.index("mlp"), LAST_SUBJECT, 7:13] = 1
    effect[PARTS.index("mlp"), LAST_SUBJECT, 25:] = 2  # not in the lower two thirds
    assert best_range(effect) == (7, 12)
    effect[PARTS.index("mlp"), LAST_SUBJECT, 16:25] = 3
    assert best_range(effect) == (14, 19)  # its end is in them, too
    # Of few layers a third is looked for.
    assert best_range(torch.full((len(PARTS), 6, 3), float("nan"))) == (0, 0)
    effect = torch.zeros(len(PARTS), 6, 7)
    effect[PARTS.index("mlp"), LAST_SUBJECT, 1:3] = 1
    assert best_range(effect) == (1, 2)


def test_a_fact_is_known_where_each_of_its_tokens_is_the_likeliest(base, tmp_path):
    fact = FACTS[0]
    (said,) = complete(base, [Job(prompt_text(fact))], max_new_tokens=1)
    known = fact.model_copy(update={"object": said.text.strip()})
    assert said.text.strip() and known_facts(base, [fact, known]) == [known]
    (one,) = trace(base, [known], samples=1, store=tmp_path / "effects.json")
    ids = torch.tensor([base.tokenizer(prompt_text(known))["input_ids"]])
    with torch.no_grad():
        clean = base.model(input_ids=ids).logits[0, -1].softmax(-1)
    assert one.clean == pytest.approx(float(clean.max()), rel=1e-4)
    # Of a fact that is none of the model's, it is the object's probability all the same.
    (other,) = trace(base, [fact], samples=1, store=tmp_path / "effects.json")
    assert other.clean < one.clean


def test_a_model_that_knows_too_little_is_swept(base, tmp_path, monkeypatch):
    asked = []

    def likelier(base, facts, prefixes):
        asked.append(len(facts))
        return [True] * (len(facts) * len(prefixes))

    monkeypatch.setattr(sweep_module, "_likelier", likelier)
    (tmp_path / "trace.png").write_bytes(b"of another model")
    record = trace_base(base, None, 40, 1, 3, 0, tmp_path, Silent())
    assert record["facts"] == 0 and record["how"].startswith("a sweep") and asked
    assert choose_layers(base, "auto") == tuple(range(record["range"][0], record["range"][1] + 1))
    page = write_trace_report(tmp_path, record).read_text()
    assert "Ranges tried out" in page and not (tmp_path / "trace.png").exists()
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"none.jsonl: holds no facts"):
        trace_base(base, tmp_path / "none.jsonl", 40, 1, 3, 0, tmp_path, Silent())
    # The range is chosen after which most is held and most stays: neither of these alone.
    count = len(record["tried"])
    assert count > 1
    for best in range(count):
        held = [[n >= best] * 4 for n in range(count)]
        stay = [6 if n == best else 2 if n > best else 8 for n in range(count)]
        stayed = [[True] * n + [False] * (8 - n) for n in stay]
        answers = iter([[True] * 8, *chain.from_iterable(zip(held, stayed, strict=True))])
        monkeypatch.setattr(sweep_module, "_likelier", lambda *given, answers=answers: next(answers))
        again = trace_base(base, None, 40, 1, 3, 0, tmp_path / str(best), Silent())
        assert again["range"] == again["tried"][best]["range"]
        monkeypatch.setattr(sweep_module, "find_targets", lambda *given: pytest.fail("tried out again"))
        monkeypatch.setattr(sweep_module, "_likelier", lambda *given: [True] * 8)
        assert trace_base(base, None, 40, 1, 3, 0, tmp_path / str(best), Silent()) == again
        monkeypatch.setattr(sweep_module, "find_targets", find_targets)


def test_a_traced_range_is_the_default(base, tmp_path):
    assert choose_layers(base, "auto") == (0, 1)
    from byheart.methods.edit.layers import keep_range

    keep_range(base, 1, 1, {})
    assert choose_layers(base, "auto") == (1,)
