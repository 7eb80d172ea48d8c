"""Loads, trains, saves and resumes one small Llama under DeepSpeed's ZeRO, for test_deepspeed.py:

torchrun --nproc-per-node N tests/deepspeed_case.py FOLDER OUT CASE ...

FOLDER holds the models that are loaded; OUT/result.pt gets what each CASE found.
"""

import gc
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from sharded_case import make_model
from torch import nn
from training_case import leave, make_items, make_reference, options

from srlm_fast import checkpoint
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.model import Llama
from srlm_fast.parallel import World, parallelize, sharding_of, whole_tensors
from srlm_fast.trainer import Trainer

FSDP2: dict[str, Any] = {}


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"backend": "deepspeed", "zero_stage": stage, **keys}


def build(world: World, keys: dict[str, Any], dropout: float = 0.0, **arguments: Any) -> tuple[Trainer, list[dict]]:
    model = parallelize(make_model(dropout), world, ParallelConfig(**keys))
    items, steps = make_items(24, 2), []
    config = options("dpo", max_steps=5, tokens_per_microbatch=30, max_grad_norm=0.5)
    reference = make_reference(items)
    return Trainer(
        model, items, config, reference=reference, world=world, seed=5, on_step=steps.append, **arguments
    ), steps


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole.detach().clone() for name, whole in whole_tensors(model, torch.float32)}


def run(world: World, keys: dict[str, Any], dropout: float = 0.0, **arguments: Any) -> dict[str, Any]:
    """Five steps, or those that are left after the checkpoints in `checkpoint_dir`."""
    trainer, steps = build(world, keys, dropout, **arguments)
    trainer.fit()
    return {
        "losses": [step["loss"] for step in steps],
        "norms": [step["grad_norm"] for step in steps],
        "weights": weights(trainer.model),
    }


