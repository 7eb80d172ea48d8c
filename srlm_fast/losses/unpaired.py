"""Losses of single responses that are labelled desirable (1) or undesirable (0)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.losses.logprobs import LogProbs
from srlm_fast.losses.options import NonNegative


def kto(
    logps: LogProbs,
    *,
    beta: float,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """Kahneman-Tversky Optimization, [S] (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7).

    weight (1 - sigmoid(beta (u - z)))  desirable        weight (1 - sigmoid(beta (z - u)))  undesirable

    u = log pi - log pi_ref; z = baseline, the estimated KL of `kl_estimate`.
    """
    advantage = beta * (logps.ratios() - logps.baseline)
    return _by_label(logps, desirable_weight * torch.sigmoid(-advantage), undesirable_weight * torch.sigmoid(advantage))


def apo_zero_unpaired(
    logps: LogProbs,
    *,
    beta: float,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """APO-zero on unpaired data, [S] (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): KTO with z = 0."""
    reward = logps.rewards(beta)
    return _by_label(logps, desirable_weight * torch.sigmoid(-reward), undesirable_weight * torch.sigmoid(reward))


def bco(logps: LogProbs, *, beta: float) -> Tensor:
    """Binary Classifier Optimization, [S] (Jung et al. 2024, arXiv:2404.04656): a logit that tells the labels apart.

    -log sigmoid(beta (u - z))  desirable        -log sigmoid(beta (z - u))  undesirable

    u = log pi - log pi_ref; z = baseline, the reward shift delta / beta of `midpoint`.
    """
    advantage = beta * (logps.ratios() - logps.baseline)
    return _by_label(logps, -F.logsigmoid(advantage), -F.logsigmoid(-advantage))


def _by_label(logps: LogProbs, desirable: Tensor, undesirable: Tensor) -> Tensor:
    return torch.where(logps.labels > 0.5, desirable, undesirable)


def kl_estimate(total: float, count: float) -> float:
    """KTO's z from the summed log-ratios of responses to other prompts than their own: max(0, mean)."""
    return max(0.0, total / max(1.0, count))


def midpoint(desirable: float, n_desirable: float, undesirable: float, n_undesirable: float) -> float:
    """BCO's z from the summed log-ratios of both labels: half-way between the means, that of no responses being 0.

    The paper takes a moving average over batches; this is of one batch, so training has no state but the optimizer's.
    """
    return (desirable / max(1.0, n_desirable) + undesirable / max(1.0, n_undesirable)) / 2
