"""Softmax rows in two passes, so that a row may be spread over several devices; and whole rows in plain torch.

`statistics` sums up a slice of every row, `merge` puts the slices' numbers together, `finish` makes of them the results
and the terms by which `gradient` writes U for a slice. The formulas are those of kernels/softmax_rows.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.softmax_rows import (
    LOWEST,
    Softmax,
    absorb,
    config,
    load_row,
    load_target,
    padded,
    padded_rows,
    unit_gradient,
)
from srlm_fast.kernels.triton_helpers import store, tl, triton

BLOCK = 4096


class Results(NamedTuple):
    """Per-row results [n], and the terms [n, 7] of which `gradient` makes U."""

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    terms: Tensor


@triton.jit
def statistics_kernel(
    logits, target, out, n_cols, logits_stride, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row: max, others, the target's z (-inf if another slice has it) and others weighted."""
    n = tl.program_id(0).to(tl.int64)
    row, y, cols = logits + n * logits_stride, tl.load(target + n), tl.arange(0, BLOCK)
    z_y, slope_y = load_target(row, y, n_cols, scale, softcap, -float("inf"), SOFTCAP)
    m, others, weighted, total = tl.full((), LOWEST, tl.float32), 0.0, 0.0, 0.0
    for i in range(0, n_cols, BLOCK):
        z, slope = load_row(row, i + cols, n_cols, scale, softcap, SOFTCAP, "evict_first")
        m, others, weighted, total = absorb(z, i + cols, y, n_cols, m, others, weighted, total, True, False)
    tl.store(out + n * 4, m)
    tl.store(out + n * 4 + 1, others)
    tl.store(out + n * 4 + 2, z_y)
    tl.store(out + n * 4 + 3, weighted)


