"""RMSNorm, and RMSNorm behind the residual add that precedes it, in one pass forward and one backward.

    s = x + delta        r = 1 / sqrt(mean(s^2) + eps)        n = s r        y = weight n
    ds += r (weight dy - n mean(weight dy n))        d_weight = sum over rows of dy n

s and n are rounded to the tensors' dtype, the rest is fp32: the casting order of Hugging Face's Llama. r is kept in
fp32 for the backward, which adds the gradient that reaches s along the residual stream in the same pass. d_weight is
summed within blocks of rows, then over the blocks in order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.triton_helpers import rounded, store, tl, triton


@triton.jit
def forward_kernel(
    x, delta, weight, total, y, rstd, n_rows, n_cols, x_stride, delta_stride, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    s = tl.load(x + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        s = rounded(s + tl.load(delta + rows * delta_stride + cols, mask=mask, other=0.0).to(tl.float32), total)
        store(total + rows * n_cols + cols, s, mask)
    r = tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / n_cols + eps)
    tl.store(rstd + rows, r, mask=rows < n_rows)
    w = tl.load(weight + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    store(y + rows * n_cols + cols, rounded(s * r, y) * w, mask)


@triton.jit
def backward_kernel(
    grad, x, weight, rstd, grad_sum, dx, partial, n_rows, n_cols, x_stride, rows_per_program,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, rows_per_program, ROWS):
        rows = program * rows_per_program + step + tl.arange(0, ROWS)[:, None]
        mask = (rows < n_rows) & (cols < n_cols)
        dy = tl.load(grad + rows * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + rows, mask=rows < n_rows, other=0.0)
        n = tl.load(x + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * r
        d = (w * dy - n * (tl.sum(w * dy * n, axis=1, keep_dims=True) / n_cols)) * r
        if ADD:
            d += tl.load(grad_sum + rows * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
        store(dx + rows * n_cols + cols, d, mask)
        dw += dy * n
    tl.store(partial + program * n_cols + cols, tl.sum(dw, axis=0, keep_dims=True), mask=cols < n_cols)


def _tile(n_cols: int) -> dict[str, int]:
    """Whole rows, several of them where they are short."""
    block = triton.next_power_of_2(n_cols)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(4, rows * block // 512), 32)}


def _programs(device: torch.device) -> int:
    """How many programs share the rows in the backward: two per multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _launch_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)
    total, delta_stride = (None, 0) if delta is None else (torch.empty_like(y), delta.stride(0))
    if x.numel():
        tile = _tile(x.shape[1])
        grid = (-(-x.shape[0] // tile["ROWS"]),)
        forward_kernel[grid](
            x, delta, weight, total, y, rstd, *x.shape, x.stride(0), delta_stride, eps, ADD=delta is not None, **tile
        )
    return total, y, rstd


def _forward_triton(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _launch_forward(x, None, weight, eps)[1:]


def _backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(grad)
    if not x.numel():
        return dx, torch.zeros_like(weight)
    tile = _tile(x.shape[1])
    rows_per_program = -(-x.shape[0] // (_programs(x.device) * tile["ROWS"])) * tile["ROWS"]
    programs = -(-x.shape[0] // rows_per_program)
    partial = rstd.new_empty(programs, x.shape[1])
    backward_kernel[(programs,)](
        grad, x, weight, rstd, grad_sum, dx, partial, *x.shape, x.stride(0), rows_per_program,
        ADD=grad_sum is not None, **tile,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def compile_cases() -> None:
    """The launches that bench/compile_report.py compiles."""
    for dtype, cols in ((torch.bfloat16, 4096), (torch.bfloat16, 8192), (torch.float32, 8192), (torch.bfloat16, 100)):
        x, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((4096, cols), (cols,)))
        for other in (None, x):
            _, y, rstd = _launch_forward(x, other, weight, 1e-5)
            _backward_triton(y, x, weight, rstd, other)


def _forward_torch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (s.square().mean(1) + eps).rsqrt()
    return weight * (s * rstd[:, None]).to(x.dtype), rstd


def _add_forward_torch(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + delta).contiguous()
    return total, *_forward_torch(total, weight, eps)


def _backward_torch(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    dy, w, r = grad.to(rstd.dtype), weight.to(rstd.dtype), rstd[:, None]
    n = x.to(rstd.dtype) * r
    d = (w * dy - n * (w * dy * n).mean(1, keepdim=True)) * r
    if grad_sum is not None:
        d += grad_sum.to(d.dtype)
    return d.to(x.dtype), (dy * n).sum(0).to(weight.dtype)


def _fake(x: Tensor, n_outputs: int) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return *(x.new_empty(x.shape) for _ in range(n_outputs)), x.new_empty(x.shape[0], dtype=wide)


_backward_op = library.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_sum) -> (Tensor, Tensor)",
    fake=lambda grad, x, weight, rstd, grad_sum: (torch.empty_like(grad), torch.empty_like(weight)),
    torch_impl=_backward_torch,
    triton_impl=_backward_triton,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
    return *_backward_op(grad.contiguous(), *ctx.saved_tensors, None), None


_forward_op = library.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, weight, eps: _fake(x, 1),
    torch_impl=_forward_torch,
    triton_impl=_forward_triton,
    setup_context=_setup_context,
    backward=_backward,
)


def _add_setup_context(ctx, inputs, output) -> None:
    total, _, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_backward(ctx, grad_sum: Tensor | None, grad: Tensor | None, _) -> tuple[Tensor | None, ...]:
    if grad is None:
        return grad_sum, grad_sum, None, None
    if grad_sum is not None:
        grad_sum = grad_sum.contiguous()
    dx, d_weight = _backward_op(grad.contiguous(), *ctx.saved_tensors, grad_sum)
    return dx, dx, d_weight, None


_add_forward_op = library.define(
    "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, delta, weight, eps: _fake(x, 2),
    torch_impl=_add_forward_torch,
    triton_impl=_launch_forward,
    setup_context=_add_setup_context,
    backward=_add_backward,
)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating [T, D] tensor, got {x.dtype} {tuple(x.shape)}")
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be {x.dtype} [{x.shape[1]}] on {x.device} like x, "
            f"got {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )


def _check_dense(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"rows of {name} must be dense, got strides {tensor.stride()}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization").

    Args:
        x: [T, D] floating; rows may be strided.
        weight: [D] of x's dtype.
        eps: what is added to the mean square.

    Returns:
        [T, D] in x's dtype: normalised in fp32 or wider, rounded to it, then multiplied by `weight`.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or a row is not dense.
    """
    _check(x, weight)
    if not library.fused():
        return _reference(x, weight, eps)
    _check_dense(x=x, weight=weight)
    return _forward_op(x, weight, eps)[0]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream after one more branch, and its `rms_norm`.

    Args:
        x, delta: [T, D] floating, of one dtype; rows may be strided.
        weight: [D] of their dtype.
        eps: what is added to the mean square.

    Returns:
        x + delta and rms_norm(x + delta, weight, eps), both [T, D] in x's dtype. Both carry gradients; those of x and
        delta are one tensor.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or a row is not dense.
    """
    _check(x, weight)
    if delta.shape != x.shape or delta.dtype != x.dtype or delta.device != x.device:
        raise ValueError(
            f"delta must be {x.dtype} {tuple(x.shape)} on {x.device} like x, "
            f"got {delta.dtype} {tuple(delta.shape)} on {delta.device}"
        )
    if not library.fused():
        total = x + delta
        return total, _reference(total, weight, eps)
    _check_dense(x=x, delta=delta, weight=weight)
    return _add_forward_op(x, delta, weight, eps)[:2]
