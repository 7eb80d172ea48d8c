"""The pairwise preference losses from token log-probabilities: sums, values and gradients in one launch.

    s = sum of a response's log-probabilities      r = beta (s - reference) [/ length]      d = r_c - r_r - margin

for the chosen (c) and the rejected (r) response of a pair. With sigma the logistic function, eps the label smoothing:

    sigmoid     -(1 - eps) log sigma(d) - eps log sigma(-d)
                DPO (Rafailov et al. 2023, eq. 7); eps > 0: cDPO (Mitchell 2023); margin: ODPO (Amini et al. 2024);
                without reference, length-normalised and with margin gamma: SimPO (Meng et al. 2024, eq. 6)
    robust      [-(1 - eps) log sigma(d) + eps log sigma(-d)] / (1 - 2 eps)
                robust DPO, unbiased under labels flipped with probability eps (Chowdhury et al. 2024)
    hinge       max(0, 1 - d)
                SLiC (Zhao et al. 2023), normalised by the reference as in RSO (Liu et al. 2023)
    ipo         (d / beta - 1 / (2 beta))^2
                IPO (Azar et al. 2023, eq. 17, tau = beta) on sums; length-normalised it is the averaged form of TRL
    exo_pair    sigma(d) log [sigma(d) / (1 - eps)] + sigma(-d) log [sigma(-d) / eps]
                EXO (Ji et al. 2024, eq. 16); eps > 0
    discopop    -(1 - m) log sigma(d) + m exp(-d),  m = sigma(d / 0.05)
                DiscoPOP's log-ratio modulated loss (Lu et al. 2024, eq. 27)
    nca_pair    -log sigma(r_c) - log sigma(-r_c) / 2 - log sigma(-r_r) / 2
                NCA (Chen et al. 2024)
    sppo_hard   (r_c / beta - 1 / (2 beta))^2 + (r_r / beta + 1 / (2 beta))^2
                SPPO (Wu et al. 2024, eq. 4.7, eta = 1 / beta) with winning probabilities 1 and 0
    apo_zero    sigma(-r_c) + sigma(r_r)
                APO-zero (D'Oosterlinck et al. 2024, eq. 7)
    apo_down    sigma(r_c) + sigma(r_r - r_c)
                APO-down (D'Oosterlinck et al. 2024, eq. 8)

The kernel saves one coefficient per response, the gradient of its pair's value with respect to s; the backward is a
broadcast of these over the tokens. Sums are accumulated in float64 and rounded once.
"""

from __future__ import annotations

import math
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.triton_helpers import exp, store, tl, triton

BLOCK = 512

DISCOPOP_TAU = 0.05

