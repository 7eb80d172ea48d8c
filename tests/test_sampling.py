"""Sampling: the generator against integers, the distribution against sorting, independence of rows."""

import pytest
import torch

from srlm_fast.engine.sampling import sample, sample_keys, uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix_finaliser(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def test_generator_is_splitmix64():
    # The first outputs of SplitMix64 seeded with 1234567, as published with its reference implementation.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    got = uniform(torch.full((5,), 1234567), torch.arange(5), attempt=0)
    assert got.tolist() == [(x >> 11) / 2**53 for x in known]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 2**100 + 7])
def test_keys_match_integer_arithmetic(seed):
    base = splitmix_finaliser((seed + GOLDEN) & MASK)
    expected = [splitmix_finaliser((base + i * GOLDEN) & MASK) for i in (1, 2, 3)]
    assert [int(key) & MASK for key in sample_keys(seed, 3)] == expected
    assert torch.equal(sample_keys(seed, 5)[:3], sample_keys(seed, 3))


def test_uniform_is_uniform():
    """Kolmogorov-Smirnov over keys, steps and attempts; streams do not correlate."""
    from scipy.stats import kstest

    keys, steps = sample_keys(3, 20_000), torch.zeros(20_000, dtype=torch.int64)
    streams = [uniform(keys, steps, 0), uniform(keys, steps + 1, 0), uniform(keys, steps, 1)]
    streams.append(uniform(keys[:1].expand(20_000), torch.arange(20_000), 0))
    for u in streams:
        assert kstest(u.numpy(), "uniform").pvalue > 1e-3
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 0.03


def draw(logits, n, temperature=1.0, top_p=1.0, seed=0):
    rows = logits.expand(n, -1)
    settings = torch.full((n,), temperature), torch.full((n,), top_p)
    return sample(rows, *settings, sample_keys(seed, n), torch.zeros(n, dtype=torch.int64))


def top_p_by_sorting(logits, temperature, top_p):
    """The distribution by definition, in float64."""
    probs = (logits.double() / temperature).softmax(-1)
    ordered, order = probs.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p
    cut = torch.zeros_like(probs)
    cut[order[kept]] = ordered[kept]
    return cut / cut.sum()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.6, 0.9), (1.5, 0.5), (1.0, 0.05)])
def test_distribution_is_that_of_sorting(temperature, top_p):
    from scipy.stats import chisquare

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    n = 40_000
    expected = top_p_by_sorting(logits, temperature, top_p) * n
    counts = draw(logits, n, temperature, top_p).bincount(minlength=50)
    assert counts[expected == 0].sum() == 0
    merged = expected < 5  # too rare for the test one by one
    observed = torch.cat((counts[~merged], counts[merged].sum()[None]))
    wanted = torch.cat((expected[~merged], expected[merged].sum()[None]))
    nonempty = wanted > 0
    if nonempty.sum() > 1:
        assert chisquare(observed[nonempty].numpy(), wanted[nonempty].numpy()).pvalue > 1e-3


def test_tiny_top_p_is_greedy():
    logits = torch.randn(1000)
    assert set(draw(logits, 200, top_p=1e-6).tolist()) == {int(logits.argmax())}


def test_ties_are_kept_together():
    logits = torch.tensor([0.0, 0.0, 0.0, -20.0])
    assert draw(logits, 300, top_p=0.1).unique().tolist() == [0, 1, 2]


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((500,), -torch.inf)
    logits[[7, 499]] = 0.0
    for top_p in (1.0, 0.9):
        assert draw(logits, 500, top_p=top_p).unique().tolist() == [7, 499]


def test_temperature_zero_is_argmax_beside_sampled_rows():
    logits = torch.randn(64, 300)
    temperature = torch.tensor([0.0, 1.0] * 32)
    keys, steps = sample_keys(5, 64), torch.arange(64)
    tokens = sample(logits, temperature, torch.full((64,), 0.9), keys, steps)
    assert torch.equal(tokens[::2], logits[::2].argmax(-1))
    assert not torch.equal(tokens[1::2], logits[1::2].argmax(-1))
    assert torch.equal(sample(logits, torch.zeros(64), torch.ones(64), keys, steps), logits.argmax(-1))


def test_a_row_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 700, generator=generator) * 2
    temperature = torch.rand(40, generator=generator) + 0.3
    top_p = torch.rand(40, generator=generator) * 0.7 + 0.3
    keys, steps = sample_keys(9, 40), torch.arange(40)
    together = sample(logits, temperature, top_p, keys, steps)
    order = torch.randperm(40, generator=generator)
    shuffled = sample(*(x[order] for x in (logits, temperature, top_p, keys, steps)))
    assert torch.equal(shuffled, together[order])
    alone = [sample(*(x[i : i + 1] for x in (logits, temperature, top_p, keys, steps))) for i in range(40)]
    assert torch.equal(torch.cat(alone), together)


def test_nan_row_ends_and_leaves_the_others_alone():
    logits = torch.randn(3, 100)
    keys, steps = sample_keys(0, 3), torch.zeros(3, dtype=torch.int64)
    settings = torch.full((3,), 0.8), torch.full((3,), 0.9)
    clean = sample(logits, *settings, keys, steps)
    logits[1] = torch.nan
    broken = sample(logits, *settings, keys, steps)
    assert broken[[0, 2]].tolist() == clean[[0, 2]].tolist()
    assert 0 <= broken[1] < 100
