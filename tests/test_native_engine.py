"""The native engine against transformers, and against itself in any order, company and batch size."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from srlm_fast import native_ops
from srlm_fast.checkpoint import save_weights
from srlm_fast.engine import Request, load_engine
from srlm_fast.engine.native import NativeEngine
from srlm_fast.errors import UserError
from srlm_fast.model import Llama, LlamaConfig

SMALL = LlamaConfig(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=256,
)
SHAPES = {
    "mha": SMALL,
    "gqa": replace(SMALL, num_key_value_heads=2),
    "tied": replace(SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "head_dim 8": replace(SMALL, num_attention_heads=8, num_key_value_heads=2, head_dim=8),
}


def build(config: LlamaConfig) -> Llama:
    """Random weights, large enough that the answers are no mere repetition."""
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(5)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Llama:
    return build(SHAPES["gqa"])


def engine_of(model: Llama, **options) -> NativeEngine:
    engine = load_engine("native", **options)
    engine.load(model)
    return engine


def random_requests(n: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 60 tokens with every kind of setting; metadata is the number of the request."""
    rng = random.Random(seed)
    return [
        Request(
            prompt_ids=[rng.randrange(160) for _ in range(rng.randint(1, 60))],
            n=rng.choice([1, 1, 2, 4]),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([0.8, 0.9, 1.0]),
            max_new_tokens=rng.randint(1, 70),
            seed=rng.randrange(2**40),
            stop_ids=rng.choice([(), (3,), (5, 6, 7)]),
            logprob_token_ids=rng.choice([(), (1, 2), (9,)]),
            metadata=i,
        )
        for i in range(n)
    ]


def results(completions) -> dict:
    found = {}
    for c in completions:
        key = (c.request.metadata, c.index)
        assert key not in found
        found[key] = (c.token_ids, c.logprobs, c.finish_reason, c.extra_logprobs)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_transformers_generate(shape):
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    ours = build(SHAPES[shape])
    theirs = LlamaForCausalLM(HFConfig(**ours.config.to_hf())).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    rng = random.Random(1)
    prompts = [[rng.randrange(160) for _ in range(length)] for length in (1, 2, 7, 30, 64, 65, 130)]
    requests = [
        Request(p, temperature=0, max_new_tokens=60, metadata=i, logprob_token_ids=(0, 8))
        for i, p in enumerate(prompts)
    ]
    got = results(engine_of(ours, max_batch=5).stream(requests))
    answers = set()
    for i, prompt in enumerate(prompts):
        tokens, logprobs, reason, extra = got[i, 0]
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=60,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == expected[0, len(prompt) :].tolist() and reason == "length"
        with torch.no_grad():
            logits = theirs(expected).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        torch.testing.assert_close(
            torch.tensor(logprobs), logits.gather(1, torch.tensor(tokens)[:, None])[:, 0].float()
        )
        torch.testing.assert_close(torch.tensor(extra), logits[:, [0, 8]].float(), atol=1e-5, rtol=1e-5)
        answers.add(tuple(tokens))
    assert len(answers) == len(prompts) and max(len(set(a)) for a in answers) > 4


@pytest.mark.parametrize("operators", ["native", "python"])
def test_results_depend_on_the_request_alone(model, operators, monkeypatch):
    """The same to the last bit in another order, another batch size, with other neighbours and one by one."""
    if operators == "python":
        monkeypatch.setattr(native_ops, "native_available", lambda: False)
    requests = random_requests(30)
    alone = results(c for request in requests for c in engine_of(model).stream([request]))
    assert len(alone) == sum(r.n for r in requests) and len({tuple(r[0]) for r in alone.values()}) > 40
    for options in ({"max_batch": 64}, {"max_batch": 5}, {"max_batch": 1}, {"max_batch": 21, "prefill_tokens": 1}):
        shuffled = requests[:]
        random.Random(str(options)).shuffle(shuffled)
        assert results(engine_of(model, **options).stream(shuffled)) == alone
    others = [replace(r, metadata=("other", i)) for i, r in enumerate(random_requests(20, seed=1))]
    mixed = [request for pair in zip(requests, [*others, *others]) for request in pair][:50]
    together = results(engine_of(model, max_batch=16).stream(mixed[:40] + requests[20:]))
    assert {key: value for key, value in together.items() if isinstance(key[0], int)} == alone


