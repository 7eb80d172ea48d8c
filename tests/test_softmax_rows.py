"""Rows of logits to losses and gradients, whole and in slices, against float64 autograd."""

import pytest
import torch
from head_case import exact_losses
from kernel_case import ROUNDING, relative_error

from srlm_fast.kernels import softmax_rows
from srlm_fast.kernels.softmax_rows import Softmax, padded_rows, triton_rows
from srlm_fast.kernels.softmax_slices import finish, gradient, merge, statistics, torch_rows

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NaN in rows or their padding

LOSSES = [
    Softmax(),
    Softmax(temperature=0.7),
    Softmax(softcap=5.0),
    Softmax(label_smoothing=0.2),
    Softmax(z_loss=0.05),
    Softmax(1.3, 4.0, 0.1, 0.01),
]


@pytest.fixture(params=["torch", "one block", "blocks of 64"])
def rows(request, monkeypatch):
    """Whole rows in plain torch, and by the Triton kernel with either way of going over a row."""
    if request.param == "torch":
        return torch_rows
    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "blocks of 64":
        monkeypatch.setattr(softmax_rows, "config", lambda n_cols, plain: {"ONE_BLOCK": False, "BLOCK": 64})
    return triton_rows


def padded(logits, garbage=float("nan")):
    """A copy with the rows further apart than they are long, and `garbage` between them."""
    copy = padded_rows(*logits.shape, logits.dtype, logits.device)
    copy.as_strided((logits.shape[0], copy.stride(0)), copy.stride()).fill_(garbage)
    return copy.copy_(logits)


def case(n, v, scale=4.0):
    generator = torch.Generator().manual_seed(n * 1000 + v)
    logits = torch.randn(n, v, generator=generator) * scale
    target = torch.randint(0, v, (n,), generator=generator)
    target[: min(n, 5)] = torch.tensor([0, v - 1, 63 % v, 64 % v, 65 % v])[: min(n, 5)]
    c, h = torch.randn(2, n, generator=generator)
    return logits, target, c, h


def run(rows, logits, target, softmax, dtype=torch.float32, **upstream):
    """(loss, lse, entropy, U) of one call."""
    out = {name: logits.new_full(logits.shape[:1], 7.0) for name in ("loss", "lse", "entropy")}
    unit = padded_rows(*logits.shape, dtype, logits.device)
    rows(padded(logits), target, softmax, unit=unit, **out, **upstream)
    return *out.values(), unit


@pytest.mark.parametrize("softmax", LOSSES)
@pytest.mark.parametrize(("n", "v"), [(1, 1), (2, 2), (6, 64), (6, 65), (7, 201), (0, 9)])
def test_losses_and_gradients(rows, softmax, n, v):
    logits, target, c, h = case(n, v)
    raw = logits.double().requires_grad_()
    exact_loss, exact_entropy = exact_losses(raw, target, softmax)
    loss, lse, entropy, unit = run(rows, logits, target, softmax)
    torch.testing.assert_close(loss.double(), exact_loss.detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), exact_entropy.detach(), rtol=1e-6, atol=2e-6)
    z = raw.detach() if not softmax.softcap else softmax.softcap * torch.tanh(raw.detach() / softmax.softcap)
    torch.testing.assert_close(lse.double(), torch.logsumexp(z / softmax.temperature, 1), rtol=1e-6, atol=2e-6)
    (exact_unit,) = torch.autograd.grad(exact_loss.sum(), raw, retain_graph=True)
    torch.testing.assert_close(unit.double(), exact_unit, rtol=5e-6, atol=1e-7)
    (exact_unit,) = torch.autograd.grad((c.double() * exact_loss + h.double() * exact_entropy).sum(), raw)
    *_, unit = run(rows, logits, target, softmax, coefficient=c, grad_entropy=h)
    torch.testing.assert_close(unit.double(), exact_unit, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_once(rows, dtype):
    logits, target, *_ = case(6, 130, scale=1.0)
    *_, unit = run(rows, logits, target, Softmax())
    *_, narrow = run(rows, logits, target, Softmax(), dtype=dtype)
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow, unit.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("gap", [5.0, 14.0, 25.0])
def test_certain_targets_keep_relative_accuracy(rows, gap):
    """As p_y -> 1, rounding p_y before subtracting 1 would lose p_y - 1, in bf16 from a gap of 6 on."""
    logits, target, *_ = case(5, 201, scale=1.0)
    logits.scatter_(1, target[:, None], logits.amax(1, keepdim=True) + gap)
    raw = logits.double().requires_grad_()
    exact_loss, _ = exact_losses(raw, target, Softmax())
    others = torch.softmax(raw.detach(), 1).scatter(1, target[:, None], 0.0).sum(1)
    for dtype in (torch.float32, torch.bfloat16):
        loss, _, _, unit = run(rows, logits, target, Softmax(), dtype=dtype)
        assert relative_error(loss, others.log1p() if gap > 20 else exact_loss) < 2e-6
        assert relative_error(unit.gather(1, target[:, None])[:, 0], -others) < ROUNDING[dtype]


def test_huge_logits(rows):
    logits, target, c, h = case(6, 130)
    logits *= 2500.0
    logits[0, 5], logits[1, 7] = 1e4, -1e4
    raw = logits.double().requires_grad_()
    exact_loss, exact_entropy = exact_losses(raw, target, Softmax())
    (exact_unit,) = torch.autograd.grad((c.double() * exact_loss + h.double() * exact_entropy).sum(), raw)
    loss, _, entropy, unit = run(rows, logits, target, Softmax(), coefficient=c, grad_entropy=h)
    torch.testing.assert_close(loss.double(), exact_loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), exact_entropy.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unit.double(), exact_unit, rtol=1e-4, atol=1e-6)


