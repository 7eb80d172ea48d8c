"""Row losses where every rank holds a slice of the output embedding's rows.

A rank's statistics of its slice of a row (maximum, sum of exponentials, the target's logit, the entropy's sum) are
gathered from all ranks and merged by each in the order of ranks, so all have the same results to the bit. The gradient
of the logits then needs no more communication; that of x is summed over the ranks. kernels/softmax_slices.py has the
formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from srlm_fast.kernels.linear_softmax import chunks, multiply, plan, wide_dtype
from srlm_fast.kernels.softmax_rows import Softmax, padded_rows
from srlm_fast.kernels.softmax_slices import finish, gradient, merge, statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def slice_of_vocabulary(weight: Tensor, group: ProcessGroup, vocab_size: int | None) -> tuple[int, int]:
    """Which rows of the whole vocabulary this rank's `weight` holds.

    Returns:
        (start, most): the first row, and the number of rows of every rank but the last, ceil(vocab_size / ranks).

    Raises:
        ValueError: if `vocab_size` is missing or too small for the ranks, or `weight` has not this rank's rows.
    """
    n_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    most = -(-(vocab_size or 0) // n_ranks)
    if vocab_size is None or vocab_size <= (n_ranks - 1) * most:
        raise ValueError(f"vocab_size must be given with group and leave no rank empty, got {vocab_size}")
    start, stop = rank * most, min((rank + 1) * most, vocab_size)
    if weight.shape[0] != stop - start:
        raise ValueError(
            f"weight of rank {rank} must hold rows {start} to {stop} of vocab_size {vocab_size}, "
            f"got {weight.shape[0]} rows"
        )
    return start, most


class _SlicedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, main_grad, softmax, keep, forward_rows, backward_rows, group):
        wide, n_cols = wide_dtype(x.dtype), weight.shape[0]
        numbers = x.new_empty(x.shape[0], 4, dtype=wide)
        unit = padded_rows(x.shape[0] if keep else 0, n_cols, weight.dtype, x.device)
        for part in chunks(x.shape[0], forward_rows):
            in_place = keep and unit.dtype == wide
            logits = unit[part] if in_place else padded_rows(part.stop - part.start, n_cols, wide, x.device)
            multiply(x[part], weight.t(), logits)
            own = statistics(logits, target[part], softmax.temperature, softmax.softcap)
            of_all = own.new_empty(dist.get_world_size(group), *own.shape)
            dist.all_gather_into_tensor(of_all.view(-1, 4), own, group=group)
            numbers[part] = merge(of_all)
            if keep:
                terms = finish(numbers[part], softmax, n_cols).terms
                gradient(logits, target[part], terms, unit[part], softmax.temperature, softmax.softcap)
        ctx.save_for_backward(x, weight, target, numbers, unit)
        ctx.main_grad, ctx.softmax, ctx.rows, ctx.group = main_grad, softmax, backward_rows, group
        ctx.set_materialize_grads(False)
        results = finish(numbers, softmax, n_cols)
        return results.loss, results.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, grad_entropy):
        x, weight, target, numbers, unit = ctx.saved_tensors
        need_dx, need_dw, *_ = ctx.needs_input_grad
        kept = unit.shape[0] > 0 and grad_entropy is None
        g = torch.zeros_like(numbers[:, 0]) if grad_loss is None else grad_loss
        dx = numbers.new_empty(x.shape) if need_dx else None
        dw = None
        if need_dw:
            dw = numbers.new_zeros(weight.shape) if ctx.main_grad is None else ctx.main_grad
        reductions = []
        for part, part_unit, factor in _units(ctx, kept, g, grad_entropy):
            if dx is not None:
                multiply(part_unit, weight, dx[part])
                dx[part] *= factor
                reductions.append(dist.all_reduce(dx[part], group=ctx.group, async_op=True))
            if dw is not None:  # while dX travels
                multiply(part_unit.t(), (x[part] * factor).to(x.dtype), dw, accumulate=True)
        for reduction in reductions:
            reduction.wait()
        return (
            None if dx is None else dx.to(x.dtype),
            None if dw is None or ctx.main_grad is not None else dw.to(weight.dtype),
            *[None] * 7,
        )


def _units(
    ctx, kept: bool, grad_loss: Tensor, grad_entropy: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
    """Chunks of rows with their U, and what is still to be multiplied to the rows."""
    x, weight, target, numbers, unit = ctx.saved_tensors
    if kept:
        yield slice(0, x.shape[0]), unit, grad_loss[:, None]
        return
    for part in chunks(x.shape[0], ctx.rows):
        logits = padded_rows(part.stop - part.start, weight.shape[0], numbers.dtype, x.device)
        part_unit = logits if weight.dtype == numbers.dtype else padded_rows(*logits.shape, weight.dtype, x.device)
        multiply(x[part], weight.t(), logits)
        upstream = {"coefficient": grad_loss[part]}
        if grad_entropy is not None:
            upstream["grad_entropy"] = grad_entropy[part]
        terms = finish(numbers[part], ctx.softmax, weight.shape[0], **upstream).terms
        gradient(logits, target[part], terms, part_unit, ctx.softmax.temperature, ctx.softmax.softcap)
        yield part, part_unit, 1.0


def sliced_losses(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    softmax: Softmax,
    *,
    most: int,
    chunk_bytes: int,
    main_grad: Tensor | None,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Losses and entropies [N] of all rows, the same to the bit on all ranks.

    Args:
        x: [N, D], the same on all ranks.
        weight: this rank's rows of the output embedding.
        target: int64 [N], relative to the first of them; elsewhere the target is another rank's.
        softmax: temperature and softcap.
        most: from `slice_of_vocabulary`; all ranks plan by it, and so make the same chunks.
        chunk_bytes, main_grad, group: as for `linear_logprob`.
    """
    keep, forward_rows, backward_rows = plan(x.shape[0], most, weight.dtype, chunk_bytes)
    keep = keep and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    options = (main_grad, softmax, keep, forward_rows, backward_rows, group)
    return _SlicedLosses.apply(x.contiguous(), weight, target, *options)
