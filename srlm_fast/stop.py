"""When a program has to stop: after a signal, or before a time that is known beforehand."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from srlm_fast.errors import Interrupted, UserError

STOPPED, REQUEUE = 143, 75
"""Exit codes of a process that stopped by SIGTERM or SIGINT, and by SIGUSR1 or save_by (sysexits.h's EX_TEMPFAIL)."""
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


class Stop:
    """True as soon as the program has to stop.

    Args:
        save_by: see `deadline`.

    Raises:
        UserError: when save_by cannot be read.
    """

    def __init__(self, save_by: str | None = None) -> None:
        self.deadline = deadline(save_by, time.time(), os.environ) if save_by is not None else None
        self._signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self._signal is not None or self.deadline is not None and time.time() >= self.deadline

    def request(self, number: int, frame: Any = None) -> None:
        """Ask to stop, as a signal does; SIGTERM or SIGINT after one of these raises Interrupted at once."""
        ends = (signal.SIGTERM, signal.SIGINT)
        if number in ends and self._signal in ends:
            raise Interrupted(f"stopped at once by a second {signal.Signals(number).name}")
        self._signal = signal.Signals(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """From here on signals are requests, and an `Interrupted` that leaves the block says how the process ends."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.request)
        try:
            yield
        except Interrupted as stopped:
            stopped.code = STOPPED if self._signal in (signal.SIGTERM, signal.SIGINT) else REQUEUE
            raise


def deadline(save_by: str, start: float, environment: Mapping[str, str]) -> float:
    """The time, in seconds as of time.time(), by which everything has to be saved.

    Args:
        save_by: a duration after `start` (2h50m, 90m, 1d12h), a date with a time (2026-11-24T06:00, local or with an
            offset), or slurm-DURATION: so long before the end of the job, which Slurm has in SLURM_JOB_END_TIME.

    Raises:
        UserError: for anything else, or slurm without that variable.
    """
    text = save_by.strip()
    if text.startswith("slurm"):
        before = _seconds(text.removeprefix("slurm-"))
        end = environment.get("SLURM_JOB_END_TIME", "")
        if before is not None and not end.isdigit():
            raise UserError(
                f"save_by={save_by}: SLURM_JOB_END_TIME is {end or 'not set'}, outside a job of Slurm 22.05 or newer; "
                "give a duration after the start, such as 2h50m"
            )
        if before is not None:
            return int(end) - before
    elif (after := _seconds(text)) is not None:
        return start + after
    else:
        try:
            return datetime.fromisoformat(text).timestamp()
        except ValueError:
            pass
    raise UserError(
        f"save_by={save_by!r}: must be a duration after the start (2h50m), a date with a time (2026-11-24T06:00) or "
        "slurm-10m, so long before the end of a Slurm job"
    )


def _seconds(duration: str) -> int | None:
    """Seconds of 1d2h3m4s, some parts of which may be left out; None for anything else."""
    found = _DURATION.fullmatch(duration)
    if not duration or not found:
        return None
    return sum(int(number) * unit for number, unit in zip(found.groups(default="0"), _UNITS.values()))
