"""Causal attention over packed segments whose queries and keys may differ in length.

A segment is one block of queries with the keys that they may see; the causal mask is aligned to the bottom right, so
that the last query sees every key. Prefix-shared packing (a prompt with several responses) is the case in which the
keys of the prompt belong to several segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from srlm_fast.kernels.gather import gather_rows, inverse_uses


@dataclass
class _Bucket:
    """Segments of similar key length, padded to a rectangle."""

    q_index: Tensor  # int64 [s * max_q], -1 where padded
    q_uses: Tensor
    k_index: Tensor  # int64 [s * max_k], -1 where padded
    k_uses: Tensor
    mask: Tensor  # bool [s, 1, max_q, max_k], True where a query sees a key
    shape: tuple[int, int, int]  # s, max_q, max_k


class Segments:
    """Layout of S segments over T packed tokens, built on the CPU once per batch.

    Args:
        q_starts, q_lens: [S] queries of segment s are tokens q_starts[s] .. q_starts[s] + q_lens[s] - 1. Together the
            segments cover every token exactly once, in order.
        key_spans: [S] for each segment the (start, length) runs of tokens that are its keys, in order; the last q_len
            keys are the queries themselves.
        device: where the index tensors live.

    Raises:
        ValueError: when the segments do not tile the tokens.
    """

    def __init__(
        self,
        q_starts: Sequence[int],
        q_lens: Sequence[int],
        key_spans: Sequence[Sequence[tuple[int, int]]],
        device: torch.device | str = "cpu",
    ) -> None:
        expected = 0
        for start, length in zip(q_starts, q_lens, strict=True):
            if start != expected or length < 1:
                raise ValueError(
                    f"segments must tile the tokens: expected a start of {expected}, got {start} (+{length})"
                )
            expected += length
        self.n_tokens = expected
        self.q_lens = list(q_lens)
        self.k_lens = [sum(length for _, length in spans) for spans in key_spans]
        self._buckets = self._build_buckets(q_starts, key_spans, device)
        total = sum(s * max_q for s, max_q, _ in (b.shape for b in self._buckets))
        flat = (
            torch.cat([b.q_index for b in self._buckets]).cpu() if self._buckets else torch.zeros(0, dtype=torch.int64)
        )
        token_of = torch.nonzero(flat >= 0).squeeze(1)
        out_index = torch.empty(self.n_tokens, dtype=torch.int64)
        out_index[flat[token_of]] = token_of
        self._out_index = out_index.to(device)
        self._out_uses = inverse_uses(out_index, total).to(device)

    @classmethod
    def causal(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Independent sequences: every sequence is a segment whose keys are its own tokens."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        return cls(starts[:-1], lengths, [[(s, n)] for s, n in zip(starts, lengths, strict=False)], device)

    def _build_buckets(self, q_starts, key_spans, device) -> list[_Bucket]:
        groups: dict[tuple[int, int], list[int]] = {}
        for s, (q_len, k_len) in enumerate(zip(self.q_lens, self.k_lens, strict=True)):
            groups.setdefault((q_len.bit_length(), k_len.bit_length()), []).append(s)
        buckets = []
        for members in groups.values():
            max_q = max(self.q_lens[s] for s in members)
            max_k = max(self.k_lens[s] for s in members)
            q_index = torch.full((len(members), max_q), -1, dtype=torch.int64)
            k_index = torch.full((len(members), max_k), -1, dtype=torch.int64)
            for row, s in enumerate(members):
                q_index[row, : self.q_lens[s]] = torch.arange(q_starts[s], q_starts[s] + self.q_lens[s])
                k_index[row, : self.k_lens[s]] = torch.cat([torch.arange(a, a + n) for a, n in key_spans[s]])
            k_len = torch.tensor([self.k_lens[s] for s in members])[:, None, None]
            q_len = torch.tensor([self.q_lens[s] for s in members])[:, None, None]
            query, key = torch.arange(max_q)[None, :, None], torch.arange(max_k)[None, None, :]
            mask = (key < k_len) & (key <= query + k_len - q_len)
            q_flat, k_flat = q_index.flatten(), k_index.flatten()
            buckets.append(
                _Bucket(
                    q_index=q_flat.to(device),
                    q_uses=inverse_uses(q_flat, self.n_tokens).to(device),
                    k_index=k_flat.to(device),
                    k_uses=inverse_uses(k_flat, self.n_tokens).to(device),
                    mask=mask[:, None].to(device),
                    shape=(len(members), max_q, max_k),
                )
            )
        return buckets

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of every segment through padded rectangles of `scaled_dot_product_attention`."""
        outputs = []
        for b in self._buckets:
            s, max_q, max_k = b.shape
            qb = gather_rows(q, b.q_index, b.q_uses).view(s, max_q, *q.shape[1:]).transpose(1, 2)
            kb = gather_rows(k, b.k_index, b.k_uses).view(s, max_k, *k.shape[1:]).transpose(1, 2)
            vb = gather_rows(v, b.k_index, b.k_uses).view(s, max_k, *v.shape[1:]).transpose(1, 2)
            out = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=b.mask, enable_gqa=q.shape[1] != k.shape[1])
            outputs.append(out.transpose(1, 2).reshape(s * max_q, *q.shape[1:]))
        return gather_rows(torch.cat(outputs), self._out_index, self._out_uses)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v inside each segment, causal, aligned to the bottom right.

    Args:
        q: [T, H, head_dim]; k, v: [T, H_kv, head_dim] with H a multiple of H_kv (grouped-query attention).
        segments: the layout of the T tokens.

    Returns:
        [T, H, head_dim] in q's dtype.

    Raises:
        ValueError: when T differs from the layout's.
    """
    if not q.shape[0] == k.shape[0] == v.shape[0] == segments.n_tokens:
        raise ValueError(f"q, k, v hold {q.shape[0]}, {k.shape[0]}, {v.shape[0]} tokens, segments {segments.n_tokens}")
    return segments.sdpa(q, k, v)
