"""Timing and memory of alternatives, side by side in one process."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

Run = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    runs: Mapping[str, Run], rounds: int, device: torch.device, once: Collection[str] = ()
) -> dict[str, list[float]]:
    """Seconds of every run, `rounds` times each, after one round of warm-up; those named in `once` run once, cold.

    Every round runs all of them, each time beginning with another, so that a slow spell of the machine meets all alike.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            if name in once and turn != 1:
                continue
            synchronize(device)
            started = time.perf_counter()
            runs[name]()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Memory that a run needs at its peak beside what was there before and the tensors that it returns.

    On CUDA from torch's allocator; on Linux from the resident set, whose high-water mark is reset; elsewhere None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = _bytes(run())
        return torch.cuda.max_memory_allocated(device) - before - results
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    results = _bytes(run())
    return max(0, _status_bytes("VmHWM") - before - results)


def _bytes(results: object) -> int:
    return sum(tensor.nbytes for tensor in results if tensor is not None) if isinstance(results, tuple) else 0


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def environment(device: torch.device, packages: tuple[str, ...] = ()) -> str:
    """One line: the device, threads, and the versions of Python, torch and `packages` that are installed."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([where, f"Python {platform.python_version()}", f"torch {torch.__version__}", *found])


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
