"""The pairwise losses of `preference.py`, each with its derivatives, in Triton and in torch.

    s = sum of a response's log-probabilities      r = beta (s - reference) [/ length]      d = r_c - r_r - margin

for the chosen (c) and the rejected (r) response of a pair. With sigma the logistic function, eps the label smoothing:

    sigmoid     -(1 - eps) log sigma(d) - eps log sigma(-d)
                DPO (Rafailov et al. 2023, eq. 7); eps > 0: cDPO (Mitchell 2023); margin: ODPO (Amini et al. 2024);
                without reference, length-normalised and with margin gamma: SimPO (Meng et al. 2024, eq. 6)
    robust      [-(1 - eps) log sigma(d) + eps log sigma(-d)] / (1 - 2 eps)
                robust DPO, unbiased under labels flipped with probability eps (Chowdhury et al. 2024)
    hinge       max(0, 1 - d)
                SLiC (Zhao et al. 2023), normalised by the reference as in RSO (Liu et al. 2023)
    ipo         (d / beta - 1 / (2 beta))^2
                IPO (Azar et al. 2023, eq. 17, tau = beta) on sums; length-normalised it is the averaged form of TRL
    exo_pair    sigma(d) log [sigma(d) / (1 - eps)] + sigma(-d) log [sigma(-d) / eps]
                EXO (Ji et al. 2024, eq. 16); eps > 0
    discopop    -(1 - m) log sigma(d) + m exp(-d),  m = sigma(d / 0.05)
                DiscoPOP's log-ratio modulated loss (Lu et al. 2024, eq. 27)
    nca_pair    -log sigma(r_c) - log sigma(-r_c) / 2 - log sigma(-r_r) / 2
                NCA (Chen et al. 2024)
    sppo_hard   (r_c / beta - 1 / (2 beta))^2 + (r_r / beta + 1 / (2 beta))^2
                SPPO (Wu et al. 2024, eq. 4.7, eta = 1 / beta) with winning probabilities 1 and 0
    apo_zero    sigma(-r_c) + sigma(r_r)
                APO-zero (D'Oosterlinck et al. 2024, eq. 7)
    apo_down    sigma(r_c) + sigma(r_r - r_c)
                APO-down (D'Oosterlinck et al. 2024, eq. 8)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.kernels.triton_helpers import exp, tl, triton

DISCOPOP_TAU = 0.05

_TAU = tl.constexpr(DISCOPOP_TAU)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], with a small relative error: 2 artanh(x / (2 + x)) as a series."""
    s = x / (2 + x)
    t = s * s
    series = 1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t / 15))))))
    return 2 * s * series


@triton.jit
def sigmoid(x):
    return 1 / (1 + exp(-x))


