"""linear_logprob against float64 log_softmax under autograd."""

import pytest
import torch
from head_case import BUDGETS, Recorder, exact_losses, make
from kernel_case import ROUNDING, relative_error
from torch.utils.checkpoint import checkpoint

from srlm_fast.kernels import library
from srlm_fast.kernels.linear_logprob import linear_logprob, log_collisions
from srlm_fast.kernels.linear_softmax import CHUNK_BYTES, TILED, chunks, plan
from srlm_fast.kernels.softmax_rows import Softmax

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NaN in rows or their padding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(case, grad_entropy=None, **options):
    """(logp, entropy, dx, dw) in float64."""
    x, weight, target, grad = case.exact()
    loss, entropy = exact_losses(x @ weight.t(), target, Softmax(**options))
    total = (-loss * grad).sum() + (0 if grad_entropy is None else (entropy * grad_entropy).sum())
    return -loss, entropy, *torch.autograd.grad(total, (x, weight))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "v"), [(1, 3, 2), (17, 8, 101), (40, 32, 1000)])
def test_value_and_gradients(implementation, n, d, v, dtype, budget):
    case = make(n, d, v, dtype, scale=0.5)
    logp = linear_logprob(case.x, case.weight, case.target, chunk_bytes=case.chunk_bytes(budget))
    assert logp.dtype == torch.float32
    dx, dw = torch.autograd.grad(logp, (case.x, case.weight), case.grad)
    assert dx.dtype == dw.dtype == dtype
    expected, _, edx, edw = exact(case)
    assert relative_error(logp, expected) < 1e-6, "logits of any dtype are summed and kept in fp32"
    assert relative_error(dx, edx) < 2 * ROUNDING[dtype]
    assert relative_error(dw, edw) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_softcap_and_entropy(implementation, dtype, budget):
    case, options = make(20, 16, 201, dtype), {"temperature": 0.7, "softcap": 5.0}
    h = torch.linspace(-1, 1, 20)
    logp, entropy = linear_logprob(*case[:3], return_entropy=True, chunk_bytes=case.chunk_bytes(budget), **options)
    elogp, eentropy, edx, edw = exact(case, h.double(), **options)
    assert relative_error(logp, elogp) < 1e-6 and relative_error(entropy, eentropy) < 1e-6
    dx, dw = torch.autograd.grad((logp, entropy), (case.x, case.weight), (case.grad, h), retain_graph=True)
    assert relative_error(dx, edx) < 2 * ROUNDING[dtype] and relative_error(dw, edw) < 2 * ROUNDING[dtype]
    only = [exact(case._replace(grad=case.grad * w), h.double() * (1 - w), **options)[2] for w in (0, 1)]
    for (output, upstream), edx in zip(((entropy, h), (logp, case.grad)), only):
        (dx,) = torch.autograd.grad(output, case.x, upstream, retain_graph=True)
        assert relative_error(dx, edx) < 2 * ROUNDING[dtype]


def test_kept_and_recomputed_agree(implementation):
    case = make(40, 16, 201)
    gradients = []
    for chunk_bytes in (CHUNK_BYTES, case.chunk_bytes("chunks"), 1):
        logp = linear_logprob(*case[:3], chunk_bytes=chunk_bytes)
        gradients.append((logp, *torch.autograd.grad(logp, (case.x, case.weight), case.grad)))
    for other in gradients[1:]:
        for got, want in zip(other, gradients[0]):
            assert relative_error(got, want) < 5e-7


