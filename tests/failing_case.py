"""A command whose ranks fail in a chosen way, for test_failures.py:

torchrun --nproc-per-node N tests/failing_case.py WAY [collective | elsewhere]

The last rank fails while the others wait for it: in a collective of gloo, or elsewhere, where nobody tells them.
"""

import ctypes
import os
import signal
import sys
import time

import torch.distributed as dist

from srlm_fast import command
from srlm_fast.errors import UserError
from srlm_fast.parallel import World, watch

WAY, WHERE = sys.argv[1], (*sys.argv[2:], "collective")[0]
if WAY == "freeze":
    watch.SILENT_POLLS = 5


def fail(rank: int) -> None:
    if WAY == "raise":
        raise ValueError(f"rank {rank} cannot go on")
    if WAY == "refuse":
        raise UserError(f"rank {rank} finds its file damaged; copy it again")
    if WAY == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if WAY == "freeze":
        ctypes.PyDLL(None).sleep(600)  # no other thread runs meanwhile


def read() -> None:
    if WAY == "unreadable":
        raise UserError("unknown key 'sft.lrr'")


def work(config: None, world: World) -> None:
    world.barrier()
    if WAY == "orphan":
        if world.rank == 0:
            print(os.getpid(), flush=True)
            os.kill(os.getppid(), signal.SIGKILL)  # torchrun's agent, and with it the store
        time.sleep(600)
    if world.rank == world.size - 1:
        fail(world.rank)
    if WHERE == "collective":
        world.sum([1.0])
    else:
        dist.distributed_c10d._get_default_store().get("what nobody sets")


if __name__ == "__main__":
    sys.exit(command.run(read, work))
