"""The output head's three operators: row losses of softmax(x weight^T) without a tensor of N x V log-probabilities.

    loss[n] = -(1 - eps) log p[n, y_n] - eps / V sum_j log p[n, j] + z_loss lse[n]^2        p = softmax(z)
    z = softcap tanh(raw / softcap) / temperature        raw = x weight^T
    U[n, :] = d loss[n] / d raw[n, :]        dX = g (.) (U W)        dW = U^T (g (.) X)        for upstream g [N]

`linear_softmax` leaves U in place of the logits: 6 N D V FLOPs for any g. Where U would be too large,
`linear_softmax_backward` makes it again chunk by chunk (8 N D V), and `linear_softmax_gradients` needs only one pass
(6 N D V), because g is known beforehand. Logits and statistics are fp32 whatever the dtype of x and weight, and so is
the sum of dW over chunks. On CUDA: cuBLAS and one launch of kernels/softmax_rows.py per chunk of rows. On a CPU with
AVX-512 the logits of -log p are made again tile by tile in the cache, csrc/tiled_softmax.cpp: `TILED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.softmax_rows import ALIGNMENT, Softmax, padded_rows, triton_rows
from srlm_fast.kernels.softmax_slices import torch_rows
from srlm_fast.native_ops import native_available

CHUNK_BYTES = 2 << 30
"""Default for the largest kept U, and for the logits and U of a chunk where it is not kept, but on the CPU."""

CPU_CHUNK_BYTES = 128 << 20
"""The same on the CPU, and there for the fp32 sum of a dW in 16 bits too, whose U is not kept."""

SCRATCH_BYTES = 512 << 20
"""Most for the logits of a chunk when no dW is summed up over chunks: the product is at full speed with fewer rows."""


TILED = frozenset(
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if native_available() and torch.ops.srlm.linear_softmax_is_tiled(dtype)
)
"""dtypes for which the C++ on this machine makes the logits of -log p again tile by tile in the cache."""


def default_chunk_bytes(device: torch.device) -> int:
    """What `chunk_bytes` is where it is not given."""
    return CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: fp64 for fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def chunks(n_rows: int, most: int) -> Iterator[slice]:
    """Slices of at most `most` rows: as few as possible, of about one size, multiples of 128 rows if `most` allows."""
    step = 128 if most >= 128 else 1
    n_chunks = max(1, -(-n_rows // (most // step * step)))
    size = max(1, -(-n_rows // (n_chunks * step))) * step
    return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))


class Plan(NamedTuple):
    """Whether U of all rows may be kept, and how many rows at a time without (forward) and with (backward) a new U."""

    keep: bool
    forward_rows: int
    backward_rows: int


def plan(n_rows: int, n_cols: int, dtype: torch.dtype, chunk_bytes: int) -> Plan:
    """What fits into `chunk_bytes`; a row always does.

    Args:
        n_rows, n_cols: N and V.
        dtype: of the weight.
        chunk_bytes: most for a kept U, or for the logits of a chunk with their U.
    """
    width, wide = -(-n_cols // ALIGNMENT) * ALIGNMENT, wide_dtype(dtype)
    both = wide.itemsize + (dtype.itemsize if dtype != wide else 0)
    return Plan(
        keep=n_rows * width * dtype.itemsize <= chunk_bytes,
        forward_rows=max(1, min(chunk_bytes, SCRATCH_BYTES) // (width * wide.itemsize)),
        backward_rows=max(1, chunk_bytes // (width * both)),
    )


@cache
def _multiplies(narrow: torch.dtype, wide: torch.dtype, device: torch.device, accumulate: bool) -> bool:
    """Whether this torch has a product of `narrow` matrices into a `wide` one on this device; tries it once."""
    a, out = torch.ones(16, 16, dtype=narrow, device=device), torch.ones(16, 16, dtype=wide, device=device)
    try:
        if accumulate:
            torch.addmm(out, a, a, out_dtype=wide, out=out)
        else:
            torch.mm(a, a, out_dtype=wide, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out = a b, or out += a b, with sums in out's dtype, which may be wider than that of a and b."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate and _multiplies(a.dtype, out.dtype, a.device, True):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif not _multiplies(a.dtype, out.dtype, a.device, False):
        multiply(a.to(out.dtype), b.to(out.dtype), out, accumulate=accumulate)
    elif accumulate:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


Rows = Callable[..., None]
"""`triton_rows` or `torch_rows`."""


def _forward(
    rows: Rows,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    entropy: bool,
    keep: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    softmax = Softmax(temperature, softcap, label_smoothing, z_loss)
    loss, lse, entropies, unit = _forward_fake(
        x, weight, target, temperature, softcap, label_smoothing, z_loss, entropy, keep, chunk_rows
    )
    in_place = keep and unit.dtype == loss.dtype
    parts = list(chunks(len(x), chunk_rows))
    largest = max((part.stop - part.start for part in parts), default=0)
    scratch = unit if in_place else padded_rows(largest, len(weight), loss.dtype, x.device)
    for part in parts:
        logits = unit[part] if in_place else scratch[: part.stop - part.start]
        multiply(x[part], weight.t(), logits)
        rows(
            logits,
            target[part],
            softmax,
            unit=unit[part] if keep else None,
            loss=loss[part],
            lse=lse[part],
            entropy=entropies[part] if entropy else None,
        )
    return loss, lse, entropies, unit


def _forward_fake(
    x, weight, target, temperature, softcap, label_smoothing, z_loss, entropy, keep, chunk_rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    loss, lse = x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape[0], dtype=torch.float64)
    entropies = x.new_empty(x.shape[0] if entropy else 0, dtype=wide)
    n_cols = weight.shape[0]
    unit = padded_rows(x.shape[0], n_cols, weight.dtype, x.device) if keep else weight.new_empty(0, n_cols)
    return loss, lse, entropies, unit


def _units(
    rows: Rows, x: Tensor, weight: Tensor, target: Tensor, softmax: Softmax, chunk_rows: int, **wanted: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows with their U, each valid until the next; `wanted` are the [N] arguments of `triton_rows`."""
    wide = wide_dtype(x.dtype)
    parts = list(chunks(len(x), chunk_rows))
    largest = max((part.stop - part.start for part in parts), default=0)
    scratch = padded_rows(largest, len(weight), wide, x.device)
    units = scratch if weight.dtype == wide else padded_rows(largest, len(weight), weight.dtype, x.device)
    for part in parts:
        size = part.stop - part.start
        multiply(x[part], weight.t(), scratch[:size])
        of_part = {name: None if values is None else values[part] for name, values in wanted.items()}
        rows(scratch[:size], target[part], softmax, unit=units[:size], **of_part)
        yield part, units[:size]


