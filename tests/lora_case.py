"""Trains the adapters of one small Llama in many ways, for test_lora.py:

torchrun --nproc-per-node 2 tests/lora_case.py FOLDER OUT CASE ...

FOLDER holds the frozen model. OUT/result.pt gets the adapters and losses of every CASE after five DPO steps, OUT/merged
the model that the last one makes.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from sharded_case import CASES
from training_case import CONFIG, full_weights, leave, make_items, options

from srlm_fast import checkpoint
from srlm_fast.adapters import save_merged
from srlm_fast.config import LoraConfig
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import Interrupted
from srlm_fast.lora import add_adapters, init_adapters, is_adapter
from srlm_fast.model import Llama
from srlm_fast.parallel import World, compute_dtype, parallelize
from srlm_fast.reference import ReferenceCache, compute
from srlm_fast.trainer import Trainer

SHAPE = replace(CONFIG, vocab_size=67, intermediate_size=63, tie_word_embeddings=False)
LORA = {"rank": 3, "alpha": 6.0}


def make_base() -> Llama:
    model = Llama(SHAPE)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def load(folder: Path, case: str, world: World) -> torch.nn.Module:
    """As a run loads a model to put adapters beside."""
    dropout = 0.1 if case.startswith("dropout ") else 0.0
    parallel = ParallelConfig(**CASES[case.removeprefix("dropout ")])
    with torch.device("meta"):
        model = Llama(SHAPE, dropout)
        add_adapters(
            model, LoraConfig(**LORA, dropout=dropout), base_dtype=compute_dtype(torch.device("cpu"), parallel)
        )
    model = parallelize(model, world, parallel).to_empty(device="cpu")
    checkpoint.load_weights(model, folder)
    init_adapters(model, seed=3)
    return model


def train(folder: Path, case: str, world: World | None = None, state: Path | None = None, stop: int = 0) -> dict:
    """The trained model, its adapters and its losses; with `stop` it ends after so many steps, with a checkpoint."""
    world, items = world or World(), make_items(24, 2)
    model = load(folder, case, world)
    reference = ReferenceCache("base")
    reference.update(compute(make_base(), items, "base", [list(range(i, i + 4)) for i in range(0, 24, 4)]))
    steps: list[dict] = []
    trainer = Trainer(
        model,
        items,
        options("dpo", max_steps=5, tokens_per_microbatch=30, lr=1e-2),
        reference=reference,
        world=world,
        seed=5,
        checkpoint_dir=state,
        on_step=steps.append,
        should_stop=lambda: bool(stop) and len(steps) == stop - 1,
    )
    try:
        trainer.fit()
    except Interrupted:
        assert stop
    states = trainer.optimizer.state
    assert all((p in states) == p.requires_grad == is_adapter(name) for name, p in model.named_parameters())
    assert all(p.grad is None or p.requires_grad and not p.grad.any() for p in model.parameters())
    weights = {name: p for name, p in full_weights(model).items() if is_adapter(name)}
    return {"model": model, "weights": weights, "losses": [step["loss"] for step in steps]}


def main(folder: Path, out: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    world, results = World(), {}
    for case in cases:
        found = train(folder, case, world)
        model = found.pop("model")
        results[case] = found
    save_merged(model, out / "merged", out / "adapter", base=folder, world=world)
    train(folder, "plain", world, out / "state", stop=2)
    assert len(list((out / "state").iterdir())) == 1
    results["resumed"] = train(folder, "plain", world, out / "state")
    del results["resumed"]["model"]
    leave(world, results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
