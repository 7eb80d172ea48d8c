"""How well a judge's scores agree with a known ranking: the paper's five metrics, with intervals.

Source: arXiv 2401.10020, section 3.1.3 and table 4. The paper does not say how equal scores count, which tau is meant,
or how correlations are averaged, so both readings of each are reported:

pairwise_accuracy          pairs of differently ranked replies whose scores are in the human order / all such pairs; a
                           tie or a missing score counts against the judge
pairwise_accuracy_decided  the same among the pairs with two different scores
exact_match                instructions with all their pairs in order / all instructions
exact_match_ties_allowed   instructions with every reply scored and no pair in reverse / all instructions
five_best                  replies ranked highest by humans / replies with the best score
spearman, kendall          mean over instructions of the correlation of scores and -ranks (tau-b); 0 for an instruction
                           whose replies all have one score, since that orders nothing
spearman_pooled, kendall_pooled   one correlation over the scored replies of all instructions
tie_rate                   differently ranked pairs with equal scores / those with two scores
unparsable                 replies without a score / all replies

Instructions without two differently ranked replies are left out of all but five_best and unparsable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from srlm_fast.errors import UserError


@dataclass(frozen=True)
class Ranked:
    """The replies to one instruction."""

    scores: Sequence[float | None]  # the judge's; None where no judgement was parsable
    ranks: Sequence[float]  # the human's; the lowest is the best, equal ones ask for no order


def ranks(qualities: Sequence[float]) -> list[int]:
    """Ranks of known qualities: 0 for the highest, equal qualities share one, none is left out."""
    place = {quality: rank for rank, quality in enumerate(sorted(set(qualities), reverse=True))}
    return [place[quality] for quality in qualities]


# Numerator and denominator, as columns of `_statistics`, of each metric that is a ratio of sums over instructions.
_RATIOS = {
    "pairwise_accuracy": ("in_order", "pairs"),
    "pairwise_accuracy_decided": ("in_order", "decided"),
    "exact_match": ("exact", "instructions"),
    "exact_match_ties_allowed": ("no_reverse", "instructions"),
    "five_best": ("best_and_ranked_first", "best"),
    "spearman": ("spearman", "instructions"),
    "kendall": ("kendall", "instructions"),
    "tie_rate": ("tied", "scored_pairs"),
    "unparsable": ("unscored", "replies"),
}


def judge_metrics(
    items: Sequence[Ranked], *, best_score: float = 5.0, bootstrap: int = 1000, seed: int = 0
) -> dict[str, float | int | list[float] | None]:
    """The metrics above as fractions or correlations; None where the denominator is zero.

    With `bootstrap` > 0 every ratio NAME has NAME_interval: [low, high], its 95 % percentile interval over that many
    draws of instructions with replacement. "instructions" and "replies" are the counts behind all of them.
    """
    rows = [_statistics(item, best_score) for item in items]
    names = list(_statistics(Ranked([], []), best_score))
    table = np.array([[row[name] for name in names] for row in rows], dtype=np.float64).reshape(len(rows), len(names))
    totals = dict(zip(names, table.sum(axis=0), strict=True))
    metrics: dict = {name: _ratio(totals[top], totals[bottom]) for name, (top, bottom) in _RATIOS.items()}
    pooled = [(score, -rank) for item in items for score, rank in zip(item.scores, item.ranks) if score is not None]
    metrics["spearman_pooled"], metrics["kendall_pooled"] = _correlations(*zip(*pooled)) if pooled else (None, None)
    if bootstrap and rows:
        draws = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=bootstrap)
        sums = dict(zip(names, (draws @ table).T, strict=True))
        for name, (top, bottom) in _RATIOS.items():
            drawn = sums[bottom] > 0
            values = sums[top][drawn] / sums[bottom][drawn]
            metrics[f"{name}_interval"] = np.percentile(values, [2.5, 97.5]).tolist() if drawn.any() else None
    return metrics | {"instructions": int(totals["instructions"]), "replies": int(totals["replies"])}


def _statistics(item: Ranked, best_score: float) -> dict[str, float]:
    """The counts of one instruction."""
    replies = list(zip(item.scores, item.ranks, strict=True))
    pairs = [(a, b) if a[1] < b[1] else (b, a) for a, b in combinations(replies, 2) if a[1] != b[1]]
    scored = [(better[0], worse[0]) for better, worse in pairs if None not in (better[0], worse[0])]
    in_order = sum(better > worse for better, worse in scored)
    tied = sum(better == worse for better, worse in scored)
    best = [rank for score, rank in replies if score is not None and score >= best_score]
    known = [(score, -rank) for score, rank in replies if score is not None]
    spearman, kendall = _correlations(*zip(*known)) if pairs and known else (None, None)
    return {
        "instructions": bool(pairs),
        "replies": len(replies),
        "unscored": len(replies) - len(known),
        "pairs": len(pairs),
        "scored_pairs": len(scored),
        "decided": len(scored) - tied,
        "in_order": in_order,
        "tied": tied,
        "exact": bool(pairs) and in_order == len(pairs),
        "no_reverse": bool(pairs) and len(known) == len(replies) and in_order + tied == len(pairs),
        "best": len(best),
        "best_and_ranked_first": sum(rank == min(item.ranks) for rank in best),
        "spearman": spearman or 0.0,
        "kendall": kendall or 0.0,
    }


def _correlations(scores: Sequence[float], orders: Sequence[float]) -> tuple[float | None, float | None]:
    """(Spearman's rho, Kendall's tau-b); None where either side has a single value."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError("the judge metrics need SciPy: pip install scipy") from None
    if len(set(scores)) < 2 or len(set(orders)) < 2:
        return None, None
    return float(stats.spearmanr(scores, orders).statistic), float(stats.kendalltau(scores, orders).statistic)


def _ratio(top: float, bottom: float) -> float | None:
    return float(top / bottom) if bottom else None
