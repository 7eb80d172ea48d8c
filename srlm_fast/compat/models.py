"""Hugging Face models and tokenizers as ours, told by what they can do, so that transformers is not imported."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srlm_fast.checkpoint import load_model
from srlm_fast.errors import UserError
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.parallel import whole_tensors
from srlm_fast.tokenizer import Tokenizer, load_tokenizer


def as_llama(model: Any) -> Llama:
    """A model folder, a LlamaForCausalLM of transformers or a `Llama`, as a `Llama` in fp32.

    The parameters of a model in fp32 are shared, so training it trains the other.

    Raises:
        UserError: for something else.
    """
    if isinstance(model, Llama):
        return model
    if isinstance(model, (str, Path)):
        if not Path(model).is_dir():
            raise UserError(f"model: {model} is no folder; download it, and name the folder")
        return load_model(model)
    if not hasattr(model, "state_dict") or not hasattr(getattr(model, "config", None), "to_dict"):
        raise UserError(f"model: a folder or a LlamaForCausalLM, got {type(model).__name__}")
    llama = Llama(LlamaConfig.from_hf(model.config.to_dict()))
    tensors = {name: tensor.float() for name, tensor in model.state_dict().items()}
    missing, unexpected = llama.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        raise UserError(
            f"model: {type(model).__name__} lacks {missing[:3]} and has {unexpected[:3]}; merge adapters first"
        )
    if llama.config.tie_word_embeddings:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    for parameter in llama.parameters():
        parameter.requires_grad_(True)
    return llama.to(next(iter(tensors.values())).device)


@torch.no_grad()
def write_back(trained: nn.Module, model: Any) -> None:
    """Give a model of transformers the trained weights, where it does not share them. Collective if sharded."""
    if isinstance(model, (str, Path)) or model is trained:
        return
    theirs = model.state_dict()
    for name, whole in whole_tensors(trained):
        if whole.data_ptr() != theirs[name].data_ptr():
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
