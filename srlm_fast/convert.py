"""Meta's consolidated.*.pth and llama2.c's .bin -> a model folder in Hugging Face's layout.

Both store interleaved rotary pairs (2i, 2i + 1); our layout, as Hugging Face's, pairs i with i + head_dim / 2, so the
rows of the query and key projections are reordered. Tensors are read, joined and written one at a time.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.model import NAMED_CONFIGS, Llama, LlamaConfig
from srlm_fast.model_files import write_folder
from srlm_fast.progress import progress
from srlm_fast.tokenizer import check_vocab, load_tokenizer

# Meta's name: (our name, dimension along which tensor-parallel files are joined; None: every file has all of it)
_NAMES: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_ROTARY = re.compile(r".*\.self_attn\.[qk]_proj\.weight")
_LLAMA2C_MAGIC = 0x616B3432


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read yet; `read` gives it in our layout."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_position_embeddings: int | None = None,
    max_shard_bytes: int = 5 << 30,
) -> LlamaConfig:
    """Write the model folder `target` from `source`.

    Args:
        source: a folder with params.json and consolidated.00.pth, ..., or a llama2.c .bin file (version 0 or 1, fp32).
        target: see `model_files.write_folder`.
        tokenizer: file or folder to copy the tokenizer from; None: the tokenizer.model in the source's folder or, as
            Meta's download lays it, in the one above, if there.
        dtype: of the tensors written; None keeps the source's.
        max_position_embeddings: the longest context, which Meta's files do not state; None: that of the release which
            the other parameters belong to.

    Returns:
        The shape, as written to config.json.

    Raises:
        UserError: when the source is missing, damaged, incomplete, or holds anything but plain tensors of the shapes
            that its parameters state; nothing is left at the target then.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"convert: {source} does not exist")
    config, stored = read_meta(source) if source.is_dir() else read_llama2c(source)
    if max_position_embeddings is not None:
        config = replace(config, max_position_embeddings=max_position_embeddings)
    _check(source, config, stored)
    files = {}
    if tokenizer is None:
        home = source if source.is_dir() else source.parent
        tokenizer = next((f for f in (home / "tokenizer.model", home.parent / "tokenizer.model") if f.exists()), None)
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        check_vocab(loaded, config.vocab_size)
        config, files = replace(config, bos_token_id=loaded.bos_id, eos_token_id=loaded.eos_id), loaded.files
    specs = [(name, tensor.shape, dtype or tensor.dtype) for name, tensor in stored.items()]
    specs.sort(key=lambda spec: -spec[2].itemsize)

    def tensors() -> Iterator[Tensor]:
        with progress("convert", len(specs), unit="tensors") as advance:
            for name, _, kind in specs:
                yield stored[name].read().to(kind)
                advance(1)

    write_folder(target, config, specs, tensors(), max_shard_bytes=max_shard_bytes, extra_files=files)
    return config


def rotate_half_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder a projection's rows [heads * head_dim, D] from interleaved rotary pairs to halves."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


# ---------------------------------------------------------------------------------------------------- Meta's release


