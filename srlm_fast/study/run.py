"""Runs a study: every run is a process of its own, some side by side; what is done is not done again."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from srlm_fast.config import Config
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.opening import match
from srlm_fast.rundir import RunDir
from srlm_fast.study.arms import Study, run_folder
from srlm_fast.study.measure import measure, read


def run_one(study: Study, name: str, seed: int, root: Path) -> None:
    """One run in this process, resumed where it was, and its measurements.

    Raises:
        UserError, Interrupted: as `srlm_fast.iterate.iterate`.
    """
    from srlm_fast.iterate import iterate
    from srlm_fast.parallel import World

    arm = study.arm(name)
    config = study.configuration(arm, seed, root)
    fresh = not (Path(config.run_dir) / "phases").exists()
    iterate(config, World())
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = round(used.ru_utime + used.ru_stime, 1) if fresh else None
    measure(config, name, with_own_judge=arm == study.arms[0], cpu_seconds=seconds)


def run_all(study: Study, root: Path, command: Sequence[str], *, jobs: int, only: Sequence[str] = ()) -> None:
    """Every run of a study that is not done yet, `jobs` of them side by side, each with one thread.

    Args:
        root: folder of the run folders.
        command: what starts one run when its arm and its seed are put behind it.
        only: names of arms; none: all.

    Raises:
        UserError: when a run was made with other keys or inputs, or fails; its log is named.
        Interrupted: after SIGTERM or SIGINT, when the runs at work have stopped too.
    """
    wanted = [study.arm(name) for name in only] or study.arms
    todo = [(arm, seed) for arm, seed in study.jobs() if arm in wanted]
    total = len(todo)
    todo = [(arm, seed) for arm, seed in todo if not _done(study.configuration(arm, seed, root))]
    print(f"{root}: {total - len(todo)} of {total} runs done", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    at_work: dict[subprocess.Popen, tuple[str, float]] = {}
    stop = _Signals()
    failed: list[str] = []
    while at_work or todo and not failed and not stop.number:
        while todo and len(at_work) < jobs and not failed and not stop.number:
            arm, seed = todo.pop(0)
            name = run_folder(root, arm, seed).name
            with open(root / f"{name}.log", "a", encoding="utf-8") as log:
                started = subprocess.Popen(
                    [*command, arm.name, str(seed)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C reaches it through us, once
                )
            at_work[started] = (name, time.monotonic())
        time.sleep(0.2)
        for process in list(at_work):
            stop.forward(process)
            if process.poll() is None:
                continue
            name, since = at_work.pop(process)
            if process.returncode == 0:
                left = len(todo) + len(at_work)
                print(f"[{time.monotonic() - since:6.1f} s] {name}; {left} runs left", flush=True)
            elif not stop.number:
                failed.append(name)
    if stop.number:
        raise Interrupted("stopped; the same command goes on from here")
    if failed:
        raise UserError(f"{', '.join(failed)} failed; see {root / failed[0]}.log, then start the same command again")


def _done(config: Config) -> bool:
    """Whether a run is finished and measured.

    Raises:
        UserError: when it was made with other keys or inputs.
    """
    folder = Path(config.run_dir)
    if not folder.exists():
        return False
    match(RunDir(folder), config)
    return read(folder) is not None


class _Signals:
    """SIGTERM and SIGINT, remembered and passed on to processes once each."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._told: set[int] = set()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on)

    def _on(self, number: int, frame: object) -> None:
        self.number = number

    def forward(self, process: subprocess.Popen) -> None:
        if self.number and process.pid not in self._told:
            self._told.add(process.pid)
            process.send_signal(signal.SIGTERM)


def script_command(script: str, *arguments: str) -> list[str]:
    """How a script starts itself for one run."""
    return [sys.executable, script, *arguments]