@triton.jit
def log_sigmoid(x):
    return tl.where(x < 0, x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def margin_loss(d, beta, eps, KIND: tl.constexpr):
    """A loss of the margin d alone: (value, slope)."""
    if KIND == "sigmoid":
        return -(1 - eps) * log_sigmoid(d) - eps * log_sigmoid(-d), eps - sigmoid(-d)
    elif KIND == "robust":
        scale = 1 / (1 - 2 * eps)
        value = (eps * log_sigmoid(-d) - (1 - eps) * log_sigmoid(d)) * scale
        return value, -sigmoid(-d) - eps * scale
    elif KIND == "hinge":
        return tl.where(d >= 1, 0.0, 1 - d), tl.where(d >= 1, 0.0, -1.0)
    elif KIND == "ipo":
        error = (d - 0.5) / beta
        return error * error, 2 * error / beta
    elif KIND == "exo_pair":
        chosen, rejected = log_sigmoid(d) - tl.log(1 - eps), log_sigmoid(-d) - tl.log(eps)
        p, q = sigmoid(d), sigmoid(-d)
        return p * chosen + q * rejected, p * q * (chosen - rejected)
    else:
        tl.static_assert(KIND == "discopop")
        m, rest = sigmoid(d / _TAU), sigmoid(-d / _TAU)
        logistic = log_sigmoid(d)
        exponential = exp(log_sigmoid(d / _TAU) - d)
        slope = m * rest / _TAU * logistic - rest * sigmoid(-d) + exponential * (rest / _TAU - 1)
        return exponential - rest * logistic, slope


@triton.jit
def reward_loss(r_c, r_r, beta, KIND: tl.constexpr):
    """A loss of both rewards: (value, derivative by r_c, derivative by r_r)."""
    if KIND == "nca_pair":
        value = -log_sigmoid(r_c) - 0.5 * log_sigmoid(-r_c) - 0.5 * log_sigmoid(-r_r)
        return value, 0.5 * sigmoid(r_c) - sigmoid(-r_c), 0.5 * sigmoid(r_r)
    elif KIND == "sppo_hard":
        chosen, rejected = (r_c - 0.5) / beta, (r_r + 0.5) / beta
        return chosen * chosen + rejected * rejected, 2 * chosen / beta, 2 * rejected / beta
    elif KIND == "apo_zero":
        return sigmoid(-r_c) + sigmoid(r_r), -sigmoid(r_c) * sigmoid(-r_c), sigmoid(r_r) * sigmoid(-r_r)
    else:
        tl.static_assert(KIND == "apo_down")
        d = r_c - r_r
        slope = sigmoid(d) * sigmoid(-d)
        return sigmoid(r_c) + sigmoid(-d), sigmoid(r_c) * sigmoid(-r_c) - slope, slope


def _sigmoid(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    return -(1 - eps) * F.logsigmoid(d) - eps * F.logsigmoid(-d), eps - torch.sigmoid(-d)


def _robust(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    scale = 1 / (1 - 2 * eps)
    value = (eps * F.logsigmoid(-d) - (1 - eps) * F.logsigmoid(d)) * scale
    return value, -torch.sigmoid(-d) - eps * scale


def _hinge(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    return F.relu(1 - d), -(d < 1).to(d.dtype)


def _ipo(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    error = (d - 0.5) / beta
    return error.square(), 2 * error / beta


def _exo_pair(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    chosen, rejected = F.logsigmoid(d) - math.log(1 - eps), F.logsigmoid(-d) - math.log(eps)
    p, q = torch.sigmoid(d), torch.sigmoid(-d)
    return p * chosen + q * rejected, p * q * (chosen - rejected)


def _discopop(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    m, rest = torch.sigmoid(d / DISCOPOP_TAU), torch.sigmoid(-d / DISCOPOP_TAU)
    logistic = F.logsigmoid(d)
    exponential = (F.logsigmoid(d / DISCOPOP_TAU) - d).exp()
    slope = m * rest / DISCOPOP_TAU * logistic - rest * torch.sigmoid(-d) + exponential * (rest / DISCOPOP_TAU - 1)
    return exponential - rest * logistic, slope


def _nca_pair(r_c: Tensor, r_r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    value = -F.logsigmoid(r_c) - 0.5 * F.logsigmoid(-r_c) - 0.5 * F.logsigmoid(-r_r)
    return value, 0.5 * torch.sigmoid(r_c) - torch.sigmoid(-r_c), 0.5 * torch.sigmoid(r_r)


def _sppo_hard(r_c: Tensor, r_r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected = (r_c - 0.5) / beta, (r_r + 0.5) / beta
    return chosen.square() + rejected.square(), 2 * chosen / beta, 2 * rejected / beta


def _apo_zero(r_c: Tensor, r_r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    p, q = torch.sigmoid(r_r), torch.sigmoid(-r_c)
    return q + p, -torch.sigmoid(r_c) * q, p * torch.sigmoid(-r_r)


def _apo_down(r_c: Tensor, r_r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    p, q = torch.sigmoid(r_c), torch.sigmoid(r_r - r_c)
    slope = q * torch.sigmoid(r_c - r_r)
    return p + q, p * torch.sigmoid(-r_c) - slope, slope


MARGIN_LOSSES = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "discopop": _discopop,
}
"""Losses of d alone: fn(d, beta, eps) -> (value, slope)."""

REWARD_LOSSES = {"nca_pair": _nca_pair, "sppo_hard": _sppo_hard, "apo_zero": _apo_zero, "apo_down": _apo_down}
"""Losses of both rewards: fn(r_c, r_r, beta) -> (value, derivative by r_c, derivative by r_r)."""

KINDS = (*MARGIN_LOSSES, *REWARD_LOSSES)

SMOOTHED = ("sigmoid", "robust", "exo_pair")
"""The kinds with a label smoothing."""
