"""The packed batch: its sampling against srlm_fast.engine.sampling, its cache against no cache, its blocks."""

import random
from dataclasses import replace

import pytest
import torch
from test_native_engine import SMALL, build, engine_of, results
from test_native_ops import need_native

from srlm_fast.engine import Request
from srlm_fast.engine.blocks import BLOCK_TOKENS, BlockPool
from srlm_fast.engine.packed import PackedBatch
from srlm_fast.engine.rows import Rows
from srlm_fast.engine.sampling import sample, sample_keys


@pytest.fixture(autouse=True, scope="module")
def _native():
    need_native()


@pytest.fixture(scope="module")
def model():
    return build(replace(SMALL, num_key_value_heads=2, head_dim=32))


def emit(logits, temperature, top_p, keys, steps, extra=()):
    """Tokens, raw log-probs of them and of `extra`, and who ended, by the C++ sampler."""
    n = len(logits)
    rows = Rows(n, torch.device("cpu"))
    request = Request([1], stop_ids=(0,), logprob_token_ids=extra)
    order = torch.arange(n)
    rows.start(order, requests=[request] * n, lengths=[1] * n, room=[int(steps.max()) + 2] * n, keys=keys)
    rows.temperature, rows.top_p, rows.steps = temperature, top_p, steps.clone()
    names = ("last_tokens", "lengths", "steps", "room", "keys", "temperature", "top_p", "stop_ids", "extra_ids")
    state = [getattr(rows, name) for name in (*names, "tokens", "logprobs", "extra_logprobs")]
    ended = torch.ops.srlm.decoder_emit(logits, order, state)
    assert torch.equal(rows.steps, steps + 1) and torch.equal(rows.tokens[order, steps], rows.last_tokens)
    extra_logprobs = rows.extra_logprobs[order, steps] if extra else None
    return rows.last_tokens, rows.logprobs[order, steps], extra_logprobs, ended


@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 1000, 32000])
def test_sampling_is_that_of_the_reference(vocab):
    """The same tokens for the same keys and steps: greedy, all temperatures, all nuclei, ties, impossible tokens."""
    generator = torch.Generator().manual_seed(vocab)
    n = 4000 if vocab < 2000 else 150
    logits = torch.randn(n, vocab, generator=generator) * torch.rand(n, 1, generator=generator) * 6
    logits[: n // 8] = logits[: n // 8].round()
    logits[n // 8 : n // 4, vocab // 2 + 1 :] = -torch.inf
    temperature = torch.rand(n, generator=generator) * 1.5 + 0.05
    temperature[::5], temperature[1::5] = 0.0, 1.0
    top_p = torch.rand(n, generator=generator) * 0.99 + 0.01
    top_p[::3] = 1.0
    keys, steps = sample_keys(3, n), torch.randint(0, 50, (n,), generator=generator)
    tokens, logprobs, extra, ended = emit(logits, temperature, top_p, keys, steps, extra=(0, vocab - 1))
    assert torch.equal(tokens, sample(logits, temperature, top_p, keys, steps))
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), expected.gather(1, tokens[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(extra.double(), expected[:, [0, vocab - 1]], atol=2e-6, rtol=1e-6)
    assert torch.equal(ended, tokens == 0)


def test_a_logit_that_is_no_number_ends_the_row():
    logits = torch.randn(40, 100)
    logits[torch.arange(20), torch.arange(0, 100, 5)] = torch.nan
    one = torch.ones(40)
    _, logprobs, _, ended = emit(logits, one, one, sample_keys(0, 40), torch.zeros(40, dtype=torch.int64))
    assert ended[:20].all() and logprobs[:20].isnan().all() and logprobs[20:].isfinite().all()


def family(rng, n=24):
    """Requests whose prompts share beginnings of every length."""
    stem = [rng.randrange(160) for _ in range(150)]
    requests = []
    for i in range(n):
        cut = rng.choice([0, 1, 15, 16, 17, 32, 47, 48, 64, 100, 150])
        prompt = [*stem[:cut], *(rng.randrange(160) for _ in range(rng.randint(0, 40)))] or [1]
        options = {"n": rng.choice([1, 3]), "max_new_tokens": rng.randint(1, 60), "seed": i, "stop_ids": (3,)}
        requests.append(Request(prompt, temperature=rng.choice([0.0, 0.8]), top_p=0.9, metadata=i, **options))
    return requests


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_found_in_the_cache_changes_nothing(model, threads):
    requests = family(random.Random(0), 24 // threads**2)
    alone = results(c for request in requests for c in engine_of(model).stream([request]))
    torch.set_num_threads(threads)
    try:
        for options in ({"max_batch": 64}, {"max_batch": 3}, {"prefill_tokens": 40}):
            engine = engine_of(model, **options)
            assert isinstance(engine._batch, PackedBatch)
            for _ in range(2):
                assert results(engine.stream(requests)) == alone
            stats, asked = engine.stats, 2 * sum(len(r.prompt_ids) for r in requests)
            assert stats.prompt_tokens + stats.cached_tokens == asked and stats.cached_tokens > 0.4 * asked
    finally:
        torch.set_num_threads(1)


def test_new_weights_find_nothing_of_the_old(model):
    other = build(model.config)
    other.lm_head.weight.data.mul_(-1)
    other.model.layers[0].self_attn.v_proj.weight.data.mul_(0.5)
    requests = family(random.Random(1), 8)
    engine = engine_of(model)
    list(engine.stream(requests))
    engine.load(other)
    assert results(engine.stream(requests)) == results(engine_of(other).stream(requests))


def test_the_rubric_is_computed_once(model):
    rubric = [i % 160 for i in range(100)]
    engine = engine_of(model)
    list(engine.stream([Request([*rubric, 7, i], n=3, max_new_tokens=2, metadata=i) for i in range(10)]))
    assert engine.stats.prompt_tokens == 102 + 9 * (102 - 96) and engine.stats.cached_tokens == 9 * 96


def test_blocks_are_shared_found_again_and_given_away_when_idle():
    pool = BlockPool(1, 1, 2, BLOCK_TOKENS * 16)
    ids = list(range(40))
    first, held = pool.prompt(ids)
    assert (len(first), held) == (3, 0)
    second, held = pool.prompt([*ids[:33], 99])
    assert second[:2] == first[:2] and second[2] != first[2] and held == 32
    whole, held = pool.prompt(ids[:32])
    assert whole[0] == first[0] and held == 16, "the last token is always computed"
    for blocks in (first, second, whole):
        pool.release(blocks)
    again, held = pool.prompt(ids)
    assert again[:2] == first[:2] and held == 32
    pool.release(again)
    size = len(pool.cache)
    taken = [pool.take() for _ in range(size)]
    assert len(set(taken)) == size == len(pool.cache), "idle blocks go before the cache grows"
    pool.cache[taken[5]] = 7
    assert len(set(taken) | {pool.take()}) == size + 1 and len(pool.cache) > size
    assert (pool.cache[taken[5]] == 7).all(), "and growing keeps what is there"
    pool.release(taken)
    assert pool.prompt(ids)[1] == 0, "what was given away is not found"
    pool.forget()
