"""Progress of a phase on rank 0: a bar with rate and ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_SECONDS = 15.0


@contextmanager
def progress(name: str, total: int, *, unit: str, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Yields advance(n, text=""): n more of `total` are done; `text` is shown behind the bar."""
    if not enabled:
        yield lambda n=1, text="": None
    elif sys.stderr.isatty():
        yield from _bar(name, total, unit)
    else:
        yield from _lines(name, total, unit)


def _bar(name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, rate="", text="")
        started, done = time.perf_counter(), 0

        def advance(n: int = 1, text: str = "") -> None:
            nonlocal done
            done += n
            bar.update(task, advance=n, text=text, rate=f"{done / (time.perf_counter() - started):.1f} {unit}/s")

        yield advance


def _lines(name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    started = last = time.perf_counter()
    done = 0

    def advance(n: int = 1, text: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.perf_counter()
        if now - last >= _LINE_SECONDS:
            last = now
            rate = done / (now - started)
            remaining = max(0, total - done) / rate if rate else 0.0
            print(
                f"{name}: {done}/{total}, {rate:.1f} {unit}/s, {remaining:.0f} s left {text}",
                file=sys.stderr,
                flush=True,
            )

    yield advance
    seconds = time.perf_counter() - started
    print(f"{name}: {done} {unit} in {seconds:.1f} s", file=sys.stderr, flush=True)
