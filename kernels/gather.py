"""Row gather whose backward is a gather too: deterministic, without atomics."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_uses(index: Tensor, n_rows: int) -> Tensor:
    """Where each row of the source went.

    Args:
        index: int64 [M] on the CPU; entry m says which source row output row m takes, or -1 for padding.
        n_rows: T, rows of the source.

    Returns:
        int64 [T, U] with U the largest number of uses; unused places hold M, the index of a row of zeros.
    """
    position = torch.nonzero(index >= 0).squeeze(1)
    source = index[position]
    order = torch.argsort(source, stable=True)
    source, position = source[order], position[order]
    counts = torch.bincount(source, minlength=n_rows)
    first = torch.cumsum(counts, 0) - counts
    nth_use = torch.arange(len(source)) - first[source]
    uses = torch.full((n_rows, max(1, int(counts.max()) if n_rows else 1)), len(index), dtype=torch.int64)
    uses[source, nth_use] = position
    return uses


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, uses: Tensor) -> Tensor:
        ctx.save_for_backward(uses)
        return x.index_select(0, index.clamp_min(0))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (uses,) = ctx.saved_tensors
        flat = grad.reshape(grad.shape[0], -1)
        padded = torch.cat((flat, flat.new_zeros(1, flat.shape[1])))
        out = padded.index_select(0, uses[:, 0])
        for use in range(1, uses.shape[1]):
            out += padded.index_select(0, uses[:, use])
        return out.view(uses.shape[0], *grad.shape[1:]), None, None


def gather_rows(x: Tensor, index: Tensor, uses: Tensor) -> Tensor:
    """`x[index]` along dim 0, with -1 for rows whose content does not matter.

    Args:
        x: [T, ...] floating.
        index: int64 [M], as given to `inverse_uses`.
        uses: int64 [T, U] from `inverse_uses(index, T)`, on x's device.

    Returns:
        [M, ...]. The gradient of a source row is the sum over its uses in a fixed order (bitwise repeatable).
    """
    return _GatherRows.apply(x, index, uses)
