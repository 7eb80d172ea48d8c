"""The embedding whose gradient is added to what is there, against autograd's."""

import pytest
import torch
import torch.nn.functional as F

from srlm_fast.kernels.embedding import embedding

IDS = torch.tensor([3, 0, 3, 5, 3])


@pytest.mark.parametrize("ids", [IDS, IDS[:0]])
def test_main_grad_takes_the_weights_gradient(ids):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=generator, requires_grad=True)
    grad, before = torch.randn(len(ids), 4, generator=generator), torch.randn(7, 4, generator=generator)
    main_grad = before.clone()
    rows = embedding(ids, weight, main_grad=main_grad)
    rows.backward(grad)
    assert torch.equal(rows, weight[ids]) and weight.grad is None
    plain = weight.detach().double().requires_grad_()
    F.embedding(ids, plain).backward(grad.double())
    torch.testing.assert_close(main_grad.double(), before.double() + plain.grad, rtol=0, atol=1e-6)


def test_without_one_autograd_has_it():
    weight = torch.randn(7, 4, requires_grad=True)
    embedding(IDS, weight).sum().backward()
    assert weight.grad[3].eq(3).all() and weight.grad[1].eq(0).all()
