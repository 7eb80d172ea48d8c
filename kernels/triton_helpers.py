"""What every Triton kernel here uses, so that it is right on a GPU and under Triton's interpreter alike.

The interpreter (TRITON_INTERPRET=1) keeps bf16 as bit patterns: arithmetic and `tl.dot` on them are silently
wrong and a conversion from fp32 truncates. Hence three rules: a load is followed by `.to(tl.float32)`, operands of a
product go through `dot`, and results are stored by `store`.
"""

from __future__ import annotations

import os

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU needs no Triton

    class _Missing:
        """Stands where Triton would: its decorators do nothing, its functions are only met on a GPU."""

        def jit(self, function):
            return function

        def constexpr(self, value):
            return value

    triton = tl = _Missing()

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter; read once, as Triton itself does."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def to_bf16(x):
    """fp32 -> bf16, rounded to nearest even by the interpreter too."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def store(pointer, x, mask=None):
    """Stores fp32 `x` in the pointer's dtype, rounded to nearest even."""
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, to_bf16(x), mask=mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def rounded(x, pointer):
    """fp32 `x` as it reads back once stored at `pointer`."""
    if pointer.dtype.element_ty == tl.bfloat16:
        return to_bf16(x).to(tl.float32)
    else:
        return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a b, accumulated in fp32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def exp(x):
    """e^x by the hardware's exp2."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """tanh(x) within 1e-7, from exp2 of a nonpositive number; libdevice is unknown to the interpreter."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)
