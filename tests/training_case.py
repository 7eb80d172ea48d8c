"""One small training problem for several tests: a 2-layer Llama, random pairs, a reference cache.

Run as a script under torchrun it trains the same problem sharded and saves the weights:
    torchrun --nproc-per-node 2 tests/training_case.py OUT LOSS [STOP_AFTER]
"""

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from srlm_fast.config import TrainConfig
from srlm_fast.errors import Interrupted
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.packing import Item, split_batch
from srlm_fast.parallel import World, shard
from srlm_fast.reference import ReferenceCache, compute, reference_items
from srlm_fast.trainer import Trainer, training_objective

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)


def make_items(n: int, n_responses: int, seed: int = 0) -> list[Item]:
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(64) for _ in range(rng.randint(low, high)))

    return [Item(ids(2, 12), tuple(ids(1, 9) for _ in range(n_responses))) for _ in range(n)]


def label(items: list[Item]) -> list[Item]:
    """Pairs get probabilities that add up to 1, single responses 1 and 0 in turn."""
    labels = [
        (0.9 - 0.01 * i, 0.1 + 0.01 * i) if len(item.responses) == 2 else (i % 2,) for i, item in enumerate(items)
    ]
    return [replace(item, labels=values) for item, values in zip(items, labels)]


def make_model(dropout: float = 0.0) -> Llama:
    model = Llama(CONFIG, dropout)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def make_reference(items: list[Item]) -> ReferenceCache:
    cache = ReferenceCache("weights-0")
    plan = split_batch([item.n_tokens for item in items], 200, 1)
    cache.update(compute(make_model(), items, "weights-0", [per_rank[0] for per_rank in plan]))
    return cache


def leave(world: World, results: Any, out: Path) -> None:
    """The end of a case under torchrun: rank 0 writes what was found to OUT/result.pt, and all ranks go."""
    world.barrier()
    if world.is_main:
        torch.save(results, out / "result.pt")
    world.exit(0)


def options(loss: str, **changes) -> TrainConfig:
    return TrainConfig(
        **{
            "loss": loss,
            "lr": 3e-3,
            "min_lr": 3e-4,
            "schedule": "cosine",
            "batch_size": 8,
            "epochs": 2,
            "tokens_per_microbatch": 120,
            "checkpoint_every": 2,
            **changes,
        }
    )


def build(
    loss: str, world: World | None = None, dropout: float = 0.0, n: int = 24, changes: dict | None = None, **arguments
) -> Trainer:
    config = options(loss, **(changes or {}))
    objective = training_objective(config)
    items = make_items(n, 2 if objective.paired else 1)
    if objective.needs_labels:
        items = label(items)
    model = make_model(dropout)
    if world is not None:
        model = shard(model, world)
    reference = make_reference(reference_items(items, objective)) if objective.needs_reference else None
    return Trainer(model, items, config, reference=reference, world=world, seed=5, **arguments)


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, loss, *stop_after = sys.argv[1:]
    world = World()
    steps: list[dict] = []
    trainer = build(
        loss,
        world,
        dropout=0.1 if stop_after else 0.0,
        checkpoint_dir=Path(out) / "checkpoints" if stop_after else None,
        on_step=steps.append,
        should_stop=lambda: bool(stop_after) and world.rank == 1 and len(steps) == int(stop_after[0]) - 1,
    )
    try:
        trainer.fit()
    except Interrupted:
        print("interrupted")
    weights = full_weights(trainer.model)
    leave(world, {"weights": weights, "steps": steps}, Path(out))
