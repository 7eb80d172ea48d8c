"""Segmented attention against plain float64 attention written out per segment."""

import sys
from types import ModuleType

import pytest
import torch
from kernel_case import ROUNDING, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from srlm_fast.kernels import attention, library
from srlm_fast.kernels.attention import Segments, backend, varlen_attention
from srlm_fast.native_ops import native_available

SHARED_PREFIX = (
    [0, 6, 9, 18, 19],
    [6, 3, 9, 1, 2],
    [[(0, 6)], [(0, 6), (6, 3)], [(0, 6), (9, 9)], [(18, 1)], [(18, 3)]],
)
"""[prompt 6 | chosen 3 | rejected 9] and [prompt 1 | one response 2]: starts, lengths and spans of keys."""


def plain_segment(q, k, v):
    """One segment by the definition: q [n, H, d], k, v [m, H_kv, d]."""
    n, m, groups = len(q), len(k), q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, 1)) / q.shape[-1] ** 0.5
    visible = torch.arange(m)[None] <= torch.arange(n)[:, None] + m - n
    weights = scores.masked_fill(~visible.to(q.device), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(groups, 1))


def plain(q, k, v, layout):
    """Attention over a layout (starts, lengths, spans), keys picked token by token."""
    outputs = []
    for start, length, spans in zip(*layout):
        keys = [token for first, n in spans for token in range(first, first + n)]
        outputs.append(plain_segment(q[start : start + length], k[keys], v[keys]))
    return torch.cat(outputs)


def random_qkv(n, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, heads, head_dim), (n, kv_heads, head_dim), (n, kv_heads, head_dim), (n, heads, head_dim))
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    return [t.requires_grad_() for t in made[:3]], made[3]


def independent(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return starts, lengths, [[(s, n)] for s, n in zip(starts, lengths)]


def random_layout():
    """Prompts of many lengths with up to four responses, one continued segment, one token alone."""
    generator, layout, start = torch.Generator().manual_seed(0), ([], [], []), 0

    def add(length, earlier=()):
        nonlocal start
        for column, value in zip(layout, (start, length, [*earlier, (start, length)])):
            column.append(value)
        start += length

    for prompt, *responses in torch.randint(1, 45, (6, 5), generator=generator).tolist():
        prompt_start = start
        add(prompt)
        for response in responses[: prompt % 5]:
            add(response, [(prompt_start, prompt)])
    add(1)
    layout[0].append(start), layout[1].append(5), layout[2].append([(start - 1, 6)])
    return layout


LAYOUTS = {
    "one token": independent([1]),
    "independent": independent([5, 1, 17, 64, 3]),
    "alike": independent([33] * 4),
    "shared prefix": SHARED_PREFIX,
    "many": random_layout(),
}


def check(run, layout, dtype=torch.float64, device="cpu", tolerance=None, **shape):
    """`run`(q, k, v, segments) and its gradients against the definition in float64."""
    segments = Segments(*layout, device)
    inputs, upstream = random_qkv(segments.n_tokens, dtype=dtype, device=device, **shape)
    out = run(*inputs, segments)
    assert out.dtype == dtype and out.shape == inputs[0].shape
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = plain(*exact_inputs, layout)
    ours = [out, *torch.autograd.grad(out, inputs, upstream)]
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, upstream.double())]
    tolerance = tolerance or 2 * ROUNDING[dtype]  # the output is rounded once before the backward reads it
    for a, b in zip(ours, expected):
        assert relative_error(a, b) < tolerance or not b.any() and a.abs().max() < tolerance


@pytest.fixture(params=["native", "sdpa"])
def path(request):
    """Runs a test with the C++ operator and with torch's own attention."""
    if request.param == "native" and not native_available():
        pytest.skip("native operators not built")
    with library.using("fused" if request.param == "native" else "reference"):
        yield request.param


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_value_and_gradients(path, layout):
    check(varlen_attention, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 32), (4, 1, 20), (3, 3, 1)])
def test_dtypes_and_heads(path, dtype, heads, kv_heads, head_dim):
    check(varlen_attention, LAYOUTS["many"], dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def test_bitwise_repeatable(path):
    """And the same for any number of threads, where the arithmetic is ours."""

    def run():
        (q, k, v), _ = random_qkv(segments.n_tokens, dtype=torch.float32)
        out = varlen_attention(q, k, v, segments)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    segments = Segments(*LAYOUTS["many"])
    expected = run()
    torch.set_num_threads(3 if path == "native" else 1)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), expected))
    finally:
        torch.set_num_threads(1)


