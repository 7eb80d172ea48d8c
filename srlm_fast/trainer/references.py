"""Reference log-probabilities for a training in memory; `reference.fill` keeps them on disk."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from srlm_fast.config import TrainConfig
from srlm_fast.packing import Item, split_batch
from srlm_fast.parallel import World
from srlm_fast.reference import ReferenceCache, compute, reference_items
from srlm_fast.trainer.optimization import training_objective


def reference_cache(
    model: nn.Module, config: TrainConfig, *data: Sequence[Item], world: World | None = None
) -> ReferenceCache | None:
    """What a loss has to know of the reference, for one or more lists of items; None for a loss without a reference.

    Args:
        model: the reference, on the ranks' device and sharded like the model to train.
        config: tells the loss and the size of a forward pass.
        data: the items to train on, the held-out ones, ...
        world: the processes; every rank calls this alike and gets all values.
    """
    world, objective = world or World(), training_objective(config)
    if not objective.needs_reference:
        return None
    items = [item for part in data for item in reference_items(part, objective)]
    plan = split_batch([item.n_tokens for item in items], config.tokens_per_microbatch, world.size)
    mine = [per_rank[world.rank] for per_rank in plan]
    cache = ReferenceCache("in memory")
    for part in world.gather(list(compute(model, items, cache.weights_id, mine, device=world.device))):
        cache.update(part)
    return cache
