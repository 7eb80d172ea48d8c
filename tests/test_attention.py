"""Segmented attention against plain float64 attention written out per segment."""

import pytest
import torch

from srlm_fast.kernels.attention import Segments, varlen_attention


def plain(q, k, v, q_start, q_len, keys):
    """One segment by the definition, in float64: queries q_start.., keys a list of token indices."""
    groups = q.shape[1] // k.shape[1]
    qs, ks = q[q_start : q_start + q_len], k[keys].repeat_interleave(groups, 1)
    vs = v[keys].repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", qs, ks) / q.shape[-1] ** 0.5
    visible = torch.arange(len(keys))[None] <= torch.arange(q_len)[:, None] + len(keys) - q_len
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), vs)


def random_qkv(n, heads=4, kv_heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, heads, head_dim), (n, kv_heads, head_dim), (n, kv_heads, head_dim))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def check(segments, spans, q_starts, q_lens):
    q, k, v = random_qkv(segments.n_tokens)
    out = varlen_attention(q, k, v, segments)
    expected = torch.cat(
        [
            plain(q, k, v, s, n, [t for a, m in keys for t in range(a, a + m)])
            for s, n, keys in zip(q_starts, q_lens, spans, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    reference = torch.autograd.grad(expected, (q, k, v), upstream)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("lengths", [[1], [5, 1, 17, 64, 3], [33] * 4])
def test_independent_sequences(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    check(Segments.causal(lengths), [[(s, n)] for s, n in zip(starts, lengths, strict=True)], starts, lengths)


def test_shared_prefix_is_exact():
    """[prompt 6 | chosen 3 | rejected 9] and [prompt 1 | one response 2]: outputs and gradients of q, k, v."""
    q_starts, q_lens = [0, 6, 9, 18, 19], [6, 3, 9, 1, 2]
    spans = [[(0, 6)], [(0, 6), (6, 3)], [(0, 6), (9, 9)], [(18, 1)], [(18, 1), (19, 2)]]
    check(Segments(q_starts, q_lens, spans), spans, q_starts, q_lens)


def test_bitwise_repeatable():
    segments = Segments([0, 6, 9], [6, 3, 9], [[(0, 6)], [(0, 6), (6, 3)], [(0, 6), (9, 9)]])
    q, k, v = (t.detach().float().requires_grad_() for t in random_qkv(18))
    grads = [torch.autograd.grad(varlen_attention(q, k, v, segments).square().sum(), (q, k, v)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match="tile"):
        Segments([0, 4], [3, 2], [[(0, 3)], [(4, 2)]])
    q, k, v = random_qkv(4)
    with pytest.raises(ValueError, match="4, 4, 4 tokens, segments 5"):
        varlen_attention(q, k, v, Segments.causal([5]))
