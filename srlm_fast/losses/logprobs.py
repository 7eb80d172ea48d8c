"""What a loss is a function of: log-probabilities of responses, and what else is known of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogProbs:
    """Responses of a batch, fp32 [S] unless said otherwise; None where nobody asked for it.

    For a paired loss the responses come as chosen, rejected, chosen, rejected, ...
    """

    policy: Tensor
    """Log-probability of each response: the sum over its tokens."""
    reference: Tensor | None
    """The same under the reference model."""
    lengths: Tensor
    """int64, tokens of each response."""
    tokens: Tensor | None = None
    """[N], log-probability of each token under the policy, response after response."""
    reference_heads: Tensor | None = None
    """The reference's sums over the first min(|chosen|, |rejected|) tokens."""
    labels: Tensor | None = None
    """Pairs: probability that this response is the better one. Unpaired: 1 desirable, 0 undesirable."""
    baseline: Tensor | None = None
    """[], the log-ratio that those of unpaired responses are compared with."""
    log_collisions: Tensor | None = None
    """Sum over the tokens of log sum_v p(v)^2, the log-probability that two samples of a token are the same."""

    def ratios(self) -> Tensor:
        """log pi - log pi_ref, [S]; without a reference log pi."""
        return self.policy if self.reference is None else self.policy - self.reference

    def rewards(self, beta: float) -> Tensor:
        """Implicit rewards beta (log pi - log pi_ref), [S] (Rafailov et al. 2023, eq. 5 up to a constant)."""
        return beta * self.ratios()

    def means(self) -> Tensor:
        """Log-probability per token under the policy, [S]."""
        return self.policy / self.lengths.clamp_min(1)


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """[S] -> those of the chosen and those of the rejected responses, [S / 2] each."""
    return values[0::2], values[1::2]


def sequence_sums(logps: Tensor, lengths: Tensor) -> Tensor:
    """Sum of each response's token log-probabilities, in token order. logps [N], lengths int64 [S] -> [S]."""
    return torch.segment_reduce(logps, "sum", lengths=lengths, unsafe=True)


def head_sums(logps: Tensor, lengths: Tensor) -> Tensor:
    """As `sequence_sums`, but of both responses of a pair only as many tokens as the shorter one has."""
    heads = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    parts = torch.stack((heads, lengths - heads), 1).flatten()
    return sequence_sums(logps, parts)[0::2]


def preference_metrics(logps: LogProbs, beta: float, *, per_token: bool = False) -> dict[str, Tensor]:
    """Sums over the pairs of a batch, under TRL's metric names; divide by the number of pairs.

    per_token: the rewards are beta times the mean per token, as TRL has it for SimPO and ORPO.
    """
    rewards = beta * logps.means() if per_token else logps.rewards(beta)
    chosen, rejected = halves(rewards.detach())
    logp_chosen, logp_rejected = halves(logps.policy.detach())
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).float().sum(),
        "logps/chosen": logp_chosen.sum(),
        "logps/rejected": logp_rejected.sum(),
    }


def label_metrics(logps: LogProbs, beta: float) -> dict[str, Tensor]:
    """The same of unpaired responses: divide by the number of desirable (chosen) or undesirable (rejected) ones."""
    rewards, policy, desirable = logps.rewards(beta).detach(), logps.policy.detach(), logps.labels > 0.5
    return {
        "rewards/chosen": rewards[desirable].sum(),
        "rewards/rejected": rewards[~desirable].sum(),
        "logps/chosen": policy[desirable].sum(),
        "logps/rejected": policy[~desirable].sum(),
    }
