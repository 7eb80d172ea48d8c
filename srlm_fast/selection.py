"""Which answers of one prompt are paired.

A rule turns the scored answers into slots: answers of which one is chosen, and answers of which one is rejected. Which
pair of a slot is taken is decided by the ties among them (`srlm_fast.pairs`).

Sources: max_min is that of Self-Rewarding Language Models (arXiv 2401.10020, section 2.2); the length control is
Meta-Rewarding's (Wu et al. 2024, arXiv 2407.19594, section 2.1); past and future answers are Temporal Self-Rewarding's
(Wang et al. 2025, arXiv 2508.06026).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Candidate = dict[str, Any]
Slot = tuple[list[Candidate], list[Candidate]]
"""Answers of which one is chosen, answers of which one is rejected."""


def _score(candidate: Candidate) -> float:
    return candidate["score"]


def tiers(high: Sequence[Candidate], low: Sequence[Candidate], rho: float) -> Slot:
    """The answers in the upper and in the lower share rho of the range of scores, 0 <= rho <= 1/2.

        chosen    S >= (1 - rho) S_max + rho S_min
        rejected  S <= (1 - rho) S_min + rho S_max

    With rho = 0 those are the best and the worst. Meta-Rewarding takes the shortest chosen and the longest rejected.
    """
    best, worst = max(map(_score, high)), min(map(_score, low))
    if rho == 0:
        return [c for c in high if c["score"] == best], [c for c in low if c["score"] == worst]
    top, bottom = (1 - rho) * best + rho * worst, (1 - rho) * worst + rho * best
    return [c for c in high if c["score"] >= top], [c for c in low if c["score"] <= bottom]


def pools(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """The answers that may be chosen and those that may be rejected, by the model that wrote them ("by").

    Temporal Self-Rewarding, eq. of both phases, with S the scores by M_t:

        anchored rejection     past answers are rejected where  min S(past) < min S(M_t's own)
        future-guided chosen   future answers are chosen where  max S(future) > max S(M_t's own)
    """
    own = [c for c in candidates if "by" not in c]
    past = [c for c in candidates if c.get("by") == "past"]
    future = [c for c in candidates if c.get("by") == "future"]
    if not own:
        return [], []
    anchored = past and min(map(_score, past)) < min(map(_score, own))
    guided = future and max(map(_score, future)) > max(map(_score, own))
    return future if guided else own, past if anchored else own


def _max_min(candidates: list[Candidate], k: int, rho: float, rng: random.Random) -> list[Slot]:
    high, low = pools(candidates)
    return [tiers(high, low, rho)] if high and low else []


def _max_random(candidates: list[Candidate], k: int, rho: float, rng: random.Random) -> list[Slot]:
    best, _ = tiers(candidates, candidates, 0)
    worse = [c for c in candidates if c["score"] < best[0]["score"]]
    return [(best, [rng.choice(worse)])] if worse else []


def _max_median(candidates: list[Candidate], k: int, rho: float, rng: random.Random) -> list[Slot]:
    """The middle of an even number is the lower one of both."""
    best, _ = tiers(candidates, candidates, 0)
    ordered = sorted(map(_score, candidates))
    median = ordered[(len(ordered) - 1) // 2]
    return [(best, [c for c in candidates if c["score"] == median])]


def _top_bottom(candidates: list[Candidate], k: int, rho: float, rng: random.Random) -> list[Slot]:
    """The best with the worst, the second best with the second worst, ...; equal scores stand in a drawn order."""
    ordered = sorted(rng.sample(candidates, len(candidates)), key=_score)
    return [([ordered[-1 - i]], [ordered[i]]) for i in range(min(k, len(ordered) // 2))]


def _all(candidates: list[Candidate], k: int, rho: float, rng: random.Random) -> list[Slot]:
    return [([a], [b]) for a in candidates for b in candidates if a["score"] > b["score"]]


RULES: dict[str, Callable[[list[Candidate], int, float, random.Random], list[Slot]]] = {
    "max_min": _max_min,
    "max_random": _max_random,
    "max_median": _max_median,
    "top_bottom": _top_bottom,
    "all": _all,
}
"""By pairs.select: (scored answers, k, rho, random numbers) -> slots."""
