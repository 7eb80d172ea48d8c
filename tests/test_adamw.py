"""adamw_step_ against float64, its implementations against each other bit for bit, and its stochastic rounding."""

import math

import pytest
import torch
from kernel_case import running

from srlm_fast.kernels import library
from srlm_fast.kernels.adamw import adamw_step_

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [(FP32, FP32), (FP32, BF16), (BF16, BF16), (BF16, FP32)]


def case(shape, param_dtype=FP32, moment_dtype=FP32):
    """param, grad, exp_avg, exp_avg_sq in the middle of a training run."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    param, grad, m, v = (torch.randn(shape, generator=generator) for _ in range(4))
    return param.to(param_dtype), (grad * 0.1).to(param_dtype), (m * 0.1).to(moment_dtype), (v**2).to(moment_dtype)


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def assert_same(ours, others):
    for a, b in zip(ours, others):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def exact(param, grad, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """A step as the paper's algorithm 2 has it, in float64."""
    param, grad, m, v = param.double(), grad.double(), m.double(), v.double()
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return param - lr * m_hat / (v_hat.sqrt() + eps) - lr * weight_decay * param, m, v


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 4), (1030,), (0, 3), ()])
@pytest.mark.parametrize("step", [1, 1000])
def test_fp32_is_the_formula(implementation, shape, step):
    param, grad, m, v = case(shape)
    expected = exact(param, grad, m, v, step, **OPTIONS)
    adamw_step_(param, grad, m, v, step=step, **OPTIONS)
    for ours, theirs in zip((param, m, v), expected):
        torch.testing.assert_close(ours, theirs.float(), rtol=3e-7, atol=1e-8)


def test_fp64_is_the_formula(implementation):
    tensors = [tensor.double() for tensor in case((5, 7))]
    expected = exact(*tensors, 3, **OPTIONS)
    adamw_step_(*tensors, step=3, **OPTIONS)
    for ours, theirs in zip((tensors[0], *tensors[2:]), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("param_dtype", "moment_dtype"), DTYPES)
def test_without_a_seed_bf16_is_rounded_to_nearest(implementation, param_dtype, moment_dtype):
    tensors = case((40,), param_dtype, moment_dtype)
    wide = [tensor.clone().float() for tensor in tensors]
    adamw_step_(*wide, step=3, **OPTIONS)
    adamw_step_(*tensors, step=3, **OPTIONS)
    assert_same(tensors, [wide[0].to(param_dtype), tensors[1], wide[2].to(moment_dtype), wide[3].to(moment_dtype)])


@pytest.mark.parametrize(("param_dtype", "moment_dtype"), DTYPES)
@pytest.mark.parametrize("size", [3, 32768 + 17])
def test_implementations_agree_bit_for_bit(param_dtype, moment_dtype, size):
    results = {}
    for implementation in ("cpp", "torch", "triton"):
        with running(implementation):
            tensors = clones(case((size,), param_dtype, moment_dtype))
            for step in (1, 2, 3):
                adamw_step_(*tensors, step=step, seed=-(2**40) + 5, **OPTIONS)
            results[implementation] = tensors
    assert_same(results["cpp"], results["torch"])
    assert_same(results["cpp"], results["triton"])


def test_repeatable_whatever_the_threads():
    tensors = case((3, 40000), BF16, BF16)
    one, two = clones(tensors), clones(tensors)
    adamw_step_(*one, step=1, seed=1, **OPTIONS)
    torch.set_num_threads(2)
    try:
        adamw_step_(*two, step=1, seed=1, **OPTIONS)
    finally:
        torch.set_num_threads(1)
    assert_same(one, two)