def _backward(
    rows: Rows,
    grad_loss: Tensor,
    grad_entropy: Tensor | None,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    loss: Tensor,
    unit: Tensor,
    main_grad: Tensor | None,
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    dx, dw = _backward_fake(
        grad_loss, grad_entropy, x, weight, target, lse, loss, unit, main_grad, *4 * [0.0], need_dx, need_dw, chunk_rows
    )
    if len(unit) and grad_entropy is None:
        g = grad_loss[:, None]
        if need_dx:
            multiply(unit, weight, dx)
            dx.mul_(g)
        if need_dw:
            scaled = (x * g).to(x.dtype)
            # One product is left to torch in the weight's dtype: an fp32 sum to be rounded later would cost 16 bytes
            # more of traffic per weight.
            if main_grad is None:
                torch.mm(unit.t(), scaled, out=dw)
            else:
                multiply(unit.t(), scaled, main_grad, accumulate=True)
        return dx, dw
    total = main_grad
    if need_dw and main_grad is None:
        total = dw.zero_() if dw.dtype == grad_loss.dtype else torch.zeros_like(dw, dtype=grad_loss.dtype)
    softmax = Softmax(temperature, softcap, label_smoothing, z_loss)
    upstream = {"coefficient": grad_loss, "grad_entropy": grad_entropy}
    for part, chunk_unit in _units(rows, x, weight, target, softmax, chunk_rows, **upstream):
        if need_dx:
            multiply(chunk_unit, weight, dx[part])
        if need_dw:
            multiply(chunk_unit.t(), x[part], total, accumulate=True)
    if need_dw and main_grad is None:
        dw.copy_(total)
    return dx, dw


def _gradients(
    rows: Rows,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    need_dx: bool,
    need_dw: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    softmax = Softmax(temperature, softcap, label_smoothing, z_loss)
    loss = torch.empty_like(coefficient)
    dx = x.new_empty(len(x) if need_dx else 0, x.shape[1])
    dw = (coefficient.new_empty if len(x) else coefficient.new_zeros)(len(weight) if need_dw else 0, x.shape[1])
    for part, unit in _units(rows, x, weight, target, softmax, chunk_rows, loss=loss, coefficient=coefficient):
        if need_dx:
            multiply(unit, weight, dx[part])
        if need_dw:
            multiply(unit.t(), x[part], dw, accumulate=part.start > 0)
    return loss, dx, dw


def _gradients_fake(
    x, weight, target, coefficient, temperature, softcap, label_smoothing, z_loss, need_dx, need_dw, chunk_rows
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape[0] if need_dx else 0, x.shape[1])
    dw = coefficient.new_empty(weight.shape[0] if need_dw else 0, x.shape[1])
    return torch.empty_like(coefficient), dx, dw


def _backward_fake(
    grad_loss, grad_entropy, x, weight, target, lse, loss, unit, main_grad, temperature, softcap, label_smoothing,
    z_loss, need_dx, need_dw, chunk_rows,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    give_dw = need_dw and main_grad is None
    dw = weight.new_empty(weight.shape[0] if give_dw else 0, weight.shape[1])
    return x.new_empty(x.shape[0] if need_dx else 0, x.shape[1]), dw


LOSS = "float temperature, float softcap, float label_smoothing, float z_loss"

linear_softmax = library.define(
    f"linear_softmax(Tensor x, Tensor weight, Tensor target, {LOSS}, bool entropy, bool keep, int chunk_rows) "
    "-> (Tensor loss, Tensor lse, Tensor entropy, Tensor unit)",
    fake=_forward_fake,
    torch_impl=partial(_forward, torch_rows),
    triton_impl=partial(_forward, triton_rows),
)
"""x [N, D], weight [V, D], target int64 [N] -> loss [N]; lse [N] in fp64, so that e^(z - lse) of large logits is exact;
entropy [N], or [0] if not asked for; U [N, V] in the weight's dtype, its rows a multiple of 64 elements apart, or
[0, V] if not kept. At most `chunk_rows` rows of logits exist at once."""

linear_softmax_backward = library.define(
    "linear_softmax_backward(Tensor grad_loss, Tensor? grad_entropy, Tensor x, Tensor weight, Tensor target, "
    f"Tensor lse, Tensor loss, Tensor unit, Tensor(a!)? main_grad, {LOSS}, bool need_dx, bool need_dw, int chunk_rows) "
    "-> (Tensor dx, Tensor dw)",
    fake=_backward_fake,
    torch_impl=partial(_backward, torch_rows),
    triton_impl=partial(_backward, triton_rows),
)
"""dX [N, D] in x's dtype and dW [V, D] in the weight's, [0, D] where not needed; dW goes to fp32 `main_grad` instead,
added, where that is given. U is made again if it was not kept or the entropy has a gradient. `lse` and `loss`, both of
`linear_softmax`, spare the C++ a pass over the logits; the others rather read them twice."""

linear_softmax_gradients = library.define(
    f"linear_softmax_gradients(Tensor x, Tensor weight, Tensor target, Tensor coefficient, {LOSS}, bool need_dx, "
    "bool need_dw, int chunk_rows) -> (Tensor loss, Tensor dx, Tensor dw)",
    fake=_gradients_fake,
    torch_impl=partial(_gradients, torch_rows),
    triton_impl=partial(_gradients, triton_rows),
)
"""loss [N], and the gradients of sum_n coefficient[n] loss[n]: dX in x's dtype, dW in fp32; [0, D] where not needed."""
