"""The processes that torchrun starts: this one among its peers, and a few collectives."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from srlm_fast.errors import UserError


def backend(device: torch.device) -> str:
    """What ranks with this device talk through: gloo for what lies on the CPU, NCCL for what lies on a GPU."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


class World:
    """This process among its peers. Without torchrun (WORLD_SIZE unset or 1) nothing is initialised."""

    _n_claims = 0
    group_size = 1  # ranks of a group: consecutive ones, which generate the same together
    _group: Any = None

    def __init__(self, timeout_s: float = 3600.0) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group(backend(self.device), timeout=timedelta(seconds=timeout_s))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def form_groups(self, size: int) -> None:
        """Make groups of `size` consecutive ranks, which share the work of a claim. All ranks call this, once."""
        self.group_size = size
        if size > 1:
            for first in range(0, self.size, size):
                group = dist.new_group(range(first, first + size), backend="gloo")
                self._group = group if first == self.group * size else self._group

    @property
    def group(self) -> int:
        """Number of this rank's group."""
        return self.rank // self.group_size

    @property
    def n_groups(self) -> int:
        return self.size // self.group_size

    @property
    def leads_group(self) -> bool:
        """Whether this rank writes what its group has made."""
        return self.rank % self.group_size == 0

    def broadcast_in_group(self, value: Any) -> Any:
        """The picklable value of the group's first rank, on all its ranks."""
        if self.group_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.group * self.group_size, group=self._group)
        return box[0]

    def any_in_group(self, flag: bool) -> bool:
        """Whether a rank of the group says so."""
        if self.group_size == 1:
            return flag
        total = torch.tensor(int(flag))
        dist.all_reduce(total, group=self._group)
        return bool(total)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum of a list of numbers over the ranks, in fp64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether a rank says so."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The ranks' picklable values, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Runs on rank 0 and gives every rank its result, or the same UserError."""
        result, error = None, None
        if self.is_main:
            try:
                result = function()
            except UserError as caught:
                error = str(caught)
        result, error = self.broadcast((result, error))
        if error is not None:
            raise UserError(error)
        return result

    def claims(self) -> Iterator[int]:
        """0, 1, 2, ... shared out among the groups in order of asking; endless. All ranks call this alike."""
        World._n_claims += 1
        if self.size == 1:
            return count()
        store, key = dist.distributed_c10d._get_default_store(), f"srlm/claims/{World._n_claims}"
        return (self.broadcast_in_group(store.add(key, 1) - 1 if self.leads_group else None) for _ in count())

    def exit(self, code: int) -> None:
        """Leave the process group and end the process.

        With several ranks Python's own way out is not taken: a thread of gloo that lets go of a last tensor while the
        interpreter shuts down aborts the process, and a finished run would count as failed.
        """
        if self.size > 1:
            if dist.is_initialized() and code == 0:
                dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
