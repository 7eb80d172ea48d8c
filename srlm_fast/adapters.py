"""Adapters in files, laid out as PEFT's: adapter_config.json and adapter_model.safetensors; merging them into weights.

save_adapters(model, "adapter", base="m0")
merge_folders("m0", "adapter", "m1", extra_files=tokenizer.files)
model = load_adapters(load_model("m0"), "adapter")
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from srlm_fast import checkpoint
from srlm_fast.config.keys import LoraConfig
from srlm_fast.errors import UserError
from srlm_fast.lora import TARGETS, adapter_parameters, add_adapters, fill, merged
from srlm_fast.model import Llama
from srlm_fast.model_files import write_folder
from srlm_fast.parallel import World, sharding_of
from srlm_fast.rundir import atomic_file, write_json

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's wrapping of the model
_WITHOUT_EFFECT = frozenset(
    """
    auto_mapping base_model_name_or_path ensure_weight_tying inference_mode megatron_core peft_version
    qalora_group_size revision runtime_config task_type
    """.split()
)
"""Fields of PEFT's configuration that change nothing here; those that are not mapped have to be empty."""
_STARTS = (True, False, "gaussian", "eva")
"""Values of init_lora_weights that leave the base as it is."""


def save_adapters(model: nn.Module, folder: str | Path, *, base: str | Path = "", world: World | None = None) -> None:
    """Write the adapters of a model in fp32, whole or sharded. All ranks call it, rank 0 writes.

    Args:
        model: after `add_adapters`.
        folder: made if needed; an adapter that it holds is replaced.
        base: folder of the model beneath, for those who read adapter_config.json.
        world: the ranks.

    Raises:
        UserError: for a model without adapters, or when the folder cannot be written.
    """
    options: LoraConfig | None = getattr(model, "lora", None)
    if options is None:
        raise UserError("this model has no adapters to save; lora.add_adapters makes them")
    sharding, tensors = sharding_of(model), {}
    sharding.reshard()
    for name, parameter in adapter_parameters(model):
        tensors[_PREFIX + name] = sharding.whole(parameter, torch.float32).cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": list(options.targets),
        "bias": "none",
        "inference_mode": True,
    }

    def write() -> None:
        (Path(folder) / CONFIG_FILE).unlink(missing_ok=True)  # is written last: with it the folder is complete
        with atomic_file(Path(folder) / WEIGHTS_FILE, "wb") as file:
            file.write(save(tensors, {"format": "pt"}))
        write_json(Path(folder) / CONFIG_FILE, config)

    (world or World()).on_main(write)


def read_adapters(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Options and {our name: tensor} of an adapter folder, ours or PEFT's.

    Raises:
        UserError: when a file is missing or damaged, or the adapter is of a kind that this project has not.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read as an adapter of PEFT's layout ({error})") from None
    options = options_of(config, str(folder / CONFIG_FILE))
    return options, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def options_of(config: Mapping[str, Any], where: str) -> LoraConfig:
    """The options that PEFT's configuration of an adapter means, as a mapping by its names.

    `use_rslora` becomes the alpha with the same product; `target_modules` may be "all-linear", or None for those that
    PEFT then takes in a Llama.

    Raises:
        UserError: beginning with `where`, for an adapter of a kind that this project has not.
    """
    mapped = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias"}
    wrong = {name: value for name, value in config.items() if value and name not in mapped | _WITHOUT_EFFECT}
    if wrong.get("init_lora_weights") in _STARTS:
        del wrong["init_lora_weights"]
    for name, only in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(name, only) != only:
            wrong[name] = config[name]
    targets = config.get("target_modules") or ("q_proj", "v_proj")
    targets = TARGETS if targets == "all-linear" else targets
    if isinstance(targets, str):
        raise UserError(f"{where}: target_modules={targets!r} is a pattern; list the names")
    targets = {name.rpartition(".")[2] for name in targets}  # PEFT may name those of every block
    unknown = sorted(targets - set(TARGETS))
    if unknown:
        wrong["target_modules"] = unknown
    if wrong:
        shown = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise UserError(
            f"{where}: {shown} is not supported. Adapters are plain LoRA, the same in all blocks, beside "
            f"{', '.join(TARGETS)}; leave it out, or train with PEFT and merge"
        )
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        return LoraConfig(
            rank=rank,
            alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=tuple(name for name in TARGETS if name in targets),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: r or lora_alpha is missing or no number ({error})") from None


def load_adapters(model: Llama, folder: str | Path) -> Llama:
    """Put the adapters of a folder beside the weights of a plain model, ready to be trained on or asked.

    Raises:
        UserError: when the folder cannot be read, or its adapters do not fit the model.
    """
    options, tensors = read_adapters(folder)
    add_adapters(model, options)
    parameters = dict(adapter_parameters(model))
    _check(folder, tensors, parameters)
    for name, parameter in parameters.items():
        fill(model, parameter, tensors[name])
    return model


def merge_folders(
    base: str | Path,
    adapter: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 << 30,
    extra_files: Mapping[str, Path | bytes] | Iterable[Path] = (),
) -> None:
    """Write the model that a base and an adapter make together, tensor by tensor, as a plain model folder.

    Args:
        base, adapter: folders.
        folder: replaced if it holds an earlier model.
        dtype: of the tensors in the files. Sums are fp32, of the base as it is in its files.
        max_shard_bytes, extra_files: as of `checkpoint.save_weights`.

    Raises:
        UserError: when the adapter does not fit the base, or a folder cannot be read or written; nothing is then left
            behind.
    """
    options, tensors = read_adapters(adapter)
    config = checkpoint.read_config(base)
    with torch.device("meta"):
        plain = Llama(config)
        specs = [(name, tuple(p.shape), dtype) for name, p in plain.named_parameters()]
        _check(adapter, tensors, dict(adapter_parameters(add_adapters(plain, options))))

    def stream() -> Iterator[Tensor]:
        for name, weight in checkpoint.read_tensors(base, torch.float32):
            thin = [tensors.get(f"{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB"]
            yield (weight if thin[0] is None else merged(weight, *thin, options.alpha / options.rank)).to(dtype)

    write_folder(folder, config, specs, stream(), max_shard_bytes=max_shard_bytes, extra_files=extra_files)


def save_merged(
    model: nn.Module,
    folder: Path,
    adapter: Path,
    *,
    base: str | Path,
    world: World,
    extra_files: Mapping[str, Path | bytes] | Iterable[Path] = (),
) -> None:
    """What a training with adapters leaves: the adapters in a folder, and in fp32 what they make of `base`.

    All ranks call it, rank 0 writes.

    Raises:
        UserError: as `save_adapters` and `merge_folders`.
    """
    save_adapters(model, adapter, base=base, world=world)
    world.on_main(lambda: merge_folders(base, adapter, folder, extra_files=extra_files))


def _check(folder: str | Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are not those of these adapters."""
    for what, names in (
        ("is missing", parameters.keys() - tensors.keys()),
        ("does not belong to this model", tensors.keys() - parameters.keys()),
        ("has another shape", {n for n, p in parameters.items() if n in tensors and tensors[n].shape != p.shape}),
    ):
        if names:
            raise UserError(f"{folder}: adapter tensor {min(names)} {what} ({len(names)} in all)")