def test_extreme_logits_and_certain_targets(implementation):
    x = torch.tensor([[100.0, 0.0], [0.0, -100.0], [1.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[100.0, 0.0], [0.0, 100.0], [-1.0, -1.0]], requires_grad=True)
    logp = linear_logprob(x, weight, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(logp.detach(), torch.tensor([0.0, -10100.0, -0.6931472]), atol=1e-4, rtol=1e-6)
    dx, dw = torch.autograd.grad(logp.sum(), (x, weight))
    torch.testing.assert_close(dx, torch.tensor([[0.0, 0.0], [1.0, 101.0], [-50.0, 50.0]]))
    torch.testing.assert_close(dw, torch.tensor([[-0.5, -0.5], [0.5, -99.5], [0.0, 100.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", BUDGETS)
def test_certain_targets_keep_relative_accuracy(implementation, dtype, budget):
    """p - 1 of a bf16 p = 1 - 5e-4 would be 0; dx is (p - 1) times a difference of embeddings."""
    weight = torch.tensor([[4.0], [-4.0]] + [[-16.0]] * 30, dtype=dtype).repeat(10, 1).requires_grad_()
    weight = weight.detach()[:32].clone().requires_grad_()
    x = torch.full((3, 1), 1.0, dtype=dtype, requires_grad=True)
    case = make(3, 1, 32, dtype)._replace(x=x, weight=weight, target=torch.zeros(3, dtype=torch.int64))
    logp = linear_logprob(*case[:3], chunk_bytes=case.chunk_bytes(budget))
    (dx,) = torch.autograd.grad(logp, x, case.grad)
    expected, _, edx, _ = exact(case)
    assert float(expected[0].detach().exp()) > 0.9996
    assert relative_error(logp, expected) < 2e-4 and relative_error(dx, edx) < max(2e-4, ROUNDING[dtype])


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_rows(implementation, budget):
    case = make(0, 4, 9)
    logp, entropy = linear_logprob(*case[:3], return_entropy=True, chunk_bytes=case.chunk_bytes(budget))
    dx, dw = torch.autograd.grad(logp.sum() + entropy.sum(), (case.x, case.weight))
    assert logp.shape == entropy.shape == (0,) and dx.shape == (0, 4) and dw.shape == (9, 4) and not dw.any()


@pytest.mark.parametrize("budget", BUDGETS)
def test_nan_stays_in_its_row(implementation, budget):
    case = make(6, 4, 65)
    x = case.x.detach().clone()
    x[2, 1] = float("nan")
    x.requires_grad_()
    logp = linear_logprob(x, case.weight, case.target, chunk_bytes=case.chunk_bytes(budget))
    (dx,) = torch.autograd.grad(logp.sum(), x)
    assert (
        logp.isnan().tolist() == dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == [n == 2 for n in range(6)]
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_is_added_to(implementation, dtype, budget):
    case = make(20, 16, 201, dtype)
    main_grad = torch.full((201, 16), 3.0)
    for times in (1, 2):
        logp = linear_logprob(*case[:3], chunk_bytes=case.chunk_bytes(budget), main_grad=main_grad)
        logp.backward(case.grad)
        assert case.weight.grad is None
        _, _, edx, edw = exact(case)
        assert relative_error(main_grad - 3.0, times * edw) < ROUNDING[dtype], "fp32 sums of products of this dtype"
        assert relative_error(case.x.grad, times * edx) < 3 * ROUNDING[dtype]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_second_backward_gives_the_same(implementation, budget):
    case = make(20, 16, 201, torch.bfloat16)
    logp = linear_logprob(*case[:3], chunk_bytes=case.chunk_bytes(budget))
    first, second = (torch.autograd.grad(logp, (case.x, case.weight), case.grad, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_repeats_to_the_bit(implementation, budget):
    def run():
        case = make(40, 16, 201, torch.bfloat16)
        logp, entropy = linear_logprob(*case[:3], return_entropy=True, chunk_bytes=case.chunk_bytes(budget))
        return logp, entropy, *torch.autograd.grad((logp, entropy), (case.x, case.weight), (case.grad, case.grad))

    for a, b in zip(run(), run()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("needs_x", "needs_weight", "kept_products", "recomputed_products"),
    [(1, 1, 3, 4), (1, 0, 2, 3), (0, 1, 2, 3), (0, 0, 1, 1)],
)
def test_products_are_those_needed(needs_x, needs_weight, kept_products, recomputed_products, budget):
    case = make(40, 16, 201)
    x, weight = case.x.detach().requires_grad_(bool(needs_x)), case.weight.detach().requires_grad_(bool(needs_weight))
    with library.on_cpu("torch"), Recorder() as record:
        logp = linear_logprob(x, weight, case.target, chunk_bytes=case.chunk_bytes(budget))
        if needs_x or needs_weight:
            logp.backward(case.grad)
    assert (x.grad is not None, weight.grad is not None) == (needs_x, needs_weight)
    products = kept_products if budget == "kept" else recomputed_products
    assert record.flops == 2 * products * x.shape[0] * weight.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_stays_within_the_budget(dtype):
    n, v = 1000, 300
    case = make(n, 4, v, dtype)
    budget = 128 * 320 * 6
    assert budget < n * v * dtype.itemsize
    with library.on_cpu("torch"), Recorder() as record:
        linear_logprob(*case[:3], chunk_bytes=budget).backward(case.grad)
    assert record.largest <= budget
    with library.on_cpu("torch"), Recorder() as record:
        linear_logprob(*case[:3]).backward(case.grad)
    assert record.largest >= n * v * dtype.itemsize, "the record would have seen it"


def test_works_under_checkpointing():
    case = make(20, 16, 201)
    expected = torch.autograd.grad(linear_logprob(*case[:3]), (case.x, case.weight), case.grad)
    again = checkpoint(linear_logprob, *case[:3], use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again, (case.x, case.weight), case.grad), expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 1])
def test_gradcheck(implementation, chunk_bytes):
    case, options = make(4, 3, 7, torch.float64), {"temperature": 0.8, "softcap": 3.0, "chunk_bytes": chunk_bytes}

    def both(x, weight):
        return linear_logprob(x, weight, case.target, return_entropy=True, **options)

    assert torch.autograd.gradcheck(both, (case.x, case.weight))
    assert torch.autograd.gradcheck(lambda x, weight: linear_logprob(x, weight, case.target), (case.x, case.weight))


@pytest.mark.parametrize("budget", BUDGETS)
def test_compiles_without_a_break(budget):
    case = make(20, 16, 201)
    main_grad = torch.zeros(201, 16)

    def function(x, weight):
        logp, entropy = linear_logprob(
            x, weight, case.target, return_entropy=True, chunk_bytes=case.chunk_bytes(budget)
        )
        return logp + entropy.detach() + linear_logprob(x, weight, case.target, main_grad=main_grad)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        main_grad.zero_()
        value = run(case.x, case.weight)
        results.append((value, *torch.autograd.grad(value, (case.x, case.weight), case.grad), main_grad.clone()))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_operators_are_registered_soundly():
    x, weight, target, grad = (t.detach() for t in make(6, 4, 20))
    loss = (1.0, 0.0, 0.1, 0.01)
    ops = torch.ops.srlm
    for keep in (True, False):
        torch.library.opcheck(ops.linear_softmax.default, (x, weight, target, *loss, True, keep, 4))
        losses, lse, _, unit = ops.linear_softmax(x, weight, target, *loss, True, keep, 4)
        for main_grad in (None, torch.zeros(20, 4)):
            into = (grad, None if keep else grad, x, weight, target, lse, losses, unit, main_grad)
            torch.library.opcheck(ops.linear_softmax_backward.default, (*into, *loss, True, True, 4))
    torch.library.opcheck(ops.linear_softmax_gradients.default, (x, weight, target, grad, *loss, True, True, 4))


@pytest.mark.parametrize("main_grad", [None, torch.zeros(65, 8)])
def test_reference_agrees(main_grad):
    case, h = make(9, 8, 65), torch.linspace(-1, 1, 9)
    results = []
    for implementation in library.IMPLEMENTATIONS:
        case.weight.grad = case.x.grad = None
        with library.using(implementation):
            logp, entropy = linear_logprob(
                *case[:3], temperature=0.9, softcap=6.0, return_entropy=True, main_grad=main_grad
            )
        torch.autograd.backward((logp, entropy), (case.grad, h))
        dw = case.weight.grad if main_grad is None else main_grad.clone()
        results.append((logp, entropy, case.x.grad, dw))
        if main_grad is not None:
            assert case.weight.grad is None
            main_grad.zero_()
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


TILED_SHAPES = [(1, 1, 1), (3, 5, 300), (300, 33, 129), (2100, 64, 517), (700, 70, 4099)]


@pytest.mark.skipif(not TILED, reason="needs the C++ kernels for AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "v"), TILED_SHAPES)
def test_logits_made_tile_by_tile(n, d, v, dtype):
    """More rows and columns than a tile has; one needs no gradient; main_grad; any number of threads."""
    case = make(n, d, v, dtype, scale=d**-0.5)
    logp = linear_logprob(*case[:3], temperature=0.7, chunk_bytes=1)
    dx, dw = torch.autograd.grad(logp, (case.x, case.weight), case.grad, retain_graph=True)
    expected, _, edx, edw = exact(case, temperature=0.7)
    assert relative_error(logp, expected) < 1e-6 or v == 1
    assert relative_error(dx, edx) < 2 * ROUNDING[dtype] and relative_error(dw, edw) < 2 * ROUNDING[dtype]
    for chosen, whole in ((case.x, dx), (case.weight, dw)):
        torch.testing.assert_close(
            torch.autograd.grad(logp, chosen, case.grad, retain_graph=True)[0], whole, rtol=0, atol=0
        )
    main_grad = torch.full(dw.shape, 3.0)
    linear_logprob(*case[:3], temperature=0.7, chunk_bytes=1, main_grad=main_grad).backward(case.grad)
    assert relative_error(main_grad - 3.0, edw) < 2 * ROUNDING[dtype]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = linear_logprob(*case[:3], temperature=0.7, chunk_bytes=1)
        got = (again, *torch.autograd.grad(again, (case.x, case.weight), case.grad))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(got, (logp, dx, dw)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(not TILED, reason="needs the C++ kernels for AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "v"), TILED_SHAPES)
def test_entropies_made_tile_by_tile(n, d, v, dtype):
    """Nearly flat, and from 0.01 on nearly certain; the log-probs are those without, to the bit."""
    for temperature in (30.0, 0.7, 0.01):
        case = make(n, d, v, dtype, scale=d**-0.5)
        logp, entropy = linear_logprob(*case[:3], temperature=temperature, chunk_bytes=1, return_entropy=True)
        _, expected, *_ = exact(case, temperature=temperature)
        largest_logit = 6 / temperature  # whose rounding enters
        torch.testing.assert_close(entropy.double(), expected, rtol=2e-6, atol=1e-6 * max(1, largest_logit))
        alone = linear_logprob(*case[:3], temperature=temperature, chunk_bytes=1)
        torch.testing.assert_close(logp, alone, rtol=0, atol=0)
    with torch.no_grad():
        case.x[-1] = float("nan")
    _, entropy = linear_logprob(*case[:3], chunk_bytes=1, return_entropy=True)
    assert entropy[-1].isnan() and not entropy[:-1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_collisions(implementation, dtype):
    case = make(9, 5, 40, dtype)
    found = log_collisions(*case[:3], linear_logprob(*case[:3]))
    p = torch.softmax(case.exact().x @ case.exact().weight.t(), 1)
    torch.testing.assert_close(found.double(), p.square().sum(1).log().detach(), rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("n_rows", "most"), [(0, 5), (1, 1), (7, 3), (128, 128), (1000, 300), (1000, 127), (101, 100), (4097, 2048)]
)
def test_chunks_are_few_and_balanced(n_rows, most):
    parts = list(chunks(n_rows, most))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n_rows))
    sizes = [part.stop - part.start for part in parts]
    assert all(size <= most for size in sizes)
    step = 128 if most >= 128 else 1
    assert len(sizes) == -(-n_rows // (most // step * step))
    assert all(size == sizes[0] and size % step == 0 for size in sizes[:-1])
    assert not sizes or sizes[0] - sizes[-1] < step * len(sizes)


def test_plan_counts_padded_bytes():
    for n_rows, keep in ((100, True), (101, False)):
        assert plan(n_rows, 65, torch.bfloat16, 100 * 128 * 2).keep == keep
    assert plan(9, 65, torch.bfloat16, 100 * 128 * 6)[1:] == (150, 100)
    assert plan(9, 65, torch.float32, 100 * 128 * 4)[1:] == (100, 100)
    assert plan(9, 65, torch.float32, 1) == (False, 1, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(x=torch.zeros(4, 5)), r"same D.*\(4, 5\).*\(9, 3\)"),
        (dict(x=torch.zeros(3)), r"x must be \[N, D\]"),
        (dict(weight=torch.zeros(0, 3)), "V > 0"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), r"target must be int64 of shape \(4,\).*\(3,\)"),
        (dict(target=torch.zeros(4)), "target must be int64.*float32"),
        (dict(target=torch.tensor([0, 1, 9, 2])), r"\[0, 9\), got 0 to 9"),
        (dict(target=torch.tensor([0, 1, -100, 2])), r"\[0, 9\), got -100 to 2"),
        (dict(weight=torch.zeros(9, 3, dtype=torch.float64)), "one floating dtype.*float32.*float64"),
        (dict(x=torch.zeros(4, 3).long(), weight=torch.zeros(9, 3).long()), "floating.*int64"),
        (dict(weight=torch.zeros(9, 3, device="meta")), "one device.*cpu.*meta"),
        (dict(weight=torch.zeros(3, 9).t()), r"weight must be contiguous, got strides \(1, 9\)"),
        (dict(temperature=0.0), "temperature must be positive.*0.0"),
        (dict(temperature=float("nan")), "temperature.*nan"),
        (dict(softcap=-1.0), "softcap.*-1.0"),
        (dict(chunk_bytes=0), "chunk_bytes.*0"),
        (dict(main_grad=torch.zeros(9, 4)), r"main_grad.*\(9, 3\).*got.*\(9, 4\)"),
        (dict(main_grad=torch.zeros(9, 3, dtype=torch.bfloat16)), "main_grad.*float32.*bfloat16"),
        (dict(main_grad=torch.zeros(3, 9).t()), r"main_grad.*contiguous.*\(1, 9\)"),
        (dict(main_grad=torch.zeros(9, 3, requires_grad=True)), "main_grad.*requires_grad=True"),
    ],
)
def test_bad_arguments_are_named(change, says):
    arguments = dict(x=torch.zeros(4, 3), weight=torch.zeros(9, 3), target=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=says):
        linear_logprob(**{**arguments, **change})
