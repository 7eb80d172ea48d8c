"""The moments of an optimizer in host memory while something else needs the GPU, such as an engine that generates.

    offload_state(optimizer)
    ...                             # neither a step nor a checkpoint
    reload_state(optimizer)

The tensors stay what they are, DTensors with their placements or torchao's codes and scales; only their storage is
emptied and filled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_AWAY = "_away"


@dataclass
class _Away:
    """What of an optimizer is in host memory, and the hooks that stand for it."""

    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)


def offload_state(optimizer: Optimizer) -> int:
    """Copies the state of an optimizer to host memory, pinned for a GPU, frees it, and forgets the gradients.

    Single numbers such as the count of steps stay. Until `reload_state`, `step` and `state_dict` raise RuntimeError.

    Returns:
        Bytes that were freed on this process's device; 0 when all is in host memory already.
    """
    optimizer.zero_grad(set_to_none=True)
    if hasattr(optimizer, _AWAY):
        return 0
    away, seen = _Away(), set()
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _plain(value):
                storage = tensor.untyped_storage()
                if tensor.dim() and storage.nbytes() == tensor.nbytes > 0 and storage._cdata not in seen:
                    seen.add(storage._cdata)
                    pinned = tensor.device.type == "cuda"
                    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
                    away.tensors.append((tensor, host.copy_(tensor, non_blocking=pinned)))
    _finish(away, free=False)  # the copies, before what they are made of goes
    for tensor, _ in away.tensors:
        tensor.untyped_storage().resize_(0)
    _finish(away, free=True)
    away.hooks = [optimizer.register_step_pre_hook(_refuse), optimizer.register_state_dict_pre_hook(_refuse)]
    setattr(optimizer, _AWAY, away)
    return sum(host.nbytes for _, host in away.tensors)


def reload_state(optimizer: Optimizer) -> int:
    """Puts everything back where `offload_state` found it, to the bit.

    Returns:
        Bytes that were copied; 0 when nothing was away.
    """
    away: _Away = getattr(optimizer, _AWAY, _Away())
    for tensor, host in away.tensors:
        tensor.untyped_storage().resize_(host.nbytes)
        tensor.copy_(host, non_blocking=host.is_pinned())
    _finish(away, free=False)
    for hook in away.hooks:
        hook.remove()
    if hasattr(optimizer, _AWAY):
        delattr(optimizer, _AWAY)
    return sum(host.nbytes for _, host in away.tensors)


@contextmanager
def offloaded(optimizer: Optimizer, wanted: bool = True) -> Iterator[None]:
    """`offload_state` at the start of a block and `reload_state` at its end, also when it fails."""
    if wanted:
        offload_state(optimizer)
    try:
        yield
    finally:
        reload_state(optimizer)


def _plain(value: object) -> Iterator[Tensor]:
    """The plain tensors that a state's value lies in on this process."""
    if not isinstance(value, Tensor):
        return
    value = value.to_local() if hasattr(value, "to_local") else value
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    else:
        yield value


def _refuse(*arguments: Any) -> None:
    raise RuntimeError("the moments of this optimizer are in host memory; reload_state comes first")


def _finish(away: _Away, *, free: bool) -> None:
    """Wait for the copies of a GPU; or give freed memory back to it, for others than torch."""
    if any(tensor.device.type == "cuda" for tensor, _ in away.tensors):
        torch.cuda.empty_cache() if free else torch.cuda.synchronize()
