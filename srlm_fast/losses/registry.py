"""The registered losses, and how one is evaluated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.kernels import library
from srlm_fast.kernels.preference import preference_loss
from srlm_fast.losses import likelihood, margins, rewards, unpaired
from srlm_fast.losses.logprobs import LogProbs, sequence_sums
from srlm_fast.losses.options import KEYS, Option, options_of

_KERNEL_OPTIONS = {"margin", "length_normalised"}


@dataclass(frozen=True)
class Loss:
    """A registered loss.

    fn(logps, *, beta, label_smoothing, ...) -> one value per response, or per pair if `paired`; it takes of beta and
    label_smoothing what has a meaning for it, and its other keyword arguments are its options. The trainer sums the
    values over the global batch and divides by the count of `unit`.
    """

    fn: Callable[..., Tensor]
    unit: str
    """"tokens", "chosen_tokens", "responses" or "pairs"."""
    needs_reference: bool = False
    paired: bool = False
    needs_labels: bool = False
    needs_smoothing: bool = False
    """label_smoothing must be above 0."""
    needs_heads: bool = False
    """Reads LogProbs.reference_heads."""
    baseline: str = ""
    """What LogProbs.baseline is: "kl" (KTO's estimate) or "delta" (BCO's reward shift)."""
    per_token: bool = False
    """The rewards of its metrics are means per token."""
    kind: str = ""
    """Its name in `kernels.preference`, if it is there."""
    kernel_options: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda options: options
    """The loss's options under the names that the kernel has for them."""

    @cached_property
    def options(self) -> dict[str, Option]:
        """Its options by name."""
        takes_score = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.fn).parameters.values())
        return {**(options_of(margins.margins) if takes_score else {}), **options_of(self.fn)}

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Which of beta and label_smoothing it takes."""
        return tuple(name for name in KEYS if name in inspect.signature(self.fn).parameters)

    def kernel(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments of `preference_loss` for these options (all of them); None where the kernel cannot do it."""
        if not self.kind:
            return None
        given = self.kernel_options(options)
        if any(given[name] != self.options[name].default for name in given.keys() - _KERNEL_OPTIONS):
            return None
        return {"kind": self.kind, **{name: given[name] for name in _KERNEL_OPTIONS & given.keys()}}


_pairs = partial(Loss, unit="pairs", paired=True)
_against_reference = partial(_pairs, needs_reference=True)
_labelled = partial(Loss, unit="responses", needs_reference=True, needs_labels=True)


def _simpo_kernel(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"margin": options["gamma"], "length_normalised": True}


LOSSES: dict[str, Loss] = {
    "sft": Loss(likelihood.sft, unit="tokens"),
    "nll": Loss(likelihood.nll, unit="chosen_tokens", paired=True),
    # of the margin
    "dpo": _against_reference(margins.dpo, kind="sigmoid"),
    "dpo_norm": _against_reference(margins.dpo_norm, kind="sigmoid"),
    "robust": _against_reference(margins.robust, kind="robust"),
    "hinge": _against_reference(margins.hinge, kind="hinge"),
    "ipo": _against_reference(margins.ipo, kind="ipo"),
    "exo_pair": _against_reference(margins.exo_pair, needs_smoothing=True, kind="exo_pair"),
    "discopop": _against_reference(margins.discopop, kind="discopop"),
    "r_dpo": _against_reference(margins.r_dpo),
    "ld_dpo": _against_reference(margins.ld_dpo, needs_heads=True),
    "dpop": _against_reference(margins.dpop),
    "wpo": _against_reference(margins.wpo),
    "cream": _against_reference(margins.cream, needs_labels=True),
    "aot": _against_reference(margins.aot),
    "aot_unpaired": _against_reference(margins.aot_unpaired),
    # of both rewards
    "nca_pair": _against_reference(rewards.nca_pair, kind="nca_pair"),
    "bco_pair": _against_reference(rewards.bco_pair),
    "sppo": _against_reference(rewards.sppo, needs_labels=True),
    "sppo_hard": _against_reference(rewards.sppo_hard, kind="sppo_hard"),
    "apo_zero": _against_reference(rewards.apo_zero, kind="apo_zero"),
    "apo_down": _against_reference(rewards.apo_down, kind="apo_down"),
    # with a likelihood, or without a reference
    "irpo": _against_reference(likelihood.irpo),
    "simpo": _pairs(likelihood.simpo, per_token=True, kind="sigmoid", kernel_options=_simpo_kernel),
    "cpo": _pairs(likelihood.cpo),
    "orpo": _pairs(likelihood.orpo, per_token=True),
    # of single responses
    "kto": _labelled(unpaired.kto, baseline="kl"),
    "bco": _labelled(unpaired.bco, baseline="delta"),
    "apo_zero_unpaired": _labelled(unpaired.apo_zero_unpaired),
}


def get_loss(name: str) -> Loss:
    """The registered loss of that name.

    Raises:
        UserError: when there is none, with the nearest name.
    """
    if name not in LOSSES:
        near = get_close_matches(name, LOSSES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown loss {name!r}{hint} (known: {', '.join(LOSSES)})")
    return LOSSES[name]


def evaluate(
    loss: Loss,
    logps: Tensor,
    lengths: Tensor,
    reference: Tensor | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    options: Mapping[str, Any] | None = None,
    **data: Tensor | None,
) -> tuple[Tensor, LogProbs]:
    """A loss from token log-probabilities: in one launch where it has a kernel and kernels are in use.

    Args:
        loss: a registered loss.
        logps: fp32 [N], response after response.
        lengths: int64 [S], tokens of each response.
        reference: fp32 [S] summed log-probabilities of the reference model, for a loss that needs them.
        beta, label_smoothing: for the losses that have them.
        options: the loss's own options; those left out have their defaults.
        data: other fields of `LogProbs` that the loss reads.

    Returns:
        The values, [S] or [S / 2], and what they were made from.
    """
    options = {name: option.default for name, option in loss.options.items()} | dict(options or {})
    keys = {"beta": beta, "label_smoothing": label_smoothing}
    keys = {name: keys[name] for name in loss.keys}
    kernel = loss.kernel(options) if library.fused() else None
    if kernel is not None:
        against = reference if loss.needs_reference else None
        values, sums = preference_loss(logps, lengths, against, **keys, **kernel)
        return values, LogProbs(sums, reference, lengths, logps, **data)
    made_from = LogProbs(sequence_sums(logps, lengths), reference, lengths, logps, **data)
    return loss.fn(made_from, **keys, **options), made_from
