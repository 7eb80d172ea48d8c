"""The linear layer against float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from kernel_case import ROUNDING, relative_error, running

from srlm_fast.kernels import library
from srlm_fast.kernels.linear import linear

SHAPES = [(1, 1, 1), (3, 5, 7), (70, 33, 130), (16, 128, 65), (0, 4, 6)]


def case(rows, n_in, n_out, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * 100 + n_out)
    x = torch.randn(rows, n_in, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(n_out, n_in, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randn(rows, n_out, generator=generator).to(dtype)


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(implementation, shape, dtype):
    x, weight, grad = case(*shape, dtype)
    exact_x, exact_w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.linear(exact_x, exact_w)
    ours = torch.ops.srlm.linear(x, weight, None)
    assert ours.dtype == dtype and ours.is_contiguous()
    pairs = zip(
        (ours, *torch.autograd.grad(ours, (x, weight), grad)),
        (exact, *torch.autograd.grad(exact, (exact_x, exact_w), grad.double())),
    )
    for got, want in pairs:
        assert got.shape == want.shape and (got.numel() == 0 or relative_error(got, want) < ROUNDING[dtype])


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    x, weight, grad = case(6, 5, 4)
    wanted, other = (weight, x) if frozen == "x" else (x, weight)
    other.requires_grad_(False)
    (got,) = torch.autograd.grad(linear(x, weight), (wanted,), grad)
    (expected,) = torch.autograd.grad(F.linear(x, weight), (wanted,), grad)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kernels", ["fused", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_main_grad_takes_the_weights_gradient(kernels, shape):
    x, weight, grad = case(*shape)
    before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    main_grad = before.clone()
    with library.using(kernels):
        linear(x, weight, main_grad=main_grad).backward(grad)
    exact = before.double() + grad.double().t() @ x.detach().double()
    assert weight.grad is None and relative_error(main_grad, exact) < ROUNDING[torch.float32]
    assert x.grad.shape == x.shape


def test_a_row_does_not_depend_on_the_others():
    with running("cpp"):
        x, weight, _ = case(300, 96, 150)
        whole = linear(x, weight)
        for rows in (slice(0, 1), slice(7, 24), slice(100, 299)):
            assert torch.equal(linear(x[rows], weight), whole[rows])


def test_nan_stays_in_its_row(implementation):
    x, weight, _ = case(40, 20, 30)
    x = x.detach().clone()
    x[3, 4] = float("nan")
    assert torch.isnan(linear(x, weight)).any(1).nonzero().flatten().tolist() == [3]


def test_gradcheck():
    x, weight, _ = case(3, 4, 5, torch.float64)
    assert torch.autograd.gradcheck(torch.ops.srlm.linear, (x, weight, None))


def test_compiles_and_is_registered_soundly():
    x, weight, grad = case(6, 5, 4)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), linear(x, weight), rtol=0, atol=0)
    main_grad = torch.zeros_like(weight, requires_grad=False)
    torch.library.opcheck(torch.ops.srlm.linear.default, (x, weight, main_grad))
    for into in (None, main_grad):
        arguments = (grad, x.detach(), weight.detach(), into, True, True)
        torch.library.opcheck(torch.ops.srlm.linear_backward.default, arguments)


def test_reference_is_torchs_own():
    x, weight, _ = case(6, 5, 4)
    with library.using("reference"):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), r"\(2, 3\) and \(4, 5\)"),
        (torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64), "float32 on cpu and torch.float64"),
    ],
)
def test_bad_arguments_are_named(x, weight, says):
    with pytest.raises(ValueError, match=says):
        linear(x, weight)
