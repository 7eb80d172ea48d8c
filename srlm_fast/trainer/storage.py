"""torch.distributed.checkpoint on a file system, with nothing in its files trusted that a training state does not have.

Its index and its small values are pickles. Here they may name the classes of an index, plain values and tensors only,
so a checkpoint from elsewhere can be wrong but cannot run code.
"""

from __future__ import annotations

import io
import pickle
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_ALLOWED = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which no index does")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        for place in metadata.storage_data.values():
            if place.relative_path != Path(place.relative_path).name:
                raise pickle.UnpicklingError(f"its index names the file {place.relative_path}, outside its folder")
        return metadata


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


def load(state: dict[str, Any], folder: Path, group: ProcessGroup | None, *, alone: bool) -> None:
    """Fill the tensors and values of a state from a folder, whatever number of processes wrote it.

    Raises:
        Exception, CheckpointException: on every rank, when it cannot be read.
    """
    dcp.load(state, storage_reader=_Reader(folder), planner=_LoadPlanner(), process_group=group, no_dist=alone)


class Writer:
    """Writes states; in the background, from a copy of them in host memory, or while one waits.

    Args:
        group: for the collectives of the background thread, apart from those of the training; None without ranks.
        background: whether `begin` comes back when the copy is made.
        pinned: whether that copy lies in pinned memory, which GPUs fill faster. It is kept from one save to the next.
    """

    def __init__(self, group: ProcessGroup | None, *, background: bool, pinned: bool) -> None:
        self.group, self.background, self.pinned = group, background, pinned
        self._stager: DefaultStager | None = None

    def begin(self, state: dict[str, Any], folder: Path) -> Future:
        """Start to write; the state may change when this returns. The future holds what went wrong, on every rank.

        When it is done on rank 0, all ranks have written and synced their files.
        """
        where = {"storage_writer": dcp.FileSystemWriter(folder), "process_group": self.group}
        alone = self.group is None
        if self.background:
            if self._stager is None:
                options = {"use_pinned_memory": self.pinned, "use_non_blocking_copy": self.pinned}
                self._stager = DefaultStager(
                    StagingOptions(use_shared_memory=False, use_async_staging=False, **options)
                )
            return dcp.async_save(state, async_stager=self._stager, no_dist=alone, **where)
        future: Future = Future()
        try:
            future.set_result(dcp.save(state, no_dist=alone, **where))
        except BaseException as error:  # a CheckpointException is no Exception
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Let go of the copy's memory."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None
