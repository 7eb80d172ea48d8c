"""What the operators' tests share: the implementations to run, and how errors are measured."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from srlm_fast.kernels import library
from srlm_fast.native_ops import native_available

WITHOUT_CPP = {"softmax_statistics", "softmax_gradient"}
"""Operators of the vocabulary-parallel head, which run in plain torch on the CPU."""

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
"""Relative error (in norm) that one rounding to a dtype explains, with a little room."""


@contextmanager
def running(implementation: str) -> Iterator[None]:
    """Lets the C++, plain-torch or interpreted Triton versions of all operators run on CPU tensors."""
    if implementation == "cpp":
        if not native_available():
            if shutil.which("cmake") and shutil.which("c++"):
                pytest.fail("native operators not built: python setup.py build_ext --inplace")
            pytest.skip("no CMake or C++ compiler to build the native operators with")
        for name in library.OPERATORS.keys() - WITHOUT_CPP:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"srlm::{name}", "CPU"):
                pytest.fail(f"the built library lacks {name}: python setup.py build_ext --inplace")
        yield
        return
    if implementation == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    with library.on_cpu(implementation):
        yield


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """|ours - exact| / |exact| in the 2-norm, in float64; inf where ours is not finite."""
    ours, exact = ours.detach().double(), exact.detach().double()
    error = float((ours - exact).norm() / exact.norm().clamp_min(1e-30))
    return error if error == error else float("inf")
