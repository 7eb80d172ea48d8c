"""SwiGLU's product, silu(gate) * up, in one pass forward and one backward.

    y = g s(g) u        s(g) = 1 / (1 + e^-g)
    dg = dy u s(g) (1 + g (1 - s(g)))        du = dy g s(g)

The backward recomputes silu from the saved inputs; plain torch would keep silu(gate) as a third tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.triton_helpers import exp, store, tl, triton

BLOCK = 2048


@triton.jit
def forward_kernel(gate, up, out, n_cols, gate_stride, up_stride, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    g = tl.load(gate + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    store(out + row * n_cols + cols, g / (1 + exp(-g)) * u, mask)


@triton.jit
def backward_kernel(grad, gate, up, d_gate, d_up, n_cols, gate_stride, up_stride, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    dy = tl.load(grad + row * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    s = 1 / (1 + exp(-g))
    store(d_gate + row * n_cols + cols, dy * u * s * (1 + g * (1 - s)), mask)
    store(d_up + row * n_cols + cols, dy * g * s, mask)


def _grid(rows: int, cols: int) -> tuple[int, int]:
    return rows, -(-cols // BLOCK)


def _forward_triton(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        forward_kernel[_grid(*gate.shape)](gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), BLOCK=BLOCK)
    return out


def _backward_triton(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        backward_kernel[_grid(*gate.shape)](
            grad, gate, up, d_gate, d_up, gate.shape[1], gate.stride(0), up.stride(0), BLOCK=BLOCK
        )
    return d_gate, d_up


def compile_cases() -> None:
    """The launches that bench/compile_report.py compiles."""
    for dtype in (torch.bfloat16, torch.float32):
        for cols in (14336, 344):
            gate = torch.empty(8, cols, dtype=dtype, device="meta")
            _forward_triton(gate, gate)
            _backward_triton(gate, gate, gate)


def _forward_torch(gate: Tensor, up: Tensor) -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def _backward_torch(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    dy, g, u = grad.to(wide), gate.to(wide), up.to(wide)
    s = g.sigmoid()
    return (dy * u * s * (1 + g * (1 - s))).to(gate.dtype), (dy * g * s).to(gate.dtype)


_backward_op = library.define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    fake=lambda grad, gate, up: (torch.empty_like(grad), torch.empty_like(grad)),
    torch_impl=_backward_torch,
    triton_impl=_backward_triton,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_op(grad.contiguous(), *ctx.saved_tensors)


_forward_op = library.define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    fake=lambda gate, up: gate.new_empty(gate.shape),
    torch_impl=_forward_torch,
    triton_impl=_forward_triton,
    setup_context=_setup_context,
    backward=_backward,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer"), computed in fp32 or wider.

    Args:
        gate, up: [T, F] floating, of one dtype; rows may be strided (the halves of one [T, 2F] product will do).

    Returns:
        [T, F] in their dtype, contiguous.

    Raises:
        ValueError: when shapes, dtypes or devices differ, or a row is not dense.
    """
    if gate.dim() != 2 or gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate and up must be alike [T, F] tensors, got {gate.dtype} {tuple(gate.shape)} on {gate.device} and "
            f"{up.dtype} {tuple(up.shape)} on {up.device}"
        )
    if not library.fused():
        return F.silu(gate) * up
    if gate.stride(1) != 1 or up.stride(1) != 1:
        raise ValueError(f"rows of gate and up must be dense, got strides {gate.stride()} and {up.stride()}")
    return _forward_op(gate, up)
