"""CREAM's labels: how far a ranking of the answers is confirmed by another one.

Source: Wang et al. 2024, CREAM, arXiv 2410.12735, section 4. With Kendall's tau between the rankings of N answers by
two reward models,

    tau = 2 / (N (N - 1)) sum over pairs of answers [concordant - discordant]        C = (tau + 1) / 2

the label "chosen is better" holds with probability C: the loss `cream` is

    C DPO(chosen, rejected) + (1 - C) DPO(rejected, chosen)

CREAM's rewards are log-probabilities, which never tie; judges' scores do, and a tied pair is neither concordant nor
discordant (tau-a). Its second model is that of the iteration before; another half of the same model's judgements is
ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from srlm_fast.judge import DECIDES, aggregate

Scores = Sequence[float | None]


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """tau-a of two lists of scores of the same answers; None of fewer than two answers."""
    pairs = list(combinations(zip(one, other, strict=True), 2))
    if not pairs:
        return None
    signs = ((a - b) * (c - d) for (a, c), (b, d) in pairs)
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(pairs)


def consistency(one: Scores, other: Scores) -> float | None:
    """C of two lists of scores, from the answers that both have scored; None where these are fewer than two."""
    both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    tau = kendall_tau([a for a, _ in both], [b for _, b in both])
    return None if tau is None else (tau + 1) / 2


def halves(judgements: Sequence[Mapping[str, Any]], mode: str) -> tuple[float | None, float | None]:
    """The mean scores of the first, third, ... and of the second, fourth, ... judgement of an answer."""
    decides = DECIDES[mode]
    return aggregate(j[decides] for j in judgements[0::2]), aggregate(j[decides] for j in judgements[1::2])


def labels(found: Mapping[str, float | None], scope: str) -> tuple[dict[str, float], float | None]:
    """The labels of the pairs of every prompt, and the mean of what was found.

    Args:
        found: C by prompt id; None where it could not be found, which takes the mean (1 if there is none).
        scope: "mean", all prompts have the mean, as the paper's equation does; "prompt", each its own.
    """
    known = [value for value in found.values() if value is not None]
    mean = sum(known) / len(known) if known else None
    fallback = 1.0 if mean is None else mean
    own = scope == "prompt"
    return {key: value if own and value is not None else fallback for key, value in found.items()}, mean


def from_scores(rows: Iterable[dict[str, Any]]) -> None:
    """Writes "label" into pair rows: 1 / (1 + exp(rejected score - chosen score)), as Bradley and Terry have it."""
    for row in rows:
        row["label"] = 1 / (1 + math.exp(row["rejected_score"] - row["chosen_score"]))