@triton.jit
def gradient_kernel(
    logits, target, terms, unit, n_cols, logits_stride, unit_stride, scale, softcap, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block; `terms` as `finish` makes them."""
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m, log_sum, a = tl.load(terms + n * 7), tl.load(terms + n * 7 + 1), tl.load(terms + n * 7 + 2)
    b, u_y = tl.load(terms + n * 7 + 3), tl.load(terms + n * 7 + 4)
    h, entropy = tl.load(terms + n * 7 + 5), tl.load(terms + n * 7 + 6)
    z, slope = load_row(logits + n * logits_stride, cols, n_cols, scale, softcap, SOFTCAP, "evict_first")
    u = tl.where(cols == tl.load(target + n), u_y, unit_gradient(z, m, log_sum, a, b, h, entropy, True))
    store(unit + n * unit_stride + cols, u * slope, cols < padded(n_cols))


def torch_rows(
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
    """`triton_rows` in plain torch, for logits in fp32 or fp64."""
    numbers = _statistics_torch(logits, target, softmax.temperature, softmax.softcap)
    mean_z = _cap(logits, softmax.temperature, softmax.softcap)[0].mean(1) if softmax.label_smoothing else 0.0
    results = finish(numbers, softmax, logits.shape[1], mean_z, coefficient, grad_entropy)
    for wanted, values in ((loss, results.loss), (lse, results.lse), (entropy, results.entropy)):
        if wanted is not None:
            wanted.copy_(values)
    if unit is not None:
        _gradient_torch(logits, target, results.terms, unit, softmax.temperature, softmax.softcap)


def merge(slices: Tensor) -> Tensor:
    """[n, 4], the statistics of whole rows from those of their slices [R, n, 4]; summed in the order of slices."""
    row_max, others, z_y, weighted = slices.unbind(2)
    top = row_max.amax(0)
    shift = row_max - top
    weighted = shift.exp() * (weighted + others * shift)
    return torch.stack((top, (shift.exp() * others).sum(0), z_y.amax(0), weighted.sum(0)), dim=1)


def finish(
    numbers: Tensor,
    softmax: Softmax,
    n_cols: int,
    mean_z: Tensor | float = 0.0,
    coefficient: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> Results:
    """From the statistics of whole rows to their results.

    Args:
        numbers: [n, 4] as `statistics` gives them, of whole rows.
        softmax, coefficient, grad_entropy: as for `triton_rows`.
        n_cols: V.
        mean_z: [n], mean of z over a row; wanted for label smoothing only.
    """
    row_max, others, z_y, weighted = numbers.unbind(1)
    eps, c = softmax.label_smoothing, torch.ones_like(row_max) if coefficient is None else coefficient
    e_y, total = (z_y - row_max).exp(), others + (z_y - row_max).exp()
    log_sum = torch.log1p(others + torch.expm1(z_y - row_max))
    log_p_y, lse, p_y = z_y - row_max - log_sum, row_max + log_sum, e_y / total
    entropy = log_sum - (weighted + e_y * (z_y - row_max)) / total
    loss = softmax.z_loss * lse * lse - (1 - eps) * log_p_y - eps * (mean_z - lse)
    h = torch.zeros_like(row_max) if grad_entropy is None else grad_entropy
    a, b = c * (1 + 2 * softmax.z_loss * lse), c * eps / n_cols
    u_y = c * (2 * softmax.z_loss * lse * p_y + eps - others / total) - b - h * p_y * (log_p_y + entropy)
    return Results(loss, lse, entropy, torch.stack((row_max, log_sum, a, b, u_y, h, entropy), dim=1))


def _cap(raw: Tensor, temperature: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """z, and dz / d raw."""
    if not softcap:
        return raw / temperature, 1 / temperature
    t = torch.tanh(raw / softcap)
    return t * (softcap / temperature), (1 - t * t) / temperature


def _statistics_torch(logits: Tensor, target: Tensor, temperature: float, softcap: float) -> Tensor:
    z, _ = _cap(logits, temperature, softcap)
    column = target.clamp(0, z.shape[1] - 1)[:, None]
    absent = (target != column[:, 0])[:, None]
    z_y = z.gather(1, column)
    row_max = z.amax(1, keepdim=True)
    e = z.sub_(row_max).exp()
    e.scatter_(1, column, e.gather(1, column) * absent)
    weighted = z.mul_(e).sum(1)
    return torch.stack((row_max[:, 0], e.sum(1), z_y.masked_fill(absent, -torch.inf)[:, 0], weighted), dim=1)


def _gradient_torch(
    logits: Tensor, target: Tensor, terms: Tensor, unit: Tensor, temperature: float, softcap: float
) -> None:
    z, slope = _cap(logits, temperature, softcap)
    row_max, log_sum, a, b, u_y, h, entropy = terms[:, :, None].unbind(1)
    log_p = z.sub_(row_max).sub_(log_sum)
    u = log_p.exp() * (a - h * (log_p + entropy)) - b
    column = target.clamp(0, z.shape[1] - 1)[:, None]
    u.scatter_(1, column, torch.where(target[:, None] == column, u_y, u.gather(1, column)))
    unit.copy_(u.mul_(slope))


def _statistics_triton(logits: Tensor, target: Tensor, temperature: float, softcap: float) -> Tensor:
    n_rows, n_cols = logits.shape
    out = logits.new_empty(n_rows, 4)
    if n_rows:
        block = config(n_cols, False)
        del block["ONE_BLOCK"]
        stride = logits.stride(0)
        statistics_kernel[(n_rows,)](
            logits, target, out, n_cols, stride, 1 / temperature, softcap, SOFTCAP=softcap > 0, **block
        )
    return out


def _gradient_triton(
    logits: Tensor, target: Tensor, terms: Tensor, unit: Tensor, temperature: float, softcap: float
) -> None:
    n_rows, n_cols = logits.shape
    if n_rows:
        gradient_kernel[(n_rows, -(-n_cols // BLOCK))](
            logits,
            target,
            terms,
            unit,
            n_cols,
            logits.stride(0),
            unit.stride(0),
            1 / temperature,
            softcap,
            SOFTCAP=softcap > 0,
            BLOCK=BLOCK,
            num_warps=8,
        )


def compile_cases() -> None:
    """The launches that bench/compile_report.py compiles."""
    target, terms = torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(8, 7, device="meta")
    for n_cols, softcap in ((32064, 0.0), (32064, 30.0), (32001, 0.0)):
        logits = padded_rows(8, n_cols, torch.float32, target.device)
        _statistics_triton(logits, target, 1.0, softcap)
        for unit in (logits, padded_rows(8, n_cols, torch.bfloat16, target.device)):
            _gradient_triton(logits, target, terms, unit, 1.0, softcap)


statistics = library.define(
    "softmax_statistics(Tensor logits, Tensor target, float temperature, float softcap) -> Tensor",
    fake=lambda logits, target, temperature, softcap: logits.new_empty(logits.shape[0], 4),
    torch_impl=_statistics_torch,
    triton_impl=_statistics_triton,
)
"""[n, 4] of a slice of every row: max z, sum of e^(z - max) but for the target's, the target's z (-inf where `target`
is no column of this slice), and that sum with every term times z - max."""

gradient = library.define(
    "softmax_gradient(Tensor logits, Tensor target, Tensor terms, Tensor(a!) unit, float temperature, float softcap) "
    "-> ()",
    fake=lambda logits, target, terms, unit, temperature, softcap: None,
    torch_impl=_gradient_torch,
    triton_impl=_gradient_triton,
)
"""Writes U of a slice of every row into `unit`, by `terms` from `finish`; `unit` may be `logits`."""
