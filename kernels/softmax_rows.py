"""Rows of logits to losses, and to the gradients of these losses, with all statistics in fp32 (or fp64).

    z = softcap tanh(raw / softcap) / temperature        p = softmax(z)        lse = logsumexp(z)
    loss = -(1 - eps) log p_y - eps / V sum_j log p_j + z_loss lse^2        entropy = -sum_j p_j log p_j
    U_j = d(c loss + h entropy) / d raw_j
        = [p_j (a - h (log p_j + entropy)) - b - c (1 - eps) (j = y)] (1 - tanh^2(raw_j / softcap)) / temperature
    where a = c (1 + 2 z_loss lse) and b = c eps / V

The sum of exponentials is kept as the target's term and that of the others, so that p_y - 1 = -others / sum keeps its
relative accuracy as p_y goes to 1; U_y is made from it and rounded once.

`triton_rows` does all of it in one launch; kernels/softmax_slices.py has it in plain torch, and for slices of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srlm_fast.kernels.triton_helpers import exp, store, tanh, tl, triton

ALIGNMENT = 64
"""Rows lie a multiple of this many columns apart, for 16-byte accesses whatever the vocabulary's size."""

PAD = tl.constexpr(ALIGNMENT)

LOWEST = tl.constexpr(-1e30)
"""Where a running maximum starts, and z beyond a row's end: e^(z - max) is 0 there, and so are its multiples."""


class Softmax(NamedTuple):
    """What turns raw logits into a loss, see the module's formulas."""

    temperature: float = 1.0
    softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@triton.jit
def padded(n_cols):
    return tl.cdiv(n_cols, PAD) * PAD


@triton.jit
def log1p(x):
    """log(1 + x) to rounding, for x >= 0."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def cap(raw, scale, softcap, SOFTCAP: tl.constexpr):
    """z, and dz / d raw."""
    if SOFTCAP:
        t = tanh(raw / softcap)
        return softcap * t * scale, scale * (1 - t * t)
    else:
        return raw * scale, scale


@triton.jit
def load_row(row, cols, n_cols, scale, softcap, SOFTCAP: tl.constexpr, EVICT: tl.constexpr):
    """z of a block, LOWEST beyond the row's end, and dz / d raw. The padding is read too: vectors need no mask then."""
    raw = tl.load(row + cols, mask=cols < padded(n_cols), other=0.0, eviction_policy=EVICT).to(tl.float32)
    z, slope = cap(raw, scale, softcap, SOFTCAP)
    return tl.where(cols < n_cols, z, LOWEST), slope


@triton.jit
def load_target(row, y, n_cols, scale, softcap, absent, SOFTCAP: tl.constexpr):
    """z of the target, or `absent` where it is no column of this row, and dz / d raw."""
    inside = (y >= 0) & (y < n_cols)
    z, slope = cap(tl.load(row + y, mask=inside, other=0.0).to(tl.float32), scale, softcap, SOFTCAP)
    return tl.where(inside, z, absent), slope


@triton.jit
def absorb(z, cols, y, n_cols, row_max, others, weighted, total, WEIGHTED: tl.constexpr, TOTAL: tl.constexpr):
    """Adds a block to max z, sum_{j != y} e^(z_j - max), sum_{j != y} e^(z_j - max) (z_j - max) and sum_j z_j."""
    new_max = tl.maximum(row_max, tl.max(z, 0))
    rescale = exp(row_max - new_max)
    e = tl.where(cols == y, 0.0, exp(z - new_max))
    if WEIGHTED:
        weighted = rescale * (weighted + others * (row_max - new_max)) + tl.sum(e * (z - new_max), 0)
    if TOTAL:
        total += tl.sum(tl.where(cols < n_cols, z, 0.0), 0)
    return new_max, rescale * others + tl.sum(e, 0), weighted, total


@triton.jit
def unit_gradient(z, row_max, log_sum, a, b, h, entropy, ENTROPY: tl.constexpr):
    """U of a block without the target's entry and without dz / d raw."""
    log_p = z - row_max - log_sum
    if ENTROPY:
        return exp(log_p) * (a - h * (log_p + entropy)) - b
    else:
        return exp(log_p) * a - b


