"""What `linear_logprob` and `linear_cross_entropy` share: autograd around the head's operators, checks, plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srlm_fast.kernels.linear import IntoMainGrad
from srlm_fast.kernels.linear_softmax import (
    TILED,
    linear_softmax,
    linear_softmax_backward,
    linear_softmax_gradients,
    plan,
    wide_dtype,
)
from srlm_fast.kernels.softmax_rows import Softmax

NARROW = 1024
"""Columns below which bf16 rows on the CPU are made again in the backward: as fast as keeping U, in less memory."""


class _RowLosses(torch.autograd.Function):
    """Loss and entropy per row, for any upstream gradient."""

    @staticmethod
    def forward(x, weight, target, main_grad, softmax, entropy, keep, forward_rows, backward_rows):
        return linear_softmax(x, weight, target, *softmax, entropy, keep, forward_rows)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, target, ctx.main_grad, ctx.softmax, entropy, _, _, ctx.backward_rows = inputs
        loss, lse, entropies, unit = output
        ctx.save_for_backward(x, weight, target, lse, loss, unit)
        ctx.mark_non_differentiable(lse, unit, *(() if entropy else (entropies,)))
        ctx.has_entropy = entropy
        if not torch.compiler.is_compiling():  # which lacks it; an entropy that is not used then has zero gradients
            ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _lse, grad_entropy, _unit):
        x, weight, target, lse, loss, unit = ctx.saved_tensors
        if not ctx.has_entropy:
            grad_entropy = None
        if grad_loss is None:
            grad_loss = torch.zeros_like(loss)
        need_dx, need_dw, *_ = ctx.needs_input_grad
        dx, dw = linear_softmax_backward(
            grad_loss.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            x,
            weight,
            target,
            lse,
            loss,
            unit,
            ctx.main_grad if need_dw else None,
            *ctx.softmax,
            need_dx,
            need_dw,
            ctx.backward_rows,
        )
        return dx if need_dx else None, dw if need_dw and ctx.main_grad is None else None, *[None] * 7


class _TotalLoss(torch.autograd.Function):
    """The sum of the rows' losses, with its gradients made in the forward."""

    @staticmethod
    def forward(x, weight, target, main_grad, softmax, need_dx, need_dw, chunk_rows):
        ones = x.new_ones(x.shape[0], dtype=wide_dtype(x.dtype))
        loss, dx, dw = linear_softmax_gradients(x, weight, target, ones, *softmax, need_dx, need_dw, chunk_rows)
        return loss.sum(), dx, dw

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.dtype, ctx.main_grad, ctx.need_dx, ctx.need_dw = inputs[1].dtype, inputs[3], *inputs[5:7]
        _, dx, dw = output
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(dx, dw)
        if not torch.compiler.is_compiling():  # which lacks it; otherwise zeros as large as dW would be made
            ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _dx, _dw):
        if grad is None:  # of a loss that nothing depends on
            return (None,) * 8
        dx, dw = ctx.saved_tensors
        if ctx.need_dw and ctx.main_grad is not None:
            ctx.main_grad.addcmul_(dw, grad)
        scaled = None
        if ctx.need_dw and ctx.main_grad is None:
            scaled = dw.new_empty(dw.shape, dtype=ctx.dtype)
            for part, out in zip(dw.chunk(16), scaled.chunk(16)):  # torch rounds from a temporary of the wide dtype
                torch.mul(part, grad, out=out)
        return (dx * grad).to(dx.dtype) if ctx.need_dx else None, scaled, *[None] * 6


def _made_again(x: Tensor, softmax: Softmax) -> bool:
    """Whether bf16 logits on the CPU are rather made again in the cache, tile by tile, than their gradients kept."""
    plain = softmax == Softmax(softmax.temperature)
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.dtype in TILED and plain and x.shape[1] < NARROW


