"""Training with checkpoints on several ranks, stopped, killed and out of space, for test_recovery.py:

torchrun --nproc-per-node N tests/recovery_case.py FOLDER OUT CASE ...

FOLDER holds what the cases share and leave; OUT/CASE.pt gets the weights, moments and losses of those that end.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import torch
from training_case import build, full_weights

from srlm_fast import checkpoint, command
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.parallel import World
from srlm_fast.trainer import Trainer, storage

CHANGES = {"checkpoint_every": 1, "keep_last": 2}


def trainer(folder: Path, world: World, dropout: float = 0.1, changes: dict | None = None, **arguments) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    return build("dpo", world, dropout=dropout, changes=CHANGES | (changes or {}), checkpoint_dir=folder, **arguments)


def moments(made: Trainer) -> dict[str, torch.Tensor]:
    """The whole moments of every parameter."""
    found = {}
    for name, parameter in made.model.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            value = made.optimizer.state[parameter][kind]
            found[f"{name}/{kind}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found


def fit(made: Trainer, out: Path, world: World, name: str) -> None:
    made.fit()
    result = {"weights": full_weights(made.model), "moments": moments(made)}
    if world.is_main:
        torch.save(result, out / f"{name}.pt")


def slow_writes() -> None:
    """Several steps are done before a save in the background is."""
    import time

    write = storage.dcp.FileSystemWriter.write_data
    storage.dcp.FileSystemWriter.write_data = lambda *args: (time.sleep(0.5), write(*args))[1]


def undisturbed(folder: Path, out: Path, world: World) -> None:
    fit(trainer(folder / "undisturbed", world, changes={"checkpoint_every": 100}), out, world, "undisturbed")


def stop(folder: Path, out: Path, world: World) -> None:
    """Every step asks for a checkpoint while the one before is being written; stopped after 4 of 6."""
    slow_writes()
    steps: list[dict] = []
    made = trainer(folder / "run", world, on_step=steps.append, should_stop=lambda: len(steps) == 3)
    begun = []
    save = made.checkpoints.save
    made.checkpoints.save = lambda *args: (save(*args), begun.append(made.checkpoints._saving.done()))
    try:
        made.fit()
    except Interrupted:
        assert begun == [False] * 4, "saves were waited for"
    else:
        raise AssertionError("not stopped")
    kept = sorted(path.name for path in (folder / "run").iterdir())
    assert kept == ["step-3", "step-4"], kept
    checkpoint.save_weights(made.model, folder / "at-stop")


def resume(folder: Path, out: Path, world: World) -> None:
    fit(trainer(folder / "run", world), out, world, "resume")


def load(folder: Path, out: Path, world: World) -> None:
    """What another number of ranks finds in the checkpoint of `stop`."""
    made = trainer(folder / "run", world)
    assert made.checkpoints.resume(made.sharding) == (4, [])
    result = {"weights": full_weights(made.model), "moments": moments(made)}
    if world.is_main:
        torch.save(result, out / f"load-{world.size}.pt")
    checkpoint.save_weights(made.model, out / f"export-{world.size}", max_shard_bytes=4000)


def refuse(folder: Path, out: Path, world: World) -> None:
    for changes, says in (({"lr": 0.1}, "lr: was 0.003, now 0.1"), ({"batch_size": 4}, "batch_size: was 8, now 4")):
        try:
            trainer(folder / "run", world, changes=changes).fit()
        except UserError as error:
            assert "step-4 is a checkpoint of another training" in str(error) and says in str(error), error
        else:
            raise AssertionError("not refused")


def kill(folder: Path, out: Path, world: World) -> None:
    """SIGKILL for the last rank in the middle of the second save, after it has written some bytes."""
    write = storage.dcp.FileSystemWriter.write_data

    def killed(self, plan, planner):
        if (folder / "killed/step-1").exists() and world.rank == world.size - 1:
            (Path(self.path) / f"__{world.rank}_0.distcp").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, plan, planner)

    storage.dcp.FileSystemWriter.write_data = killed
    trainer(folder / "killed", world).fit()


def after_kill(folder: Path, out: Path, world: World) -> None:
    assert [path.name for path in (folder / "killed").glob("step-*")] == ["step-1"]
    fit(trainer(folder / "killed", world), out, world, "after_kill")
    assert not list((folder / "killed").glob(".*"))


def full_disk(folder: Path, out: Path, world: World) -> None:
    """From the second save on no file may grow beyond 20 kB."""

    def limit(metrics: dict) -> None:
        if metrics["step"] == 2:
            made.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    made = trainer(folder / "full", world, on_step=limit)
    made.fit()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out, *cases = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]

    def work(config: None, world: World) -> None:
        for case in cases:
            globals()[case](folder, out, world)

    sys.exit(command.run(lambda: None, work))
