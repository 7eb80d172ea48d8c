"""rotary against float64, in place and not, and rotary_table."""

import pytest
import torch
from kernel_case import ROUNDING, relative_error

from srlm_fast.kernels import library
from srlm_fast.kernels.rotary import rotary, rotary_table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 2), (3, 3, 1, 6), (9, 4, 2, 32), (4, 33, 33, 16), (2, 2, 1, 80), (0, 2, 1, 8)]
"""tokens, query heads, key heads, head_dim"""


def case(tokens, q_heads, k_heads, head_dim, dtype):
    """q and k as slices of one packed product, a table whose positions restart, and two upstream gradients."""
    generator = torch.Generator().manual_seed(tokens * 1000 + head_dim)
    sizes = [q_heads * head_dim, k_heads * head_dim, k_heads * head_dim]
    q, k, _ = torch.randn(tokens, sum(sizes), generator=generator).to(dtype).split(sizes, 1)
    positions = torch.arange(tokens) % 5 + 1000 * (torch.arange(tokens) > 6)
    table = rotary_table(positions, 10000 ** -(torch.arange(head_dim // 2) / (head_dim / 2)))
    return q, k, table, [torch.randn(tokens, size, generator=generator).to(dtype) for size in sizes[:2]]


def exact(x, table, head_dim):
    """The definition: every pair is a complex number, turned by its angle."""
    a, b = x.double().unflatten(1, (-1, head_dim)).chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(*(t.double() for t in table))[:, None]
    return torch.cat((turned.real, turned.imag), -1).flatten(1)


def inverse(table):
    return table[0], -table[1]


def assert_close(got, want, dtype):
    for ours, expected in zip(got, want, strict=True):
        assert ours.dtype == dtype and ours.shape == expected.shape
        assert relative_error(ours, expected) < ROUNDING[dtype] or not expected.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_of_a_packed_product(implementation, shape, dtype):
    """Views that require gradients: new tensors come out, the product stays as it was."""
    q, k, table, grads = case(*shape, dtype)
    before = q.clone(), k.clone()
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    ours = rotary(q, k, *table, shape[-1])
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]) and all(y.is_contiguous() for y in ours)
    assert_close(ours, [exact(x, table, shape[-1]) for x in before], dtype)
    gradients = torch.autograd.grad(ours, (q, k), grads)
    assert_close(gradients, [exact(grad, inverse(table), shape[-1]) for grad in grads], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_without_gradients(implementation, shape, dtype):
    """Slices are rotated where they lie, and what lies beside them stays."""
    q, k, table, _ = case(*shape, dtype)
    product = q._base
    before, expected = product.clone(), [exact(x, table, shape[-1]) for x in (q, k)]
    ours = rotary(q, k, *table, shape[-1])
    assert ours[0] is q and ours[1] is k
    assert_close(ours, expected, dtype)
    values = q.shape[1] + k.shape[1]
    assert torch.equal(product[:, values:], before[:, values:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_behind_linear_layers(implementation, dtype):
    shape = (9, 4, 2, 32)
    q, k, table, grads = case(*shape, dtype)
    leaves = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    made = tuple(leaf @ torch.eye(leaf.shape[1], dtype=dtype) for leaf in leaves)
    addresses, kept = [x.data_ptr() for x in made], [grad.clone() for grad in grads]
    ours = rotary(*made, *table, shape[-1])
    assert [x.data_ptr() for x in ours] == addresses
    assert_close(ours, [exact(leaf.detach(), table, shape[-1]) for leaf in leaves], dtype)
    gradients = torch.autograd.grad(ours, leaves, grads)
    assert_close(gradients, [exact(grad, inverse(table), shape[-1]) for grad in grads], dtype)
    for grad, before in zip(grads, kept, strict=True):
        assert torch.equal(grad, before)


def test_one_gradient_may_be_missing_or_expanded(implementation):
    shape = (9, 4, 2, 32)
    q, k, table, _ = case(*shape, torch.float32)
    leaves = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    rotated, _ = rotary(*(leaf * 1 for leaf in leaves), *table, shape[-1])
    d_q, d_k = torch.autograd.grad(rotated.sum(), leaves)
    assert relative_error(d_q, exact(torch.ones_like(q), inverse(table), shape[-1])) < ROUNDING[torch.float32]
    assert not d_k.any()


def test_what_needs_its_output_is_told(implementation):
    q, k, table, _ = case(3, 3, 1, 6, torch.float32)
    leaf = q.detach().clone().requires_grad_()
    rotated, _ = rotary(leaf.exp(), k.clone(), *table, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotated.sum().backward()


def test_nan_stays_in_its_pair(implementation):
    q, k, table, _ = case(9, 4, 2, 32, torch.float32)
    q[1, 35] = float("nan")
    rotated_q, rotated_k = rotary(q, k, *table, 32)
    assert torch.isnan(rotated_q).nonzero().tolist() == [[1, 35], [1, 51]] and not torch.isnan(rotated_k).any()


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x * 1], ids=["new", "in place"])
def test_gradcheck(implementation, make):
    q, k, table, _ = case(3, 3, 1, 6, torch.float64)
    inputs = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotary(make(q), make(k), *table, 6), inputs)


def test_compiles_to_one_node():
    q, k, table, grads = case(4, 4, 2, 8, torch.float32)
    leaves = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()

    def layer(q, k):
        return rotary(q * 2, k * 2, *table, 8)

    ours, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves), layer(*leaves)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grads), torch.autograd.grad(expected, leaves, grads))


