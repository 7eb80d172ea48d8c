"""What the rest of the project asks of a model that lies on many processes, whoever divided it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srlm_fast.parallel.fsdp2 import Fsdp2


class Sharding(Protocol):
    """How a model lies on the processes, and how it is updated. All ranks call its methods alike.

    Names are those of `named_parameters`, Hugging Face's. The gradient of a step is the sum of what all ranks and
    micro-batches give, never a mean.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of every parameter."""

    def parts(self, parameter: nn.Parameter) -> Iterable[tuple[Tensor, tuple[slice, ...]]]:
        """What of a parameter this rank keeps: memory to be filled, and which slices of the whole it is."""

    def whole(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """A parameter, whole on every rank, with the precision in which it is updated and then cast."""

    def reshard(self) -> None:
        """Free what was gathered: after a pass without a backward some parameters are left whole, and those are others
        than the optimizer has and a checkpoint wants."""

    def begin(self, optimizer: Optimizer) -> None:
        """From here on train: the groups of the optimizer hold the model's parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, for `backward`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch to those of the step; `last` says that it has no other."""

    def clip(self, most: float) -> float:
        """The norm of the step's gradient, which is then scaled to have no larger one than `most`."""

    def step(self) -> None:
        """Update the parameters and forget the gradient."""

    def discard(self) -> None:
        """Forget the gradient."""

    def end(self) -> None:
        """Let go of the optimizer; the model stays and runs."""

    def state(self, *, optimizer: bool = True) -> dict[str, Any]:
        """{"model": {name: tensor}, "optimizer": state_dict by name} for torch.distributed.checkpoint.

        The tensors are sharded along their first dimension, so any number of processes can load them.
        """

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave and a checkpoint filled."""


def sharding_of(model: nn.Module) -> Sharding:
    """The sharding that `parallelize` gave a model."""
    return getattr(model, "sharding", None) or Fsdp2(model)


def whole_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of a model's parameters, one at a time. All ranks iterate it alike."""
    sharding = sharding_of(model)
    sharding.reshard()
    for name, parameter in model.named_parameters():
        yield name, sharding.whole(parameter, dtype or parameter.dtype)