def test_sampled_tokens_have_the_models_probabilities(model):
    """First tokens of many samples against the softmax of the raw logits; logprobs are raw whatever the temperature."""
    from scipy.stats import chisquare

    prompt, n = [4, 8, 15], 6000
    request = Request(prompt, n=n, temperature=2.0, max_new_tokens=1, seed=7, logprob_token_ids=range(160))
    completions = list(engine_of(model).stream([request]))
    raw = torch.tensor(completions[0].extra_logprobs[0])
    assert raw.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert all(c.logprobs[0] == c.extra_logprobs[0][c.token_ids[0]] for c in completions)
    expected = (raw.double() / 2).softmax(-1) * n
    counts = torch.tensor([c.token_ids[0] for c in completions]).bincount(minlength=160)
    assert expected.min() > 5
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_samples_of_a_request_differ_and_do_not_depend_on_n(model):
    request = Request([1, 2, 3], n=6, max_new_tokens=30, seed=11)
    six = results(engine_of(model, max_batch=4).stream([request]))
    two = results(engine_of(model).stream([replace(request, n=2)]))
    assert len({tuple(r[0]) for r in six.values()}) == 6
    assert two == {key: six[key] for key in two}
    other_seed = results(engine_of(model).stream([replace(request, seed=12)]))
    assert all(other_seed[key][0] != six[key][0] for key in six)


def test_stop_token_is_included_and_ends_the_answer(model):
    [free] = engine_of(model).stream([Request([1, 2], temperature=0, max_new_tokens=40)])
    stop = free.token_ids[10]
    first = free.token_ids.index(stop)
    [stopped] = engine_of(model).stream([Request([1, 2], temperature=0, max_new_tokens=40, stop_ids=(159, stop))])
    assert stopped.token_ids == free.token_ids[: first + 1] and stopped.finish_reason == "stop"
    assert stopped.logprobs == free.logprobs[: first + 1]


def test_requests_may_be_submitted_while_streaming(model):
    requests = random_requests(24)
    expected = results(engine_of(model).stream(requests))
    engine = engine_of(model, max_batch=6)
    waiting = requests[4:]
    completions = []
    for completion in engine.stream(requests[:4]):
        completions.append(completion)
        if waiting:
            engine.submit([waiting.pop()])
    assert results(completions) == expected
    assert list(engine.stream()) == []