@triton.jit
def rows_kernel(
    logits,
    target,
    unit,
    loss,
    lse,
    entropy,
    coefficient,
    grad_entropy,
    n_cols,
    logits_stride,
    unit_stride,
    scale,
    softcap,
    smoothing,
    z_loss,
    SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row; results that are None are not wanted. `unit` may be `logits`. A bad target gives NaN."""
    n = tl.program_id(0).to(tl.int64)
    row, y, cols = logits + n * logits_stride, tl.load(target + n), tl.arange(0, BLOCK)
    z_y, slope_y = load_target(row, y, n_cols, scale, softcap, float("nan"), SOFTCAP)
    ENTROPY_GRADIENT: tl.constexpr = grad_entropy is not None
    WEIGHTED: tl.constexpr = entropy is not None or grad_entropy is not None
    m, others, weighted, total = tl.full((), LOWEST, tl.float32), 0.0, 0.0, 0.0
    if ONE_BLOCK:
        z, slope = load_row(row, cols, n_cols, scale, softcap, SOFTCAP, "evict_first")
        m, others, weighted, total = absorb(z, cols, y, n_cols, m, others, weighted, total, WEIGHTED, SMOOTHED)
    else:
        for i in range(0, n_cols, BLOCK):
            z, slope = load_row(row, i + cols, n_cols, scale, softcap, SOFTCAP, "evict_last")
            m, others, weighted, total = absorb(z, i + cols, y, n_cols, m, others, weighted, total, WEIGHTED, SMOOTHED)
    e_y = exp(z_y - m)
    p_y = e_y / (others + e_y)
    log_sum = log1p(others + (e_y - 1))
    log_p_y, log_z = z_y - m - log_sum, m + log_sum
    row_entropy = log_sum - (weighted + e_y * (z_y - m)) / (others + e_y)
    if loss is not None:
        smooth = smoothing * (total / n_cols - log_z)
        tl.store(loss + n, z_loss * log_z * log_z - (1 - smoothing) * log_p_y - smooth)
    if lse is not None:
        tl.store(lse + n, log_z)
    if entropy is not None:
        tl.store(entropy + n, row_entropy)
    if unit is not None:
        c, h, out = 1.0, 0.0, unit + n * unit_stride
        if coefficient is not None:
            c = tl.load(coefficient + n)
        if ENTROPY_GRADIENT:
            h = tl.load(grad_entropy + n)
        a, b = c * (1 + 2 * z_loss * log_z), c * smoothing / n_cols
        u_y = c * (2 * z_loss * log_z * p_y + smoothing - others / (others + e_y)) - b
        u_y = (u_y - h * p_y * (log_p_y + row_entropy)) * slope_y
        if ONE_BLOCK:
            u = unit_gradient(z, m, log_sum, a, b, h, row_entropy, ENTROPY_GRADIENT) * slope
            store(out + cols, tl.where(cols == y, u_y, u), cols < padded(n_cols))
        else:
            for back in range(0, n_cols, BLOCK):  # last block first: the L2 cache still has it
                i = (n_cols - 1) // BLOCK * BLOCK - back
                z, slope = load_row(row, i + cols, n_cols, scale, softcap, SOFTCAP, "evict_first")
                u = unit_gradient(z, m, log_sum, a, b, h, row_entropy, ENTROPY_GRADIENT) * slope
                store(out + i + cols, tl.where(i + cols == y, u_y, u), i + cols < padded(n_cols))


def config(n_cols: int, plain: bool) -> dict:
    """How `rows_kernel` goes over a row: at once where its registers hold it, else reading it twice.

    Args:
        n_cols: V.
        plain: whether nothing else takes registers: U as wide as the logits, the entropy or its gradient,
            soft-capping, label smoothing.
    """
    longest = 32768 if plain else 8192
    if n_cols <= longest:
        block = max(ALIGNMENT, 1 << (n_cols - 1).bit_length())
        return {"ONE_BLOCK": True, "BLOCK": block, "num_warps": min(16, max(4, block // 1024))}
    return {"ONE_BLOCK": False, "BLOCK": 16384 if plain else 8192, "num_warps": 16}


def padded_rows(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [n_rows, n_cols], the rows ALIGNMENT columns or a multiple of it apart."""
    width = -(-n_cols // ALIGNMENT) * ALIGNMENT
    return torch.empty(n_rows, width, dtype=dtype, device=device)[:, :n_cols]


def triton_rows(
    logits: Tensor,
    target: Tensor,
    softmax: Softmax,
    *,
    unit: Tensor | None = None,
    loss: Tensor | None = None,
    lse: Tensor | None = None,
    entropy: Tensor | None = None,
    coefficient: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> None:
    """Losses of rows and their gradients, in one launch.

    Args:
        logits: [n, V] in fp32, the raw products, made by `padded_rows`; garbage afterwards if it is `unit` too.
        target: int64 [n].
        softmax: the loss.
        unit: takes U, [n, V] of any dtype, made by `padded_rows`; may be `logits`.
        loss, lse, entropy: take the rows' values, [n] in fp32.
        coefficient, grad_entropy: c and h of U, fp32 [n]; 1 and 0 if None.
    """
    n_rows, n_cols = logits.shape
    narrow = unit is None or unit.dtype != logits.dtype
    plain = narrow and entropy is grad_entropy is None and not softmax.softcap and not softmax.label_smoothing
    if n_rows:
        rows_kernel[(n_rows,)](
            logits,
            target,
            unit,
            loss,
            lse,
            entropy,
            coefficient,
            grad_entropy,
            n_cols,
            logits.stride(0),
            0 if unit is None else unit.stride(0),
            1 / softmax.temperature,
            softmax.softcap,
            softmax.label_smoothing,
            softmax.z_loss,
            SOFTCAP=softmax.softcap > 0,
            SMOOTHED=softmax.label_smoothing > 0,
            **config(n_cols, plain),
        )


def compile_cases() -> None:
    """The launches that bench/compile_report.py compiles."""
    row, target = torch.empty(8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    smooth, capped = Softmax(label_smoothing=0.1, z_loss=1e-4), Softmax(temperature=0.7, softcap=30.0)
    for n_cols in (4096, 32000, 32001, 128256):
        logits = padded_rows(8, n_cols, torch.float32, row.device)
        unit = padded_rows(8, n_cols, torch.bfloat16, row.device)
        triton_rows(logits, target, Softmax(), unit=unit, loss=row, lse=row)
        triton_rows(logits, target, Softmax(), unit=logits, loss=row, coefficient=row)
        triton_rows(logits, target, Softmax(), loss=row, lse=row, entropy=row)
        triton_rows(logits, target, Softmax(), unit=unit, loss=row, lse=row, entropy=row)
        if n_cols in (4096, 32000):
            triton_rows(logits, target, smooth, unit=unit, loss=row, lse=row)
            triton_rows(logits, target, capped, unit=unit, coefficient=row, grad_entropy=row)
