"""The options of a loss: the keyword arguments of its function, read from the configuration's `loss_options`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from srlm_fast.errors import UserError

KEYS = ("beta", "label_smoothing")
"""Arguments that are configuration keys of their own."""

_RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda x: x > 0,
    "at least 0": lambda x: x >= 0,
    "from 0 to 1": lambda x: 0 <= x <= 1,
}
Positive = Annotated[float, "above 0"]
NonNegative = Annotated[float, "at least 0"]
Share = Annotated[float, "from 0 to 1"]


@dataclass(frozen=True)
class Option:
    """One keyword argument: its default, and what it may be."""

    default: Any
    choices: tuple[str, ...] = ()
    bounds: str = ""

    def read(self, name: str, value: Any) -> Any:
        """The value as this option's type.

        Raises:
            UserError: naming the option and what it may be.
        """
        if self.choices:
            if value not in self.choices:
                raise UserError(f"loss_options: {name}={value!r}: must be one of {', '.join(self.choices)}")
            return value
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise UserError(f"loss_options: {name}={value!r}: must be true or false")
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or (self.bounds and not _RANGES[self.bounds](number)):
            raise UserError(f"loss_options: {name}={value!r}: must be a number{' ' * bool(self.bounds)}{self.bounds}")
        return number


def options_of(fn: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only arguments of a function that have a default, without `KEYS`."""
    hints = get_type_hints(fn, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name in KEYS:
            continue
        hint = hints[name]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        bounds = hint.__metadata__[0] if get_origin(hint) is Annotated else ""
        found[name] = Option(parameter.default, choices, bounds)
    return found


def unknown_option(name: str, losses: str, known: dict[str, Option]) -> UserError:
    """The refusal of an option that none of the losses has."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    have = f"it has {', '.join(sorted(known))}" if known else "it has none"
    return UserError(f"loss_options: unknown option {name!r} of loss {losses!r}{hint} ({have})")
