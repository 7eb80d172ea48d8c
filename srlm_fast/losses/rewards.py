"""Losses of both rewards of a pair, r = beta (log pi - log pi_ref), not of their difference alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.losses.logprobs import LogProbs, halves


def nca_pair(logps: LogProbs, *, beta: float) -> Tensor:
    """NCA for pairs, [pairs] (Chen et al. 2024, arXiv:2402.05369): -log s(r_c) - log s(-r_c) / 2 - log s(-r_r) / 2."""
    chosen, rejected = halves(logps.rewards(beta))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(logps: LogProbs, *, beta: float) -> Tensor:
    """BCO for pairs, [pairs] (Jung et al. 2024, arXiv:2404.04656, without its shift): -log s(r_c) - log s(-r_r)."""
    chosen, rejected = halves(logps.rewards(beta))
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo(logps: LogProbs, *, beta: float) -> Tensor:
    """Self-Play Preference Optimization, [pairs] (Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with eta = 1 / beta).

    sum over both responses of [log pi(y) - log pi_ref(y) - (P(y) - 1/2) / beta]^2,  P = labels

    P(y) is the probability that y wins against a response of the reference.
    """
    chosen, rejected = halves((logps.ratios() - (logps.labels - 0.5) / beta).square())
    return chosen + rejected


def sppo_hard(logps: LogProbs, *, beta: float) -> Tensor:
    """SPPO with P = 1 for the chosen and P = 0 for the rejected response, [pairs]."""
    chosen, rejected = halves(logps.rewards(beta))
    return ((chosen - 0.5) / beta).square() + ((rejected + 0.5) / beta).square()


def apo_zero(logps: LogProbs, *, beta: float) -> Tensor:
    """APO-zero, [pairs] (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): 1 - s(r_c) + s(r_r).

    For chosen responses that are better than the model's own: they gain, the rejected lose.
    """
    chosen, rejected = halves(logps.rewards(beta))
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(logps: LogProbs, *, beta: float) -> Tensor:
    """APO-down, [pairs] (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8): s(r_c) + 1 - s(r_c - r_r).

    For chosen responses that are worse than the model's own: both lose, the rejected more.
    """
    chosen, rejected = halves(logps.rewards(beta))
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