def test_gradients_may_replace_the_logits(rows):
    logits, target, *_ = case(5, 201)
    *_, unit = run(rows, logits, target, Softmax(softcap=5.0))
    own = padded(logits)
    rows(own, target, Softmax(softcap=5.0), unit=own)
    torch.testing.assert_close(own, unit, rtol=0, atol=0)


def test_nan_stays_in_its_row(rows):
    logits, target, *_ = case(5, 201)
    clean = run(rows, logits, target, Softmax())
    logits[2, 100] = float("nan")
    for got, want in zip(run(rows, logits, target, Softmax()), clean):
        assert got[2].isnan().all()
        others = torch.tensor([0, 1, 3, 4])
        torch.testing.assert_close(got[others], want[others], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-100, 201, 1 << 40])
def test_unchecked_targets_read_nothing_outside(bad):
    pytest.importorskip("triton", reason="Triton is not installed")
    logits, target, *_ = case(3, 201)
    target[1] = bad
    loss, *_, unit = run(triton_rows, logits, target, Softmax())
    assert loss.isnan().tolist() == [False, True, False] and unit[1].isnan().all() and not unit[0].isnan().any()


@pytest.mark.parametrize("implementation", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize("softmax", [Softmax(), Softmax(0.7, 5.0)])
@pytest.mark.parametrize("bounds", [(0, 201), (0, 70, 140, 201), (0, 1, 201)])
def test_slices_make_the_whole(implementation, softmax, bounds):
    logits, target, c, h = case(6, 201)
    expected = run(torch_rows, logits, target, softmax, coefficient=c, grad_entropy=h)
    slices = [(padded(logits[:, a:b]), target - a) for a, b in zip(bounds, bounds[1:])]
    numbers = merge(torch.stack([statistics(*part, softmax.temperature, softmax.softcap) for part in slices]))
    results = finish(numbers, softmax, 201, coefficient=c, grad_entropy=h)
    for raw, own_target in slices:
        gradient(raw, own_target, results.terms, raw, softmax.temperature, softmax.softcap)
    made = (results.loss, results.lse, results.entropy, torch.cat([raw for raw, _ in slices], dim=1))
    for got, want in zip(made, expected):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


def test_slice_operators_are_registered_soundly():
    logits, target, *_ = case(3, 20)
    numbers = torch.ops.srlm.softmax_statistics(logits, target, 1.0, 0.0)
    torch.library.opcheck(torch.ops.srlm.softmax_statistics.default, (logits, target, 1.0, 0.0))
    terms = finish(numbers, Softmax(), 20).terms
    unit = torch.empty_like(logits)
    torch.library.opcheck(torch.ops.srlm.softmax_gradient.default, (logits, target, terms, unit, 1.0, 0.0))


def test_every_config_holds_its_rows():
    for plain in (True, False):
        for n_cols in (1, 64, 65, 8192, 8193, 32000, 32768, 32769, 128256):
            config = softmax_rows.config(n_cols, plain)
            assert not config["ONE_BLOCK"] or n_cols <= config["BLOCK"]
            assert config["BLOCK"] <= 2048 * config["num_warps"], "64 fp32 elements of a row per thread"
