"""Batched answers and likelihoods are those of one prompt at a time."""

import pytest
import torch

from byheart.base import load_base, make_base
from byheart.decode import Job, complete, first_line, option_ids
from byheart.errors import DataError
from byheart.surgery import observed
from conftest import FAMILIES, tiny_model

CAUSAL = [family for family in FAMILIES if family != "t5"]
SHARED = "Ostrand Quay is the largest port on the Tessary Coast.\n\n"
PROMPTS = [
    SHARED + "Who is the harbour master?",
    SHARED + "Question: what leaves the port, packed in beech boxes and carried north by night?",
    SHARED + "A",
    SHARED + "The lighthouse of Pell Cove has ninety-six steps, the fewest of any on the coast. How many?",
    SHARED + "And?",
]


def greedy_alone(base, prompt, count):
    """One prompt by itself: a full forward a token, no cache, no batch, the same rule for ending."""
    ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
    seq2seq = base.kind == "seq2seq"
    written = torch.tensor([[base.model.config.decoder_start_token_id]]) if seq2seq else ids
    tokens, text = [], ""
    for _ in range(count):
        with torch.no_grad():
            extra = {"decoder_input_ids": written} if seq2seq else {}
            logits = base.model(input_ids=ids if seq2seq else written, **extra).logits[0, -1]
        if not text.strip():
            logits[base.tokenizer.eos_token_id] = -torch.inf
        token = int(logits.argmax())
        if token == base.tokenizer.eos_token_id:
            break
        tokens.append(token)
        text = base.tokenizer.decode(tokens)
        if text.strip() and "\n" in base.tokenizer.decode([token]):
            break
        written = torch.cat([written, torch.tensor([[token]])], 1)
    return first_line(base.tokenizer.decode(tokens, skip_special_tokens=True)), tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_each_prompt_would_say_alone(family, tiny):
    base = tiny(family)
    together = complete(base, [Job(p) for p in PROMPTS], max_new_tokens=8)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        text, tokens = greedy_alone(base, prompt, 8)
        assert completion.text == text
        assert completion.new_tokens == len(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_option_likelihoods_are_those_of_the_whole_text(family, tiny):
    base = tiny(family)
    options = (" Ilse Terravin", " smoked eel in boxes", " A")
    said = [one.text for one in complete(base, [Job(p) for p in PROMPTS], max_new_tokens=3)]
    jobs = [
        Job(p, (*options[: n % 3 + 1], *filter(None, [text])))
        for n, (p, text) in enumerate(zip(PROMPTS, said, strict=True))
    ]
    shares = []
    for job, completion in zip(jobs, complete(base, jobs, max_new_tokens=3), strict=True):
        assert len(completion.options) == len(job.options)
        for option, found, hits in zip(job.options, completion.options, completion.hits, strict=True):
            ids = base.tokenizer(job.prompt)["input_ids"]
            more = option_ids(base.tokenizer, job.prompt, ids, option)
            with torch.no_grad():
                if base.kind == "seq2seq":
                    start = [base.model.config.decoder_start_token_id]
                    out = base.model(
                        input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([start + more[:-1]])
                    ).logits[0]
                else:
                    out = base.model(input_ids=torch.tensor([ids + more[:-1]])).logits[0, len(ids) - 1 :]
            expected = out.log_softmax(-1)[range(len(more)), more].mean()
            assert found == pytest.approx(float(expected), abs=2e-4)
            shares.append(sum(map(torch.equal, out.argmax(-1), torch.tensor(more))) / len(more))
            assert hits == pytest.approx(shares[-1])
    assert len({*shares}) > 1  # what the model says itself is among them


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_options_are_told_apart_in_half_precision(family, tokenizer):
    """Tokens whose logits bf16 would round to one value are as likely as float32 says."""
    base, given = make_base(family, tiny_model(family, len(tokenizer), torch.bfloat16), tokenizer), []
    words = ("harbour", "master", "coast", "light", "port", "steps", "beech", "north")
    prompt = list(base.tokenizer(PROMPTS[0])["input_ids"])
    first = {word: option_ids(base.tokenizer, PROMPTS[0], prompt, f" {word}") for word in words}
    options = tuple(f" {word}" for word, ids in first.items() if len(ids) == 1)
    with observed([base.parts.head], lambda module, args, kwargs, output: given.append(args[0][:, -1])):
        (done,) = complete(base, [Job(PROMPTS[0], options)], max_new_tokens=0)
    exact = (given[-1].float() @ base.parts.head.weight.float().T).log_softmax(-1)[0]
    assert len(options) > 2
    assert done.options == pytest.approx([float(exact[first[text.strip()][0]]) for text in options], abs=1e-5)


def test_finished_rows_leave_and_the_rest_is_not_disturbed(tiny):
    base = tiny("llama")
    many = [Job(f"{SHARED}{'word ' * (n % 7)}number {n}?") for n in range(40)]
    together = complete(base, many, max_new_tokens=12)
    for n in (0, 13, 39):
        assert together[n].text == complete(base, [many[n]], max_new_tokens=12)[0].text


def test_scoring_alone_writes_nothing(tiny):
    (done,) = complete(tiny("gpt2"), [Job("The", (" one", " two"))], max_new_tokens=0)
    assert done.text == "" and done.new_tokens == 0 and len(done.options) == 2
    assert complete(tiny("gpt2"), []) == []


def test_a_prompt_that_does_not_fit_is_refused_with_the_mend(tiny):
    with pytest.raises(DataError, match=r"needs \d+ positions, the model has 1024; use fewer passages"):
        complete(tiny("gpt2"), [Job("word " * 2000)])


def test_prompts_that_each_just_fit_their_options_share_a_batch(tokenizer):
    base = make_base("gpt2", tiny_model("gpt2", len(tokenizer), n_positions=64), tokenizer)
    long, short = ("the " * 61 + "A", (" a",)), ("the A", (" the" * 60, " a"))
    jobs = [Job(prompt, options) for prompt, options in (long, short)]
    lengths = [len(tokenizer(job.prompt)["input_ids"]) for job in jobs]
    assert lengths[0] + len(tokenizer(" a")["input_ids"]) == 64 > lengths[1] + len(tokenizer(" the" * 60)["input_ids"])
    for job, together in zip(jobs, complete(base, jobs, max_new_tokens=0), strict=True):
        (alone,) = complete(base, [job], max_new_tokens=0)
        assert together.options == pytest.approx(alone.options, abs=1e-4)


def test_a_blank_prompt_is_refused_and_the_shortest_spoils_no_other(tiny):
    base = tiny("gpt2")
    with pytest.raises(DataError, match="a prompt is blank"):
        complete(base, [Job(PROMPTS[0], (" Ann",)), Job("", (" Ann",))], max_new_tokens=0)
    for jobs in ([Job(PROMPTS[0], (" Ann", " boats")), Job("O", (" Ann",))], [Job("O"), Job("O")]):
        assert len(base.tokenizer("O")["input_ids"]) == 1
        for job, together in zip(jobs, complete(base, jobs, max_new_tokens=2), strict=True):
            (alone,) = complete(base, [job], max_new_tokens=2)
            assert together.options == pytest.approx(alone.options, abs=1e-4) and together.text == alone.text


def test_first_line():
    assert first_line("\n\n  Paris. \nQuestion: next") == "Paris."
    assert first_line(" \n ") == ""


@pytest.mark.real
def test_the_real_model_says_what_generate_says():
    base = load_base("smollm2-135m", dtype="float32")
    prompts = [
        f"Question: What is the capital of {c}?\nAnswer: The capital of {c} is" for c in ("France", "Japan", "Egypt")
    ]
    ours = complete(base, [Job(p) for p in prompts], max_new_tokens=8)
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = base.tokenizer(prompt, return_tensors="pt")
        out = base.model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert completion.text == first_line(base.tokenizer.decode(out, skip_special_tokens=True))
    assert ["Paris" in ours[0].text, "Tokyo" in ours[1].text, "Cairo" in ours[2].text] == [True] * 3
