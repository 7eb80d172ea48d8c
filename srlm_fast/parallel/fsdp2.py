"""FSDP2: every block a unit of shards, with or without copies of the whole (HSDP), and mixed precision."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import UserError
from srlm_fast.model import Llama
from srlm_fast.parallel.world import World, backend


def mesh_shape(n_ranks: int, options: ParallelConfig) -> tuple[int, int]:
    """(replicate, shard): copies of the model, and ranks that share one.

    Raises:
        UserError: when they are not the number of ranks.
    """
    per_copy = options.shard or max(1, n_ranks // options.replicate)
    if options.replicate * per_copy != n_ranks:
        shown = "" if options.shard is None else f" x parallel.shard={options.shard}"
        raise UserError(
            f"parallel.replicate={options.replicate}{shown} does not fit {n_ranks} processes: every one of replicate "
            "copies is shared by shard of them; change these keys or --nproc-per-node"
        )
    return options.replicate, per_copy


def compute_dtype(device: torch.device, options: ParallelConfig) -> torch.dtype:
    """The dtype of products and activations: bfloat16 on a GPU, whose tensor cores want it, and float32 on a CPU, most
    of which compute bfloat16 no faster."""
    name = options.dtype if options.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def place_in_copy(model: nn.Module, world: World) -> int:
    """Which shard this rank holds: the same on the ranks of all copies that hold equal shards."""
    for parameter in model.parameters():
        if hasattr(parameter, "device_mesh"):
            return parameter.device_mesh.get_coordinate()[-1]
    return world.rank


def shard(model: Llama, world: World, options: ParallelConfig | None = None) -> nn.Module:
    """FSDP2: every block a unit; embedding, norm and head in the root, inside whose forward the log-prob head runs.

    Every rank keeps fp32 shards of parameters and gradients. Gradients are summed in fp32 over all ranks, not averaged:
    the trainer divides by what the whole batch counts. One rank that computes in fp32: the model as it is.
    """
    options = options or ParallelConfig()
    dtype = compute_dtype(world.device, options)
    if world.size == 1 and dtype == torch.float32:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():  # one process, in which FSDP2 does nothing but the mixed precision
        dist.init_process_group(backend(world.device), store=dist.HashStore(), rank=0, world_size=1)
    replicate, per_copy = mesh_shape(world.size, options)
    if replicate == 1:
        mesh = init_device_mesh(world.device.type, (per_copy,))
    else:
        mesh = init_device_mesh(world.device.type, (replicate, per_copy), mesh_dim_names=("replicate", "shard"))
    precision = MixedPrecisionPolicy()
    if dtype != torch.float32:
        # Inputs are not cast: the rotary tables stay fp32, and the embedding gives the stream its dtype.
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard: bool | int = options.reshard != "never"
    if options.reshard == "node":
        reshard = math.gcd(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), per_copy)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    for module in (*model.model.layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    if options.reduce == "microbatch":
        # Where the trainer would put off the whole reduction to the last micro-batch, only that between copies waits.
        model.set_requires_gradient_sync = model.set_requires_all_reduce
    return model


class Fsdp2:
    """The `Sharding` of a model in FSDP2's shards, and of one that a process has whole."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer: Optimizer | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def parts(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        ranges = [(0, size) for size in parameter.shape]
        if not isinstance(parameter, DTensor):
            yield parameter, tuple(slice(*ends) for ends in ranges)
            return
        mesh = parameter.device_mesh
        for rank, n_ranks, placement in zip(mesh.get_coordinate(), mesh.shape, parameter.placements):
            if placement.is_shard():
                start, stop = ranges[placement.dim]
                size = math.ceil((stop - start) / n_ranks)
                ranges[placement.dim] = (min(start + rank * size, stop), min(start + (rank + 1) * size, stop))
        yield parameter.to_local(), tuple(slice(*ends) for ends in ranges)

    def whole(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        tensor = parameter.detach().to(dtype)  # before it is gathered: half the bytes on the way
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def reshard(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def begin(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        for p in self.model.parameters():
            p.adds_in_place = self._whole_on_cpu and p.requires_grad and p.dtype == torch.float32

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if isinstance(self.model, FSDPModule) and dist.get_world_size() > 1:
            self.model.set_requires_gradient_sync(last)
        loss.backward()

    def clip(self, most: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), most)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self) -> None:
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        # On a CPU memory that is new costs more time than zeros.
        self.optimizer.zero_grad(set_to_none=not self._whole_on_cpu)

    def end(self) -> None:
        for p in self.model.parameters():
            p.grad, p.adds_in_place = None, False
        self.optimizer = None

    @property
    def _whole_on_cpu(self) -> bool:
        return not isinstance(self.model, FSDPModule) and next(self.model.parameters()).device.type == "cpu"

    def state(self, *, optimizer: bool = True) -> dict[str, Any]:
        if self.optimizer is not None and not self.optimizer.state:
            self.optimizer.zero_grad(set_to_none=True)  # torch makes the moments of an optimizer without gradients only
        options = self._state_options()
        if not optimizer:
            return {"model": get_model_state_dict(self.model, options=options)}
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model_state, "optimizer": optimizer_state}

    def load_state(self, state: dict[str, Any]) -> None:
        options = self._state_options()
        if "optimizer" in state:
            states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
            set_state_dict(self.model, self.optimizer, **states, options=options)
        else:
            set_model_state_dict(self.model, state["model"], options=options)

    def _state_options(self) -> StateDictOptions:
        """Without frozen weights, which are in the model folder from which training starts."""
        frozen = any(not parameter.requires_grad for parameter in self.model.parameters())
        return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)
