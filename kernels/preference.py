"""The pairwise preference losses from token log-probabilities: sums, values and gradients in one launch.

`pair_losses.py` has the losses, functions of both rewards of a pair; here are the sums s of a response's token
log-probabilities that rewards are made of, the launch and the gradient. The kernel saves one coefficient per response,
the derivative of its pair's value by s; the backward is a broadcast of these over the tokens. Sums are accumulated in
float64 and rounded once.
"""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.pair_losses import KINDS, MARGIN_LOSSES, REWARD_LOSSES, SMOOTHED, margin_loss, reward_loss
from srlm_fast.kernels.triton_helpers import store, tl, triton

BLOCK = 512


@triton.jit
def tokens_before(lengths, sequence, BLOCK: tl.constexpr):
    """The sum of the first `sequence` lengths."""
    total = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, sequence, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        total += tl.load(lengths + index, mask=index < sequence, other=0)
    return tl.sum(total)


@triton.jit
def token_sum(logps, begin, length, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for offset in range(0, length, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        total += tl.load(logps + begin + index, mask=index < length, other=0.0).to(tl.float32).to(tl.float64)
    return tl.sum(total).to(tl.float32)


@triton.jit
def preference_kernel(
    logps,
    lengths,
    reference,
    values,
    sums,
    coefficients,
    beta,
    label_smoothing,
    margin,
    KIND: tl.constexpr,
    MARGIN: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    c, r = 2 * pair, 2 * pair + 1
    begin, c_length, r_length = tokens_before(lengths, c, BLOCK), tl.load(lengths + c), tl.load(lengths + r)
    s_c, s_r = token_sum(logps, begin, c_length, BLOCK), token_sum(logps, begin + c_length, r_length, BLOCK)
    store(sums + c, s_c)
    store(sums + r, s_r)
    if HAS_REFERENCE:
        s_c -= tl.load(reference + c).to(tl.float32)
        s_r -= tl.load(reference + r).to(tl.float32)
    scale_c, scale_r = beta, beta
    if LENGTH_NORMALISED:
        scale_c, scale_r = beta / tl.maximum(c_length, 1).to(tl.float32), beta / tl.maximum(r_length, 1).to(tl.float32)
    r_c, r_r = scale_c * s_c, scale_r * s_r
    if MARGIN:
        value, slope = margin_loss(r_c - r_r - margin, beta, label_smoothing, KIND)
        d_c, d_r = slope, -slope
    else:
        value, d_c, d_r = reward_loss(r_c, r_r, beta, KIND)
    store(values + pair, value)
    store(coefficients + c, d_c * scale_c)
    store(coefficients + r, d_r * scale_r)


@triton.jit
def preference_backward_kernel(grad_values, grad_sums, coefficients, lengths, d_logps, BLOCK: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    begin, length = tokens_before(lengths, sequence, BLOCK), tl.load(lengths + sequence)
    gradient = tl.load(grad_values + sequence // 2).to(tl.float32) * tl.load(coefficients + sequence).to(tl.float32)
    gradient += tl.load(grad_sums + sequence).to(tl.float32)
    for offset in range(0, length, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        store(d_logps + begin + index, tl.zeros((BLOCK,), tl.float32) + gradient, index < length)


def _forward_triton(
    logps: Tensor,
    lengths: Tensor,
    reference: Tensor | None,
    kind: str,
    beta: float,
    label_smoothing: float,
    margin: float,
    length_normalised: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values, sums, coefficients = _fake(logps, lengths)
    if len(values):
        preference_kernel[(len(values),)](
            logps,
            lengths,
            logps if reference is None else reference,
            values,
            sums,
            coefficients,
            beta,
            label_smoothing,
            margin,
            KIND=kind,
            MARGIN=kind in MARGIN_LOSSES,
            HAS_REFERENCE=reference is not None,
            LENGTH_NORMALISED=length_normalised,
            BLOCK=BLOCK,
        )
    return values, sums, coefficients


def _backward_triton(
    grad_values: Tensor, grad_sums: Tensor, coefficients: Tensor, lengths: Tensor, n_tokens: int
) -> Tensor:
    d_logps = coefficients.new_empty(n_tokens)
    if n_tokens:
        preference_backward_kernel[(len(lengths),)](grad_values, grad_sums, coefficients, lengths, d_logps, BLOCK=BLOCK)
    return d_logps


def compile_cases() -> None:
    """The launches that bench/compile_report.py compiles."""
    logps, lengths = torch.empty(4096, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    for kind in KINDS:
        _forward_triton(logps, lengths, lengths.float(), kind, 0.1, 0.1, 0.0, False)
    values, sums, coefficients = _forward_triton(logps, lengths, None, "sigmoid", 0.1, 0.0, 0.5, True)
    _backward_triton(values, sums, coefficients, lengths, len(logps))


def _token_sums(logps: Tensor, lengths: Tensor) -> Tensor:
    unsafe = logps.is_cuda or not len(lengths)  # the check of the lengths would wait for a GPU, and fails on none
    return torch.segment_reduce(logps.double(), "sum", lengths=lengths, unsafe=unsafe).to(logps.dtype)


def _pair_values(
    sums: Tensor,
    lengths: Tensor,
    reference: Tensor | None,
    kind: str,
    beta: float,
    label_smoothing: float,
    margin: float,
    length_normalised: bool,
) -> tuple[Tensor, Tensor]:
    """(values [S / 2], their derivatives by the sums [S])."""
    scale = torch.full_like(sums, beta)
    if length_normalised:
        scale = scale / lengths.clamp_min(1)
    r_c, r_r = (scale * (sums if reference is None else sums - reference)).view(-1, 2).unbind(1)
    if kind in MARGIN_LOSSES:
        values, slope = MARGIN_LOSSES[kind](r_c - r_r - margin, beta, label_smoothing)
        d_c, d_r = slope, -slope
    else:
        values, d_c, d_r = REWARD_LOSSES[kind](r_c, r_r, beta)
    return values, torch.stack((d_c, d_r), 1).flatten() * scale


def _forward_torch(
    logps: Tensor, lengths: Tensor, reference: Tensor | None, kind: str, *options: float
) -> tuple[Tensor, Tensor, Tensor]:
    sums = _token_sums(logps, lengths)
    values, coefficients = _pair_values(sums, lengths, reference, kind, *options)
    return values, sums, coefficients


def _backward_torch(
    grad_values: Tensor, grad_sums: Tensor, coefficients: Tensor, lengths: Tensor, n_tokens: int
) -> Tensor:
    gradient = grad_values.repeat_interleave(2) * coefficients + grad_sums
    return gradient.repeat_interleave(lengths, output_size=n_tokens)


def _fake(logps: Tensor, lengths: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    n = lengths.shape[0]
    return logps.new_empty(n // 2), logps.new_empty(n), logps.new_empty(n)


_backward_op = library.define(
    "preference_loss_backward(Tensor grad_values, Tensor grad_sums, Tensor coefficients, Tensor lengths, "
    "SymInt n_tokens) -> Tensor",
    fake=lambda grad_values, grad_sums, coefficients, lengths, n_tokens: coefficients.new_empty(n_tokens),
    torch_impl=_backward_torch,
    triton_impl=_backward_triton,
)


def _setup_context(ctx, inputs, output) -> None:
    logps, lengths = inputs[:2]
    ctx.save_for_backward(output[2], lengths)
    ctx.n_tokens = logps.shape[0]


def _backward(ctx, grad_values: Tensor, grad_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_logps = _backward_op(grad_values.contiguous(), grad_sums.contiguous(), *ctx.saved_tensors, ctx.n_tokens)
    return d_logps, None, None, None, None, None, None, None


_forward_op = library.define(
    "preference_loss(Tensor logps, Tensor lengths, Tensor? reference, str kind, float beta, float label_smoothing, "
    "float margin, bool length_normalised) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    torch_impl=_forward_torch,
    triton_impl=_forward_triton,
    setup_context=_setup_context,
    backward=_backward,
)


def preference_loss(
    logps: Tensor,
    lengths: Tensor,
    reference: Tensor | None,
    *,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    length_normalised: bool = False,
) -> tuple[Tensor, Tensor]:
    """Values of a pairwise preference loss; `pair_losses` has the equation and the paper of every kind.

    Args:
        logps: [N] fp32 (or fp64), the log-probabilities of all response tokens, response after response.
        lengths: int64 [S], tokens per response, with sum N (checked on the CPU only: on a GPU it would have to be
            waited for). Responses come as chosen, rejected, chosen, rejected, ...
        reference: [S] in the dtype of `logps`, the reference model's sums (no gradient); None: zero.
        kind: one of `KINDS`.
        beta: the scale of the rewards, above 0.
        label_smoothing: eps, in [0, 0.5); for `SMOOTHED` only, and above 0 for exo_pair.
        margin: subtracted from r_c - r_r; for `MARGIN_LOSSES` only.
        length_normalised: rewards are divided by the length, hence are beta times a mean per token.

    Returns:
        (values [S / 2], sums [S]) in the dtype of `logps`; gradients flow to `logps` from both.

    Raises:
        ValueError: naming the argument of a wrong shape, dtype or value, or the option that the kind does not have.
    """
    _check(logps, lengths, reference, kind, beta, label_smoothing, margin)
    logps, lengths = logps.contiguous(), lengths.contiguous()
    reference = None if reference is None else reference.contiguous()
    if not library.fused():
        sums = _token_sums(logps, lengths)
        options = (kind, beta, label_smoothing, margin, length_normalised)
        return _pair_values(sums, lengths, reference, *options)[0], sums
    return _forward_op(logps, lengths, reference, kind, beta, label_smoothing, margin, length_normalised)[:2]


def _check(
    logps: Tensor,
    lengths: Tensor,
    reference: Tensor | None,
    kind: str,
    beta: float,
    label_smoothing: float,
    margin: float,
) -> None:
    if logps.dim() != 1 or logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logps must be fp32 or fp64 [N], got {logps.dtype} {tuple(logps.shape)}")
    if lengths.dim() != 1 or lengths.dtype != torch.int64 or lengths.shape[0] % 2 or lengths.device != logps.device:
        raise ValueError(
            f"lengths must be int64 [S] with S even, on {logps.device}, got {lengths.dtype} {tuple(lengths.shape)} "
            f"on {lengths.device}"
        )
    if reference is not None and (
        reference.shape != lengths.shape or reference.dtype != logps.dtype or reference.device != logps.device
    ):
        raise ValueError(
            f"reference must be {logps.dtype} {tuple(lengths.shape)} on {logps.device}, got {reference.dtype} "
            f"{tuple(reference.shape)} on {reference.device}"
        )
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}" + f"; meant {near[0]!r}?" * bool(near))
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (kind == "exo_pair" and label_smoothing == 0):
        raise ValueError(f"label_smoothing must be in [0, 0.5), for exo_pair above 0; got {label_smoothing}")
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(f"label_smoothing={label_smoothing} has no meaning for {kind}, only for {', '.join(SMOOTHED)}")
    if margin and kind not in MARGIN_LOSSES:
        raise ValueError(f"margin={margin} has no meaning for {kind}, only for {', '.join(MARGIN_LOSSES)}")