_TAU = tl.constexpr(DISCOPOP_TAU)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], with a small relative error: 2 artanh(x / (2 + x)) as a series."""
    s = x / (2 + x)
    t = s * s
    series = 1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t / 15))))))
    return 2 * s * series


@triton.jit
def sigmoid(x):
    return 1 / (1 + exp(-x))


@triton.jit
def log_sigmoid(x):
    return tl.where(x < 0, x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def margin_loss(d, beta, eps, KIND: tl.constexpr):
    """A loss of the margin d alone: (value, slope)."""
    if KIND == "sigmoid":
        return -(1 - eps) * log_sigmoid(d) - eps * log_sigmoid(-d), eps - sigmoid(-d)
    elif KIND == "robust":
        scale = 1 / (1 - 2 * eps)
        value = (eps * log_sigmoid(-d) - (1 - eps) * log_sigmoid(d)) * scale
        return value, -sigmoid(-d) - eps * scale
    elif KIND == "hinge":
        return tl.where(d >= 1, 0.0, 1 - d), tl.where(d >= 1, 0.0, -1.0)
    elif KIND == "ipo":
        error = (d - 0.5) / beta
        return error * error, 2 * error / beta
    elif KIND == "exo_pair":
        chosen, rejected = log_sigmoid(d) - tl.log(1 - eps), log_sigmoid(-d) - tl.log(eps)
        p, q = sigmoid(d), sigmoid(-d)
        return p * chosen + q * rejected, p * q * (chosen - rejected)
    else:
        tl.static_assert(KIND == "discopop")
        m, rest = sigmoid(d / _TAU), sigmoid(-d / _TAU)
        logistic = log_sigmoid(d)
        exponential = exp(log_sigmoid(d / _TAU) - d)
        slope = m * rest / _TAU * logistic - rest * sigmoid(-d) + exponential * (rest / _TAU - 1)
        return exponential - rest * logistic, slope


@triton.jit
def reward_loss(r_c, r_r, beta, KIND: tl.constexpr):
    """A loss of both rewards: (value, derivative by r_c, derivative by r_r)."""
    if KIND == "nca_pair":
        value = -log_sigmoid(r_c) - 0.5 * log_sigmoid(-r_c) - 0.5 * log_sigmoid(-r_r)
        return value, 0.5 * sigmoid(r_c) - sigmoid(-r_c), 0.5 * sigmoid(r_r)
    elif KIND == "sppo_hard":
        chosen, rejected = (r_c - 0.5) / beta, (r_r + 0.5) / beta
        return chosen * chosen + rejected * rejected, 2 * chosen / beta, 2 * rejected / beta
    elif KIND == "apo_zero":
        return sigmoid(-r_c) + sigmoid(r_r), -sigmoid(r_c) * sigmoid(-r_c), sigmoid(r_r) * sigmoid(-r_r)
    else:
        tl.static_assert(KIND == "apo_down")
        d = r_c - r_r
        slope = sigmoid(d) * sigmoid(-d)
        return sigmoid(r_c) + sigmoid(-d), sigmoid(r_c) * sigmoid(-r_c) - slope, slope


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


def _sigmoid(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    return -(1 - eps) * F.logsigmoid(d) - eps * F.logsigmoid(-d), eps - torch.sigmoid(-d)


def _robust(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    scale = 1 / (1 - 2 * eps)
    value = (eps * F.logsigmoid(-d) - (1 - eps) * F.logsigmoid(d)) * scale
    return value, -torch.sigmoid(-d) - eps * scale


def _hinge(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    return F.relu(1 - d), -(d < 1).to(d.dtype)


def _ipo(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    error = (d - 0.5) / beta
    return error.square(), 2 * error / beta


def _exo_pair(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    chosen, rejected = F.logsigmoid(d) - math.log(1 - eps), F.logsigmoid(-d) - math.log(eps)
    p, q = torch.sigmoid(d), torch.sigmoid(-d)
    return p * chosen + q * rejected, p * q * (chosen - rejected)


def _discopop(d: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    m, rest = torch.sigmoid(d / DISCOPOP_TAU), torch.sigmoid(-d / DISCOPOP_TAU)
    logistic = F.logsigmoid(d)
    exponential = (F.logsigmoid(d / DISCOPOP_TAU) - d).exp()
    slope = m * rest / DISCOPOP_TAU * logistic - rest * torch.sigmoid(-d) + exponential * (rest / DISCOPOP_TAU - 1)
    return exponential - rest * logistic, slope


def _nca_pair(r_c: Tensor, r_r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    value = -F.logsigmoid(r_c) - 0.5 * F.logsigmoid(-r_c) - 0.5 * F.logsigmoid(-r_r)
    return value, 0.5 * torch.sigmoid(r_c) - torch.sigmoid(-r_c), 0.5 * torch.sigmoid(r_r)


def _sppo_hard(r_c: Tensor, r_r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected = (r_c - 0.5) / beta, (r_r + 0.5) / beta
    return chosen.square() + rejected.square(), 2 * chosen / beta, 2 * rejected / beta


def _apo_zero(r_c: Tensor, r_r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    p, q = torch.sigmoid(r_r), torch.sigmoid(-r_c)
    return q + p, -torch.sigmoid(r_c) * q, p * torch.sigmoid(-r_r)


def _apo_down(r_c: Tensor, r_r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    p, q = torch.sigmoid(r_c), torch.sigmoid(r_r - r_c)
    slope = q * torch.sigmoid(r_c - r_r)
    return p + q, p * torch.sigmoid(-r_c) - slope, slope


MARGIN_LOSSES = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "discopop": _discopop,
}
"""Losses of d alone: fn(d, beta, eps) -> (value, slope)."""

REWARD_LOSSES = {"nca_pair": _nca_pair, "sppo_hard": _sppo_hard, "apo_zero": _apo_zero, "apo_down": _apo_down}
"""Losses of both rewards: fn(r_c, r_r, beta) -> (value, derivative by r_c, derivative by r_r)."""

KINDS = (*MARGIN_LOSSES, *REWARD_LOSSES)

SMOOTHED = ("sigmoid", "robust", "exo_pair")
"""The kinds with a label smoothing."""


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
    """Values of a pairwise preference loss; the module's docstring has the equation and the paper of every kind.

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
