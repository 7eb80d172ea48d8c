"""What is put around a model so that many processes train it: recomputation, compilation, sharding.

| module | what is there |
| --- | --- |
| `world` | `World`: torchrun's processes and a few collectives |
| `watch` | `Watch`: the end of all processes when one fails |
| `recomputation` | activations that are computed again in the backward pass |
| `sharding` | `Sharding`: what trainer, checkpoints and engines ask of a model that lies on many processes |
| `fsdp2` | shards of parameters, gradients and moments by FSDP2; the dtype of computation |
| `deepspeed` | the same by ZeRO-1, 2 or 3 |
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from srlm_fast.config.keys import ParallelConfig
from srlm_fast.model import Llama
from srlm_fast.parallel.deepspeed import check_zero, zero
from srlm_fast.parallel.fsdp2 import compute_dtype, mesh_shape, place_in_copy, shard
from srlm_fast.parallel.recomputation import recompute
from srlm_fast.parallel.sharding import Sharding, sharding_of, whole_tensors
from srlm_fast.parallel.world import World, backend

__all__ = [
    "Sharding",
    "World",
    "backend",
    "check_parallel",
    "compute_dtype",
    "mesh_shape",
    "parallelize",
    "place_in_copy",
    "recompute",
    "shard",
    "sharding_of",
    "whole_tensors",
]


def parallelize(model: Llama, world: World, options: ParallelConfig | None = None) -> nn.Module:
    """Checkpointing, compilation and sharding, in the order in which each sees what it has to see.

    Recomputation becomes part of a block, the compiler sees the block with it, and what gathers shards stays outside of
    both. Names of parameters do not change. The model may be on the meta device: then `to_empty` and
    `checkpoint.load_weights` follow, and no process ever holds more of it than its shard.

    Args:
        model: on any device, changed in place.
        world: the processes that train it together.
        options: the keys parallel.*; those left out have their defaults.

    Raises:
        UserError: as `check_parallel`.
    """
    options = options or ParallelConfig()
    check_parallel(world.size, options)
    for block in model.model.layers:
        if options.checkpointing != "none":
            recompute(block, selective=options.checkpointing == "selective")
        if options.compile:
            block.compile(dynamic=True)  # every batch has another number of tokens
    if options.backend == "deepspeed":
        return zero(model, world, options)
    return shard(model, world, options)


def check_parallel(n_ranks: int, options: ParallelConfig, moments: Sequence[str] = (), *, lora: int = 0) -> None:
    """Refuses keys parallel.* that do not fit each other, the number of processes or how is trained.

    Args:
        n_ranks: all processes.
        options: the keys.
        moments: of the optimizers.
        lora: rank of the adapters.

    Raises:
        UserError: for such keys, or where DeepSpeed is asked for and not installed.
    """
    if options.backend == "deepspeed":
        check_zero(n_ranks, options, moments, lora=lora)
    else:
        mesh_shape(n_ranks, options)
