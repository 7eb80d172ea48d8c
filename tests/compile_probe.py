"""Kernels that show that bench/compile_report.py sees what it looks for: a product, and one that has to spill."""

import torch

from srlm_fast.kernels.triton_helpers import dot, store, tl, triton


@triton.jit
def product_kernel(a, b, out, k, BLOCK: tl.constexpr):
    rows, inner = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, k, BLOCK):
        left = tl.load(a + rows[:, None] * k + (i + inner)[None, :])
        total = dot(left, tl.load(b + (i + inner)[:, None] * BLOCK + rows[None, :]), total)
    store(out + rows[:, None] * BLOCK + rows[None, :], total)


@triton.jit
def spilling_kernel(x, out, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    z = tl.load(x + cols)
    e = tl.exp(z - tl.max(z, 0))
    tl.store(out + cols, e / tl.sum(e, 0) * z)


def compile_cases() -> None:
    narrow, wide = (torch.empty(64, 256, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    product_kernel[(1,)](narrow, narrow, wide, 256, BLOCK=64)
    spilling_kernel[(1,)](wide, wide, BLOCK=8192, num_warps=1)
