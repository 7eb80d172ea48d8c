"""Training checkpoints: kept in a folder each, written in the background, whole or not there.

FOLDER/step-N holds the model and the optimizer after N steps (torch.distributed.checkpoint) and `training.json`. Where
the training is in its schedule and its data follows from N; all randomness derives from (seed, step, micro-batch,
rank), so there is no state of a generator to be kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
from array import array
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from srlm_fast.config import TrainConfig, results_keys
from srlm_fast.errors import UserError
from srlm_fast.packing import Item
from srlm_fast.parallel import Sharding, World
from srlm_fast.rundir import digest, sync_folder, write_json
from srlm_fast.trainer.storage import Writer, load

FORMAT = 1
_ABOUT = "training.json"


class Checkpoints:
    """The checkpoints of one training. All ranks call its methods alike.

    Args:
        folder: theirs alone; it exists.
        world: the ranks.
        identity: of the training, `identity`; a checkpoint of another one is refused.
        keep_last: how many of the newest are kept.
        background: whether training goes on while one is written, see `storage.Writer`.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        identity: Mapping[str, Any],
        *,
        keep_last: int = 1,
        background: bool = True,
    ) -> None:
        self.folder, self.world, self.identity, self.keep_last = folder, world, dict(identity), keep_last
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._writer = Writer(self._group, background=background, pinned=world.device.type == "cuda")
        self._saving: Future | None = None
        self.seconds = 0.0
        """What the longest save so far took, from its start to its end in the background."""

    def save(
        self, step: int, sharding: Sharding, history: Sequence[dict[str, float]] = (), keep: Collection[int] = ()
    ) -> None:
        """Begin to write step-N; training may go on when this returns.

        The folder has a temporary name until everything is on disk. Then older ones are deleted, but for the newest
        `keep_last` in all and those of the steps in `keep`.

        Raises:
            UserError: on every rank, when the save before could not be finished.
        """
        self.wait()
        started = time.monotonic()
        temporary = self.folder / ".saving"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.world.barrier()
        about = {"format": FORMAT, "step": step, "identity": self.identity, "evaluations": list(history)}
        written = self._writer.begin(sharding.state(), temporary)
        self._saving = Future()
        arguments = self._saving, written, temporary, about, frozenset(keep), started
        if written.done():
            self._finish(*arguments)
        else:
            threading.Thread(target=self._finish, args=arguments, name="checkpoint").start()

    def _finish(
        self, saving: Future, written: Future, temporary: Path, about: dict, keep: Collection[int], started: float
    ) -> None:
        """When all is written, give the folder its name and delete older ones; in a thread, on rank 0."""
        try:
            written.result()
            files = self._digests(temporary)
            if self.world.is_main:
                write_json(temporary / _ABOUT, about | {"files": files})
                self._publish(temporary, about["step"], keep)
            self.seconds = max(self.seconds, time.monotonic() - started)
            saving.set_result(None)
        except BaseException as error:  # a CheckpointException is no Exception
            saving.set_exception(error)

    def _digests(self, temporary: Path) -> dict[str, str]:
        """SHA-256 of all ranks' data files: their readers do not notice a byte that has changed."""
        try:
            mine: dict[str, str] | str = {f.name: digest(f) for f in temporary.glob(f"__{self.world.rank}_*.distcp")}
        except OSError as error:
            mine = f"cannot read back {error.filename}: {error.strerror}"
        found = [mine] * self.world.size
        if self._group is not None:
            dist.all_gather_object(found, mine, group=self._group)
        for part in found:
            if isinstance(part, str):
                raise UserError(part)
        return {name: value for part in found for name, value in part.items()}

    def _check_digests(self, path: Path, files: Mapping[str, str]) -> None:
        """Every rank reads its share of the files; raises `_Unreadable` on all of them."""
        wrong = None
        for name in sorted(files)[self.world.rank :: self.world.size]:
            try:
                if digest(path / name) != files[name]:
                    wrong = f"{name} is not what was written"
            except OSError as error:
                wrong = f"{name}: {error.strerror}"
        if causes := [cause for cause in self.world.gather(wrong) if cause]:
            raise _Unreadable(causes[0])

    def _publish(self, temporary: Path, step: int, keep: Collection[int]) -> None:
        target, unreadable = self.folder / f"step-{step}", self.folder / ".old"
        shutil.rmtree(unreadable, ignore_errors=True)
        if target.exists():  # a damaged one, before which training was resumed
            target.rename(unreadable)
        temporary.rename(target)
        sync_folder(self.folder)
        shutil.rmtree(unreadable, ignore_errors=True)
        for path in self._all()[: -self.keep_last]:
            if _step(path) not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def failed(self) -> bool:
        """Whether this rank knows already that the save in the background failed; `wait` tells all ranks."""
        saving = self._saving
        return saving is not None and saving.done() and saving.exception() is not None

    def wait(self) -> None:
        """Until the save in the background, if there is one, is on disk under its name.

        Raises:
            UserError: on every rank, when it could not be finished; what older ones hold is as it was.
        """
        if self._saving is None:
            return
        self.settle()
        error, self._saving = self._saving.exception(), None
        causes = [cause for cause in self.world.gather(_cause(error) if error else None) if cause]
        if causes:
            if self.world.is_main:
                shutil.rmtree(self.folder / ".saving", ignore_errors=True)
            raise UserError(
                f"cannot write a training checkpoint below {self.folder}: {causes[0]}; older ones are as they were. "
                "Free space or fix permissions, then start again"
            )

    def settle(self) -> None:
        """Wait without talking to other ranks, as before the end of a rank that something else has gone wrong with."""
        if self._saving is not None:
            self._saving.exception()

    def end(self) -> None:
        """`wait`, and let go of the memory that saves are made from."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def resume(self, sharding: Sharding) -> tuple[int, list[dict[str, float]]]:
        """Load the newest checkpoint that can be read, if any: the steps already done, and the evaluations of them.

        One that cannot be read is passed over with a warning as long as there is an older one.

        Raises:
            UserError: when it is of another training, or when none can be read.
        """
        if self.world.is_main:
            shutil.rmtree(self.folder / ".saving", ignore_errors=True)  # of a killed process
        names = self.world.broadcast([path.name for path in reversed(self._all())])
        for name, older in zip(names, [*names[1:], None]):
            path = self.folder / name
            try:
                about = self._read_about(path)
                self._check_digests(path, about["files"])
                state = sharding.state()
                self._load(state, path)
            except _Unreadable as error:
                if older is None:
                    raise UserError(
                        f"cannot resume from {path}: {error}; delete that folder to train from the start"
                    ) from error
                if self.world.is_main:
                    warning = f"warning: cannot resume from {path}: {error}; trying {older}, which is older\n"
                    sys.stderr.write(warning)
                continue
            sharding.load_state(state)
            return about["step"], about["evaluations"]
        return 0, []

    def load_model(self, step: int, sharding: Sharding) -> None:
        """The weights of a kept checkpoint.

        Raises:
            UserError: when it cannot be read.
        """
        self.wait()
        state, path = sharding.state(optimizer=False), self.folder / f"step-{step}"
        try:
            self._load(state, path)
        except _Unreadable as error:
            raise UserError(f"cannot go back to {path}: {error}") from error
        sharding.load_state(state)

    def _read_about(self, path: Path) -> dict[str, Any]:
        """training.json, the same on every rank.

        Raises:
            UserError: when it is of another training.
        """

        def read() -> tuple[dict[str, Any], str]:
            try:
                about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                return {}, f"{_ABOUT}: {error}"
            if about.get("format") != FORMAT:
                raise UserError(
                    f"{path} is a checkpoint of format {about.get('format')}, this program reads {FORMAT}; delete that "
                    "folder to train from the start"
                )
            differences = _differences(about["identity"], self.identity)
            if differences:
                raise UserError(
                    f"{path} is a checkpoint of another training ({differences}); restore what differs, or choose "
                    "another folder"
                )
            return about, ""

        about, broken = self.world.on_main(read)
        if broken:
            raise _Unreadable(broken)
        return about

    def _load(self, state: dict[str, Any], path: Path) -> None:
        try:
            load(state, path, self._group, alone=self.world.size == 1)
        except (Exception, CheckpointException) as error:
            raise _Unreadable(_cause(error)) from error

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=_step)


class _Unreadable(Exception):
    """A checkpoint that is damaged or incomplete."""


def identity(items: Sequence[Item], config: TrainConfig, seed: int, reference: str | None) -> dict[str, Any]:
    """What two trainings share whose checkpoints can stand for each other: data, result-relevant keys, seed, reference.

    reference: id of the weights behind the reference log-probabilities.
    """
    content = hashlib.blake2b(digest_size=16)
    for item in items:
        content.update(array("q", [len(item.responses), len(item.prompt), *map(len, item.responses)]).tobytes())
        content.update(array("q", item.prompt).tobytes() + b"".join(array("q", r).tobytes() for r in item.responses))
        content.update(array("d", item.labels).tobytes())
    named = {"items": content.hexdigest(), "seed": seed, "reference": reference}
    return json.loads(json.dumps({**results_keys(config), **named}))


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return ", ".join(f"{name}: was {found.get(name)!r}, now {wanted.get(name)!r}" for name in names[:3])


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _cause(error: BaseException) -> str:
    """One line about the first rank's failure behind a DCP exception."""
    failures = getattr(error, "failures", None) or {0: error}
    first = next(iter(failures.values()))
    first = first[0] if isinstance(first, tuple) else first
    behind = first  # torch's writer says of a full disk only that it is not where it should be in its file
    while behind is not None:
        if isinstance(behind, OSError) and behind.strerror:
            return behind.strerror
        behind = behind.__cause__ or behind.__context__
    if isinstance(first, UserError):
        return str(first)
    return f"{type(first).__name__} {first}".strip().splitlines()[0]
