"""Cross-entropy of target tokens straight from hidden states: the losses of kernels/linear_softmax.py, reduced.

    loss[n] = -(1 - eps) log p[n, y_n] - eps / V sum_j log p[n, j] + z_loss lse[n]^2        p = softmax(z)
    z = softcap tanh(x W^T / softcap) / temperature        lse[n] = logsumexp_v z[n, v]

Rows that do not count are left out before the products (compaction), not masked after them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srlm_fast.kernels import library
from srlm_fast.kernels.head_losses import check, check_range, reference_losses, row_losses, total_loss
from srlm_fast.kernels.linear_softmax import default_chunk_bytes
from srlm_fast.kernels.softmax_rows import Softmax

REDUCTIONS = ("mean", "sum", "none")


class _TakeRows(torch.autograd.Function):
    """x[rows] for distinct rows; the backward copies, where index_select's would add by atomics."""

    @staticmethod
    def forward(x, rows):
        return x.index_select(0, rows)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, rows = inputs
        ctx.n_rows = x.shape[0]
        ctx.save_for_backward(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.n_rows, grad.shape[1]).index_copy_(0, rows, grad), None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    temperature: float = 1.0,
    softcap: float = 0.0,
    rows: Tensor | None = None,
    chunk_bytes: int | None = None,
    main_grad: Tensor | None = None,
    check_targets: bool = False,
) -> Tensor:
    """Cross-entropy with softmax(z), z as in the module's formula; differentiable in x and weight.

    While U fits into `chunk_bytes` it is kept for the backward, as in `linear_logprob`. Past it the gradients of a mean
    or sum are made in the forward chunk by chunk (no product is done twice), and `reduction="none"` makes U again.

    Args:
        x: [N, D] hidden states that predict the targets.
        weight: [V, D] output embedding, x's dtype, contiguous.
        target: int64 [N] in [0, V), or `ignore_index` in rows that do not count.
        ignore_index: as for `torch.nn.functional.cross_entropy`.
        label_smoothing: eps, the weight of the uniform distribution in the target (arXiv:1512.00567).
        z_loss: weight of lse^2, which keeps logits small (PaLM, arXiv:2204.02311; 1e-4 there).
        reduction: "mean" over the rows that count (0 if there are none), "sum", or "none".
        temperature: divides the (capped) logits.
        softcap: bound of the logits' absolute values, 0 for none (Gemma 2, arXiv:2408.00118).
        rows: int64, the distinct rows that count, in place of a look at `ignore_index`; made where the batch is packed
            it spares the one wait for the device that finding them among targets on a GPU costs.
        chunk_bytes: largest kept U, and largest logits and U of a chunk; None: 128 MiB on the CPU, else 2 GiB.
        main_grad: fp32 (fp64) [V, D] that the weight's gradient is added to; autograd then gives the weight none.
        check_targets: look for targets out of range on a GPU too, which waits for it. Unnoticed they give NaN.

    Returns:
        A scalar, or [N] with zeros in rows that do not count; fp32 (fp64 for fp64 input).

    Raises:
        ValueError: on a wrong shape, dtype, device or value, or (on the CPU) a target outside [0, V).
    """
    chunk_bytes = default_chunk_bytes(x.device) if chunk_bytes is None else chunk_bytes
    softmax = Softmax(temperature, softcap, label_smoothing, z_loss)
    check(x, weight, target, softmax, chunk_bytes, main_grad)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows must be int64 [n], got {rows.dtype} {tuple(rows.shape)}")
    if rows is None:
        rows = torch.nonzero(target != ignore_index).squeeze(1)
    n_rows, count = x.shape[0], rows.shape[0]
    if count < n_rows:
        target = target.index_select(0, rows.to(target.device, non_blocking=True))
        rows = rows.to(x.device, non_blocking=True)
        x = _TakeRows.apply(x, rows)
    check_range(target, weight.shape[0], check_targets)
    target = target.to(x.device, non_blocking=True)
    options = {"chunk_bytes": chunk_bytes, "main_grad": main_grad}
    if not library.fused():
        losses, _ = reference_losses(x, weight, target, softmax, main_grad)
    elif reduction == "none":
        losses, _ = row_losses(x, weight, target, softmax, **options)
    else:
        losses = total_loss(x, weight, target, softmax, **options)
    if reduction == "none":
        if count == n_rows:
            return losses
        return losses.new_zeros(n_rows).index_copy(0, rows, losses)
    total = losses.sum()
    return total / max(count, 1) if reduction == "mean" else total
