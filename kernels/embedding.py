"""Rows of an embedding, whose gradient can be added to what is there.

    y_t = weight[id_t]        d_weight[v] = sum of dy_t over t with id_t = v

As a tensor of its own the gradient would be as large as the weight, zeros but for the few rows of a micro-batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _IntoMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.main_grad = main_grad
        return weight.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        ctx.main_grad.index_add_(0, *ctx.saved_tensors, grad.to(ctx.main_grad.dtype))
        return None, None, None


def embedding(ids: Tensor, weight: Tensor, *, main_grad: Tensor | None = None) -> Tensor:
    """weight[ids].

    Args:
        ids: int64 [T].
        weight: [V, D].
        main_grad: [V, D] that the weight's gradient is added to; autograd then gives the weight none.

    Returns:
        [T, D] in the weight's dtype.
    """
    if main_grad is None:
        return F.embedding(ids, weight)
    return _IntoMainGrad.apply(ids, weight, main_grad)
