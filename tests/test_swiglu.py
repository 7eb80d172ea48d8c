"""swiglu against float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from kernel_case import ROUNDING, relative_error

from srlm_fast.kernels import library
from srlm_fast.kernels.swiglu import swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(rows, cols, dtype, spread=3.0):
    """gate and up as the two halves of one tensor, so that their rows are strided; and an upstream gradient."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    both = (torch.randn(rows, 2 * cols, generator=generator) * spread).to(dtype)
    grad = torch.randn(rows, cols, generator=generator).to(dtype)
    return both[:, :cols].detach().requires_grad_(), both[:, cols:].detach().requires_grad_(), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (5, 64), (2, 2500), (0, 8)])
def test_value_and_gradients(implementation, rows, cols, dtype):
    gate, up, grad = case(rows, cols, dtype)
    ours = swiglu(gate, up)
    assert ours.dtype == dtype and ours.is_contiguous()
    d_gate, d_up = torch.autograd.grad(ours, (gate, up), grad)
    g, u = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    exact = F.silu(g) * u
    e_gate, e_up = torch.autograd.grad(exact, (g, u), grad.double())
    for got, want in ((ours, exact), (d_gate, e_gate), (d_up, e_up)):
        assert got.shape == want.shape and relative_error(got, want) < ROUNDING[dtype] or rows == 0


def test_extreme_gates(implementation):
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], requires_grad=True)
    up = torch.full((1, 5), 2.0, requires_grad=True)
    y = swiglu(gate, up)
    torch.testing.assert_close(y.detach(), torch.tensor([[0.0, 0.0, 0.0, 200.0, 2e4]]))
    d_gate, d_up = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(d_gate, torch.tensor([[0.0, 0.0, 1.0, 2.0, 2.0]]))
    torch.testing.assert_close(d_up, torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
def test_gradcheck(implementation):
    gate, up, _ = case(3, 5, torch.float64)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_nan_stays_in_its_place(implementation):
    gate, up, _ = case(3, 40, torch.float32)
    gate = gate.detach().clone()
    gate[1, 3] = float("nan")
    assert torch.isnan(swiglu(gate, up.detach())).nonzero().tolist() == [[1, 3]]


def test_compiles_to_one_node():
    gate, up, grad = case(4, 24, torch.float32)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    expected = swiglu(gate, up)
    torch.testing.assert_close(compiled(gate, up), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(gate, up), (gate, up), grad), torch.autograd.grad(expected, (gate, up), grad)
    )


def test_operators_are_registered_soundly():
    gate, up, grad = case(3, 20, torch.float32)
    torch.library.opcheck(torch.ops.srlm.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.srlm.swiglu_backward.default, (grad, gate.detach(), up.detach()))


def test_reference_agrees():
    gate, up, _ = case(4, 24, torch.float32)
    with library.using("reference"):
        expected = swiglu(gate, up)
    torch.testing.assert_close(swiglu(gate, up), expected)


@pytest.mark.parametrize(
    ("gate", "up", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"\(2, 3\).*\(2, 4\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64), "float32.*float64"),
        (torch.zeros(3), torch.zeros(3), r"\[T, F\]"),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), "dense"),
    ],
)
def test_bad_arguments_are_named(gate, up, says):
    with pytest.raises(ValueError, match=says):
        swiglu(gate, up)
