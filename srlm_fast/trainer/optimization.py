"""The objective of a configuration, its learning rates and its optimizer."""

from __future__ import annotations

import math

import torch
from torch import nn

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.kernels import library
from srlm_fast.kernels.optimizer import AdamW
from srlm_fast.losses import Objective, get_objective
from srlm_fast.parallel import sharding_of
from srlm_fast.trainer.eight_bit import adamw_8bit, check_installed


def training_objective(config: TrainConfig) -> Objective:
    """The loss of a configuration with its options.

    Raises:
        UserError: for a loss, an option or a value that is not known.
    """
    return get_objective(
        config.loss, beta=config.beta, label_smoothing=config.label_smoothing, options=config.loss_options
    )


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up to lr, then decay to min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining


def check_moments(config: TrainConfig) -> None:
    """Raises UserError for moments that cannot be had here."""
    if config.moments == "8bit":
        check_installed()
    if config.moments == "bf16" and not library.fused():
        raise UserError("moments=bf16 needs kernels=fused; torch's AdamW does not have them")


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives all groups a learning rate; those of torchao keep it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_optimizer(model: nn.Module, config: TrainConfig, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and none on norms; torch's fused one where kernels are not in use.

    `seed` is of the rounding of bf16 moments; it differs between ranks.

    Raises:
        UserError: for bf16 moments without kernels, and 8-bit ones without torchao.
    """
    shapes = sharding_of(model).shapes()
    parameters = [(p, len(shapes[name])) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for p, n_dims in parameters if n_dims >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p, n_dims in parameters if n_dims < 2], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    check_moments(config)
    if config.moments == "8bit":
        return adamw_8bit(groups, **options)
    if library.fused():
        return AdamW(groups, **options, moments=config.moments, seed=seed)
    return torch.optim.AdamW(groups, **options, fused=True)