def read_meta(folder: Path) -> tuple[LlamaConfig, dict[str, Stored]]:
    """Shape and tensors of Meta's release; the tensor-parallel files are mapped into memory, not read."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files or [file.name for file in files] != [f"consolidated.{i:02d}.pth" for i in range(len(files))]:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{folder}: wants consolidated.00.pth, consolidated.01.pth, ... without a gap; found {found}")
    parts = [_load_pth(file) for file in files]
    for file, part in zip(files, parts):
        for name in part.keys() ^ parts[0].keys():
            raise UserError(f"{folder}: tensor {name} is not in both {files[0].name} and {file.name}")
    config = _meta_config(folder / "params.json", parts)
    stored = {}
    for name in parts[0]:
        if name != "rope.freqs":
            ours, dim = _our_name(folder, name)
            stored[ours] = _joined(f"{folder}: tensor {name}", config, ours, dim, [part[name] for part in parts])
    return config, stored


def _load_pth(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds more than plain tensors and is not opened, it could run code") from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: cannot be read, truncated or damaged ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{file}: is not a table of tensors")
    return content


def _meta_config(file: Path, parts: list[dict[str, Tensor]]) -> LlamaConfig:
    """Shape from params.json; what it leaves out is taken from the tensors and from the release it belongs to."""
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
        dim, n_heads, multiple_of = params["dim"], params["n_heads"], params["multiple_of"]
        hidden = int((params.get("ffn_dim_multiplier") or 1) * int(8 * dim / 3))
        theta, scaled = float(params.get("rope_theta", 10000.0)), bool(params.get("use_scaled_rope"))
        vocab_size = params.get("vocab_size", -1)
        if vocab_size < 0:
            rows, columns = parts[0]["tok_embeddings.weight"].shape
            vocab_size = rows * len(parts) if columns == dim else rows
        release = NAMED_CONFIGS["llama3.1-8b" if scaled else "llama3-8b" if theta >= 500000 else "llama2-7b"]
        scaling = release.rope_scaling
        if scaled:  # the 1B and 3B models of Llama 3.2 stretch further, which their params.json does not say
            scaling = {**scaling, "factor": float(params.get("rope_scaling_factor") or (32 if dim < 4096 else 8))}
        return replace(
            release,
            vocab_size=vocab_size,
            hidden_size=dim,
            intermediate_size=-(-hidden // multiple_of) * multiple_of,
            num_hidden_layers=params["n_layers"],
            num_attention_heads=n_heads,
            num_key_value_heads=params.get("n_kv_heads") or n_heads,
            head_dim=dim // n_heads,
            rms_norm_eps=params["norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings="output.weight" not in parts[0],
        )
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: is not the params.json of a Llama ({error!r})") from error


def _joined(where: str, config: LlamaConfig, ours: str, dim: int | None, parts: list[Tensor]) -> Stored:
    """One of our tensors from its tensor-parallel parts."""
    first = parts[0]
    if len({part.dtype for part in parts}) > 1 or not first.is_floating_point():
        raise UserError(f"{where} is of dtype {first.dtype}, not of one floating point kind")
    if ours == "model.embed_tokens.weight" and first.shape[1:] == (config.hidden_size,):
        dim = 0  # Llama 3 splits the rows, Llama 2 the columns
    shape = list(first.shape)
    if dim is not None:
        if any(part.ndim != 2 or part.shape[1 - dim] != first.shape[1 - dim] for part in parts):
            raise UserError(f"{where}: its parts in the files do not fit together")
        shape[dim] = sum(part.shape[dim] for part in parts)

    def whole() -> Tensor:
        if dim is not None:
            return torch.cat(parts, dim) if len(parts) > 1 else first
        if not all(torch.equal(part, first) for part in parts):
            raise UserError(f"{where} differs between the files; they are not of one model")
        return first

    return _stored(config, ours, tuple(shape), first.dtype, whole)


# ----------------------------------------------------------------------------------------------------------- llama2.c


def read_llama2c(file: Path) -> tuple[LlamaConfig, dict[str, Stored]]:
    """Shape and tensors of a llama2.c file: version 0 (seven int32 in front) or 1 (a header of 256 bytes), fp32."""
    try:
        data = np.memmap(file, dtype=np.uint8, mode="c")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    config, versioned = _llama2c_config(file, bytes(data[:256]))
    at = 256 if versioned else 28
    layout = _llama2c_layout(config, versioned)
    wanted = at + 4 * sum(math.prod(shape) for _, shape in layout)
    if wanted != len(data):
        raise UserError(f"{file}: has {len(data)} bytes, its header asks for {wanted}; truncated, or no llama2.c file")
    stored = {}
    for name, shape in layout:
        start, at = at, at + 4 * math.prod(shape)
        if name != "rotary":
            tensor = torch.from_numpy(data[start:at].view(np.float32).reshape(shape))
            ours, _ = _our_name(file, name)
            stored[ours] = _stored(config, ours, shape, torch.float32, lambda tensor=tensor: tensor)
    return config, stored


def _llama2c_config(file: Path, head: bytes) -> tuple[LlamaConfig, bool]:
    """Shape, and whether the file has the header of version 1."""
    if len(head) < 28:
        raise UserError(f"{file}: is no llama2.c file, it has only {len(head)} bytes")
    magic, version = struct.unpack_from("<Ii", head)
    versioned = magic == _LLAMA2C_MAGIC and len(head) == 256
    if versioned and version != 1:
        raise UserError(f"{file}: is a llama2.c file of version {version}, quantised; export it as version 1")
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, context = struct.unpack_from("<7i", head, 8 if versioned else 0)
    tied = head[36] == 1 if versioned else vocab > 0
    if min(dim, hidden, n_layers, n_heads, n_kv_heads, abs(vocab), context) < 1 or dim % n_heads:
        raise UserError(f"{file}: is no llama2.c file, it starts with neither the magic number nor seven sizes")
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=dim // n_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
    )
    return config, versioned


def _llama2c_layout(config: LlamaConfig, versioned: bool) -> list[tuple[str, tuple[int, ...]]]:
    """(Meta's name, shape) of the tensors in the order of the file; each kind has all its layers together."""
    dim, hidden, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = config.num_key_value_heads * config.head_dim

    def layers(name: str, *shape: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"layers.{i}.{name}.weight", shape) for i in range(config.num_hidden_layers)]

    embedding, norm = [("tok_embeddings.weight", (vocab, dim))], [("norm.weight", (dim,))]
    attention_norm, ffn_norm = layers("attention_norm", dim), layers("ffn_norm", dim)
    q, k = layers("attention.wq", dim, dim), layers("attention.wk", kv, dim)
    v, o = layers("attention.wv", kv, dim), layers("attention.wo", dim, dim)
    w1, w2 = layers("feed_forward.w1", hidden, dim), layers("feed_forward.w2", dim, hidden)
    w3 = layers("feed_forward.w3", hidden, dim)
    rotary = [("rotary", (2, config.max_position_embeddings, config.head_dim // 2))]
    head = [] if config.tie_word_embeddings else [("output.weight", (vocab, dim))]
    if versioned:
        return attention_norm + ffn_norm + norm + embedding + q + k + v + o + w1 + w2 + w3 + head
    return embedding + attention_norm + q + k + v + o + ffn_norm + w1 + w2 + w3 + norm + rotary + head


# --------------------------------------------------------------------------------------------------------------- both


def _our_name(source: Path, name: str) -> tuple[str, int | None]:
    layer = _LAYER.fullmatch(name)
    known = _NAMES.get(layer[2] if layer else name)
    if known is None:
        raise UserError(f"{source}: tensor {name} does not belong to a Llama")
    return (f"model.layers.{layer[1]}.{known[0]}", known[1]) if layer else known


def _stored(
    config: LlamaConfig, ours: str, shape: tuple[int, ...], dtype: torch.dtype, whole: Callable[[], Tensor]
) -> Stored:
    if _ROTARY.fullmatch(ours):
        return Stored(shape, dtype, lambda: rotate_half_rows(whole(), config.head_dim))
    return Stored(shape, dtype, whole)


def _check(source: Path, config: LlamaConfig, stored: dict[str, Stored]) -> None:
    """Refuse by name what the model of this shape has not, lacks, or has otherwise."""
    n_layers = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
    if n_layers != config.num_hidden_layers:
        raise UserError(f"{source}: has {n_layers} layers, its parameters say {config.num_hidden_layers}")
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    for name in {**wanted, **stored}:
        if name not in stored:
            raise UserError(f"{source}: tensor {name} is missing")
        if name not in wanted:
            raise UserError(f"{source}: tensor {name} does not belong to the model that its parameters describe")
        found, shape = list(stored[name].shape), list(wanted[name])
        if found != shape:
            raise UserError(f"{source}: tensor {name} has shape {found}, its parameters ask for {shape}")
