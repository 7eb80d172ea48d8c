"""Training losses: pure functions of the log-probabilities of responses, and their registry.

A new loss is one function and one line of `LOSSES`; docs/losses.md has the table.

| module | what is there |
| --- | --- |
| `logprobs` | `LogProbs`, what a loss is a function of; its sums and metrics |
| `margins` | DPO and the other losses of a pair's margin |
| `rewards` | losses of both rewards of a pair |
| `likelihood` | SFT, and losses with a likelihood or without a reference |
| `unpaired` | losses of single, labelled responses |
| `registry` | `LOSSES`, `evaluate` |
| `objective` | one loss or a weighted sum, with its options |
"""

from srlm_fast.losses.logprobs import LogProbs, halves, preference_metrics, sequence_sums
from srlm_fast.losses.objective import Objective, get_objective
from srlm_fast.losses.registry import LOSSES, Loss, evaluate, get_loss

__all__ = [
    "LOSSES",
    "LogProbs",
    "Loss",
    "Objective",
    "evaluate",
    "get_loss",
    "get_objective",
    "halves",
    "preference_metrics",
    "sequence_sums",
]
