"""Loads and trains one small Llama sharded in many ways, for test_parallel.py:

torchrun --nproc-per-node N tests/sharded_case.py FOLDER OUT CASE ...

FOLDER holds the models that are loaded; OUT/result.pt gets the weights and losses of every CASE after five DPO steps.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from training_case import CONFIG, full_weights, leave, make_items, make_reference, options

from srlm_fast import checkpoint
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import UserError
from srlm_fast.model import Llama
from srlm_fast.parallel import World, mesh_shape, parallelize, shard
from srlm_fast.trainer import Trainer

UNEVEN = replace(CONFIG, vocab_size=67, hidden_size=30, intermediate_size=63, tie_word_embeddings=False)
"""No dimension but that of the heads is divided by 4, and 67 rows on 4 ranks leave the last one with two fewer."""
CASES: dict[str, dict] = {
    "plain": {},
    "full": {"checkpointing": "full"},
    "selective": {"checkpointing": "selective"},
    "microbatch": {"reduce": "microbatch"},
    "never": {"reshard": "never"},
    "node": {"reshard": "node", "checkpointing": "full"},
    "hsdp": {"replicate": 2},
    "hsdp, microbatch": {"replicate": 2, "shard": 2, "reduce": "microbatch", "checkpointing": "selective"},
    "hsdp, moments": {"replicate": 2},
    "compiled": {"compile": True},
    "compiled, full": {"compile": True, "checkpointing": "full"},
    "compiled, selective": {"compile": True, "checkpointing": "selective"},
    "bf16": {"dtype": "bfloat16"},
    "bf16, full": {"dtype": "bfloat16", "checkpointing": "full"},
}
"""Name -> keys parallel.* that differ from their defaults. With "dropout" before the name the model has dropout 0.1."""


def make_model(dropout: float = 0.0) -> Llama:
    model = Llama(UNEVEN, dropout)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def train(case: str, world: World | None) -> dict:
    """Weights and losses after five steps; without a world in one process, with nothing around the model but CASE's
    checkpointing and compilation."""
    kind, _, rest = case.partition(" ")
    dropout, name = (0.1, rest) if kind == "dropout" else (0.0, case)
    world, items = world or World(), make_items(24, 2)
    model = parallelize(make_model(dropout), world, ParallelConfig(**CASES[name]))
    steps: list[dict] = []
    moments = "bf16" if name.endswith("moments") else "fp32"
    config = options("dpo", max_steps=5, tokens_per_microbatch=30, moments=moments)
    Trainer(model, items, config, reference=make_reference(items), world=world, seed=5, on_step=steps.append).fit()
    if name.startswith("hsdp"):
        parts = world.gather([parameter.to_local() for parameter in model.parameters()])
        for mine, other in zip(parts[world.rank % 2], parts[world.rank % 2 + 2], strict=True):
            assert torch.equal(mine, other), "copies differ"
    weights = full_weights(model)
    world.barrier()
    return {"weights": weights, "losses": [step["loss"] for step in steps]}


def load(folder: Path, world: World) -> nn.Module:
    """As a run loads a model: on the meta device first."""
    with torch.device("meta"):
        model = Llama(checkpoint.read_config(folder))
    model = parallelize(model, world).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if hasattr(parameter, "to_local") else parameter).fill_(float("nan"))
    checkpoint.load_weights(model, folder)
    return model


def check_loading(folder: Path, world: World) -> None:
    """Shards equal the slices of the file, and what a model built whole and then sharded has."""
    found = load(folder, world)
    built = shard(Llama(found.config), world)
    checkpoint.load_weights(built, folder)
    assert torch.equal(found.inv_freq, built.inv_freq)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == found.config.tie_word_embeddings
    for (name, ours), (other, expected) in zip(found.named_parameters(), built.named_parameters(), strict=True):
        assert name == other
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as stored:
                if name in stored.keys():
                    whole = stored.get_tensor(name).float()
        parts = whole.chunk(world.size)
        mine = parts[world.rank] if world.rank < len(parts) else whole[:0]
        local = ours.to_local() if hasattr(ours, "to_local") else ours
        assert torch.equal(local, mine), name
        assert torch.equal(local, expected.to_local() if hasattr(expected, "to_local") else expected), name
    ids = torch.arange(5)
    with torch.no_grad():
        expected = checkpoint.load_model(folder)(ids, ids, lambda layer, q, k, v: q)
        torch.testing.assert_close(found(ids, ids, lambda layer, q, k, v: q), expected, atol=1e-5, rtol=1e-5)


def status(key: str) -> int:
    """Bytes that /proc says of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def check_memory(folder: Path, world: World) -> None:
    """No more than the shard and a tensor as it is stored, give or take a few MB."""
    load(folder.parent / "tied", world)  # whatever is allocated once
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark
    except OSError:
        return
    before = status("VmRSS")
    model = load(folder, world)
    peak = status("VmHWM") - before
    local = sum(p.to_local().nbytes for p in model.parameters())
    largest = max(p.numel() * 2 for p in model.parameters())
    assert local > 60e6 and peak < 1.05 * local + largest + 8e6, (peak, local, largest)


def check_refusals(world: World) -> None:
    for wrong in ({"shard": world.size + 1}, {"replicate": 3}, {"replicate": 2, "shard": world.size}):
        try:
            mesh_shape(world.size, ParallelConfig(**wrong))
        except UserError as error:
            assert "parallel.replicate" in str(error) and f"{world.size} processes" in str(error)
        else:
            raise AssertionError(wrong)


def main(folder: Path, out: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    world = World()
    if world.size == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # two nodes, for all that the model knows
    for name in ("untied", "tied", "bf16"):
        check_loading(folder / name, world)
    if world.size == 2:
        check_memory(folder / "wide", world)
    check_refusals(world)
    results = {case: train(case, world) for case in cases}
    leave(world, results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
