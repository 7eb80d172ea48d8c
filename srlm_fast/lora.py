"""LoRA (Hu et al. 2022, arXiv 2106.09685): frozen weights, and beside each a product of two thin matrices to train.

    y = x W^T + alpha / rank dropout(x) A^T B^T        A [rank, in], B [out, rank], B = 0 at the start

    model = add_adapters(load_model("m0"), LoraConfig(rank=16))
    Trainer(model, ...).fit()

Embedding, norms and output head stay as they are: the head's log-probs come from its weight alone
(kernels/linear_logprob.py). `adapters.py` reads and writes adapters, and merges them into weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srlm_fast.config.keys import LoraConfig
from srlm_fast.errors import UserError
from srlm_fast.kernels.linear import linear
from srlm_fast.model import Linear, Llama
from srlm_fast.parallel import sharding_of
from srlm_fast.seeds import derive_seed

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What may have adapters: the products of a block."""


class LoraLinear(Linear):
    """A linear layer with a frozen weight and an adapter, whose names are PEFT's: lora_A.weight, lora_B.weight."""

    n_products = 2

    def __init__(self, layer: Linear, options: LoraConfig) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features)
        self.weight = layer.weight
        self.lora_A = Linear(layer.in_features, options.rank).to(layer.weight.device)
        self.lora_B = Linear(options.rank, layer.out_features).to(layer.weight.device)
        self.scaling, self.dropout = options.alpha / options.rank, options.dropout

    def forward(self, x: Tensor) -> Tensor:
        thin = linear(F.dropout(x, self.dropout, self.training) if self.dropout else x, self.lora_A.weight)
        return torch.addmm(linear(x, self.weight), thin, self.lora_B.weight.t(), alpha=self.scaling)


def check_options(options: LoraConfig) -> None:
    """Refuses targets that are none; nothing with rank 0.

    Raises:
        UserError: with those that there are.
    """
    if not options.rank:
        return
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown or not options.targets:
        shown = f"{unknown[0]!r} has no adapters" if unknown else "empty"
        raise UserError(f"lora.targets: {shown}; choose from {', '.join(TARGETS)}")


def add_adapters(model: Llama, options: LoraConfig, *, seed: int = 0, base_dtype: torch.dtype | None = None) -> Llama:
    """Freezes a model and puts fp32 adapters beside its `lora.targets`; nothing with rank 0.

    Comes before `parallelize`. On the meta device the adapters are without values: after `to_empty` and `load_weights`
    comes `init_adapters`.

    Args:
        model: changed in place.
        options: the keys lora.*.
        seed: of A.
        base_dtype: of the frozen weights in memory; None keeps it.

    Raises:
        UserError: for targets that are none.
    """
    if not options.rank:
        return model
    check_options(options)
    model.requires_grad_(False)
    for parameter in model.parameters() if base_dtype else ():
        parameter.data = parameter.data.to(base_dtype)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in options.targets:
                if hasattr(part, name):
                    setattr(part, name, LoraLinear(getattr(part, name), options))
    model.lora = options
    if not next(model.parameters()).is_meta:
        init_adapters(model, seed)
    return model


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter and not to the model."""
    return ".lora_" in name


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all adapters."""
    return ((name, parameter) for name, parameter in model.named_parameters() if is_adapter(name))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the model without its adapters: what a model folder holds."""
    return ((name, parameter) for name, parameter in model.named_parameters() if not is_adapter(name))


def init_adapters(model: nn.Module, seed: int = 0) -> None:
    """Fresh adapters, if there are any: A uniform within 1 / sqrt(in) as PEFT's, B zero, so that nothing changes yet.

    Each A depends on (seed, name) alone: the same for any number of ranks, which need not talk.
    """
    shapes = sharding_of(model).shapes()
    for name, parameter in adapter_parameters(model):
        whole = torch.zeros(shapes[name])
        if ".lora_A." in name:
            bound = 1 / math.sqrt(whole.shape[1])
            whole.uniform_(-bound, bound, generator=torch.Generator().manual_seed(derive_seed(seed, "lora", name)))
        fill(model, parameter, whole)


@torch.no_grad()
def fill(model: nn.Module, parameter: nn.Parameter, whole: Tensor) -> None:
    """Writes a tensor, which all ranks have whole, into what of a model's parameter lies on this rank."""
    for part, where in sharding_of(model).parts(parameter):
        part.copy_(whole[where])


@torch.no_grad()
def merge(model: Llama) -> Llama:
    """Adds the adapters to the weights, in fp32 and then cast, and takes them off: a plain model again, in place.

    Raises:
        UserError: for a sharded model; `adapters.merge_folders` merges files.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UserError("the adapters of a sharded model are merged by way of files: save_adapters, merge_folders")
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, LoraLinear):
                layer.weight.copy_(merged(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling))
                with torch.device("meta"):
                    plain = Linear(layer.in_features, layer.out_features)
                plain.weight = layer.weight
                setattr(module, name, plain.train(layer.training))
    model.lora = None
    return model


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """W + scaling B A in fp32."""
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scaling)
