"""Hugging Face models and tokenizers as ours, told by what they can do, so that transformers is not imported."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srlm_fast.adapters import options_of
from srlm_fast.checkpoint import load_model
from srlm_fast.config import LoraConfig
from srlm_fast.errors import UserError
from srlm_fast.lora import add_adapters, is_adapter
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.parallel import whole_tensors
from srlm_fast.tokenizer import Tokenizer, load_tokenizer

_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
_LOADING = (
    "attn_implementation",
    "device_map",
    "dtype",
    "torch_dtype",
    "trust_remote_code",
    "use_cache",
    "use_kernels",
)
"""How transformers loads a model, which changes nothing here."""


def local_folder(model: Any, options: Mapping[str, Any] | None) -> Any:
    """The folder of a model that is named as on the Hugging Face Hub, downloaded if needed; anything else as it is.

    Args:
        model: what a trainer was given.
        options: model_init_kwargs; `revision` is used, and what says how transformers would load it passed over.

    Raises:
        UserError: for other options, and for a name that is neither a folder nor on the hub.
    """
    options = dict(options or {})
    revision = options.pop("revision", None)
    unknown = [name for name in options if name not in _LOADING]
    if unknown:
        raise UserError(f"model_init_kwargs: {unknown[0]} is not supported; load the model yourself and pass it")
    if not isinstance(model, str) or Path(model).is_dir():
        return model
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(model, revision=revision, allow_patterns=_FILES)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"model: {model} is no folder; download it, and name the folder ({error})") from None


def as_llama(model: Any, dtype: torch.dtype = torch.float32) -> Llama:
    """A model folder, a LlamaForCausalLM of transformers, with adapters of PEFT or not, or a `Llama`, as a `Llama`.

    Parameters that have the dtype already are shared, so training them trains those of the other.

    Args:
        model: see above; a `Llama` stays as it is.
        dtype: of the weights. Adapters are fp32.

    Raises:
        UserError: for something else.
    """
    if isinstance(model, Llama):
        return model
    if isinstance(model, (str, Path)):
        if not Path(model).is_dir():
            raise UserError(f"model: {model} is no folder; download it, and name the folder")
        return load_model(model, dtype=dtype)
    if not hasattr(model, "state_dict") or not hasattr(getattr(model, "config", None), "to_dict"):
        raise UserError(f"model: a folder or a LlamaForCausalLM, got {type(model).__name__}")
    llama = Llama(LlamaConfig.from_hf(model.config.to_dict()))
    if hasattr(model, "peft_config"):
        configs = model.peft_config
        if "default" not in configs:
            raise UserError(f"model: the adapter 'default' is trained, there are {', '.join(configs)}")
        add_adapters(llama, options_of(configs["default"].to_dict(), "model"))
    tensors = {
        name: tensor.to(torch.float32 if is_adapter(name) else dtype) for name, tensor in _tensors(model).items()
    }
    missing, unexpected = llama.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        raise UserError(f"model: {type(model).__name__} lacks {missing[:3]} and has {unexpected[:3]}; pass a Llama")
    if llama.config.tie_word_embeddings:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    return llama.to(next(iter(tensors.values())).device)


def lora_options(model: Any, peft_config: Any) -> LoraConfig:
    """The adapters that a `peft.LoraConfig` asks for beside a model; those of rank 0 for None.

    Raises:
        UserError: for something else, what this project's adapters have not, or a model that has adapters already.
    """
    if peft_config is None:
        return LoraConfig()
    if not hasattr(peft_config, "to_dict"):
        raise UserError(f"peft_config: a peft.LoraConfig, got {type(peft_config).__name__}")
    if hasattr(model, "peft_config") or getattr(model, "lora", None):
        raise UserError("peft_config: the model has adapters already; leave it out to train these, or merge them first")
    options = peft_config.to_dict()
    if options.get("init_lora_weights", True) is not True:
        shown = options["init_lora_weights"]
        raise UserError(f"peft_config: init_lora_weights={shown!r} is not supported; leave it out, or wrap the model")
    targets = options.get("target_modules") or ()
    if not isinstance(targets, str) and any("layers." in name for name in targets):
        raise UserError("peft_config: target_modules names single blocks; name the last parts, such as q_proj, for all")
    return options_of(options, "peft_config")


def _tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a model of transformers by our names, PEFT's adapter `default` among them."""
    parts = (("base_model.model.", ""), (".base_layer.", "."), (".default.", "."))
    return {reduce(lambda name, part: name.replace(*part), parts, name): t for name, t in model.state_dict().items()}


@torch.no_grad()
def write_back(trained: nn.Module, model: Any) -> None:
    """Give a model of transformers the trained weights, where it does not share them. Collective if sharded.

    Adapters that it does not have are left out: those of a peft_config are the trainer's.
    """
    if isinstance(model, (str, Path)) or model is trained:
        return
    theirs, with_adapters = _tensors(model), getattr(trained, "lora", None) is not None
    for name, whole in whole_tensors(trained):
        of_it = name in theirs and is_adapter(name) == with_adapters
        if of_it and whole.data_ptr() != theirs[name].data_ptr():
            theirs[name].copy_(whole)


def as_tokenizer(processing_class: Any, model: Any) -> tuple[Tokenizer, bool]:
    """A tokenizer of transformers, a file or folder, or (None) that of a model folder; whether it puts bos first.

    Raises:
        UserError: where there is none.
    """
    if processing_class is None:
        name = model if isinstance(model, (str, Path)) else getattr(model, "name_or_path", "")
        if not name or not Path(name).exists():
            raise UserError("processing_class: pass the tokenizer, or the model as a folder that has one")
        processing_class = name
    if isinstance(processing_class, (str, Path)):
        processing_class = load_tokenizer(processing_class)
    if isinstance(processing_class, Tokenizer):
        return processing_class, processing_class.bos_id is not None
    if not hasattr(processing_class, "save_pretrained"):
        raise UserError(f"processing_class: a tokenizer or its folder, got {type(processing_class).__name__}")
    with tempfile.TemporaryDirectory() as folder:
        processing_class.save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
    bos = tokenizer.bos_id
    return tokenizer, bos is not None and processing_class("a")["input_ids"][:1] == [bos]