def stopped(world: World, keys: dict[str, Any], folder: Path, dropout: float = 0.0) -> None:
    """Three steps and a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: list[int] = []
    trainer, _ = build(
        world, keys, dropout, checkpoint_dir=folder, should_stop=lambda: seen.append(1) or len(seen) == 3
    )
    try:
        trainer.fit()
    except Interrupted:
        assert (folder / "step-3").is_dir()
        return
    raise AssertionError("not stopped")


def copied(world: World, folder: Path) -> Path:
    """The same checkpoints in a folder that may be written to."""
    copy = folder.with_name(f"copy-of-{folder.name}")
    if world.is_main:
        shutil.copytree(folder, copy)
    world.barrier()
    return copy


def resumed(world: World, keys: dict[str, Any], out: Path, dropout: float = 0.1) -> dict[str, Any]:
    """Undisturbed weights and those of a run that was stopped after three steps."""
    folder = out / f"stopped-{keys['zero_stage']}"
    stopped(world, keys, folder, dropout)
    found = run(world, keys, dropout, checkpoint_dir=folder)
    assert len(found["losses"]) == 2
    return {"undisturbed": run(world, keys, dropout)["weights"], "resumed": found["weights"]}


def skipped(world: World, keys: dict[str, Any]) -> dict[str, Any]:
    """A step whose loss is not finite is left out; the next ones are as if it had not been."""
    trainer, steps = build(world, keys, on_nonfinite="skip")
    metrics = trainer.batches.metrics

    def broken(*arguments: Any, **more: Any) -> Any:
        found, flag = metrics(*arguments, **more)
        return ({**found, "loss": float("nan")} if len(steps) == 1 else found), flag

    trainer.batches.metrics = broken
    trainer.fit()
    assert [step.get("skipped", 0) for step in steps] == [0, 1, 0, 0, 0]
    return {"weights": weights(trainer.model)}


def load(world: World, folder: Path, keys: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        model = Llama(checkpoint.read_config(folder))
    model = parallelize(model, world, ParallelConfig(**keys)).to_empty(device="cpu")
    checkpoint.load_weights(model, folder)
    return model


@torch.no_grad()
def loaded(world: World, folder: Path, out: Path) -> dict[str, Any]:
    """Models from files, from the meta device on: their weights, what they compute, and their export."""
    ids = torch.arange(9)
    for name in ("untied", "tied", "bf16"):
        expected = checkpoint.load_model(folder / name)
        for stage in (1, 2, 3):
            model = load(world, folder / name, zero(stage))
            assert sharding_of(model).shapes() == sharding_of(expected).shapes()
            assert [n for n, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]
            if stage == 3:
                assert all(
                    p.numel() == 0 and p.ds_tensor.numel() * world.size < p.ds_numel + world.size
                    for p in model.parameters()
                )
            for (_, ours), wanted in zip(whole_tensors(model), expected.parameters(), strict=True):
                assert torch.equal(ours, wanted)
            found = model(ids, ids, lambda layer, q, k, v: q)
            torch.testing.assert_close(found, expected(ids, ids, lambda layer, q, k, v: q), atol=1e-5, rtol=1e-5)
            checkpoint.save_weights(model, out / f"{name}-{stage}", dtype=torch.float32)
    return {}


def freed(world: World) -> dict[str, Any]:
    """Moments go with the end of training, the model with its last name; between the two it runs."""
    for stage in (1, 2, 3):
        trainer, _ = build(world, zero(stage))
        trainer.fit()
        model = trainer.model
        moments = weakref.ref(next(iter(trainer.optimizer.state.values()))["exp_avg"])
        before, alive = weights(model), weakref.ref(model)
        trainer.close()
        del trainer
        gc.collect()
        assert moments() is None
        for name, whole in whole_tensors(model):
            assert torch.equal(whole, before[name]), name
        with torch.no_grad():
            model(torch.arange(5), torch.arange(5), lambda layer, q, k, v: q)
        del model
        gc.collect()
        assert alive() is None
    return {}


def refused(world: World) -> dict[str, Any]:
    """The messages for what this backend does not do."""
    messages = {}
    for name, keys, moments in (
        ("fsdp2's", zero(3, replicate=2, reduce="microbatch", compile=True), "fp32"),
        ("selective", zero(3, checkpointing="selective"), "fp32"),
        ("moments", zero(2), "bf16"),
    ):
        try:
            model = parallelize(make_model(), world, ParallelConfig(**keys))
            items = make_items(24, 2)
            Trainer(model, items, options("dpo", moments=moments), reference=make_reference(items), world=world)
        except UserError as error:
            messages[name] = str(error)
    return messages


def main(folder: Path, out: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    world = World()
    run_case = {
        "zero 1": lambda: run(world, zero(1)),
        "zero 2": lambda: run(world, zero(2)),
        "zero 3": lambda: run(world, zero(3)),
        "selective": lambda: run(world, zero(2, checkpointing="selective")),
        "dropout": lambda: run(world, zero(3), 0.1),
        "dropout full": lambda: run(world, zero(3, checkpointing="full"), 0.1),
        **{f"bf16 {stage}": lambda stage=stage: run(world, zero(stage, dtype="bfloat16")) for stage in (1, 2, 3)},
        **{f"resumed {stage}": lambda stage=stage: resumed(world, zero(stage), out) for stage in (1, 2, 3)},
        **{f"skipped {stage}": lambda stage=stage: skipped(world, zero(stage)) for stage in (1, 2, 3)},
        "skipped fsdp2": lambda: skipped(world, FSDP2),
        "stopped fsdp2": lambda: stopped(world, FSDP2, out / "from-fsdp2"),
        "stopped zero 3": lambda: stopped(world, zero(3), out / "from-zero"),
        "zero 2 after fsdp2": lambda: run(world, zero(2), checkpoint_dir=copied(world, out / "from-fsdp2")),
        "zero 3 after zero 3": lambda: run(world, zero(3), checkpoint_dir=copied(world, out / "from-zero")),
        "fsdp2 after zero 3": lambda: run(world, FSDP2, checkpoint_dir=copied(world, out / "from-zero")),
        "loaded": lambda: loaded(world, folder, out),
        "freed": lambda: freed(world),
        "refused": lambda: refused(world),
    }
    results = {}
    for case in cases:
        results[case] = run_case[case]()
        world.barrier()
    leave(world, results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