def test_large_scores(path):
    """Scores up to 1e4 saturate the softmax; its value and gradients stay finite and right."""
    segments = Segments(*SHARED_PREFIX)
    inputs, _ = random_qkv(segments.n_tokens, dtype=torch.float32)
    q, k, v = (inputs[0] * 60).detach(), (inputs[1] * 60).detach(), inputs[2].detach()
    out = varlen_attention(q, k, v, segments)
    assert relative_error(out, plain(q.double(), k.double(), v.double(), SHARED_PREFIX)) < 2e-5  # of scores in fp32


def test_nan_stays_in_its_segment(path):
    segments = Segments(*SHARED_PREFIX)
    (q, k, v), _ = random_qkv(segments.n_tokens, dtype=torch.float32)
    with torch.no_grad():
        k[7, 0, 3] = torch.nan  # the chosen answer's second token, read by its heads 0 and 1
    spoilt = torch.isnan(varlen_attention(q, k, v, segments)).any(-1)
    assert not spoilt[:, 2:].any() and spoilt[7:9, :2].all() and not spoilt[:6].any() and not spoilt[9:].any()


def test_no_tokens(path):
    (q, k, v), _ = random_qkv(0)
    out = varlen_attention(q, k, v, Segments([], [], []))
    assert out.shape == (0, 4, 8)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True) if g is not None] == [q.shape]


def test_views_of_one_projection(path):
    """q, k and v as slices of one tensor, as a fused projection gives them."""
    (q, k, v), _ = random_qkv(21)
    fused = torch.cat([q, k, v], dim=1).detach()
    out = varlen_attention(fused[:, :4], fused[:, 4:6], fused[:, 6:], Segments(*SHARED_PREFIX))
    torch.testing.assert_close(out, varlen_attention(q, k, v, Segments(*SHARED_PREFIX)), rtol=0, atol=1e-15)


def test_gradcheck(path):
    inputs, _ = random_qkv(21, heads=2, kv_heads=1, head_dim=3)
    segments = Segments(*SHARED_PREFIX)
    assert torch.autograd.gradcheck(lambda *qkv: varlen_attention(*qkv, segments), inputs)


def test_compiles_to_one_node():
    segments = Segments(*SHARED_PREFIX)
    inputs, grad = random_qkv(21, dtype=torch.float32)
    compiled = torch.compile(lambda *qkv: varlen_attention(*qkv, segments), fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*inputs), varlen_attention(*inputs, segments)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad), rtol=0, atol=0
    )


@pytest.mark.skipif(not native_available(), reason="native operators not built")
def test_operators_are_registered_soundly():
    (q, k, v), grad = random_qkv(21, dtype=torch.float32)
    segments = Segments(*SHARED_PREFIX)
    layout = (segments.cu_q, segments.cu_k, segments.key_index)
    torch.library.opcheck(torch.ops.srlm.varlen_attention.default, (q, k, v, *layout))
    q, k, v = (t.detach() for t in (q, k, v))
    saved = torch.ops.srlm.varlen_attention(q, k, v, *layout)
    torch.library.opcheck(torch.ops.srlm.varlen_attention_backward.default, (grad, q, k, v, *saved, *layout))


