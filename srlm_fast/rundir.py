"""The folder of a run: atomic files, phases that are done or not, metrics.

    run_dir/
      run.json          format version, result-relevant keys, digests of the inputs
      config.yaml       the whole configuration
      phases/NAME.json  written last, when a phase is done: counts, seconds, its output files with size and digest
      metrics.jsonl     one JSON object per training step and per phase
      state             running, done, stopped (the same command goes on) or failed

A phase is a function from files to files. Every file is written under a temporary name, synced and renamed, so a
reader never sees half of one; a phase without its phases/NAME.json is done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from srlm_fast.errors import Interrupted, UserError

FORMAT_VERSION = 3
_BEFORE_WORK = ("run.json", "config.yaml", "data.json", "state", ".lock")
_DIGEST_LIMIT = 64 << 20
"""Files above this size (weights) are checked by size only when a run is resumed."""


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends without an exception.

    Raises:
        UserError: when the folder cannot be written or the disk is full; `path` is then what it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # a folder of the path may be a file
            temporary.unlink()
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or fix permissions, then start again"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_temporary(path: Path) -> bool:
    """Whether this is a file that `atomic_file` left when the process was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """One JSON document, atomically."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value per line, atomically."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """A digest of an input file or folder that stays quick for 100 GiB of weights.

    Files up to 64 MiB count with their whole content, larger ones with their size and 16 blocks of 1 MiB spread over
    the file. Names inside a folder count, its own name and times do not.

    Raises:
        UserError: when a file cannot be read.
    """
    combined = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        try:
            content = _content(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
        name = "" if file == path else file.relative_to(path)
        combined.update(f"{name}\0{content}\n".encode())
    return combined.hexdigest()[:32]


def _content(file: Path) -> str:
    size = file.stat().st_size
    if size <= _DIGEST_LIMIT:
        return digest(file)
    blocks = hashlib.sha256()
    with open(file, "rb") as opened:
        for i in range(16):
            opened.seek(i * (size - (1 << 20)) // 15)
            blocks.update(opened.read(1 << 20))
    return f"{size}/{blocks.hexdigest()}"


class RunDir:
    """A run on disk. Only rank 0 writes run.json, phases/ and metrics.jsonl; every rank may read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, keys: dict[str, Any], inputs: dict[str, str]) -> None:
        """Create the run, or check that an existing one was made with the same keys and inputs.

        One that was refused before it had made anything takes over the new ones.

        Args:
            keys: result-relevant configuration keys.
            inputs: `fingerprint` of the content behind each input path.

        Raises:
            UserError: naming the keys that differ, or when the folder cannot be written.
        """
        record = {"format_version": FORMAT_VERSION, "keys": keys, "inputs": inputs}
        manifest = self / "run.json"
        if not manifest.exists():
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is no folder; choose another run_dir")
            if self.path.exists() and any(not _is_temporary(entry) for entry in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and holds no run.json; choose another run_dir")
            write_json(manifest, record)
            return
        old = self._read(manifest)
        if old.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{manifest}: format version {old.get('format_version')}, this program writes {FORMAT_VERSION}; "
                "choose another run_dir"
            )
        if old != record and not self._has_begun():
            self.lock()
            write_json(manifest, record)
            return
        for part in ("keys", "inputs"):
            names = sorted(record[part].keys() | old[part].keys())
            changed = [n for n in names if old[part].get(n) != record[part].get(n)]
            if changed:
                what = "; ".join(f"{n}: was {old[part].get(n)!r}, now {record[part].get(n)!r}" for n in changed[:3])
                raise UserError(
                    f"{self.path} was started with other {part} ({what}); restore them or choose another run_dir"
                )

    def _has_begun(self) -> bool:
        """Whether there is a file that the run has computed."""
        return any(file.is_file() and file.name not in _BEFORE_WORK for file in self.path.rglob("*"))

    def lock(self) -> None:
        """Keep other processes out until `unlock` or the end of this one, however it ends.

        Raises:
            UserError: when another process is at work in the run.
        """
        try:
            self._lock = open(self / ".lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works in {self.path}; wait for it or choose another run_dir") from None
        except OSError:
            pass  # a file system without locks; one without permission to write is told of by the next file

    def unlock(self) -> None:
        """Undo `lock`."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextmanager
    def at_work(self, writes: bool = True) -> Iterator[None]:
        """RUN/state is `running` in the block and `done`, `stopped` or `failed` after it; the lock is let go of.

        writes: whether this process writes it.
        """
        if writes:
            self.set_state("running")
        try:
            yield
            if writes:
                self.set_state("done")
        except Exception as error:
            if writes:
                with suppress(UserError):
                    self.set_state("stopped" if isinstance(error, Interrupted) else "failed")
            raise
        finally:
            self.unlock()

    def set_state(self, word: str) -> None:
        """Write RUN/state, which a batch script reads."""
        with atomic_file(self / "state") as file:
            file.write(f"{word}\n")

    def phase(self, name: str) -> dict[str, Any] | None:
        """What was recorded when the phase was done; None if it is not done or its files are gone or changed."""
        record = self._record(name)
        return None if record is None or any(self._changed(record)) else record

    def counts(self, name: str) -> dict[str, Any] | None:
        """What a phase counted when it was last done; None if it never was."""
        record = self._record(name)
        return None if record is None else record["counts"]

    def discard_changed(self, name: str) -> None:
        """Delete the rows of a phase that are not as they were recorded, so that it makes them again.

        Shards are kept by a phase that finds them; without this it would take over a damaged one.
        """
        record = self._record(name)
        for file in self._changed(record) if record else ():
            if file.suffix == ".jsonl":
                file.unlink(missing_ok=True)

    def finish(self, name: str, outputs: Iterable[Path], seconds: float, counts: dict[str, Any]) -> None:
        """Record a phase as done. `outputs` are files or folders below the run folder, complete on disk."""
        files: dict[str, Any] = {}
        for output in outputs:
            for file in [output] if output.is_file() else sorted(p for p in output.rglob("*") if p.is_file()):
                if _is_temporary(file):
                    continue
                size = file.stat().st_size
                sha = digest(file) if size <= _DIGEST_LIMIT else None
                files[str(file.relative_to(self.path))] = {"bytes": size, "sha256": sha}
        record = {
            "phase": name,
            "seconds": round(seconds, 3),
            "finished": time.time(),
            "counts": counts,
            "outputs": files,
        }
        write_json(self / f"phases/{name}.json", record)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a number that is not finite, which JSON lacks, becomes null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        path = self / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; free space or fix permissions, then start again"
            ) from error

    def _record(self, name: str) -> dict[str, Any] | None:
        path = self / f"phases/{name}.json"
        return self._read(path) if path.exists() else None

    def _changed(self, record: dict[str, Any]) -> Iterator[Path]:
        """Output files of a phase that are gone or not as recorded."""
        for relative, expected in record["outputs"].items():
            file = self / relative
            intact = file.is_file() and file.stat().st_size == expected["bytes"]
            if not intact or (expected["sha256"] is not None and digest(file) != expected["sha256"]):
                yield file

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; delete it to redo that part of the run") from None
