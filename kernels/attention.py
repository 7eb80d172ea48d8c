"""Causal attention over packed segments whose queries and keys may differ in length.

A segment is one block of queries with the keys that they may see; the causal mask is aligned to the bottom right, so
that the last query sees every key. Prefix-shared packing (a prompt with several responses) is the case in which the
keys of the prompt belong to several segments. For query i of a segment with n queries and m keys:

    s_ij = q_i . k_j / sqrt(head_dim) for j <= i + m - n        p_i = softmax(s_i)        y_i = sum_j p_ij v_j
    ds_ij = p_ij (dy_i . v_j - dy_i . y_i)        dq_i = sum_j ds_ij k_j / sqrt(head_dim)
    dv_j = sum_i p_ij dy_i                        dk_j = sum_i ds_ij q_i / sqrt(head_dim)

The queries of all segments are the tokens in their order. What a packed attention kernel wants beside them, the keys of
one segment after the other, is a gather of rows, in which a prompt stands once for itself and once per response.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.kernels.gather import gather_rows, inverse_uses


class Segments:
    """Layout of S segments over T packed tokens, built on the CPU once per batch.

    Args:
        q_starts, q_lens: [S] queries of segment s are tokens q_starts[s] .. q_starts[s] + q_lens[s] - 1. Together the
            segments cover every token exactly once, in order.
        key_spans: [S] for each segment the (start, length) runs of tokens that are its keys, in order; the last q_len
            keys are the queries themselves.
        device: where the index tensors live.

    Attributes:
        n_tokens: T.
        q_lens, k_lens: [S] lists of int.
        cu_q, cu_k: int32 [S + 1] on `device`, where the queries and the keys of each segment begin.
        key_index: int64 [sum of k_lens], the token behind every key, segment after segment.
        key_uses: its inverse, see `gather_rows`.

    Raises:
        ValueError: when the segments do not tile the tokens, or keys do not end with the queries.
    """

    def __init__(
        self,
        q_starts: Sequence[int],
        q_lens: Sequence[int],
        key_spans: Sequence[Sequence[tuple[int, int]]],
        device: torch.device | str = "cpu",
    ) -> None:
        expected = 0
        for start, length, spans in zip(q_starts, q_lens, key_spans, strict=True):
            if start != expected or length < 1:
                raise ValueError(
                    f"segments must tile the tokens: expected a start of {expected}, got {start} (+{length})"
                )
            expected += length
            *earlier, (last, n_last) = spans
            outside = last < 0 or any(first < 0 or first + n > start for first, n in earlier)
            if outside or last + n_last != expected or n_last < length:
                raise ValueError(f"the keys of tokens {start}..{expected - 1} must end with these, got spans {spans}")
        self.n_tokens = expected
        self.q_lens = list(q_lens)
        self.k_lens = [sum(length for _, length in spans) for spans in key_spans]
        self.cu_q, self.cu_k = _cumulative(self.q_lens).to(device), _cumulative(self.k_lens).to(device)
        runs = [torch.arange(start, start + length) for spans in key_spans for start, length in spans]
        key_index = torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64)
        self.key_index, self.key_uses = key_index.to(device), inverse_uses(key_index, self.n_tokens).to(device)

    @classmethod
    def causal(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Independent sequences: every sequence is a segment whose keys are its own tokens."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        return cls(starts[:-1], lengths, [[(s, n)] for s, n in zip(starts, lengths, strict=False)], device)

    def gather_keys(self, x: Tensor) -> Tensor:
        """Keys or values [T, ...] -> [sum of k_lens, ...]; the gradient adds in a fixed order, without atomics."""
        return gather_rows(x, self.key_index, self.key_uses)

    @functools.cached_property
    def masks(self) -> list[Tensor | None]:
        """[S] bool [q_len, k_len], True where a query sees a key; None where that is the square causal mask."""
        return [
            None if n == m else torch.ones(n, m, dtype=torch.bool, device=self.cu_q.device).tril(m - n)
            for n, m in zip(self.q_lens, self.k_lens)
        ]


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


_backward_op = library.define(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q, "
    "Tensor cu_k, Tensor key_index) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *layout = inputs
    ctx.save_for_backward(q, k, v, *output, *layout)


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad.contiguous(), *ctx.saved_tensors), None, None, None


_forward_op = library.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, Tensor key_index) -> (Tensor, Tensor)",
    fake=lambda q, *_: (
        torch.empty_like(q),
        q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32)),
    ),
    setup_context=_setup_context,
    backward=_backward,
)


def _native(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return _forward_op(q, k, v, segments.cu_q, segments.cu_k, segments.key_index)[0]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        segments.gather_keys(k),
        segments.gather_keys(v),
        segments.cu_q,
        segments.cu_k,
        max(segments.q_lens),
        max(segments.k_lens),
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    return varlen_attn(
        q,
        segments.gather_keys(k),
        segments.gather_keys(v),
        segments.cu_q,
        segments.cu_k,
        max(segments.q_lens),
        max(segments.k_lens),
        **causal,
        **grouped,
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    outputs = []
    for query, key, value, mask in zip(
        q.split(segments.q_lens),
        segments.gather_keys(k).split(segments.k_lens),
        segments.gather_keys(v).split(segments.k_lens),
        segments.masks,
    ):
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


_BACKENDS = {"native": _native, "flash_attn": _flash_attn, "varlen_attn": _varlen_attn, "sdpa": _sdpa}


_HAS_NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("srlm::varlen_attention", "CPU")
_HAS_FLASH_ATTN = getattr(importlib.util.find_spec("flash_attn"), "origin", None) is not None


def backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What `varlen_attention` runs on.

    Returns:
        "native", the operator of csrc/, on the CPU. On CUDA, in fp16 and bf16 with a head_dim that FlashAttention takes
        (a multiple of 8 up to 256): "flash_attn", the package, if it is installed, else "varlen_attn" of
        torch.nn.attention.varlen. Everywhere else "sdpa", which is torch's `scaled_dot_product_attention` for one
        segment after the other.
    """
    if device.type == "cpu" and _HAS_NATIVE:
        return "native"
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256:
        return "flash_attn" if _HAS_FLASH_ATTN else "varlen_attn"
    return "sdpa"


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v inside each segment, causal, aligned to the bottom right.

    Gradients are bitwise repeatable, except that FlashAttention's d_q is so only under
    `torch.use_deterministic_algorithms(True)`.

    Args:
        q: [T, H, head_dim] floating; k, v: [T, H_kv, head_dim] with H a multiple of H_kv (grouped-query attention).
        segments: the layout of the T tokens.

    Returns:
        [T, H, head_dim] in q's dtype.

    Raises:
        ValueError: when shapes or dtypes do not fit together, or T differs from the layout's.
    """
    if q.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must be [T, H, head_dim] and k, v [T, H_kv, head_dim] with H a multiple of H_kv, got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[0] != segments.n_tokens:
        raise ValueError(f"q, k, v hold {q.shape[0]} tokens, segments {segments.n_tokens}")
    if not segments.n_tokens:
        return q.clone()
    name = backend(q.device, q.dtype, q.shape[2]) if library.fused() else "sdpa"
    return _BACKENDS[name](q, k, v, segments)
