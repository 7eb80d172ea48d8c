"""linear_cross_entropy against float64 losses under autograd, and against torch's cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from head_case import BUDGETS, Recorder, exact_losses, make
from kernel_case import ROUNDING, relative_error

from srlm_fast.kernels import head_losses, library
from srlm_fast.kernels.linear_cross_entropy import REDUCTIONS, linear_cross_entropy
from srlm_fast.kernels.linear_softmax import CHUNK_BYTES
from srlm_fast.kernels.softmax_rows import Softmax

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NaN in rows or their padding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = {"temperature": 0.8, "softcap": 6.0, "label_smoothing": 0.1, "z_loss": 0.01}


def ignoring(case, share=3):
    """The case with every `share`-th target ignored, and the rows that count."""
    rows = torch.arange(len(case.target))[torch.arange(len(case.target)) % share != 0]
    target = torch.full_like(case.target, -100)
    target[rows] = case.target[rows]
    return case._replace(target=target), rows


def exact(case, rows, reduction, **options):
    """(loss, dx, dw) in float64; upstream gradients as in `ours`."""
    x, weight, target, grad = case.exact()
    losses, _ = exact_losses(x[rows] @ weight.t(), target[rows], Softmax(**options))
    if reduction == "none":
        loss = losses.new_zeros(len(target)).index_copy(0, rows, losses)
    else:
        loss, grad = losses.sum() / (len(rows) if reduction == "mean" else 1), torch.tensor(-1.7).double()
    return loss, *torch.autograd.grad(loss, (x, weight), grad)


def ours(case, reduction, **options):
    loss = linear_cross_entropy(*case[:3], reduction=reduction, **options)
    upstream = case.grad if reduction == "none" else torch.tensor(-1.7).to(case.grad)
    return loss, *torch.autograd.grad(loss, (case.x, case.weight), upstream)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, ALL])
def test_value_and_gradients(implementation, options, dtype, reduction, budget):
    case, rows = ignoring(make(40, 16, 201, dtype, scale=0.7))
    got = ours(case, reduction, chunk_bytes=case.chunk_bytes(budget), **options)
    want = exact(case, rows, reduction, **options)
    assert got[0].dtype == torch.float32 and got[0].shape == want[0].shape
    assert relative_error(got[0], want[0]) < 1e-6
    for ours_, exact_ in zip(got[1:], want[1:]):
        assert ours_.dtype == dtype and relative_error(ours_, exact_) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_means_what_torch_means(implementation, label_smoothing, reduction):
    case, _ = ignoring(make(20, 8, 101))
    x, weight, target, grad = case.exact()
    loss = F.cross_entropy(x @ weight.t(), target, reduction=reduction, label_smoothing=label_smoothing)
    expected = torch.autograd.grad(loss, (x, weight), grad if reduction == "none" else torch.tensor(-1.7).double())
    got = ours(case, reduction, label_smoothing=label_smoothing)
    for a, b in zip(got, (loss, *expected)):
        assert relative_error(a, b) < ROUNDING[torch.float32]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_in_place_of_targets(implementation, reduction, budget):
    case, rows = ignoring(make(20, 8, 101))
    want = ours(case, reduction, chunk_bytes=case.chunk_bytes(budget))
    garbage = case.target.masked_fill(case.target == -100, 1 << 40)
    got = ours(case._replace(target=garbage), reduction, rows=rows, chunk_bytes=case.chunk_bytes(budget))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    backwards = ours(case._replace(target=garbage), reduction, rows=rows.flip(0), chunk_bytes=case.chunk_bytes(budget))
    for a, b in zip(backwards, want):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", [0, 5])
def test_no_row_counts(implementation, n, reduction, budget):
    case = make(n, 4, 65)
    loss, dx, dw = ours(case._replace(target=torch.full((n,), -100)), reduction, chunk_bytes=case.chunk_bytes(budget))
    assert loss.shape == ((n,) if reduction == "none" else ()) and not loss.any()
    assert dx.shape == (n, 4) and not dx.any() and dw.shape == (65, 4) and not dw.any()


def test_ignored_rows_do_no_harm(implementation):
    """What an ignored row holds is never read: no product, no NaN."""
    case, rows = ignoring(make(20, 8, 101))
    want = ours(case, "mean")
    x = case.x.detach().clone()
    x[0] = float("nan")
    loss, dx, dw = ours(case._replace(x=x.requires_grad_()), "mean")
    for a, b in zip((loss, dx, dw), want):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("ignore_index", [-1, 0, 7])
def test_ignore_index(ignore_index):
    case = make(20, 8, 11)
    loss = linear_cross_entropy(*case[:3], ignore_index=ignore_index)
    expected = F.cross_entropy(case.x @ case.weight.t(), case.target, ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("options", [{}, ALL])
def test_all_ways_to_the_gradient_agree(implementation, options):
    """U kept, gradients made in the forward, and U made again for every row's loss."""
    case, rows = ignoring(make(60, 16, 201))
    kept, forward = (ours(case, "sum", chunk_bytes=case.chunk_bytes(budget), **options) for budget in BUDGETS)
    ones = case._replace(grad=torch.full_like(case.grad, -1.7))
    again = ours(ones, "none", chunk_bytes=case.chunk_bytes("chunks"), **options)
    for a, b, c in zip(kept[1:], forward[1:], again[1:]):
        assert relative_error(b, a) < 5e-7 and relative_error(c, a) < 5e-7


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_main_grad_is_added_to(implementation, reduction, budget):
    case, rows = ignoring(make(40, 16, 201, torch.bfloat16))
    main_grad = torch.full((201, 16), 3.0)
    loss = linear_cross_entropy(
        *case[:3], reduction=reduction, chunk_bytes=case.chunk_bytes(budget), main_grad=main_grad
    )
    upstream = case.grad if reduction == "none" else torch.tensor(-1.7)
    loss.backward(upstream, retain_graph=True)
    _, edx, edw = exact(case, rows, reduction)
    assert case.weight.grad is None
    assert relative_error(main_grad - 3.0, edw) < 1.5 * ROUNDING[torch.bfloat16]
    dx = case.x.grad.clone()
    loss.backward(upstream)
    assert relative_error(main_grad - 3.0, 2 * edw) < 1.5 * ROUNDING[torch.bfloat16]
    torch.testing.assert_close(case.x.grad, 2 * dx, rtol=0, atol=0)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("needs_x", "needs_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_products_are_those_needed(needs_x, needs_weight, budget, monkeypatch):
    """6 N D V whatever the budget, N being the rows that count; a frozen head or input saves its product."""
    monkeypatch.setattr(head_losses, "TILED", frozenset())
    case, rows = ignoring(make(40, 16, 201))
    x, weight = case.x.detach().requires_grad_(needs_x), case.weight.detach().requires_grad_(needs_weight)
    with library.on_cpu("torch"), Recorder() as record:
        loss = linear_cross_entropy(x, weight, case.target, chunk_bytes=case.chunk_bytes(budget))
        if needs_x or needs_weight:
            loss.backward()
    assert (x.grad is not None, weight.grad is not None) == (needs_x, needs_weight)
    assert record.flops == 2 * (1 + needs_x + needs_weight) * len(rows) * weight.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_memory_stays_within_the_budget(reduction, dtype):
    n, v = 1000, 300
    case = make(n, 4, v, dtype)
    budget = 128 * 320 * 6
    assert budget < n * v * dtype.itemsize
    with library.on_cpu("torch"), Recorder() as record:
        linear_cross_entropy(*case[:3], chunk_bytes=budget, reduction=reduction, z_loss=0.1).sum().backward()
    assert record.largest <= budget


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeats_to_the_bit(implementation, reduction, budget):
    case, _ = ignoring(make(60, 16, 201, torch.bfloat16))
    first, second = (ours(case, reduction, chunk_bytes=case.chunk_bytes(budget), **ALL) for _ in range(2))
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(implementation, reduction, chunk_bytes):
    case, _ = ignoring(make(5, 3, 7, torch.float64))

    def loss(x, weight):
        return linear_cross_entropy(x, weight, case.target, reduction=reduction, chunk_bytes=chunk_bytes, **ALL)

    assert torch.autograd.gradcheck(loss, (case.x, case.weight))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_without_a_break(reduction, budget):
    case, rows = ignoring(make(20, 8, 101))
    main_grad = torch.zeros(101, 8)

    def function(x, weight):
        return sum(
            linear_cross_entropy(
                x,
                weight,
                case.target,
                rows=rows,
                reduction=reduction,
                chunk_bytes=case.chunk_bytes(budget),
                main_grad=place,
            )
            for place in (None, main_grad)
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        main_grad.zero_()
        loss = run(case.x, case.weight)
        results.append((loss, *torch.autograd.grad(loss.sum(), (case.x, case.weight)), main_grad.clone()))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_main_grad", [False, True])
def test_reference_agrees(reduction, with_main_grad):
    case, _ = ignoring(make(20, 8, 101))
    results = []
    for implementation in library.IMPLEMENTATIONS:
        main_grad = torch.zeros(101, 8) if with_main_grad else None
        case.weight.grad = case.x.grad = None
        with library.using(implementation):
            loss = linear_cross_entropy(*case[:3], reduction=reduction, main_grad=main_grad, **ALL)
        loss.sum().backward()
        results.append((loss, case.x.grad, case.weight.grad, main_grad))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want) if got is not None else None
    assert (results[1][2] is None) == with_main_grad


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(reduction="max"), "reduction must be one of mean, sum, none, got 'max'"),
        (dict(label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\), got 1.0"),
        (dict(label_smoothing=-0.1), "label_smoothing.*-0.1"),
        (dict(z_loss=-1.0), "z_loss.*-1.0"),
        (dict(temperature=-2.0), "temperature.*-2.0"),
        (dict(rows=torch.zeros(2)), "rows must be int64.*float32"),
        (dict(rows=torch.zeros(2, 1).long()), r"rows must be int64 \[n\].*\(2, 1\)"),
        (dict(target=torch.tensor([0, 1, 9, 2])), r"\[0, 9\), got 0 to 9"),
        (dict(target=torch.tensor([0, 1, -1, 2])), r"\[0, 9\), got -1 to 2"),
        (dict(target=torch.tensor([0, 1, -100, 2]), rows=torch.arange(4)), r"\[0, 9\), got -100 to 2"),
        (dict(target=torch.zeros(4)), "target must be int64.*float32"),
    ],
)
def test_bad_arguments_are_named(change, says):
    arguments = dict(x=torch.zeros(4, 3), weight=torch.zeros(9, 3), target=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=says):
        linear_cross_entropy(**{**arguments, **change})
