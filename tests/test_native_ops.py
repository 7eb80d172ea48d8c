"""The native operators against their plain-Python versions and against the definition."""

import random
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from srlm_fast import native_ops
from srlm_fast.errors import UserError
from srlm_fast.native_ops import first_fit_decreasing


def need_native() -> None:
    """Skips where the operators could not be built; where they could be, their absence is a failure."""
    if not native_ops.native_available():
        if shutil.which("cmake") and shutil.which("c++"):
            pytest.fail("native operators not built: python setup.py build_ext --inplace")
        pytest.skip("no CMake or C++ compiler to build the native operators with")


@pytest.fixture(params=["native", "python"])
def either(request, monkeypatch):
    """Runs the test with the C++ operators, then without them."""
    if request.param == "python":
        monkeypatch.setattr(native_ops, "native_available", lambda: False)
    else:
        need_native()


def by_definition(lengths: list[int], budget: int) -> list[int]:
    bins, room = [0] * len(lengths), []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b, left in enumerate(room) if left >= lengths[item]]
        if not fitting:
            room.append(budget)
        bins[item] = fitting[0] if fitting else len(room) - 1
        room[bins[item]] -= lengths[item]
    return bins


def test_random_cases(either):
    rng = random.Random(0)
    for _ in range(200):
        budget = rng.randint(1, 64)
        lengths = [rng.randint(0, budget) for _ in range(rng.randint(0, 120))]
        got = first_fit_decreasing(torch.tensor(lengths, dtype=torch.int64), budget)
        assert got.dtype == torch.int64
        assert got.tolist() == by_definition(lengths, budget)


def test_strided_lengths(either):
    lengths = torch.tensor([5, 9, 3, 9, 2, 9])[::2]
    assert first_fit_decreasing(lengths, 5).tolist() == [0, 1, 1]


def test_ties_go_by_index(either):
    assert first_fit_decreasing(torch.tensor([3, 3, 3, 2, 2, 2]), 5).tolist() == [0, 1, 2, 0, 1, 2]


def test_large_case_agrees():
    need_native()
    lengths = torch.randint(1, 4097, (20_000,), generator=torch.Generator().manual_seed(0))
    bins = first_fit_decreasing(lengths, 4096)
    assert bins.tolist() == native_ops._first_fit_decreasing(lengths.tolist(), 4096)
    assert torch.zeros(int(bins.max()) + 1, dtype=torch.int64).index_add_(0, bins, lengths).max() <= 4096


@pytest.mark.parametrize("lengths, item", [([1, 6, 7], 1), ([2, -1], 1)])
def test_unfit_item_is_named(either, lengths, item):
    with pytest.raises(UserError, match=rf"item {item} has {lengths[item]} tokens"):
        first_fit_decreasing(torch.tensor(lengths), 5)


def test_operator_checks_its_own_arguments():
    need_native()
    with pytest.raises(ValueError, match="item 0 has length 6"):
        torch.ops.srlm.first_fit_decreasing(torch.tensor([6]), 5)
    with pytest.raises(ValueError, match="int64"):
        torch.ops.srlm.first_fit_decreasing(torch.tensor([1.0]), 5)


def decode_case(n: int, n_kv_heads: int, group: int, head_dim: int, length: int) -> list[torch.Tensor]:
    """q, k, v, caches (views of larger ones, garbage past each row's position) and positions."""
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(n, n_kv_heads * group, head_dim, generator=generator) * 2
    k, v = torch.randn(2, n, n_kv_heads, head_dim, generator=generator)
    k_cache, v_cache = torch.randn(2, n + 3, n_kv_heads, length + 5, head_dim, generator=generator)[:, :n, :, :length]
    positions = torch.randint(0, length, (n,), generator=generator)
    return [q, k, v, k_cache, v_cache, positions]


@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 1), (5, 2, 1, 32, 70), (16, 2, 4, 64, 129), (3, 1, 8, 8, 40)])
def test_decode_attention(either, shape):
    q, k, v, k_cache, v_cache, positions = case = decode_case(*shape)
    expected = torch.empty_like(q, dtype=torch.float64)
    for row, position in enumerate(positions):
        keys = torch.cat((k_cache[row, :, :position], k[row, :, None]), 1).double()
        values = torch.cat((v_cache[row, :, :position], v[row, :, None]), 1).double()
        expected[row] = torch.nn.functional.scaled_dot_product_attention(
            q[row, :, None].double(), keys, values, enable_gqa=True
        )[:, 0]
    untouched = k_cache.clone()
    torch.testing.assert_close(native_ops.decode_attention(*case).double(), expected, atol=3e-6, rtol=1e-5)
    rows = torch.arange(len(q))
    assert torch.equal(k_cache[rows, :, positions], k) and torch.equal(v_cache[rows, :, positions], v)
    untouched[rows, :, positions] = k
    assert torch.equal(k_cache, untouched)


def test_decode_attention_operator_checks_its_arguments():
    need_native()
    q, k, v, k_cache, v_cache, positions = decode_case(4, 2, 2, 16, 9)
    operator = torch.ops.srlm.decode_attention
    with pytest.raises(ValueError, match="position 9 of row 0 is outside the cache of 9"):
        operator(q, k, v, k_cache, v_cache, positions.fill_(9))
    with pytest.raises(ValueError, match="fp32"):
        operator(q.double(), k.double(), v.double(), k_cache.double(), v_cache.double(), positions)
    with pytest.raises(ValueError, match="shapes do not fit"):
        operator(q, k, v[:3], k_cache, v_cache, positions)
    with pytest.raises(ValueError, match="no multiple of 16"):
        operator(q[..., :8], k[..., :8], v[..., :8], k_cache[..., :8], v_cache[..., :8], positions)


@pytest.mark.parametrize("content", [None, b"not a shared object"])
def test_one_warning_where_not_built(monkeypatch, tmp_path, content):
    if content:
        (tmp_path / native_ops.library_name()).write_bytes(content)
    monkeypatch.setattr(native_ops, "__file__", str(tmp_path / "native_ops.py"))
    native_ops.native_available.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert first_fit_decreasing(torch.tensor([4, 4]), 8).tolist() == [0, 0]
            first_fit_decreasing(torch.tensor([4, 4]), 8)
        assert [w.category for w in caught] == [RuntimeWarning]
        assert "build_ext --inplace" in str(caught[0].message)
    finally:
        native_ops.native_available.cache_clear()


def test_operators_of_other_sources_are_refused():
    need_native()
    code = "from srlm_fast.kernels import library; library.define('swiglu(Tensor x) -> Tensor', fake=None)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "its operator swiglu has other arguments. Build it again: python setup.py" in run.stderr
