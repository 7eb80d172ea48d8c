"""Log-probabilities of target tokens straight from hidden states, without keeping log-softmax rows.

    logp[n] = (x[n] . weight[target[n]]) - logsumexp_v(x[n] . weight[v])

The forward keeps the unit gradients U = onehot(target) - softmax(logits) in place of the logits; the backward, for any
upstream gradient g [N], is two matrix products: dX = g (.) (U W) and dW = U^T (g (.) X). That is 6 N D V FLOPs in all.
Past the byte budget a chunk's U is recomputed in the backward (8 N D V).
"""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_BUDGET_BYTES = 2 << 30


def _unit_gradients(x: Tensor, weight: Tensor, target: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """fp32 statistics of one chunk: log-probs [n] and, if kept, U [n, V] in the weight's dtype."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    logits = torch.mm(x.to(accumulate), weight.to(accumulate).t())
    row_max = logits.amax(dim=1, keepdim=True)
    target_logit = logits.gather(1, target[:, None])
    logits.sub_(row_max).exp_()
    total = logits.sum(dim=1, keepdim=True)
    logp = (target_logit - row_max - total.log()).squeeze(1)
    if not keep:
        return logp, None
    unit = logits.div_(total).neg_()
    unit.scatter_(1, target[:, None], -torch.expm1(logp)[:, None])
    return logp, unit.to(weight.dtype)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, budget_bytes: int) -> Tensor:
        needs_grad = x.requires_grad or weight.requires_grad
        row_bytes = weight.shape[0] * max(4, weight.element_size())
        rows = max(1, budget_bytes // row_bytes)
        keep = needs_grad and x.shape[0] <= rows
        logps, ctx.unit, ctx.rows = [], None, rows
        for start in range(0, x.shape[0], rows):
            logp, ctx.unit = _unit_gradients(x[start : start + rows], weight, target[start : start + rows], keep=keep)
            logps.append(logp)
        ctx.save_for_backward(x, weight, target)
        return torch.cat(logps) if logps else x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, target = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, x.shape[0], ctx.rows):
            rows = slice(start, start + ctx.rows)
            unit = ctx.unit
            if unit is None:
                unit = _unit_gradients(x[rows], weight, target[rows], keep=True)[1]
            g = grad[rows, None]
            if dx is not None:
                dx[rows] = (torch.mm(unit, weight) * g).to(x.dtype)
            if dw is not None:
                dw.addmm_(unit.t().to(dw.dtype), (x[rows] * g).to(dw.dtype))
        return dx, None if dw is None else dw.to(weight.dtype), None, None


def linear_logprob(x: Tensor, weight: Tensor, target: Tensor, *, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> Tensor:
    """Log-probability of each target under softmax(x weight^T).

    Args:
        x: [N, D] hidden states that predict the targets.
        weight: [V, D] output embedding, x's dtype.
        target: int64 [N] in [0, V).
        budget_bytes: largest size of the kept unit gradients; above it they are recomputed in the backward.

    Returns:
        [N] in fp32 (fp64 for fp64 input), differentiable in x and weight.

    Raises:
        ValueError: on a wrong shape or dtype, or (on the CPU) a target outside [0, V).
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [N, D] and weight [V, D] with the same D, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if target.shape != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 of shape {tuple(x.shape[:1])}, got {target.dtype} {tuple(target.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    if (
        target.device.type == "cpu"
        and target.numel()
        and not 0 <= int(target.min()) <= int(target.max()) < weight.shape[0]
    ):
        raise ValueError(f"targets must lie in [0, {weight.shape[0]}), got {int(target.min())} to {int(target.max())}")
    return _LinearLogprob.apply(x, weight, target, budget_bytes)
