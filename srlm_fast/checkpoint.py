"""Weights in Hugging Face's layout: config.json and safetensors, one file or shards with an index.

Reading and writing go tensor by tensor: no process holds more than the slices it owns and one tensor to read, two to
write. `srlm_fast.model_files` has what is done to write.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from srlm_fast.errors import UserError
from srlm_fast.lora import base_parameters, is_adapter
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.model_files import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, Ranks, bytes_of, write_folder, writing_order
from srlm_fast.parallel import sharding_of

_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a table that old checkpoints carry; it follows from config.json
_TIED, _TIED_TO = "lm_head.weight", "model.embed_tokens.weight"


# ------------------------------------------------------------------------------------------------------------- reading


def read_config(folder: str | Path) -> LlamaConfig:
    """The shape in a model folder's config.json.

    Raises:
        UserError: when it is missing, unreadable, or describes no Llama that this project can run.
    """
    file = Path(folder) / "config.json"
    content = _read_json(file)
    try:
        return LlamaConfig.from_hf(content)
    except UserError as error:
        raise UserError(f"{file.parent}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: a value has the wrong type ({error})") from error


def load_model(
    folder: str | Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Llama:
    """The model in a folder, whole, in evaluation mode, for use in one process. Raises UserError as `load_weights`."""
    with torch.device("meta"):
        model = Llama(read_config(folder), dropout)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, folder)
    return model.eval()


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Read a folder's tensors into a Llama's parameters, cast to their dtype, and recompute its buffers.

    The parameters may be fresh from `to_empty` and may be sharded: a rank then reads only its own slices. One
    slice at a time is in memory beside the parameters. Adapters (`srlm_fast.lora`) are left as they are.

    Raises:
        UserError: before anything is changed, when a file is missing, truncated or outside the folder, or a tensor is
            missing, unknown, of the wrong shape, or not floating point.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # `to_empty` unties them
    sharding = sharding_of(model)
    sharding.reshard()  # what is written into a gathered parameter would be dropped
    folder, parameters, shapes = Path(folder), dict(base_parameters(model)), sharding.shapes()
    with _open_tensors(folder, {name: shapes[name] for name in parameters}):
        files = _tensor_files(folder)
    for name, parameter in parameters.items():
        for part, where in sharding.parts(parameter):
            assert part.shape == tuple(ends.stop - ends.start for ends in where), name
            if part.numel():
                # A file is mapped into memory, and what has been read of it stays there until it is closed.
                with _open_file(files.get(name, folder / SINGLE_FILE)) as stored:
                    part.copy_(stored.get_slice(name)[where])
    model.reset_buffers()


def read_tensors(folder: str | Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of all parameters in a folder, one at a time, on the CPU.

    Raises:
        UserError: as `load_weights`, before the first tensor.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(read_config(folder)).named_parameters()}
    with _open_tensors(Path(folder), shapes) as stored:
        for name in shapes:
            yield name, stored[name].get_tensor(name).to(dtype)


def weights_id(folder: str | Path) -> str:
    """Hex digest of what a model computes: names, dtypes, shapes and bytes of its tensors, and config.json's shape.

    The same for one file and for shards, whatever the folder is called. Raises UserError as `load_weights`.
    """
    config = read_config(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    meaning = {key: value for key, value in asdict(config).items() if key not in ("bos_token_id", "eos_token_id")}
    digest = hashlib.blake2b(json.dumps(meaning, sort_keys=True).encode(), digest_size=32)
    with _open_tensors(Path(folder), shapes) as stored, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def tensor_digest(name: str) -> bytes:
            tensor = stored[name].get_tensor(name)
            head = f"{name} {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}".encode()
            return head + hashlib.blake2b(bytes_of(tensor), digest_size=32).digest()

        for part in pool.map(tensor_digest, sorted(shapes)):
            digest.update(part)
    return digest.hexdigest()


def check_weights(folder: str | Path) -> None:
    """Raises UserError as `load_weights` does; reads no more than the headers of the files."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(read_config(folder)).named_parameters()}
    with _open_tensors(Path(folder), shapes):
        pass