def test_answer_ends_with_the_context(model):
    [c] = engine_of(model, max_len=20).stream([Request([1] * 15, temperature=0, max_new_tokens=100)])
    assert len(c.token_ids) == 5 and c.finish_reason == "length"
    [whole] = engine_of(model).stream([Request([1] * 200, max_new_tokens=100)])
    assert len(whole.token_ids) == 56


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_ids": []}, "empty"),
        ({"prompt_ids": [1] * 256}, "256 tokens.*context of 256"),
        ({"prompt_ids": [1, 160]}, r"token id 160.*0\.\.159"),
        ({"prompt_ids": [-1]}, "token id -1"),
        ({"stop_ids": (500,)}, "stop_ids holds token id 500"),
        ({"logprob_token_ids": (161,)}, "logprob_token_ids holds token id 161"),
        ({"n": 0}, "n=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_unfit_request_is_refused_by_name(model, change, message):
    engine = engine_of(model)
    good = Request([1, 2], max_new_tokens=2)
    with pytest.raises(UserError, match=rf"request 1 \(prompt 17\): .*{message}"):
        engine.submit([good, replace(good, metadata="prompt 17", **change)])


def test_nan_logits_name_the_request_and_leave_a_usable_engine(model):
    broken = build(model.config)
    broken.model.embed_tokens.weight.data[9] = torch.nan
    engine = engine_of(broken)
    requests = [Request([1, 2], max_new_tokens=5), Request([1, 9], max_new_tokens=5, metadata="bad")]
    with pytest.raises(UserError, match="request 1: the logits of token 1.*NaN"):
        list(engine.stream(requests))
    assert list(engine.stream()) == []
    engine.load(model)
    [c] = engine.stream(requests[:1])
    assert [c.token_ids, c.logprobs] == [
        r for x in engine_of(model).stream(requests[:1]) for r in (x.token_ids, x.logprobs)
    ]


def test_load_drops_what_is_under_way_and_takes_new_weights(model):
    other = build(replace(model.config, rope_theta=100.0))
    engine = engine_of(model, max_batch=4)
    requests = random_requests(10)
    next(engine.stream(requests))
    engine.load(other)
    assert list(engine.stream()) == []
    assert results(engine.stream(requests)) == results(engine_of(other).stream(requests))


def test_load_reads_a_folder(model, tmp_path):
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM(HFConfig(**model.config.to_hf()))
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(tmp_path)
    requests = random_requests(5)
    engine = load_engine("native")
    engine.load(tmp_path)
    assert results(engine.stream(requests)) == results(engine_of(model).stream(requests))
    with pytest.raises(UserError, match="nowhere"):
        engine.load(tmp_path / "nowhere")


def test_starting_loads_neither_compiler_nor_transformers(model, tmp_path):
    """What makes a start take seconds: torch's compiler, which torch loads to fill a meta tensor, costs one alone."""
    save_weights(model, tmp_path / "m", dtype=torch.float32)
    code = f"""
import sys
from srlm_fast.engine import Request, load_engine
engine = load_engine("native")
engine.load({str(tmp_path / "m")!r})
assert len(list(engine.stream([Request([1], max_new_tokens=3)]))) == 1
slow = {{"torch._dynamo", "transformers", "vllm", "scipy"}} & sys.modules.keys()
assert not slow, slow
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_bfloat16_follows_float32(model):
    request = Request([3, 1, 4, 1, 5], temperature=0, max_new_tokens=1, logprob_token_ids=range(160))
    [expected] = engine_of(model).stream([request])
    engine = engine_of(build(model.config).bfloat16())
    [got] = engine.stream([request])
    torch.testing.assert_close(
        torch.tensor(got.extra_logprobs), torch.tensor(expected.extra_logprobs), atol=0.3, rtol=0.05
    )
    assert len(list(engine.stream(random_requests(8)))) == sum(r.n for r in random_requests(8))


def test_sleep_and_close(model):
    engine = engine_of(model)
    list(engine.stream([Request([1], max_new_tokens=3)]))
    engine.sleep()
    with pytest.raises(UserError, match="load()"):
        engine.submit([Request([1])])
    engine.load(model)
    assert len(list(engine.stream([Request([1], max_new_tokens=3)]))) == 1
    engine.close()
    with pytest.raises(UserError, match="load()"):
        engine.stream([])


def test_stats_count_a_shared_prompt_once(model):
    engine = engine_of(model)
    list(engine.stream([Request([1] * 10, n=3, max_new_tokens=7), Request([2] * 5, max_new_tokens=2)]))
    assert (engine.stats.prompt_tokens, engine.stats.generated_tokens) == (15, 23)
    assert 0 < engine.stats.seconds < 60
    assert engine.stats.tokens_per_second == 23 / engine.stats.seconds


def test_unknown_engine_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'native'"):
        load_engine("natve")
    with pytest.raises(UserError, match="known: native"):
        load_engine("zzz")
    with pytest.raises(UserError, match="max_batch=0"):
        load_engine("native", max_batch=0)
