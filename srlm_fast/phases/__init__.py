"""The phases of a run: functions from files of the run folder to files of the run folder.

Each takes the run's `Context` and returns (output files or folders, counts for the record). `srlm_fast.iterate` knows
their order; nothing here does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PhaseResult = tuple[list[Path], dict[str, Any]]


def mean(values: Sequence[float]) -> float | None:
    """Mean to four digits, as counts show it; None of nothing."""
    return round(sum(values) / len(values), 4) if values else None