def packed_by_definition(q, k, v, cu_q, cu_k):
    """What a packed kernel must compute, from its arguments alone."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(q) == cu_q[-1] and len(k) == len(v) == cu_k[-1]
    q_lens, k_lens = cu_q.diff().tolist(), cu_k.diff().tolist()
    parts = zip(q.split(q_lens), k.split(k_lens), v.split(k_lens))
    return torch.cat([plain_segment(*part) for part in parts]), max(q_lens), max(k_lens)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("torch_version", ["2.10", "2.11", "2.13"])
def test_torch_varlen_attn_is_called_rightly(monkeypatch, layout, torch_version):
    """The packed layout, with each of the signatures that torch's varlen_attn has had."""

    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
        out, longest_q, longest_k = packed_by_definition(query, key, value, cu_seq_q, cu_seq_k)
        assert is_causal and (max_q, max_k) == (longest_q, longest_k)
        return out

    def of_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=window_size == (-1, 0))

    def of_2_13(*args, enable_gqa=False, window_size=(-1, -1)):
        assert enable_gqa
        return of_2_11(*args, window_size=window_size)

    functions = {"2.10": of_2_10, "2.11": of_2_11, "2.13": of_2_13}
    monkeypatch.setattr(varlen, "varlen_attn", functions[torch_version])
    check(attention._varlen_attn, layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_flash_attn_is_called_rightly(monkeypatch, layout):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        out, longest_q, longest_k = packed_by_definition(q, k, v, cu_seqlens_q, cu_seqlens_k)
        assert causal and (max_seqlen_q, max_seqlen_k) == (longest_q, longest_k)
        return out

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    check(attention._flash_attn, layout)


def test_arguments_fit_the_installed_varlen_attn():
    """Tensors without data go through torch's real function: forward and backward, and as fake CUDA tensors."""
    segments = Segments(*SHARED_PREFIX, "meta")
    shapes = [(21, heads, 64) for heads in (4, 2, 2)]
    q, k, v = (torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes)
    out = attention._varlen_attn(q, k, v, segments)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert [g.shape for g in torch.autograd.grad(out, (q, k, v), torch.empty_like(out))] == shapes
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for name in ("cu_q", "cu_k", "key_index", "key_uses"):
            setattr(segments, name, torch.empty_like(getattr(segments, name), device="cuda"))
        q, k, v = (torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in shapes)
        assert attention._varlen_attn(q, k, v, segments).device.type == "cuda"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cuda", torch.bfloat16, 128, "flash_attn, else varlen_attn"),
        ("cuda", torch.float16, 64, "flash_attn, else varlen_attn"),
        ("cuda", torch.float32, 128, "sdpa"),
        ("cuda", torch.bfloat16, 36, "sdpa"),
        ("cuda", torch.bfloat16, 264, "sdpa"),
        ("meta", torch.bfloat16, 64, "sdpa"),
        ("cpu", torch.float32, 36, "native, else sdpa"),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_backend(monkeypatch, device, dtype, head_dim, installed, expected):
    monkeypatch.setattr(attention, "_HAS_FLASH_ATTN", installed)
    monkeypatch.setattr(attention, "_HAS_NATIVE", installed)
    preferred, _, otherwise = expected.partition(", else ")
    assert backend(torch.device(device), dtype, head_dim) == (preferred if installed else otherwise or preferred)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [attention._flash_attn, attention._varlen_attn, attention._sdpa])
def test_on_cuda(run, dtype, head_dim):
    if run is attention._flash_attn:
        pytest.importorskip("flash_attn")
    check(run, LAYOUTS["many"], dtype, "cuda", tolerance=8 * ROUNDING[dtype], head_dim=head_dim)


@pytest.mark.gpu
def test_fp32_on_cuda():
    check(varlen_attention, LAYOUTS["many"], torch.float32, "cuda", tolerance=1e-5)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (([0, 4], [3, 2], [[(0, 3)], [(4, 2)]]), "tile.*3, got 4"),
        (([0, 3], [3, 0], [[(0, 3)], [(3, 0)]]), "tile"),
        (([0, 3], [3, 2], [[(0, 3)], [(0, 3)]]), r"tokens 3..4 must end"),
        (([0, 3], [3, 2], [[(0, 3)], [(0, 3), (4, 1)]]), r"tokens 3..4 must end"),
        (([0, 3], [3, 2], [[(0, 5), (0, 3)], [(3, 2)]]), r"tokens 0..2 must end"),
        (([0, 3], [3, 2], [[(0, 3)], [(-1, 2), (3, 2)]]), r"tokens 3..4 must end"),
        (([0, 3], [3, 2], [[(0, 3)], [(-1, 6)]]), r"tokens 3..4 must end"),
    ],
)
def test_wrong_layouts_are_refused(layout, says):
    with pytest.raises(ValueError, match=says):
        Segments(*layout)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "says"),
    [
        (((4, 2, 8), (4, 2, 8), (4, 2, 8)), "ddd", "4 tokens, segments 5"),
        (((5, 16), (5, 16), (5, 16)), "ddd", r"\[T, H, head_dim\]"),
        (((5, 3, 8), (5, 2, 8), (5, 2, 8)), "ddd", "multiple of H_kv"),
        (((5, 2, 8), (5, 2, 4), (5, 2, 4)), "ddd", r"\(5, 2, 4\)"),
        (((5, 2, 8), (5, 2, 8), (4, 2, 8)), "ddd", r"\(4, 2, 8\)"),
        (((5, 2, 8), (5, 2, 8), (5, 2, 8)), "dfd", "one dtype.*float32"),
    ],
)
def test_bad_arguments_are_named(shapes, dtypes, says):
    kinds = {"d": torch.float64, "f": torch.float32}
    with pytest.raises(ValueError, match=says):
        varlen_attention(*(torch.zeros(s, dtype=kinds[d]) for s, d in zip(shapes, dtypes)), Segments.causal([5]))
