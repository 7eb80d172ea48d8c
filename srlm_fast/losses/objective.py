"""What is trained on: one loss, or a weighted sum of several.

    get_objective("ipo", beta=0.1)
    get_objective("dpo + 0.2 * nll", beta=0.1, options={"margin": 0.5})

docs/losses.md lists names and options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.losses.logprobs import LogProbs, label_metrics, preference_metrics
from srlm_fast.losses.options import unknown_option
from srlm_fast.losses.registry import Loss, evaluate, get_loss

_TERM = re.compile(r"\s*(?:(?P<weight>[^\s*]+)\s*\*)?\s*(?P<name>[^\s*]+)\s*")


@dataclass(frozen=True)
class Term:
    """A loss with its weight and its options."""

    name: str
    loss: Loss
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses over the same responses."""

    terms: tuple[Term, ...]
    beta: float
    label_smoothing: float

    def _any(self, name: str) -> bool:
        return any(getattr(term.loss, name) for term in self.terms)

    @property
    def paired(self) -> bool:
        """Whether every item needs a chosen and a rejected response."""
        return self._any("paired")

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference's sums."""
        return self._any("needs_reference")

    @property
    def needs_labels(self) -> bool:
        """Whether it reads LogProbs.labels."""
        return self._any("needs_labels")

    @property
    def needs_heads(self) -> bool:
        """Whether it reads LogProbs.reference_heads."""
        return self._any("needs_heads")

    @property
    def needs_collisions(self) -> bool:
        """Whether it reads LogProbs.log_collisions."""
        return any(term.options.get("sampled_alignment") for term in self.terms)

    @property
    def baseline(self) -> str:
        """What LogProbs.baseline is: "kl", "delta", or "" where it is not read."""
        return next((term.loss.baseline for term in self.terms if term.loss.baseline), "")

    def evaluate(
        self, logps: Tensor, lengths: Tensor, reference: Tensor | None, **data: Tensor | None
    ) -> tuple[dict[str, Tensor], LogProbs]:
        """The values of every loss by name, and what they were made from; arguments as of `losses.evaluate`."""
        values, made_from = {}, None
        for term in self.terms:
            values[term.name], here = evaluate(
                term.loss,
                logps,
                lengths,
                reference,
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                options=term.options,
                **data,
            )
            made_from = made_from or here
        return values, made_from

    def total(self, values: Mapping[str, Tensor], counts: Mapping[str, float]) -> Tensor:
        """Sum over the terms of weight x summed values / counts[unit]."""
        return sum(term.weight / counts[term.loss.unit] * values[term.name].sum() for term in self.terms)

    def metrics(self, logps: LogProbs) -> dict[str, Tensor]:
        """Sums under TRL's metric names: `preference_metrics` of pairs, `label_metrics` of labelled responses."""
        if self.paired:
            rewarded = [term.loss.per_token for term in self.terms if "beta" in term.loss.keys]
            return preference_metrics(logps, self.beta, per_token=bool(rewarded) and all(rewarded))
        return label_metrics(logps, self.beta) if self.needs_labels else {}

    def metric_names(self) -> set[str]:
        """What the trainer calls the metrics of a batch."""
        zeros = torch.zeros(2)
        some = LogProbs(zeros, zeros, torch.ones(2, dtype=torch.int64), labels=torch.tensor([1.0, 0.0]))
        names = {"loss", "entropy", *self.metrics(some), *([self.baseline] if self.baseline else [])}
        if len(self.terms) > 1:
            names |= {f"loss/{term.name}" for term in self.terms}
        return names | ({"rewards/margins"} if "rewards/chosen" in names else set())


def get_objective(
    expression: str, *, beta: float = 0.1, label_smoothing: float = 0.0, options: Mapping[str, Any] | None = None
) -> Objective:
    """Reads a loss's name, or a sum such as `dpo + 0.2 * nll`.

    Args:
        expression: names of registered losses joined by +, each with a weight before it or not.
        beta, label_smoothing: of all terms that have them.
        options: by name; each goes to all terms that have it.

    Raises:
        UserError: naming what is unknown, missing, of a wrong value, or does not go together.
    """
    weights = dict(_weights(expression))
    losses = {name: get_loss(name) for name in weights}
    _check_together(expression, losses)
    _check_keys(expression, losses, beta, label_smoothing)
    options = options or {}
    known = {name: option for loss in losses.values() for name, option in loss.options.items()}
    for name in options:
        if name not in known:
            raise unknown_option(name, expression, known)
    terms = []
    for name, loss in losses.items():
        own = {option: spec.read(option, options[option]) for option, spec in loss.options.items() if option in options}
        terms.append(Term(name, loss, weights[name], own))
    return Objective(tuple(terms), beta, label_smoothing)


def _weights(expression: str) -> Iterator[tuple[str, float]]:
    """The names of an expression and their weights."""
    seen = set()
    for text in re.split(r"(?<!\d[eE])\+", expression):
        match = _TERM.fullmatch(text)
        if not match:
            raise UserError(f"loss {expression!r}: cannot read {text.strip()!r}; write it like dpo + 0.2 * nll")
        name, weight = match["name"], match["weight"]
        try:
            number = float(weight) if weight else 1.0
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"loss {expression!r}: the weight {weight!r} is not a number above 0")
        if name in seen:
            raise UserError(f"loss {expression!r} has {name} twice; add up its weights")
        seen.add(name)
        yield name, number


def _check_together(expression: str, losses: Mapping[str, Loss]) -> None:
    single = [name for name, loss in losses.items() if not loss.paired]
    if single and len(single) < len(losses):
        hint = "; nll is that of the chosen ones" if "sft" in single else ""
        raise UserError(f"loss {expression!r}: {single[0]} is of single responses, the rest of pairs{hint}")
    if len({loss.baseline for loss in losses.values()} - {""}) > 1:
        raise UserError(f"loss {expression!r}: kto and bco compare rewards with different baselines; take one of them")


def _check_keys(expression: str, losses: Mapping[str, Loss], beta: float, label_smoothing: float) -> None:
    if any("beta" in loss.keys for loss in losses.values()) and not beta > 0:
        raise UserError(f"beta={beta}: must be above 0 for loss {expression!r}")
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing={label_smoothing}: must be at least 0 and below 0.5")
    if label_smoothing and not any("label_smoothing" in loss.keys for loss in losses.values()):
        raise UserError(f"label_smoothing={label_smoothing} has no meaning for loss {expression!r}; leave it at 0")
    for name, loss in losses.items():
        if loss.needs_smoothing and not label_smoothing:
            raise UserError(f"loss {name!r} needs label_smoothing above 0; its paper takes 0.001")
