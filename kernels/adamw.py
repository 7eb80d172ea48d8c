"""One step of AdamW (Loshchilov & Hutter 2019) in one pass over a parameter, with moments in fp32 or bf16.

    m = m + (1 - beta1) (g - m)             v = beta2 v + (1 - beta2) g^2
    p = (1 - lr decay) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Rounding to nearest would freeze bf16 moments: with beta2 = 0.999 a step changes v by less than half a unit of its 8-bit
significand, and v stops short of g^2. So everything bf16 is rounded stochastically: up with a probability equal to the
fraction that is cut off, hence right on average. The random bits are a hash of (seed, step, element), the same in all
implementations and for any number of threads or blocks. Every operation of the formulas is rounded by itself (no fused
multiply-add), which makes the implementations agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.triton_helpers import store, tl, triton

BLOCK = 1024


@triton.jit
def mix(x):
    """MurmurHash3's 32-bit finaliser (Appleby 2011), a bijection that spreads every bit over all others."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def store_rounded(pointer, x, noise, mask, STOCHASTIC: tl.constexpr):
    """Stores fp32 `x` as the pointer's dtype; bf16 rounded up where the bits cut off and 16 of noise have a carry."""
    if STOCHASTIC and pointer.dtype.element_ty == tl.bfloat16:
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True) + (noise & 0xFFFF), 0x7FC00000)
        tl.store(pointer, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        store(pointer, x, mask)


@triton.jit
def adamw_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    n,
    kept,
    step_size,
    eps,
    weight1,
    beta2,
    weight2,
    unbias,
    key,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    mask = index < n
    p = tl.load(param + index, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + index, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg + index, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + index, mask=mask, other=0.0).to(tl.float32)
    m = m + weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    p = kept * p - tl.div_rn(step_size * m, tl.sqrt_rn(v) * unbias + eps)
    noise = mix(index.to(tl.uint32) ^ mix(((begin >> 32) ^ key).to(tl.uint32)))
    store_rounded(exp_avg + index, m, noise, mask, STOCHASTIC)
    store_rounded(exp_avg_sq + index, v, noise >> 16, mask, STOCHASTIC)
    store_rounded(param + index, p, mix(~noise), mask, STOCHASTIC)


def _mix(x):
    """`mix` of an int or of an int64 tensor of values below 2^32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def _key(seed: int, step: int) -> int:
    return _mix(_mix(_mix(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF)) ^ step)


class Scalars(NamedTuple):
    """All that a step needs besides the tensors."""

    kept: float
    step_size: float
    eps: float
    weight1: float
    beta2: float
    weight2: float
    unbias: float


def _scalars(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> Scalars:
    unbias = 1 / math.sqrt(1 - beta2**step)
    return Scalars(1 - lr * weight_decay, lr / (1 - beta1**step), eps, 1 - beta1, beta2, 1 - beta2, unbias)


def _step_triton(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Scalars, key: int | None
) -> None:
    if param.dtype == torch.float64:
        _step_torch(param, grad, exp_avg, exp_avg_sq, scalars, key)
    elif n := param.numel():
        adamw_kernel[(triton.cdiv(n, BLOCK),)](
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            n,
            *scalars,
            key or 0,
            STOCHASTIC=key is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


def compile_cases() -> None:
    """The launches that bench/compile_report.py compiles."""
    scalars = _scalars(1e-5, 0.9, 0.999, 1e-8, 0.01, 1)
    for dtype, moments in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        for n, key in ((4096, None), (4097, 7)):
            param, moment = (torch.empty(n, dtype=d, device="meta") for d in (dtype, moments))
            _step_triton(param, param, moment, moment, scalars, key)


def _step_torch(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Scalars, key: int | None
) -> None:
    wide = torch.promote_types(param.dtype, torch.float32)
    p, g, m, v = (tensor.to(wide) for tensor in (param, grad, exp_avg, exp_avg_sq))
    m = m + scalars.weight1 * (g - m)
    v = scalars.beta2 * v + scalars.weight2 * g * g
    root = v.double().sqrt().to(wide)  # torch's fp32 square root on the CPU may be off by a unit
    p = scalars.kept * p - scalars.step_size * m / (root * scalars.unbias + scalars.eps)
    if key is None or torch.bfloat16 not in (param.dtype, exp_avg.dtype):
        for tensor, x in ((exp_avg, m), (exp_avg_sq, v), (param, p)):
            tensor.copy_(x)
    else:
        index = torch.arange(param.numel(), device=param.device).view(param.shape)
        noise = _mix((index & 0xFFFFFFFF) ^ _mix((index >> 32) ^ key))
        _copy_rounded(exp_avg, m, noise)
        _copy_rounded(exp_avg_sq, v, noise >> 16)
        _copy_rounded(param, p, _mix(noise ^ 0xFFFFFFFF))


def _copy_rounded(to: Tensor, x: Tensor, noise: Tensor) -> None:
    if to.dtype == torch.bfloat16:
        bits = x.view(torch.int32) + (noise & 0xFFFF).to(torch.int32)
        x = torch.where(x.isnan(), x, (bits & -0x10000).view(torch.float32))
    to.copy_(x)


def _each(step_one: Callable[..., None]) -> Callable[..., None]:
    """The operator on lists, from a step on one parameter."""

    def step(params, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay, steps, seeds) -> None:
        for i, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
            scalars = _scalars(lr, beta1, beta2, eps, weight_decay, steps[i])
            step_one(*tensors, scalars, None if seeds is None else _key(seeds[i], steps[i]))

    return step


_step_op = library.define(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, int[] steps, int[]? seeds) -> ()",
    fake=lambda *args: None,
    torch_impl=_each(_step_torch),
    triton_impl=_each(_step_triton),
)


def adamw_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None = None,
) -> None:
    """Updates a parameter and its moments in place, as torch.optim.AdamW does; the module has the formulas.

    Args:
        param: fp32, fp64 or bf16, of any shape, contiguous.
        grad: like `param`.
        exp_avg, exp_avg_sq: m and v, contiguous, of the shape of `param`; both fp32 (fp64 for an fp64 parameter) or,
            unless that is fp64, both bf16.
        lr, beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        step: t, the number of this step, from 1.
        seed: of the stochastic rounding of whatever is bf16; None rounds to nearest. Give every parameter its own.

    Raises:
        ValueError: naming the tensor of another shape, dtype, device or layout, or a step below 1.
    """
    check(param, grad, exp_avg, exp_avg_sq)
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    adamw_steps_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        steps=[step],
        seeds=None if seed is None else [seed],
    )


@torch.no_grad()
def adamw_steps_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: list[int],
    seeds: list[int] | None,
) -> None:
    """`adamw_step_` for many parameters on one device, in one call; of tensors that `check` has found good."""
    run = _step_op if library.fused() else _step_op.torch
    run(params, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay, steps, seeds)
    torch.autograd.graph.increment_version(params)


def check(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Raises ValueError, naming the tensor, for what `adamw_step_` does not take."""
    if param.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"param must be fp32, fp64 or bf16, got {param.dtype}")
    wide = torch.promote_types(param.dtype, torch.float32)
    if exp_avg.dtype not in {wide, torch.float64 if wide == torch.float64 else torch.bfloat16}:
        raise ValueError(f"exp_avg of a {param.dtype} parameter cannot be {exp_avg.dtype}")
    for name, tensor, dtype in (
        ("param", param, param.dtype),
        ("grad", grad, param.dtype),
        ("exp_avg", exp_avg, exp_avg.dtype),
        ("exp_avg_sq", exp_avg_sq, exp_avg.dtype),
    ):
        alike = tensor.dtype == dtype and tensor.shape == param.shape and tensor.device == param.device
        if not (alike and tensor.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous {dtype} {tuple(param.shape)} on {param.device}, got {tensor.dtype} "
                f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
