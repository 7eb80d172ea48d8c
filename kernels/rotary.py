"""Rotate-half rotary embedding of queries and keys together, in place.

    (a, b) -> (a cos - b sin, b cos + a sin)        a, b: the two halves of a head; angle = position * frequency

The gradient is the inverse rotation of the incoming one, so nothing but the table of angles is kept. Arithmetic is
fp32. The table is per token, not per position: sequences packed into one row of tokens restart where they please.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.triton_helpers import store, tl, triton


@triton.jit
def rotate_heads(x, out, c, s, n_heads, half, pairs, HEADS: tl.constexpr):
    for first in range(0, n_heads, HEADS):
        heads = first + tl.arange(0, HEADS)[:, None]
        at, mask = heads * (2 * half) + pairs, (heads < n_heads) & (pairs < half)
        a = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + at + half, mask=mask, other=0.0).to(tl.float32)
        store(out + at, a * c - b * s, mask)
        store(out + at + half, b * c + a * s, mask)


@triton.jit
def rotary_kernel(
    q, k, q_out, k_out, cos, sin, q_heads, k_heads, half, q_stride, k_stride, q_out_stride, k_out_stride, sign,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    c = tl.load(cos + row * half + pairs, mask=pairs < half, other=0.0)
    s = tl.load(sin + row * half + pairs, mask=pairs < half, other=0.0) * sign
    rotate_heads(q + row * q_stride, q_out + row * q_out_stride, c, s, q_heads, half, pairs, HEADS)
    rotate_heads(k + row * k_stride, k_out + row * k_out_stride, c, s, k_heads, half, pairs, HEADS)


def _launch(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    rows, half = cos.shape
    if not rows or not half:
        return
    q_heads, k_heads = q.shape[1] // (2 * half), k.shape[1] // (2 * half)
    block = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(max(q_heads, 1)), max(1, 2048 // block))
    rotary_kernel[(rows,)](
        q, k, q_out, k_out, cos, sin, q_heads, k_heads, half, q.stride(0), k.stride(0), q_out.stride(0),
        k_out.stride(0), -1.0 if inverse else 1.0, HEADS=heads, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, q_out, k_out, cos, sin, inverse)
    return q_out, k_out


def _rotary_in_place_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    _launch(q, k, q, k, cos, sin, inverse)


def compile_cases() -> None:
    """The launches that bench/compile_report.py compiles."""
    for dtype, q_heads, k_heads, half in (
        (torch.bfloat16, 64, 8, 64),
        (torch.float32, 32, 32, 64),
        (torch.float32, 4, 4, 10),
    ):
        q, k = (torch.empty(8, heads * 2 * half, dtype=dtype, device="meta") for heads in (q_heads, k_heads))
        cos = torch.empty(8, half, device="meta")
        _rotary_triton(q, k, cos, cos, False)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(1, (-1, 2, cos.shape[1])).to(torch.promote_types(x.dtype, torch.float32)).unbind(2)
    c, s = cos[:, None], sin[:, None]
    return torch.stack((a * c - b * s, b * c + a * s), 2).to(x.dtype).flatten(1)


def _rotary_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    sin = -sin if inverse else sin
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotary_in_place_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    for x, rotated in zip((q, k), _rotary_torch(q, k, cos, sin, inverse)):
        x.copy_(rotated)


def _setup_context(ctx, inputs, output) -> None:
    *_, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
    return *_rotary_op(d_q.contiguous(), d_k.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotary_op = library.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    fake=lambda q, k, cos, sin, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)),
    torch_impl=_rotary_torch,
    triton_impl=_rotary_triton,
    setup_context=_setup_context,
    backward=_backward,
)

_rotary_in_place_op = library.define(
    "rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool inverse) -> ()",
    fake=lambda q, k, cos, sin, inverse: None,
    torch_impl=_rotary_in_place_torch,
    triton_impl=_rotary_in_place_triton,
)


class _InPlace(torch.autograd.Function):
    """Overwrites q and k; the incoming gradients, which are not ours to overwrite, are rotated into new tensors."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.mark_dirty(q, k)
        ctx.save_for_backward(cos, sin)
        _rotary_in_place_op(q, k, cos, sin, False)
        return q, k

    @staticmethod
    def backward(ctx, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotary_op(d_q.contiguous(), d_k.contiguous(), *ctx.saved_tensors, True), None, None


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x.unflatten(1, (-1, 2 * cos.shape[1]))
    cos, sin = (torch.cat((table, table), 1)[:, None].to(x.dtype) for table in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).flatten(1)


def _autograd_refuses(x: Tensor) -> bool:
    return x._is_view() or (x.is_leaf and x.requires_grad)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 2 or not x.is_floating_point() or x.shape[1] % head_dim:
            raise ValueError(
                f"{name} must be a floating [T, heads * head_dim] tensor with head_dim={head_dim}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    if k.shape[0] != q.shape[0] or k.dtype != q.dtype or k.device != q.device:
        raise ValueError(
            f"k must be {q.dtype} [{q.shape[0]}, ...] on {q.device} like q, "
            f"got {k.dtype} {tuple(k.shape)} on {k.device}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (q.shape[0], head_dim // 2) or table.dtype != torch.float32 or table.device != q.device:
            raise ValueError(
                f"{name} must be float32 [{q.shape[0]}, {head_dim // 2}] on {q.device}, "
                f"got {table.dtype} {tuple(table.shape)} on {table.device}"
            )


def rotary_table(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles positions * inv_freq, for `rotary`.

    Args:
        positions: int64 [T], position of each token in its own sequence.
        inv_freq: fp32 [hd / 2], angle per position of each pair.

    Returns:
        Two fp32 [T, hd / 2].

    Raises:
        ValueError: when a shape or dtype is another.
    """
    if positions.dim() != 1 or positions.dtype != torch.int64:
        raise ValueError(f"positions must be int64 [T], got {positions.dtype} {tuple(positions.shape)}")
    if inv_freq.dim() != 1 or inv_freq.dtype != torch.float32:
        raise ValueError(f"inv_freq must be float32 [hd / 2], got {inv_freq.dtype} {tuple(inv_freq.shape)}")
    angles = positions[:, None].float() * inv_freq
    return angles.cos(), angles.sin()


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k (Su et al. 2021, "RoFormer"), pairs being the halves of a head.

    q and k are consumed: they are overwritten and returned, except where autograd would refuse (a gradient is wanted,
    and one of them is a view or a leaf) or torch.compile traces; then the results are new tensors. What made q and k
    must not need their values in its backward (autograd raises if it does); a linear layer does not.

    Args:
        q: [T, H * head_dim] floating; k: [T, H_kv * head_dim] of its dtype. Rows may be strided (slices of one packed
            product will do).
        cos, sin: fp32 [T, head_dim / 2] from `rotary_table`; constants, no gradient reaches them.
        head_dim: size of a head, even.

    Returns:
        q and k rotated by each token's angles, in their dtype; computed in fp32 or wider.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or a row is not dense.
    """
    _check(q, k, cos, sin, head_dim)
    if not library.fused():
        return _reference(q, cos, sin), _reference(k, cos, sin)
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if x.stride(1) != 1:
            raise ValueError(f"rows of {name} must be dense, got strides {x.stride()}")
    cos, sin = cos.contiguous(), sin.contiguous()
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if torch.compiler.is_compiling() or differentiable and (_autograd_refuses(q) or _autograd_refuses(k)):
        return _rotary_op(q, k, cos, sin, False)
    if differentiable:
        return _InPlace.apply(q, k, cos, sin)
    _rotary_in_place_op(q, k, cos, sin, False)
    return q, k
