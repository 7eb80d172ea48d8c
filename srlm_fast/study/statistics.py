"""Means over seeds with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and half the width of its 95 % interval (Student's t); NaN for n = 1."""

    mean: float
    half: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """The mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    n, mean = len(known), math.fsum(known) / len(known)
    if n == 1:
        return Estimate(mean, math.nan, 1)
    from scipy import stats

    variance = math.fsum((value - mean) ** 2 for value in known) / (n - 1)
    return Estimate(mean, float(stats.t.ppf(0.975, n - 1)) * math.sqrt(variance / n), n)


def difference(new: dict[int, float | None], old: dict[int, float | None]) -> Estimate | None:
    """The mean of new - old over the seeds that have both: runs of one seed share their data and, up to where they
    differ, every phase, so their difference varies less than either."""
    both = [seed for seed in sorted(new.keys() & old.keys()) if None not in (new[seed], old[seed])]
    return estimate([new[seed] - old[seed] for seed in both])
