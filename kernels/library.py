"""The registry of the `torch.ops.srlm` operators, and the one switch between them and plain torch.

Every operator has one schema and a fake implementation (so that torch.compile and FakeTensor see one node), and up to
three real ones: C++ for the CPU (csrc/), Triton for CUDA, plain torch for everything else and for a CPU whose C++ was
not built. Which one runs is the dispatcher's choice by device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from srlm_fast.native_ops import library_name, native_available

IMPLEMENTATIONS = ("fused", "reference")

_LIBRARY = torch.library.Library("srlm", "FRAGMENT")
_implementation = "fused"


@dataclass(frozen=True)
class Operator:
    """One operator; calling it dispatches by the device of its arguments."""

    name: str
    overload: torch._ops.OpOverload
    torch: Callable[..., Any] | None
    triton: Callable[..., Any] | None

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)


OPERATORS: dict[str, Operator] = {}
"""name -> operator, filled by the modules that define them."""


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    torch_impl: Callable[..., Any] | None = None,
    triton_impl: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Operator:
    """Adds an operator to `torch.ops.srlm`.

    Args:
        schema: `name(Tensor x, ...) -> Tensor`, without the namespace.
        fake: the results' shapes, dtypes and strides, from arguments without data.
        torch_impl: the operator in plain torch; runs where there is nothing better.
        triton_impl: launches the Triton kernel; runs on CUDA (for float64, plain torch does). An operator without these
            two is for the CPU only, and its caller has another way where the C++ was not built.
        setup_context, backward: as `torch.library.register_autograd` wants them; an operator without them has no
            derivative.

    Raises:
        ImportError: when csrc/ was built from sources in which the operator has other arguments.
    """
    name = schema.partition("(")[0]
    native_available()  # loads csrc/, which registers its CPU versions
    try:
        _LIBRARY.define(schema)
    except RuntimeError as error:
        raise ImportError(
            f"{library_name()} is of other sources than kernels/: its operator {name} has other arguments. "
            "Build it again: python setup.py build_ext --inplace"
        ) from error
    torch.library.register_fake(f"srlm::{name}", fake, lib=_LIBRARY)
    if torch_impl is not None:
        _LIBRARY.impl(name, torch_impl, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, _unless_float64(triton_impl, torch_impl), "CUDA")
    if backward is not None:
        torch.library.register_autograd(f"srlm::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    OPERATORS[name] = Operator(name, getattr(torch.ops.srlm, name).default, torch_impl, triton_impl)
    return OPERATORS[name]


def _unless_float64(triton_impl: Callable[..., Any], torch_impl: Callable[..., Any]) -> Callable[..., Any]:
    def choose(first: torch.Tensor | list[torch.Tensor], *args: Any) -> Any:
        tensor = first if isinstance(first, torch.Tensor) else first[0]
        return (torch_impl if tensor.dtype == torch.float64 else triton_impl)(first, *args)

    return choose


def use(implementation: str) -> None:
    """Chooses for the whole process: "fused" (the operators) or "reference" (the same formulas in plain torch).

    Raises:
        ValueError: for another name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"kernels must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    global _implementation
    _implementation = implementation


def fused() -> bool:
    """Whether the public functions of this package run their operators."""
    return _implementation == "fused"


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """`use`, for the duration of a block."""
    before = _implementation
    use(implementation)
    try:
        yield
    finally:
        use(before)


@contextmanager
def on_cpu(implementation: str) -> Iterator[None]:
    """Lets the "torch" or "triton" versions of all operators run on CPU tensors for the duration of a block.

    Triton does so through its interpreter, which has to be on (TRITON_INTERPRET=1) before this package is imported.
    """
    override = torch.library.Library("srlm", "IMPL")
    try:
        with warnings.catch_warnings(action="ignore"):  # that C++ versions are overridden is the purpose
            for operator in OPERATORS.values():
                if version := getattr(operator, implementation):
                    override.impl(operator.name, version, "CPU", allow_override=True)
        yield
    finally:
        override._destroy()
