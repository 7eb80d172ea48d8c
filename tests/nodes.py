"""Starts torchrun: one agent, or several as if each were a node, all on this machine."""

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Ended:
    """What an agent and its ranks left."""

    returncode: int
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def torchrun(*command: str, n_nodes: int = 1, n_ranks: int = 2, timeout: float = 280) -> list[Ended]:
    """Runs a script with its arguments on nodes of `n_ranks` ranks each; waits for all of them.

    The address is given in figures everywhere: a machine's own name need not be known to itself.
    """
    processes, files = [], []
    port, run_id = free_port(), f"test-{os.getpid()}"
    for node in range(n_nodes):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(n_nodes)]
        launcher += ["--nproc-per-node", str(n_ranks), "--local-addr", "127.0.0.1", "--rdzv-id", run_id]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        launcher += ["--rdzv-conf", f"is_host={int(node == 0)},read_timeout=240"]
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        files.append((out, err))
        processes.append(subprocess.Popen([*launcher, *command], env=ENVIRONMENT, stdout=out, stderr=err))
    ended = []
    try:
        for process, (out, err) in zip(processes, files, strict=True):
            process.wait(timeout)
            out.seek(0), err.seek(0)
            ended.append(Ended(process.returncode, out.read(), err.read()))
    finally:
        for process, opened in zip(processes, files, strict=True):
            process.kill()
            for file in opened:
                file.close()
    return ended
