"""What a step costs and uses: FLOPs, their share of the device's peak, memory."""

from __future__ import annotations

import resource
import sys

import torch
from torch import nn

from srlm_fast.packing import Cost

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 peak by a part of the device's name (NVIDIA's data sheets, SXM versions)."""


def model_cost(model: nn.Module) -> Cost:
    """FLOPs of forward and backward: 6 for every weight of a matrix and token that it meets, 4 where it is frozen and
    has no gradient; attention beside.

    Attention takes 4 FLOPs per head dimension for a query and a key forward, twice that backward. A model without the
    shape of a Llama in `config` counts with all of its parameters per token.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "num_key_value_heads"):
        return Cost(per_token=6.0 * sum(p.numel() for p in model.parameters()))
    layers, head = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)], model.lm_head.weight
    return Cost(
        per_token=sum((6.0 if m.weight.requires_grad else 4.0) * m.in_features * m.out_features for m in layers),
        per_attended=12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim,
        per_target=(6.0 if head.requires_grad else 4.0) * config.hidden_size * config.vocab_size,
    )


def peak_tflops(device: torch.device) -> float | None:
    """The device's bf16 peak; None where it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def memory_gb(device: torch.device) -> float:
    """Most memory that this process has held so far, in 10^9 bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
