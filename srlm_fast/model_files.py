"""Writing a model folder: which tensor goes into which file, the files, their digests, and one rename for all of it.

Ranks share the files and write them at the same time, each whole tensors; what is in the files does not depend on how
many ranks there are. A folder is written under a temporary name, read back, and renamed, so its final name never holds
half a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.model import LlamaConfig
from srlm_fast.rundir import digest, sync_folder

SINGLE_FILE, INDEX_FILE, SUMS_FILE = "model.safetensors", "model.safetensors.index.json", "SHA256SUMS"
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Spec = tuple[str, tuple[int, ...], torch.dtype]  # name, shape, dtype of a tensor to be written


@dataclass(frozen=True)
class Ranks:
    """Who writes together: this rank, how many there are, and gather(value) -> the values of all, on all of them."""

    rank: int = 0
    n: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def agree(self, failure: str | None) -> None:
        """Raises the first rank's failure on every rank."""
        failures = [found for found in self.gather(failure) if found]
        if failures:
            raise UserError(failures[0])


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, copied to the host only if they are elsewhere."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def divide(specs: Sequence[Spec], max_shard_bytes: int) -> list[tuple[str, list[Spec]]]:
    """(file name, its tensors) of every file: a file is closed before it would outgrow this."""
    files: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        n_bytes = math.prod(spec[1]) * spec[2].itemsize
        if files[-1] and size + n_bytes > max_shard_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += n_bytes
    if len(files) == 1:
        return [(SINGLE_FILE, files[0])]
    return [(f"model-{i:05d}-of-{len(files):05d}.safetensors", file) for i, file in enumerate(files, 1)]


def writing_order(specs: Sequence[Spec], max_shard_bytes: int, n_ranks: int) -> list[tuple[int, str, Spec]]:
    """(rank, file, tensor) in the order in which ranks write: as many files as ranks at a time, a tensor of each in
    turn. With one rank that is the order of `specs`."""
    files, order = divide(specs, max_shard_bytes), []
    for first in range(0, len(files), n_ranks):
        together = list(enumerate(files[first : first + n_ranks]))
        for i in range(max(len(tensors) for _, (_, tensors) in together)):
            order += [(rank, name, tensors[i]) for rank, (name, tensors) in together if i < len(tensors)]
    return order


def write_folder(
    folder: str | Path,
    config: LlamaConfig,
    specs: Sequence[Spec],
    tensors: Iterable[Tensor],
    *,
    max_shard_bytes: int = 5 << 30,
    extra_files: Mapping[str, Path | bytes] | Iterable[Path] = (),
    ranks: Ranks = Ranks(),
) -> None:
    """Write a model folder from a stream of tensors, readable by transformers and vLLM. All ranks call this alike.

    Args:
        folder: replaced if it holds an earlier model.
        config: the model's shape.
        specs: all tensors, widest dtype first, so that every tensor is aligned in its file.
        tensors: in `writing_order`, on every rank; while one is written no more than the next is asked for.
        max_shard_bytes: see `divide`.
        extra_files: {name in the folder: file to copy, or content}, or files that keep their names.
        ranks: who writes together; the folder is the same for all of them.

    Raises:
        UserError: on every rank, when the folder cannot be written, holds something else, or reads back wrong; nothing
            is left behind.
    """
    folder = Path(folder).absolute()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        ranks.agree(_failure(folder, lambda: _prepare(folder, temporary)) if ranks.rank == 0 else None)
        order, sums = writing_order(specs, max_shard_bytes, ranks.n), {}
        failure = _failure(folder, lambda: sums.update(_write_files(temporary, order, iter(tensors), ranks)))
        ranks.agree(failure)
        for others in ranks.gather(sums):
            sums.update(others)

        def finish() -> None:
            _write_rest(temporary, config, specs, max_shard_bytes, extra_files, sums)
            _publish(temporary, folder)

        ranks.agree(_failure(folder, finish) if ranks.rank == 0 else None)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _failure(folder: Path, work: Callable[[], None]) -> str | None:
    """What the user has to know when work fails; None when it does not."""
    try:
        work()
    except UserError as error:
        return str(error)
    except OSError as error:
        about = f" ({error.filename})" if error.filename else ""
        return f"cannot write model folder {folder}: {error.strerror or error}{about}"
    return None


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _prepare(folder: Path, temporary: Path) -> None:
    """What may be replaced is nothing, an empty folder, or a model: files only, and a config.json among them."""
    if _old(folder).exists() and not folder.exists():
        _old(folder).rename(folder)  # a replacement was interrupted between its two renames
    if folder.exists():
        if not folder.is_dir() or folder.is_symlink():
            raise UserError(f"cannot write model folder {folder}: it exists and is no folder; choose another")
        content = list(folder.iterdir())
        if content and (not (folder / "config.json").is_file() or any(entry.is_dir() for entry in content)):
            raise UserError(f"cannot write model folder {folder}: it holds other things than a model; choose another")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_files(
    folder: Path, order: Sequence[tuple[int, str, Spec]], tensors: Iterator[Tensor], ranks: Ranks
) -> dict[str, str]:
    """This rank's files, in a thread beside the gathering of the next tensor; {file: SHA-256}.

    Raises:
        OSError, UserError: with several ranks after the last tensor, for gathering takes all of them.
    """
    shapes: dict[str, list[Spec]] = {}
    for _, name, spec in order:
        shapes.setdefault(name, []).append(spec)
    sums: dict[str, str] = {}
    opened: dict[str, _TensorFile] = {}
    failure: OSError | UserError | None = None
    pending: Future | None = None

    def write(name: str, spec: Spec, tensor: Tensor) -> None:
        if spec is shapes[name][0]:
            opened[name] = _TensorFile(folder / name, shapes[name])
        opened[name].write(tensor)
        if spec is shapes[name][-1]:
            sums[name] = opened.pop(name).close()

    with ThreadPoolExecutor(1, thread_name_prefix="export") as thread:
        try:
            for rank, name, spec in order:
                tensor = next(tensors)
                assert tensor.shape == spec[1] and tensor.dtype == spec[2], spec[0]
                if rank == ranks.rank and failure is None:
                    try:
                        if pending is not None:
                            pending.result()
                        pending = thread.submit(write, name, spec, tensor)
                    except (OSError, UserError) as error:
                        failure = error
                        if ranks.n == 1:
                            raise
                del tensor
            if pending is not None and failure is None:
                pending.result()
        finally:
            thread.shutdown()
            for file in opened.values():
                file.abandon()
    if failure is not None:
        raise failure
    return sums


