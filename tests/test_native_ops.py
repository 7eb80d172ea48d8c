"""The native operators against their plain-Python versions and against the definition."""

import random
import shutil
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


@pytest.mark.parametrize("content", [None, b"not a shared object"])
def test_one_warning_where_not_built(monkeypatch, tmp_path, content):
    if content:
        (tmp_path / "libsrlm.so").write_bytes(content)
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
