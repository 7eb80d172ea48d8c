"""Training checkpoints: model, optimizer and the evaluations so far, by torch.distributed.checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from srlm_fast.errors import UserError
from srlm_fast.parallel import Sharding, World
from srlm_fast.rundir import sync_folder

_HISTORY = "evaluations.json"


class Checkpoints:
    """The folder FOLDER/step-N of every kept checkpoint after N steps. All ranks call its methods alike."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world

    def save(
        self,
        step: int,
        sharding: Sharding,
        history: list[dict[str, float]],
        keep: Collection[int] = (),
    ) -> None:
        """Write step-N under a temporary name, rename, drop the older ones but those of the steps in `keep`."""
        temporary = self.folder / ".saving"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.world.barrier()
        state = sharding.state()
        try:
            dcp.save(state, checkpoint_id=temporary, no_dist=self.world.size == 1)
            if self.world.is_main and history:
                (temporary / _HISTORY).write_text(json.dumps(history), encoding="utf-8")
        except (OSError, CheckpointException) as error:
            raise UserError(f"cannot write a training checkpoint below {self.folder}: {_cause(error)}") from error
        self.world.barrier()
        if self.world.is_main:
            older = self._all()
            temporary.rename(self.folder / f"step-{step}")
            sync_folder(self.folder)
            for path in older:
                if _step(path) not in keep:
                    shutil.rmtree(path)
        self.world.barrier()

    def resume(self, sharding: Sharding) -> tuple[int, list[dict[str, float]]]:
        """Load the newest checkpoint, if any: the number of steps already done, and the evaluations of them.

        Raises:
            UserError: when it cannot be read.
        """
        newest = self.world.broadcast((self._all() or [None])[-1])
        if newest is None:
            return 0, []
        state = sharding.state()
        self._load(state, newest)
        sharding.load_state(state)
        history = newest / _HISTORY
        return _step(newest), json.loads(history.read_text(encoding="utf-8")) if history.exists() else []

    def load_model(self, step: int, sharding: Sharding) -> None:
        """The weights of a kept checkpoint.

        Raises:
            UserError: when it cannot be read.
        """
        state = sharding.state(optimizer=False)
        self._load(state, self.folder / f"step-{step}")
        sharding.load_state(state)

    def _load(self, state: dict[str, Any], path: Path) -> None:
        try:
            dcp.load(state, checkpoint_id=path, no_dist=self.world.size == 1)
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"cannot resume from {path}: {_cause(error)}; delete that folder to train from the start"
            ) from error

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=_step)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _cause(error: BaseException) -> str:
    """One line about the first rank's failure behind a DCP exception."""
    failures = getattr(error, "failures", None) or {0: error}
    first = next(iter(failures.values()))
    first = first[0] if isinstance(first, tuple) else first
    return f"{type(first).__name__} {first}".strip()