def rounded_up(seed=0, step=1, n=20000):
    """Whether elements whose exact values are 0.3, 0.6 and 0.25 of the way between two bf16 were rounded up (or, the
    parameter, down): bool [n] for exp_avg, exp_avg_sq and param."""
    options = {"beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
    grad = torch.full((n,), 1 + 0.3 * 2**-7)
    m, v = torch.zeros(n, dtype=BF16), torch.zeros(n, dtype=BF16)
    adamw_step_(torch.zeros(n), grad, m, v, lr=0.0, step=step, seed=seed, **options)
    param = torch.ones(n, dtype=BF16)
    zeros = torch.zeros(n), torch.zeros(n)
    adamw_step_(param, torch.ones(n, dtype=BF16), *zeros, lr=2**-10, step=step, seed=seed, **options)
    above, below = 1 + 2**-7, 1 - 2**-8
    assert set(m.tolist()) == {1.0, above} == set(v.tolist()) and set(param.tolist()) == {1.0, below}
    return m == above, v == above, param == below


def test_rounding_is_right_on_average(implementation):
    for up, fraction in zip(rounded_up(), (0.3, 0.6, 0.25)):
        deviation = math.sqrt(fraction * (1 - fraction) / len(up))
        assert abs(float(up.double().mean()) - fraction) < 4 * deviation


def test_roundings_are_independent():
    """Of tensors, elements, steps and seeds: correlations within four standard deviations of none."""
    m, v, param = rounded_up()
    next_step, next_seed = rounded_up(step=2)[0], rounded_up(seed=1)[0]
    for a, b in (
        (m, v),
        (m, param),
        (v, param),
        (m[1:], m[:-1]),
        (m[1024:], m[:-1024]),
        (m, next_step),
        (m, next_seed),
    ):
        correlation = torch.corrcoef(torch.stack((a, b)).double())[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(len(a))


def test_what_bf16_can_hold_is_not_changed(implementation):
    for seed in range(3):
        param, grad, m, v = case((200,), BF16, BF16)
        before = param.clone()
        adamw_step_(param, grad, m, v, step=1, seed=seed, **{**OPTIONS, "lr": 0.0})
        assert torch.equal(param, before)


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
def test_bf16_moments_converge_where_rounding_to_nearest_freezes(implementation):
    """Constant gradients of 1: v is 1 - 0.999^t."""
    options, n, steps = {**OPTIONS, "beta2": 0.999}, 512, 3000
    stochastic, nearest = [[torch.zeros(n), torch.ones(n), *torch.zeros(2, n, dtype=BF16)] for _ in range(2)]
    for step in range(1, steps + 1):
        adamw_step_(*stochastic, step=step, seed=0, **options)
        adamw_step_(*nearest, step=step, **options)
    v = 1 - 0.999**steps
    assert nearest[3].unique().tolist() == [0.25]
    assert float(stochastic[3].double().mean()) == pytest.approx(v, abs=0.003)
    assert float(stochastic[2].double().mean()) == pytest.approx(1.0, abs=0.003)


@pytest.mark.parametrize(("param_dtype", "moment_dtype"), DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_place(implementation, param_dtype, moment_dtype, bad):
    param, grad, m, v = case((50,), param_dtype, moment_dtype)
    grad[7] = bad
    adamw_step_(param, grad, m, v, step=1, seed=3, **OPTIONS)
    for tensor in (param, m, v):
        assert (~tensor.isfinite()).nonzero().tolist() == [[7]]
    assert param[7].isnan() and (m[7].isnan() and v[7].isnan() if math.isnan(bad) else m[7] == v[7] == math.inf)


def test_autograd_sees_the_change():
    param, grad, m, v = case((4,))
    param.requires_grad_()
    square = (param * param).sum()
    adamw_step_(param, grad, m, v, step=1, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_compiles_to_one_node():
    def step(param, grad, m, v):
        adamw_step_(param, grad, m, v, step=2, seed=1, **OPTIONS)
        return param + 1

    expected, ours = clones(case((6, 7), FP32, BF16)), clones(case((6, 7), FP32, BF16))
    plain = step(*expected)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*ours), plain, rtol=0, atol=0)
    assert_same(ours, expected)


def test_operator_is_registered_soundly():
    columns = [[tensor] for tensor in case((5,), FP32, BF16)]
    torch.library.opcheck(torch.ops.srlm.adamw_step_.default, (*columns, *OPTIONS.values(), [3], [1]))


def test_reference_agrees():
    tensors = case((30,), BF16, BF16)
    ours, plain = clones(tensors), clones(tensors)
    adamw_step_(*ours, step=2, seed=1, **OPTIONS)
    with library.using("reference"):
        adamw_step_(*plain, step=2, seed=1, **OPTIONS)
    assert_same(ours, plain)


def tensors_with(**changes):
    return {**{name: torch.zeros(2, 3) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}, **changes}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (tensors_with(param=torch.zeros(2, 3).half()), "param.*float16"),
        (tensors_with(param=torch.zeros(3, 2).t()), r"param.*contiguous.*strides \(1, 2\)"),
        (tensors_with(grad=torch.zeros(6)), r"grad.*\(2, 3\).*\(6,\)"),
        (tensors_with(grad=torch.zeros(2, 3).bfloat16()), "grad.*float32.*bfloat16"),
        (tensors_with(exp_avg=torch.zeros(2, 3).double()), "exp_avg.*float64"),
        (tensors_with(exp_avg=torch.zeros(2, 3).half()), "exp_avg.*float16"),
        (tensors_with(exp_avg_sq=torch.zeros(2, 3).bfloat16()), "exp_avg_sq.*float32.*bfloat16"),
        (tensors_with(step=0), "step.*0"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        adamw_step_(**{"step": 1, **OPTIONS, **arguments})
