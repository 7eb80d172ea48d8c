"""Losses that raise likelihoods: SFT, the terms that join a preference loss, and the losses without a reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.losses.logprobs import LogProbs, halves
from srlm_fast.losses.margins import logistic, margins
from srlm_fast.losses.options import NonNegative

_CERTAIN = -(2.0**-23)
"""Largest mean log-probability that has odds in fp32."""


def sft(logps: LogProbs) -> Tensor:
    """Negative log-likelihood of each response, [S]; per target token after the trainer's division."""
    return -logps.policy


def nll(logps: LogProbs) -> Tensor:
    """Negative log-likelihood of the chosen responses, [pairs]; per chosen token of the batch after the division.

    A term for sums, such as MPO's 0.8 dpo + 0.2 bco_pair + nll (Wang et al. 2024, arXiv:2411.10442).
    """
    return -halves(logps.policy)[0]


def chosen_nll(logps: LogProbs, per_token: bool) -> Tensor:
    """Negative log-likelihood of each chosen response, or its mean over that response's tokens, [pairs]."""
    return -halves(logps.means() if per_token else logps.policy)[0]


def irpo(
    logps: LogProbs,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    alpha: NonNegative = 1.0,
    nll_per_token: bool = True,
    **score: Any,
) -> Tensor:
    """Iterative RPO, [pairs] (Pang et al. 2024, arXiv:2404.19733): DPO + alpha NLL(y_c) / |y_c|.

    With nll_per_token false the NLL is not divided: RPO (Liu et al. 2024, arXiv:2405.16436) with alpha = eta beta.
    """
    return logistic(margins(logps, beta, **score), label_smoothing) + alpha * chosen_nll(logps, nll_per_token)


def simpo(logps: LogProbs, *, beta: float, label_smoothing: float = 0.0, gamma: float = 0.5) -> Tensor:
    """SimPO, [pairs] (Meng et al. 2024, arXiv:2405.14734, eq. 6): no reference; its beta is 2 to 10.

    -log sigmoid(beta log pi(y_c) / |y_c| - beta log pi(y_r) / |y_r| - gamma)
    """
    chosen, rejected = halves(logps.means())
    return logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo(
    logps: LogProbs,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    alpha: NonNegative = 1.0,
    nll_per_token: bool = True,
) -> Tensor:
    """Contrastive Preference Optimization, [pairs] (Xu et al. 2024, arXiv:2401.08417, eq. 3): no reference.

    -log sigmoid(beta (log pi(y_c) - log pi(y_r))) + alpha NLL(y_c)

    The paper's NLL is a sum; TRL takes it per token, and so does nll_per_token.
    """
    chosen, rejected = halves(logps.policy)
    return logistic(beta * (chosen - rejected), label_smoothing) + alpha * chosen_nll(logps, nll_per_token)


def orpo(logps: LogProbs, *, beta: float) -> Tensor:
    """ORPO, [pairs] (Hong et al. 2024, arXiv:2403.07691, eq. 6 with lambda = beta): no reference.

    NLL(y_c) / |y_c| - beta log sigmoid(log odds(y_c) - log odds(y_r)),  odds = p / (1 - p), log p = log pi(y) / |y|

    The NLL is that of the response; TRL adds the tokens of the prompt to it.
    """
    logp = logps.means().clamp_max(_CERTAIN)
    chosen, rejected = halves(logp - _log1mexp(logp))
    return chosen_nll(logps, per_token=True) - beta * F.logsigmoid(chosen - rejected)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by the formula that is accurate at x (Maechler 2012)."""
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