def test_operators_are_registered_soundly():
    q, k, table, _ = case(4, 4, 2, 8, torch.float32)
    torch.library.opcheck(torch.ops.srlm.rotary_.default, (q.clone(), k.clone(), *table, False))
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    torch.library.opcheck(torch.ops.srlm.rotary.default, (q, k, *table, True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_hugging_faces(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, table, _ = case(9, 4, 2, 32, dtype)
    with library.using("reference"):
        reference = rotary(q, k, *table, 32)
    heads = (x.unflatten(1, (-1, 32)) for x in (q, k))
    theirs = llama.apply_rotary_pos_emb(*heads, *(torch.cat((t, t), 1).to(dtype) for t in table))
    for got, want in zip(reference, theirs, strict=True):
        assert torch.equal(got, want.flatten(1))
    for got, want in zip(rotary(q, k, *table, 32), reference, strict=True):
        assert relative_error(got, want) < 2 * ROUNDING[dtype]  # the reference rounds the table and every product


def test_table():
    positions, inv_freq = torch.tensor([0, 1, 5, 0, 131071]), torch.tensor([1.0, 0.25])
    angles = positions.double()[:, None] * inv_freq.double()  # products of these are exact in fp32
    cos, sin = rotary_table(positions, inv_freq)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-7)


Q, K, TABLE = torch.zeros(3, 8), torch.zeros(3, 4), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((Q, K, TABLE, TABLE, 3), "head_dim must be even and positive, got 3"),
        ((Q, K, TABLE, TABLE, 0), "head_dim must be even and positive, got 0"),
        ((Q[0], K, TABLE, TABLE, 4), r"q must be .*\[T, heads \* head_dim\].*\(8,\)"),
        ((Q, K.int(), TABLE, TABLE, 4), "k must be a floating .*int32"),
        ((Q, torch.zeros(3, 6), TABLE, TABLE, 4), r"k must be .*head_dim=4.*\(3, 6\)"),
        ((Q, torch.zeros(2, 4), TABLE, TABLE, 4), r"k must be .*\[3, \.\.\.\].*\(2, 4\)"),
        ((Q, K.double(), TABLE, TABLE, 4), "k must be .*float32.*float64"),
        ((Q, K, TABLE[:2], TABLE, 4), r"cos must be .*\[3, 2\].*\(2, 2\)"),
        ((Q, K, TABLE, TABLE.double(), 4), "sin must be float32.*float64"),
        ((torch.zeros(8, 3).t(), K, TABLE, TABLE, 4), "rows of q must be dense"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        rotary(*arguments)


@pytest.mark.parametrize(
    ("positions", "inv_freq", "says"),
    [
        (torch.zeros(3), torch.zeros(2), "positions must be int64.*float32"),
        (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2), r"positions must be int64 \[T\].*\(3, 1\)"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(2).double(), "inv_freq must be float32.*float64"),
    ],
)
def test_bad_tables_are_named(positions, inv_freq, says):
    with pytest.raises(ValueError, match=says):
        rotary_table(positions, inv_freq)
