"""A linear layer without bias, y = x W^T, for the CPU.

    dX = dY W        dW = dY^T X        or, with `main_grad`,    main_grad += dY^T X

torch multiplies fp32 matrices on the CPU with MKL, which uses half of what an AMD processor can do; the block kernels
of oneDNN that torch also holds use all of it (csrc/blocked_products.cpp). A row of the result depends on the same row
of x alone, to the last bit, whatever the number of rows and of threads. Elsewhere, and in other dtypes, torch's own
products are as fast as can be, and `linear` is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from srlm_fast.kernels import library


def _forward_torch(x: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
    return F.linear(x, weight)


def _backward_torch(
    grad: Tensor, x: Tensor, weight: Tensor, main_grad: Tensor | None, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dx, dw = _backward_fake(grad, x, weight, main_grad, need_dx, need_dw)
    if need_dx:
        torch.mm(grad, weight, out=dx)
    if need_dw and main_grad is None:
        torch.mm(grad.t(), x, out=dw)
    elif need_dw:
        main_grad.addmm_(grad.t(), x)
    return dx, dw


def _backward_fake(grad, x, weight, main_grad, need_dx, need_dw) -> tuple[Tensor, Tensor]:
    give_dw = need_dw and main_grad is None
    dx = x.new_empty(x.shape[0] if need_dx else 0, x.shape[1])
    return dx, weight.new_empty(weight.shape[0] if give_dw else 0, weight.shape[1])


_backward_op = library.define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor(a!)? main_grad, bool need_dx, bool need_dw) "
    "-> (Tensor dx, Tensor dw)",
    fake=_backward_fake,
    torch_impl=_backward_torch,
    triton_impl=_backward_torch,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, ctx.main_grad = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    need_dx, need_dw, _ = ctx.needs_input_grad
    dx, dw = _backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.main_grad if need_dw else None, need_dx, need_dw)
    return dx if need_dx else None, dw if need_dw and ctx.main_grad is None else None, None


_forward_op = library.define(
    "linear(Tensor x, Tensor weight, Tensor? main_grad) -> Tensor",
    fake=lambda x, weight, main_grad: x.new_empty(x.shape[0], weight.shape[0]),
    torch_impl=_forward_torch,
    triton_impl=_forward_torch,
    setup_context=_setup_context,
    backward=_backward,
)


class IntoMainGrad(torch.autograd.Function):
    """The identity, whose gradient is added to `main_grad` instead of going on."""

    @staticmethod
    def forward(ctx, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        ctx.main_grad += grad
        return None, None


def linear(x: Tensor, weight: Tensor, *, main_grad: Tensor | None = None) -> Tensor:
    """x weight^T.

    Args:
        x: [T, in] floating.
        weight: [out, in] of x's dtype.
        main_grad: of weight's shape and dtype, contiguous; the weight's gradient is added to it, and autograd then
            gives the weight none.

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
        return F.linear(x, weight if main_grad is None else IntoMainGrad.apply(weight, main_grad))
    return _forward_op(x.contiguous(), weight.contiguous(), main_grad)