class _TensorFile:
    """One safetensors file: length of the header (u64), header (JSON, padded to 8 bytes), the tensors' bytes."""

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape, dtype in specs:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._sum = hashlib.sha256()
        self._file = open(path, "xb")
        self._write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, tensor: Tensor) -> None:
        self._write(bytes_of(tensor))

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._sum.update(content)

    def close(self) -> str:
        """SHA-256 of what was written, after it was synced and read back.

        Raises:
            UserError: when the file holds something else.
        """
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # not from memory, where it certainly is
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if digest(Path(file.name)) != self._sum.hexdigest():
            raise UserError(f"{file.name}: reads back other bytes than were written; look at that disk")
        return self._sum.hexdigest()

    def abandon(self) -> None:
        try:
            self._file.close()
        except OSError:  # what could not be written before
            pass


def _write_rest(
    folder: Path,
    config: LlamaConfig,
    specs: Sequence[Spec],
    max_shard_bytes: int,
    extra_files: Mapping[str, Path | bytes] | Iterable[Path],
    sums: dict[str, str],
) -> None:
    """Index, config.json, the extra files, and the digests of them all."""
    files = divide(specs, max_shard_bytes)
    if len(files) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in specs)
        weight_map = {spec[0]: name for name, tensors in files for spec in tensors}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    kinds = {str(dtype).removeprefix("torch.") for *_, dtype in specs}
    dtype = kinds.pop() if len(kinds) == 1 else "float32"
    _write_json(folder / "config.json", {**config.to_hf(), "torch_dtype": dtype})
    extra = extra_files.items() if isinstance(extra_files, Mapping) else ((file.name, file) for file in extra_files)
    for name, file in extra:
        with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as source, _synced(folder / name) as target:
            shutil.copyfileobj(source, target)
    for file in folder.iterdir():
        sums.setdefault(file.name, digest(file))
    with _synced(folder / SUMS_FILE) as file:
        file.write("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())
    sync_folder(folder)


def _publish(temporary: Path, folder: Path) -> None:
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(file: Path, value: Any) -> None:
    with _synced(file) as opened:
        opened.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


@contextmanager
def _synced(file: Path) -> Iterator[Any]:
    """A new binary file that is on the disk when the block ends."""
    with open(file, "xb") as opened:
        yield opened
        opened.flush()
        os.fsync(opened.fileno())
