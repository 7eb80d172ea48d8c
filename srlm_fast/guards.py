"""Guards against drift: what a phase has counted, compared with bounds and with the phases before.

    score_share     collapse of the scores: share of the most common (rounded) score of the candidates' judgements
    score_entropy   the same as the entropy of these scores in bits, which may not be too low
    length_ratio    explosion of the length: mean tokens of the held-out answers over those of the model before; of the
                    candidates where no held-out prompts are answered
    judge_drop      falling agreement: the best pairwise accuracy on the EFT evaluation set since M1 less this model's
    chosen_fall     falling log-probabilities: nats by which a chosen response is less likely after training than under
                    the reference, mean over the last tenth of the steps

A guard reads the records of phases only, so it says the same about a phase that was done before as about one that has
just ended: with guards.action=stop a run stops behind the phase every time until the bound is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from srlm_fast.config import GuardsConfig

Counts = Mapping[str, Any]
Records = Callable[[str], Counts | None]
"""The counts of a phase by name; None where it is not done."""


@dataclass(frozen=True)
class Finding:
    """A crossed bound."""

    guard: str
    phase: str
    value: float
    bound: float
    says: str

    @property
    def text(self) -> str:
        """One line."""
        return f"guards.{self.guard}: {self.says}; the bound is {self.bound:g}"


def check(phase: str, counts_of: Records, bounds: GuardsConfig) -> list[Finding]:
    """What the guards find about a phase that is done.

    Args:
        phase: its name.
        counts_of: counts of this and of earlier phases.
        bounds: guards.*; those that are None are not looked at.
    """
    counts, found = counts_of(phase), []
    name, _, kind = phase.partition("/")
    if counts is None or not re.fullmatch(r"m\d+", name):
        return []
    for guard, of_kind, measure, too_low in _GUARDS:
        bound = getattr(bounds, guard)
        if kind != of_kind or bound is None:
            continue
        value = measure(int(name[1:]), counts, counts_of)
        if value is not None and (value < bound if too_low else value > bound):
            says = _SAYS[guard].format(value=value, model=name.upper(), before=f"M{int(name[1:]) - 1}")
            found.append(Finding(guard, phase, round(value, 4), bound, says))
    return found


def _score_share(t: int, counts: Counts, counts_of: Records) -> float | None:
    scores = counts["scores"].values()
    return max(scores) / sum(scores) if scores else None


def _score_entropy(t: int, counts: Counts, counts_of: Records) -> float | None:
    total = sum(counts["scores"].values())
    shares = [n / total for n in counts["scores"].values()]
    return -sum(p * math.log2(p) for p in shares) + 0.0 if shares else None


def _held_out_ratio(t: int, counts: Counts, counts_of: Records) -> float | None:
    return _ratio(counts, counts_of(f"m{t - 1}/evaluate"), "answer_tokens")


def _candidates_ratio(t: int, counts: Counts, counts_of: Records) -> float | None:
    if (counts_of(f"m{t}/evaluate") or {}).get("answer_tokens"):
        return None
    return _ratio(counts, counts_of(f"m{t - 1}/candidates"), "mean_tokens")


def _ratio(counts: Counts, before: Counts | None, name: str) -> float | None:
    now, then = counts.get(name), (before or {}).get(name)
    return now / then if now and then else None


def _judge_drop(t: int, counts: Counts, counts_of: Records) -> float | None:
    known = [(counts_of(f"m{s}/evaluate") or {}).get("judge_pairwise") for s in range(1, t)]
    known = [value for value in known if value is not None]
    now = counts.get("judge_pairwise")
    return max(known) - now if known and now is not None else None


def _chosen_fall(t: int, counts: Counts, counts_of: Records) -> float | None:
    return counts.get("chosen_fall")


_GUARDS = (
    ("score_share", "candidates", _score_share, False),
    ("score_entropy", "candidates", _score_entropy, True),
    ("length_ratio", "evaluate", _held_out_ratio, False),
    ("length_ratio", "candidates", _candidates_ratio, False),
    ("judge_drop", "evaluate", _judge_drop, False),
    ("chosen_fall", "train", _chosen_fall, False),
)
"""(guard, kind of phase, measure, whether it is crossed downwards)."""
_SAYS = {
    "score_share": "{value:.1%} of the scores that {model} gave its answers are the same",
    "score_entropy": "the scores that {model} gave its answers have an entropy of {value:.2f} bits",
    "length_ratio": "the answers of {model} are {value:.2f} times as long as those of {before}",
    "judge_drop": "the judge of {model} is {value:.1%} less often right than the best since M1 (pairwise accuracy)",
    "chosen_fall": "the chosen responses are {value:.3g} nats less likely under {model} than under the reference",
}
