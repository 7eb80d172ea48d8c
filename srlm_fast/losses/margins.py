"""Losses of a pair's margin h = beta (score of the chosen - score of the rejected response) - margin.

Functions with `**score` have the options of `margins` as well as their own.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.losses.logprobs import LogProbs, halves, head_sums
from srlm_fast.losses.options import NonNegative, Positive, Share

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

_LARGEST_EXPONENT = 80.0
"""exp of it is finite in fp32."""


def margins(
    logps: LogProbs,
    beta: float,
    *,
    margin: float = 0.0,
    length_normalised: bool = False,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Tensor:
    """h [pairs] = beta (s_c - s_r) - margin, with s = f'(pi / pi_ref), and divided by the length if length_normalised.

    With u = log pi - log pi_ref (f-DPO: Wang et al. 2023, arXiv:2309.16240; alpha as in TRL, alpha -> 1: reverse_kl):

        reverse_kl        u                             (DPO)
        forward_kl        1 - exp(-u)
        js_divergence     log 2 + log sigmoid(u)
        alpha_divergence  [exp((alpha - 1) u) - 1] / (alpha - 1)

    A margin above 0 asks for more than a preference (ODPO: Amini et al. 2024, arXiv:2402.10571). Exponents are cut off
    at 80, as far as fp32 goes; their squares in IPO are beyond it.
    """
    score = logps.ratios()
    if divergence == "forward_kl":
        score = 1 - torch.exp((-score).clamp_max(_LARGEST_EXPONENT))
    elif divergence == "js_divergence":
        score = math.log(2) + F.logsigmoid(score)
    elif divergence == "alpha_divergence" and abs(divergence_alpha - 1) > 1e-6:
        power = divergence_alpha - 1
        score = torch.expm1((power * score).clamp_max(_LARGEST_EXPONENT)) / power
    if length_normalised:
        score = score / logps.lengths.clamp_min(1)
    chosen, rejected = halves(score)
    return beta * (chosen - rejected) - margin


def logistic(h: Tensor, label_smoothing: Tensor | float) -> Tensor:
    """-(1 - eps) log sigmoid(h) - eps log sigmoid(-h)."""
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def dpo(logps: LogProbs, *, beta: float, label_smoothing: float = 0.0, **score: Any) -> Tensor:
    """Direct Preference Optimization, [pairs] (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)

    eps = label_smoothing > 0 is cDPO: labels are wrong with that probability (Mitchell 2023, "A note on DPO with noisy
    preferences").
    """
    return logistic(margins(logps, beta, **score), label_smoothing)


def dpo_norm(
    logps: LogProbs, *, beta: float, label_smoothing: float = 0.0, length_normalised: bool = True, **score: Any
) -> Tensor:
    """Length-normalised DPO, [pairs] (Lambert et al. 2024, Tulu 3, arXiv:2411.15124): rewards per token."""
    return logistic(margins(logps, beta, length_normalised=length_normalised, **score), label_smoothing)


def robust(logps: LogProbs, *, beta: float, label_smoothing: float = 0.0, **score: Any) -> Tensor:
    """Robust DPO, [pairs] (Chowdhury et al. 2024, arXiv:2403.00409).

    [-(1 - eps) log sigmoid(h) + eps log sigmoid(-h)] / (1 - 2 eps)

    Its mean is DPO's of the true labels where labels are flipped with probability eps = label_smoothing.
    """
    h, eps = margins(logps, beta, **score), label_smoothing
    return (eps * F.logsigmoid(-h) - (1 - eps) * F.logsigmoid(h)) / (1 - 2 * eps)


def hinge(logps: LogProbs, *, beta: float, **score: Any) -> Tensor:
    """max(0, 1 - h), [pairs]: SLiC (Zhao et al. 2023, arXiv:2305.10425) with the rewards of RSO (Liu et al. 2023)."""
    return F.relu(1 - margins(logps, beta, **score))


def ipo(logps: LogProbs, *, beta: float, length_normalised: bool = True, **score: Any) -> Tensor:
    """Identity Preference Optimization, [pairs] (Azar et al. 2023, arXiv:2310.12036, eq. 17 with tau = beta).

    (h / beta - 1 / (2 beta))^2

    Log-ratios are per token unless length_normalised is false: so TRL does after asking the authors, though the paper
    writes sums.
    """
    return ((margins(logps, beta, length_normalised=length_normalised, **score) - 0.5) / beta).square()


def exo_pair(logps: LogProbs, *, beta: float, label_smoothing: float, **score: Any) -> Tensor:
    """EXO for pairs, [pairs] (Ji et al. 2024, arXiv:2402.00856, eq. 16): reverse KL to the smoothed label.

    sigmoid(h) log [sigmoid(h) / (1 - eps)] + sigmoid(-h) log [sigmoid(-h) / eps],  eps > 0
    """
    h, eps = margins(logps, beta, **score), label_smoothing
    chosen, rejected = F.logsigmoid(h) - math.log1p(-eps), F.logsigmoid(-h) - math.log(eps)
    return torch.sigmoid(h) * chosen + torch.sigmoid(-h) * rejected


def discopop(logps: LogProbs, *, beta: float, tau: Positive = 0.05, **score: Any) -> Tensor:
    """DiscoPOP's log-ratio modulated loss, [pairs] (Lu et al. 2024, arXiv:2406.08414).

    -(1 - m) log sigmoid(h) + m exp(-h),  m = sigmoid(h / tau)
    """
    h = margins(logps, beta, **score)
    return torch.exp(F.logsigmoid(h / tau) - h) - torch.sigmoid(-h / tau) * F.logsigmoid(h)


def r_dpo(logps: LogProbs, *, beta: float, label_smoothing: float = 0.0, alpha: float = 0.01, **score: Any) -> Tensor:
    """R-DPO, [pairs] (Park et al. 2024, arXiv:2403.19159): DPO of a reward that is charged alpha per token.

    -log sigmoid(h + alpha (|y_c| - |y_r|))
    """
    chosen, rejected = halves(logps.lengths.to(logps.policy.dtype))
    return logistic(margins(logps, beta, **score) + alpha * (chosen - rejected), label_smoothing)


def ld_dpo(logps: LogProbs, *, beta: float, label_smoothing: float = 0.0, alpha: Share = 0.5) -> Tensor:
    """LD-DPO, [pairs] (Liu et al. 2024, arXiv:2409.06411): DPO whose excess tokens count alpha.

    log p(y) = sum of the first l tokens + alpha x sum of the others, l = min(|y_c|, |y_r|), under policy and reference.
    """
    heads = head_sums(logps.tokens, logps.lengths)
    policy = heads + alpha * (logps.policy - heads)
    reference = logps.reference_heads + alpha * (logps.reference - logps.reference_heads)
    chosen, rejected = halves(policy - reference)
    return logistic(beta * (chosen - rejected), label_smoothing)


def dpop(
    logps: LogProbs, *, beta: float, label_smoothing: float = 0.0, penalty: NonNegative = 50.0, **score: Any
) -> Tensor:
    """DPO-Positive, [pairs] (Pal et al. 2024, Smaug, arXiv:2402.13228): the chosen response may not lose probability.

    -log sigmoid(h - beta penalty max(0, log pi_ref(y_c) - log pi(y_c)))
    """
    lost = F.relu(-halves(logps.ratios())[0])
    return logistic(margins(logps, beta, **score) - beta * penalty * lost, label_smoothing)


def wpo_weights(logps: LogProbs, *, sampled_alignment: bool = False) -> Tensor:
    """Weights of pairs, [pairs], without gradient (Zhou et al. 2024, WPO, arXiv:2406.11827, eq. 2): w(y_c) w(y_r).

    w(y) = exp(mean over the tokens of log p(y_t)); with sampled_alignment of log [p(y_t) / sum_v p(v)^2], which makes a
    sample of the policy itself weigh about 1.
    """
    with torch.no_grad():
        logp = logps.policy - logps.log_collisions if sampled_alignment else logps.policy
        chosen, rejected = halves(torch.exp(logp / logps.lengths.clamp_min(1)))
        return chosen * rejected


def wpo(
    logps: LogProbs, *, beta: float, label_smoothing: float = 0.0, sampled_alignment: bool = False, **score: Any
) -> Tensor:
    """Weighted Preference Optimization, [pairs]: DPO times `wpo_weights`, so that pairs far from the policy count less.

    TRL's `use_weighting` is sampled_alignment.
    """
    weights = wpo_weights(logps, sampled_alignment=sampled_alignment)
    return weights * logistic(margins(logps, beta, **score), label_smoothing)


def cream(logps: LogProbs, *, beta: float, **score: Any) -> Tensor:
    """CREAM, [pairs] (Wang et al. 2024, arXiv:2410.12735): a self-made label holds with probability C.

    -C log sigmoid(h) - (1 - C) log sigmoid(-h),  C = labels of the chosen responses
    """
    consistency, _ = halves(logps.labels)
    return logistic(margins(logps, beta, **score), 1 - consistency)


def aot(logps: LogProbs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT for pairs, [pairs] (Melnyk et al. 2024, arXiv:2406.05882): the policy's margins dominate the reference's.

    DPO of the differences of the sorted margins log pi(y_c) - log pi(y_r) and the sorted log pi_ref(y_c) - log
    pi_ref(y_r). Sorted are the pairs of a micro-batch.
    """
    (chosen, rejected), (r_chosen, r_rejected) = halves(logps.policy), halves(logps.reference)
    ours, theirs = (chosen - rejected).sort().values, (r_chosen - r_rejected).sort().values
    return logistic(beta * (ours - theirs), label_smoothing)


def aot_unpaired(logps: LogProbs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT for as many chosen as rejected responses, whatever their prompts, [pairs] (arXiv:2406.05882, as well).

    DPO of the differences of the sorted rewards of the chosen and the sorted rewards of the rejected responses of a
    micro-batch.
    """
    chosen, rejected = (values.sort().values for values in halves(logps.ratios()))
    return logistic(beta * (chosen - rejected), label_smoothing)