def row_losses(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    softmax: Softmax,
    *,
    entropy: bool = False,
    chunk_bytes: int,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses [N] of all rows, and their entropies if asked for.

    U is kept if it fits into `chunk_bytes`, but for narrow rows in bf16 on the CPU.
    """
    keep, forward_rows, backward_rows = plan(x.shape[0], weight.shape[0], weight.dtype, chunk_bytes)
    keep = keep and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    keep = keep and not _made_again(x, softmax)
    options = (main_grad, softmax, entropy, keep, forward_rows, backward_rows)
    loss, _, entropies, _ = _RowLosses.apply(x.contiguous(), weight, target, *options)
    return loss, entropies


def total_loss(
    x: Tensor, weight: Tensor, target: Tensor, softmax: Softmax, *, chunk_bytes: int, main_grad: Tensor | None
) -> Tensor:
    """The sum of all rows' losses, with gradients made in the forward, chunk by chunk of rows.

    Not so on CUDA if U fits into `chunk_bytes`: one product for dW is faster than a sum over chunks. Nor on the CPU in
    fp32, where making U again in the cache costs little time and saves the fp32 dW between forward and backward, and in
    bf16 for narrow rows or if that dW does not fit into `chunk_bytes`.
    """
    by_rows, _, backward_rows = plan(x.shape[0], weight.shape[0], weight.dtype, chunk_bytes)
    if x.device.type == "cpu":
        tiled = x.dtype in TILED and softmax == Softmax(softmax.temperature)
        by_rows = tiled and (x.dtype == torch.float32 or _made_again(x, softmax) or weight.numel() * 4 > chunk_bytes)
    if by_rows or not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return row_losses(x, weight, target, softmax, chunk_bytes=chunk_bytes, main_grad=main_grad)[0].sum()
    options = (main_grad, softmax, x.requires_grad, weight.requires_grad, backward_rows)
    return _TotalLoss.apply(x.contiguous(), weight, target, *options)[0]


def reference_losses(
    x: Tensor, weight: Tensor, target: Tensor, softmax: Softmax, main_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`row_losses` by plain torch under autograd, with all of the log-probabilities in memory."""
    wide, eps = wide_dtype(x.dtype), softmax.label_smoothing
    if main_grad is not None:
        weight = IntoMainGrad.apply(weight, main_grad)
    z = x.to(wide) @ weight.to(wide).t()
    if softmax.softcap:
        z = softmax.softcap * torch.tanh(z / softmax.softcap)
    z = z / softmax.temperature
    log_p, lse = torch.log_softmax(z, dim=1), torch.logsumexp(z, dim=1)
    log_p_y = log_p.gather(1, target[:, None]).squeeze(1)
    loss = -(1 - eps) * log_p_y - eps * log_p.mean(1) + softmax.z_loss * lse**2
    return loss, -(log_p.exp() * log_p).sum(1)


def check(
    x: Tensor, weight: Tensor, target: Tensor, softmax: Softmax, chunk_bytes: int, main_grad: Tensor | None
) -> None:
    """Raises ValueError with the argument's name and value; looks at no data."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or not weight.shape[0]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"x must be [N, D] and weight [V, D] with the same D and V > 0, got {shapes}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x and weight must have one floating dtype, got {x.dtype} and {weight.dtype}")
    if target.shape != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 of shape {tuple(x.shape[:1])}, got {target.dtype} {tuple(target.shape)}"
        )
    if x.device != weight.device or target.device not in (x.device, torch.device("cpu")):
        devices = f"{x.device}, {weight.device} and {target.device}"
        raise ValueError(f"x, weight and target (unless it is on the CPU) must be on one device, got {devices}")
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {weight.stride()} for shape {tuple(weight.shape)}")
    if not 0 < softmax.temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {softmax.temperature}")
    if not 0 <= softmax.softcap < math.inf:
        raise ValueError(f"softcap must be 0 (none) or positive and finite, got {softmax.softcap}")
    if not 0 <= softmax.label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {softmax.label_smoothing}")
    if not 0 <= softmax.z_loss < math.inf:
        raise ValueError(f"z_loss must be at least 0 and finite, got {softmax.z_loss}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    wide = wide_dtype(weight.dtype)
    if main_grad is not None and (
        main_grad.shape != weight.shape
        or main_grad.dtype != wide
        or main_grad.device != weight.device
        or not main_grad.is_contiguous()
        or main_grad.requires_grad
    ):
        raise ValueError(
            f"main_grad must be a contiguous {wide} {tuple(weight.shape)} on {weight.device} without requires_grad, "
            f"got {main_grad.dtype} {tuple(main_grad.shape)}, strides {main_grad.stride()}, on {main_grad.device}, "
            f"requires_grad={main_grad.requires_grad}"
        )


def check_range(target: Tensor, n_cols: int, on_any_device: bool) -> None:
    """Raises ValueError if a target lies outside [0, n_cols); looks on the CPU only, or waits for the device."""
    if target.numel() and not torch.compiler.is_compiling() and (on_any_device or target.device.type == "cpu"):
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= n_cols:
            raise ValueError(f"targets must lie in [0, {n_cols}), got {low} to {high}")
