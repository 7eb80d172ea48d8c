"""linear_logprob against float64 log_softmax with autograd."""

import pytest
import torch

from srlm_fast.kernels.linear_logprob import linear_logprob


def reference(x, weight, target):
    return torch.log_softmax(x @ weight.t(), dim=-1).gather(1, target[:, None]).squeeze(1)


def make(n, d, v, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(n * 1000 + v)
    x = (torch.randn(n, d, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, v, (n,), generator=generator)
    if n:
        target[0], target[-1] = 0, v - 1
    return x, weight, target, torch.randn(n, generator=generator)


@pytest.mark.parametrize(("n", "d", "v"), [(1, 3, 2), (17, 8, 101), (64, 32, 1000)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("budget", [1 << 30, 4096])
def test_value_and_gradients(n, d, v, dtype, tolerance, budget):
    x, weight, target, upstream = make(n, d, v, dtype)
    logp = linear_logprob(x, weight, target, budget_bytes=budget)
    assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dx, dw = torch.autograd.grad(logp, (x, weight), upstream.to(logp.dtype))
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference(x64, w64, target)
    edx, edw = torch.autograd.grad(expected, (x64, w64), upstream.double())
    for ours, exact in ((logp, expected), (dx, edx), (dw, edw)):
        error = (ours.double() - exact).norm() / exact.norm().clamp_min(1e-9)
        assert error < tolerance, error


def test_extreme_logits_and_certain_targets():
    x = torch.tensor([[100.0, 0.0], [0.0, -100.0], [1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[100.0, 0.0], [0.0, 100.0], [-1.0, -1.0]], requires_grad=True)
    logp = linear_logprob(x, weight, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(logp.detach(), torch.tensor([0.0, -10100.0, -0.6931472]), atol=1e-4, rtol=1e-6)
    dx, dw = torch.autograd.grad(logp.sum(), (x, weight))
    assert torch.isfinite(dx).all() and torch.isfinite(dw).all()
    assert dx[0].abs().max() == 0


def test_no_rows():
    x, weight, target, _ = make(0, 4, 9, torch.float32)
    logp = linear_logprob(x, weight, target)
    dx, dw = torch.autograd.grad(logp.sum(), (x, weight))
    assert logp.shape == (0,) and dx.shape == (0, 4) and dw.abs().max() == 0


def test_gradcheck():
    x, weight, target, _ = make(4, 3, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: linear_logprob(a, b, target), (x, weight))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(x=torch.zeros(4, 5)), "same D"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), "target must be int64"),
        (dict(target=torch.zeros(4)), "target must be int64"),
        (dict(target=torch.tensor([0, 1, 9, 2])), r"\[0, 9\)"),
        (dict(weight=torch.zeros(9, 3, dtype=torch.float64)), "one dtype"),
    ],
)
def test_bad_arguments_are_named(change, says):
    arguments = dict(x=torch.zeros(4, 3), weight=torch.zeros(9, 3), target=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=says):
        linear_logprob(**{**arguments, **change})