@contextmanager
def _open_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    """{tensor name: open safetensors file}, after checking that the folder holds tensors of just these shapes."""
    files = _tensor_files(folder)
    with ExitStack() as stack:
        stored: dict[str, Any] = {}
        for file in sorted(set(files.values()) or {folder / SINGLE_FILE}):
            opened = stack.enter_context(_open_file(file))
            for name in opened.keys():
                if name in stored or (files and files.get(name) != file):
                    raise UserError(f"{file}: holds tensor {name}, which {folder / INDEX_FILE} does not place there")
                stored[name] = opened
        for name, file in files.items():
            if name not in stored:
                raise UserError(f"{file}: tensor {name} is missing, though {folder / INDEX_FILE} places it there")
        _check(folder, stored, shapes)
        yield stored


def _tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: file} of the index; empty when the folder holds one file and no index."""
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist or is no folder")
    if (folder / SINGLE_FILE).exists():
        return {}
    index = folder / INDEX_FILE
    if not index.exists():
        raise UserError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; other formats: scripts/convert.py")
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{index}: weight_map is not a table of tensor names and file names")
    for name, place in places.items():
        if place in ("", "..") or place != Path(place).name or "\\" in place:
            raise UserError(f"{index}: tensor {name} lies in {place!r}, which is not a file of this folder")
        if not (folder / place).is_file():
            raise UserError(f"{folder / place}: file is missing, though {INDEX_FILE} places tensor {name} there")
    return {name: folder / place for name, place in places.items()}


@contextmanager
def _open_file(file: Path) -> Iterator[Any]:
    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors, truncated or damaged ({error})") from error
    with opened:
        yield opened


def _check(folder: Path, stored: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(shapes.keys() - stored.keys())
    if missing:
        hint = "; if the head is tied say tie_word_embeddings in config.json" if missing == [_TIED] else ""
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all){hint}")
    extra = sorted(name for name in stored.keys() - shapes.keys() if not name.endswith(_IGNORED_SUFFIX))
    if extra == [_TIED] and _TIED_TO in shapes:
        if not torch.equal(stored[_TIED].get_tensor(_TIED), stored[_TIED_TO].get_tensor(_TIED_TO)):
            raise UserError(f"{folder}: {_TIED} differs from {_TIED_TO}, but config.json says tie_word_embeddings")
    elif extra:
        raise UserError(f"{folder}: tensor {extra[0]} does not belong to this model ({len(extra)} such in all)")
    for name, shape in shapes.items():
        found = stored[name].get_slice(name)
        if found.get_dtype() not in DTYPE_NAMES.values():
            raise UserError(f"{folder}: tensor {name} is of dtype {found.get_dtype()}, not a plain floating point one")
        if tuple(found.get_shape()) != shape:
            raise UserError(f"{folder}: tensor {name} has shape {found.get_shape()}, the model wants {list(shape)}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    return content


# ------------------------------------------------------------------------------------------------------------- writing


def save_weights(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    extra_files: Mapping[str, Path | bytes] | Iterable[Path] = (),
) -> None:
    """Write a Llama as a model folder, readable by transformers and vLLM. All ranks call it and write files of it.

    Args:
        model: a Llama, whole or sharded; its parameters are gathered one by one.
        folder: replaced if it holds an earlier model; the same for all ranks.
        dtype: of the tensors in the files; None keeps the parameters' own.
        max_shard_bytes: a file is closed before it would outgrow this; a model that fits is one file without index.
        extra_files: {name in the folder: file to copy, or content} (`Tokenizer.files`), or files that keep their names.

    Raises:
        UserError: on every rank, as `write_folder`; for a model with adapters.
    """
    if any(is_adapter(name) for name, _ in model.named_parameters()):
        raise UserError("this model has adapters: merge them first, by lora.merge or adapters.merge_folders")
    sharding = sharding_of(model)
    shapes = sharding.shapes()
    specs = [(name, shapes[name], dtype or p.dtype) for name, p in model.named_parameters()]
    specs.sort(key=lambda spec: -spec[2].itemsize)
    parameters, ranks = dict(model.named_parameters()), _ranks()
    order = writing_order(specs, max_shard_bytes, ranks.n)
    tensors = (sharding.whole(parameters[name], kind) for _, _, (name, _, kind) in order)
    sizes = {"max_shard_bytes": max_shard_bytes, "extra_files": extra_files}
    write_folder(folder, model.config, specs, tensors, ranks=ranks, **sizes)


def _ranks() -> Ranks:
    if not dist.is_available() or not dist.is_initialized():
        return Ranks()

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    return Ranks(dist.get_rank(), dist.get_world_size(), gather)
