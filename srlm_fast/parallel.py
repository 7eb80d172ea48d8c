"""Processes and sharding: torchrun's environment, a few collectives; recomputation, compilation, FSDP2 for a model."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import UserError
from srlm_fast.model import Attend, Block, Llama


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


def parallelize(model: Llama, world: World, options: ParallelConfig | None = None) -> nn.Module:
    """Checkpointing, compilation and sharding, in the order in which each sees what it has to see.

    Recomputation becomes part of a block, the compiler sees the block with it, and FSDP2's gathering stays outside of
    both. Names of parameters do not change. The model may be on the meta device: then `to_empty` and
    `checkpoint.load_weights` follow, and no process ever holds more of it than its shard.

    Args:
        model: on any device, changed in place.
        world: the processes that train it together.
        options: the keys parallel.*; those left out have their defaults.

    Raises:
        UserError: when parallel.shard x parallel.replicate is not the number of processes.
    """
    options = options or ParallelConfig()
    mesh_shape(world.size, options)
    for block in model.model.layers:
        if options.checkpointing != "none":
            recompute(block, selective=options.checkpointing == "selective")
        if options.compile:
            block.compile(dynamic=True)  # every batch has another number of tokens
    return shard(model, world, options)


def recompute(block: Block, *, selective: bool) -> None:
    """Lets a block keep its input only and run again in the backward pass, with the same dropout.

    selective: it also keeps what the operators give that are expensive and narrow: attention, and the products that
    make the values and follow attention. The two wide products of the MLP, which are most of a block's memory, queries
    and keys, which the rotary embedding overwrites, and everything element-wise are computed again.
    """
    forward = block.forward
    contexts = {"context_fn": _selective_contexts} if selective else {}

    def forward_again(x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        if delta is not None:
            x = x + delta  # as the block's first norm does; here, so that one tensor is kept and not two
        arguments = (x, None, cos, sin, attend)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=block.dropout > 0, **contexts)

    block.forward = forward_again


_PRODUCTS = {"srlm::linear", "aten::mm"}
_KEPT_PRODUCTS = {2, 3}  # v, o of a block's q, k, v, o, gate, up, down


def _selective_contexts() -> tuple[Any, Any]:
    """What `checkpoint` wants for one pass through a block: it counts the block's products."""
    seen = {False: 0, True: 0}  # in the forward pass, when running again

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operator.name().partition(".")[0]
        if name in _PRODUCTS:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] - 1 in _KEPT_PRODUCTS
        else:
            keep = ("attention" in name or "attn" in name) and "backward" not in name
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


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
