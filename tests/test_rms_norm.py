"""rms_norm and add_rms_norm against float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from kernel_case import ROUNDING, relative_error

from srlm_fast.kernels import library
from srlm_fast.kernels.rms_norm import add_rms_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (70, 33), (64, 64), (2, 2500), (0, 8)]
EPS = 1e-5


def case(rows, cols, dtype):
    """x and delta as slices of one wider tensor, so that rows are strided; weight and two upstream gradients."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    both = (torch.randn(rows, 2 * cols, generator=generator) * 3).to(dtype)
    x, delta = both[:, :cols].detach().requires_grad_(), both[:, cols:].detach().requires_grad_()
    weight = (torch.rand(cols, generator=generator) + 0.5).to(dtype).requires_grad_()
    return x, delta, weight, *torch.randn(2, rows, cols, generator=generator).to(dtype)


def exact_norm(x, weight):
    return F.rms_norm(x, x.shape[1:], weight, EPS)


def double(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_close(got, want, dtype, roundings=1):
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape and ours.is_contiguous()
        assert relative_error(ours, exact) < roundings * ROUNDING[dtype] or not exact.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_rms_norm(implementation, rows, cols, dtype):
    x, _, weight, grad, _ = case(rows, cols, dtype)
    y = rms_norm(x, weight, EPS)
    gradients = torch.autograd.grad(y, (x, weight), grad)
    wide = double(x, weight)
    exact = exact_norm(*wide)
    assert_close([y], [exact], dtype)
    if cols == 1:  # the gradient of x / |x| is zero but for eps: nothing to be relative to
        assert gradients[0].abs().max() < 1e-3
        gradients, wide = gradients[1:], wide[1:]
    assert_close(gradients, torch.autograd.grad(exact, wide, grad.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_add_rms_norm(implementation, rows, cols, dtype):
    x, delta, weight, grad, grad_sum = case(rows, cols, dtype)
    total, y = add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(total, x + delta)
    dx, d_delta, d_weight = torch.autograd.grad((total, y), (x, delta, weight), (grad_sum, grad))
    assert torch.equal(dx, d_delta)
    wide = double(total, weight)
    exact = exact_norm(*wide)
    e_x, e_weight = torch.autograd.grad(exact, wide, grad.double())
    assert_close([y, dx, d_weight], [exact, e_x + grad_sum.double(), e_weight], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_where_llama_rounds(implementation, dtype):
    """Bit for bit: normalised, rounded, then scaled."""
    x, delta, weight, *_ = (tensor.detach() for tensor in case(9, 40, dtype))
    total, y = add_rms_norm(x, delta, weight, EPS)
    rstd = torch.ops.srlm.rms_norm(total, weight, EPS)[1]
    assert rstd.dtype == torch.float32
    assert torch.equal(y, weight * (total.float() * rstd[:, None]).to(dtype))
    assert torch.equal(y, rms_norm(total, weight, EPS))


def test_either_output_alone_carries_gradients(implementation):
    x, delta, weight, grad, _ = case(5, 12, torch.float32)
    total, y = add_rms_norm(x, delta, weight, EPS)
    through_sum = torch.autograd.grad(total, (x, delta, weight), grad, retain_graph=True, allow_unused=True)
    assert torch.equal(through_sum[0], grad) and torch.equal(through_sum[1], grad) and through_sum[2] is None
    wide = double(total, weight)
    e_x, e_weight = torch.autograd.grad(exact_norm(*wide), wide, grad.double())
    through_norm = torch.autograd.grad(y, (x, delta, weight), grad)
    assert_close(through_norm, (e_x, e_x, e_weight), torch.float32)


def test_zero_and_extreme_rows(implementation):
    x = torch.zeros(3, 8)
    x[1], x[2] = 1e15, 1e-15
    y = rms_norm(x, torch.full((8,), 2.0), EPS)
    expected = torch.tensor([0.0, 2.0, 2e-15 / EPS**0.5])[:, None].expand(3, 8)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


def test_nan_stays_in_its_row(implementation):
    x, _, weight, grad, _ = case(5, 40, torch.float32)
    with torch.no_grad():
        x[1, 3] = float("nan")
    y = rms_norm(x, weight, EPS)
    (dx,) = torch.autograd.grad(y, x, grad)
    for tensor in (y, dx):
        assert torch.isnan(tensor).all(1).tolist() == torch.isnan(tensor).any(1).tolist() == [False, True] + [False] * 3


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
def test_gradcheck(implementation):
    x, delta, weight, *_ = case(4, 19, torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda *inputs: add_rms_norm(*inputs, EPS), (x, delta, weight))


@pytest.mark.parametrize("implementation", ["cpp"], indirect=True)
def test_gradients_repeat_bitwise_on_any_number_of_threads(implementation):
    x, _, weight, grad, _ = case(3000, 33, torch.float32)

    def gradients(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad)
        finally:
            torch.set_num_threads(before)

    for one, many in zip(gradients(1), gradients(3), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("function", [rms_norm, add_rms_norm])
def test_compiles_to_one_node(function):
    x, delta, weight, grad, grad_sum = case(4, 24, torch.float32)
    inputs = (x, weight) if function is rms_norm else (x, delta, weight)
    grads = grad if function is rms_norm else (grad_sum, grad)
    compiled = torch.compile(lambda *inputs: function(*inputs, EPS), fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*inputs), function(*inputs, EPS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, grads), torch.autograd.grad(expected, inputs, grads))


def test_operators_are_registered_soundly():
    x, delta, weight, grad, grad_sum = case(3, 20, torch.float32)
    torch.library.opcheck(torch.ops.srlm.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.srlm.add_rms_norm.default, (x, delta, weight, EPS))
    x, weight = x.detach(), weight.detach()
    rstd = torch.ops.srlm.rms_norm(x, weight, EPS)[1]
    for upstream in (None, grad_sum):
        torch.library.opcheck(torch.ops.srlm.rms_norm_backward.default, (grad, x, weight, rstd, upstream))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees(dtype):
    x, delta, weight, *_ = case(4, 24, dtype)
    with library.using("reference"):
        expected = rms_norm(x, weight, EPS), *add_rms_norm(x, delta, weight, EPS)
    ours = rms_norm(x, weight, EPS), *add_rms_norm(x, delta, weight, EPS)
    for got, want in zip(ours, expected, strict=True):
        assert relative_error(got, want) < ROUNDING[dtype]


@pytest.mark.parametrize(
    ("x", "delta", "weight", "says"),
    [
        (torch.zeros(3), torch.zeros(3), torch.zeros(3), r"x must be .*\[T, D\].*\(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(3), "x must be .*int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4), r"weight must be .*\[3\].*\(4,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3).double(), "weight must be .*float32.*float64"),
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3), r"delta must be .*\(2, 3\).*\(2, 4\)"),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), torch.zeros(3), "rows of x must be dense"),
        (torch.zeros(2, 3), torch.zeros(3, 2).t(), torch.zeros(3), "rows of delta must be dense"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1).expand(3), "rows of weight must be dense"),
    ],
)
def test_bad_arguments_are_named(x, delta, weight, says):
    with pytest.raises(ValueError, match=says):
        add_rms_norm(x, delta, weight, EPS)
    if "delta" not in says:
        with pytest.raises(ValueError, match=says):
            rms_norm(x, weight, EPS)
