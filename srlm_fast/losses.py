"""Training losses: pure functions of per-response log-probability sums, and their registry.

A new loss is one function and one line of `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.kernels import library
from srlm_fast.kernels.preference import preference_loss


@dataclass(frozen=True)
class LogProbs:
    """Summed log-probabilities of the responses of a batch, fp32 [S].

    For a paired loss the responses come as chosen, rejected, chosen, rejected, ...
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor

    def rewards(self, beta: float) -> Tensor:
        """Implicit rewards beta * (log pi - log pi_ref), [S] (Rafailov et al. 2023, eq. 5 up to a constant)."""
        return beta * (self.policy - self.reference)


def sequence_sums(logps: Tensor, lengths: Tensor) -> Tensor:
    """Sum of each response's token log-probabilities, in token order. logps [N], lengths int64 [S] -> [S]."""
    return torch.segment_reduce(logps, "sum", lengths=lengths, unsafe=True)


def sft(logps: LogProbs, *, beta: float, label_smoothing: float) -> Tensor:
    """Negative log-likelihood of each response, [S]; the trainer divides by the number of target tokens."""
    return -logps.policy


def dpo(logps: LogProbs, *, beta: float, label_smoothing: float) -> Tensor:
    """Direct Preference Optimization, [pairs] (Rafailov et al. 2023, eq. 7; smoothing: Mitchell 2023, cDPO).

    -(1 - eps) log sigmoid(d) - eps log sigmoid(-d), d = reward(chosen) - reward(rejected)
    """
    rewards = logps.rewards(beta)
    margin = rewards[0::2] - rewards[1::2]
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


@dataclass(frozen=True)
class Loss:
    """A registered loss.

    fn(logps, beta=, label_smoothing=) -> one value per response, or per pair if `paired`; the trainer sums the values
    over the global batch and divides by the count of `unit` ("tokens", "responses" or "pairs"). `kind` is its name in
    `kernels.preference`, if it is there.
    """

    fn: Callable[..., Tensor]
    unit: str
    needs_reference: bool = False
    paired: bool = False
    kind: str = ""


LOSSES: dict[str, Loss] = {
    "sft": Loss(sft, unit="tokens"),
    "dpo": Loss(dpo, unit="pairs", needs_reference=True, paired=True, kind="sigmoid"),
}


def get_loss(name: str) -> Loss:
    """The registered loss of that name.

    Raises:
        UserError: when there is none, with the nearest name.
    """
    if name not in LOSSES:
        near = get_close_matches(name, LOSSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown loss {name!r}{hint} (known: {', '.join(LOSSES)})")
    return LOSSES[name]


def evaluate(
    loss: Loss, logps: Tensor, lengths: Tensor, reference: Tensor | None, *, beta: float, label_smoothing: float
) -> tuple[Tensor, LogProbs]:
    """A loss from token log-probabilities: in one launch where it has a kernel and kernels are in use.

    Args:
        loss: a registered loss.
        logps: fp32 [N], response after response.
        lengths: int64 [S], tokens of each response.
        reference: fp32 [S] summed log-probabilities of the reference model, for a loss that needs them.

    Returns:
        The values, [S] or [S / 2], and the sums that they were made from.
    """
    if loss.kind and library.fused():
        values, sums = preference_loss(
            logps, lengths, reference, kind=loss.kind, beta=beta, label_smoothing=label_smoothing
        )
        return values, LogProbs(sums, reference, lengths)
    sums = LogProbs(sequence_sums(logps, lengths), reference, lengths)
    return loss.fn(sums, beta=beta, label_smoothing=label_smoothing), sums


def preference_metrics(logps: LogProbs, beta: float) -> dict[str, Tensor]:
    """Sums over the pairs of a batch, under TRL's metric names; divide by the number of pairs."""
    chosen, rejected = logps.rewards(beta).detach().view(-1, 2).unbind(1)
    logp_chosen, logp_rejected = logps.policy.detach().view(-1, 2).unbind(1)
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).float().sum(),
        "logps/chosen": logp_chosen.sum(),
        "logps/rejected": logp_rejected.sum(),
    }
