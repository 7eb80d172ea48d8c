"""A linear layer without bias, y = x W^T, for the CPU.

    dX = dY W        dW = dY^T X

torch multiplies fp32 matrices on the CPU with MKL, which uses half of what an AMD processor can do; the block kernels
of oneDNN that torch also holds use all of it (csrc/blocked_products.cpp). A row of the result depends on the same row
of x alone, to the last bit, whatever the number of rows and of threads. Elsewhere, and in other dtypes, torch's own
products are as fast as can be, and `linear` is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.kernels import library


def _forward_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _backward_torch(grad: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor]:
    dx = grad @ weight if need_dx else x.new_empty(0, x.shape[1])
    dw = grad.t() @ x if need_dw else weight.new_empty(0, weight.shape[1])
    return dx, dw


_backward_op = library.define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
    fake=lambda grad, x, weight, need_dx, need_dw: (
        x.new_empty(x.shape[0] if need_dx else 0, x.shape[1]),
        weight.new_empty(weight.shape[0] if need_dw else 0, weight.shape[1]),
    ),
    torch_impl=_backward_torch,
    triton_impl=_backward_torch,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    need_dx, need_dw = ctx.needs_input_grad
    dx, dw = _backward_op(grad.contiguous(), *ctx.saved_tensors, need_dx, need_dw)
    return dx if need_dx else None, dw if need_dw else None


_forward_op = library.define(
    "linear(Tensor x, Tensor weight) -> Tensor",
    fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
    torch_impl=_forward_torch,
    triton_impl=_forward_torch,
    setup_context=_setup_context,
    backward=_backward,
)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T.

    Args:
        x: [T, in] floating.
        weight: [out, in] of x's dtype.

    Returns:
        [T, out] in x's dtype.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [T, in] and weight [out, in], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"x and weight must be alike, got {x.dtype} on {x.device} and {weight.dtype} on {weight.device}"
        )
    if x.device.type != "cpu" or x.dtype != torch.float32 or not library.fused():
        return F.linear(x, weight)
    return _forward_op(x.contiguous(), weight.contiguous())
