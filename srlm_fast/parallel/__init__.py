"""What is put around a model so that many processes train it: recomputation, compilation, sharding.

| module | what is there |
| --- | --- |
| `world` | `World`: torchrun's processes and a few collectives |
| `watch` | `Watch`: the end of all processes when one fails |
| `recomputation` | activations that are computed again in the backward pass |
| `sharding` | `Sharding`: what trainer, checkpoints and engines ask of a model that lies on many processes |
| `fsdp2` | shards of parameters, gradients and moments by FSDP2; the dtype of computation |
"""

from __future__ import annotations

from torch import nn

from srlm_fast.config.keys import ParallelConfig
from srlm_fast.model import Llama
from srlm_fast.parallel.fsdp2 import compute_dtype, mesh_shape, place_in_copy, shard
from srlm_fast.parallel.recomputation import recompute
from srlm_fast.parallel.sharding import Sharding, sharding_of, whole_tensors
from srlm_fast.parallel.world import World, backend

__all__ = [
    "Sharding",
    "World",
    "backend",
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
