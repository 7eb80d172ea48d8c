"""Losses against their formulas in float64 and against known values."""

import math

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.losses import LOSSES, LogProbs, dpo, get_loss, preference_metrics, sequence_sums, sft


def make(n_pairs: int = 5) -> LogProbs:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-30 * torch.rand(2 * n_pairs, generator=generator, dtype=torch.float64) for _ in range(2))
    return LogProbs(policy.requires_grad_(), reference, torch.full((2 * n_pairs,), 7))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_its_formula(smoothing):
    logps, beta = make(), 0.1
    losses = dpo(logps, beta=beta, label_smoothing=smoothing)
    for i, value in enumerate(losses.tolist()):
        pc, pr = (logps.policy[2 * i + j].item() for j in (0, 1))
        rc, rr = (logps.reference[2 * i + j].item() for j in (0, 1))
        d = beta * ((pc - rc) - (pr - rr))
        expected = -(1 - smoothing) * math.log(1 / (1 + math.exp(-d))) - smoothing * math.log(1 / (1 + math.exp(d)))
        assert value == pytest.approx(expected, abs=1e-12)


def test_dpo_at_the_reference_is_ln_2_with_gradient_half_beta():
    logps = make()
    same = LogProbs(logps.policy, logps.policy.detach(), logps.lengths)
    losses = dpo(same, beta=0.1, label_smoothing=0.0)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), atol=1e-15, rtol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logps.policy)
    torch.testing.assert_close(gradient, torch.tensor([-0.05, 0.05], dtype=torch.float64).repeat(5))


def test_dpo_stays_finite_at_huge_margins():
    policy = torch.tensor([0.0, -1e6, -1e6, 0.0], requires_grad=True)
    losses = dpo(LogProbs(policy, torch.zeros(4), torch.ones(4)), beta=0.1, label_smoothing=0.0)
    torch.testing.assert_close(losses.detach(), torch.tensor([0.0, 1e5]))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -0.1, 0.1]))


def test_sft_is_the_negative_log_likelihood():
    logps = LogProbs(torch.tensor([-2.0, -3.5]), None, torch.tensor([4, 5]))
    assert sft(logps, beta=0.1, label_smoothing=0.0).tolist() == [2.0, 3.5]


def test_sequence_sums_with_gradient():
    tokens = torch.arange(6, dtype=torch.float64).requires_grad_()
    sums = sequence_sums(tokens, torch.tensor([1, 3, 2]))
    assert sums.tolist() == [0.0, 6.0, 9.0]
    (gradient,) = torch.autograd.grad(sums, tokens, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert gradient.tolist() == [1, 2, 2, 2, 3, 3]


def test_metrics_are_sums_over_pairs():
    logps = LogProbs(torch.tensor([-1.0, -5.0, -4.0, -2.0]), torch.tensor([-2.0, -2.0, -3.0, -3.0]), torch.ones(4))
    metrics = {name: value.item() for name, value in preference_metrics(logps, 0.5).items()}
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.0,
            "rewards/rejected": -1.0,
            "rewards/margins": 1.0,
            "rewards/accuracies": 1.0,
            "logps/chosen": -5.0,
            "logps/rejected": -7.0,
        }
    )


def test_registry():
    assert get_loss("dpo").needs_reference and get_loss("dpo").paired and not get_loss("sft").paired
    assert {loss.unit for loss in LOSSES.values()} <= {"tokens", "pairs", "responses"}
    with pytest.raises(UserError, match="did you mean 'dpo'"):
        get_loss("dpoo")
