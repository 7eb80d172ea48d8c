"""preference_loss against float64 autograd of every loss as its paper writes it, from log-probability ratios."""

import pytest
import torch
import torch.nn.functional as F
from kernel_case import relative_error

from srlm_fast.kernels import library
from srlm_fast.kernels.preference import KINDS, MARGIN_LOSSES, preference_loss

BETA = 0.1

# Every kind with the options it has: kind, label smoothing, margin, length-normalised, with a reference.
OPTIONS = [
    ("sigmoid", 0.0, 0.0, False, True),
    ("sigmoid", 0.2, 0.0, False, True),
    ("sigmoid", 0.0, 0.5, True, False),
    ("robust", 0.0, 0.0, False, True),
    ("robust", 0.2, 0.3, False, True),
    ("hinge", 0.0, 0.0, False, True),
    ("hinge", 0.0, 0.5, True, False),
    ("ipo", 0.0, 0.0, False, True),
    ("ipo", 0.0, 0.0, True, True),
    ("exo_pair", 0.05, 0.0, False, True),
    ("discopop", 0.0, 0.0, False, True),
    ("nca_pair", 0.0, 0.0, False, True),
    ("sppo_hard", 0.0, 0.0, False, True),
    ("sppo_hard", 0.0, 0.0, True, True),
    ("apo_zero", 0.0, 0.0, False, True),
    ("apo_down", 0.0, 0.0, False, True),
]


def by_the_paper(kind, ratio_c, ratio_r, beta, eps, margin):
    """The loss of log-ratios log pi - log pi_ref; `margin` in units of beta times them."""
    h = beta * (ratio_c - ratio_r) - margin
    p = torch.sigmoid(h)
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(h, torch.full_like(h, 1 - eps), reduction="none")
    if kind == "robust":
        return ((1 - eps) * F.softplus(-h, threshold=1e6) - eps * F.softplus(h, threshold=1e6)) / (1 - 2 * eps)
    if kind == "hinge":
        return (1 - h).clamp_min(0)
    if kind == "ipo":
        return (ratio_c - ratio_r - margin / beta - 1 / (2 * beta)) ** 2
    if kind == "exo_pair":  # KL(policy's preference || smoothed label)
        ours, label = torch.stack([p, torch.sigmoid(-h)]), torch.tensor([[1 - eps], [eps]], dtype=h.dtype)
        return (ours * (ours / label).log()).sum(0)
    if kind == "discopop":
        modulation = torch.sigmoid(h / 0.05)
        return (1 - modulation) * F.softplus(-h, threshold=1e6) + modulation * torch.exp(-h)
    if kind == "nca_pair":
        c, r = beta * ratio_c, beta * ratio_r
        return -(torch.sigmoid(c).log() + 0.5 * torch.sigmoid(-c).log() + 0.5 * torch.sigmoid(-r).log())
    if kind == "sppo_hard":
        return (ratio_c - 0.5 / beta) ** 2 + (ratio_r + 0.5 / beta) ** 2
    if kind == "apo_zero":
        return 1 - torch.sigmoid(beta * ratio_c) + torch.sigmoid(beta * ratio_r)
    assert kind == "apo_down"
    return torch.sigmoid(beta * ratio_c) + 1 - p


def exact(logps, lengths, reference, kind, eps, margin, normalised, beta=BETA):
    """(values, sums) in float64."""
    sums = torch.stack([part.sum() for part in logps.double().split(lengths.tolist())])
    ratios = sums if reference is None else sums - reference.double()
    if normalised:
        ratios = ratios / lengths.clamp_min(1)
    return by_the_paper(kind, ratios[0::2], ratios[1::2], beta, eps, margin), sums


def case(lengths=(3, 1, 9, 4, 0, 2), spread=20.0, dtype=torch.float32, with_reference=True):
    """logps whose rewards differ by a few units, lengths, a reference near the sums, and upstream gradients."""
    generator = torch.Generator().manual_seed(sum(lengths))
    lengths = torch.tensor(lengths)
    logps = -torch.rand(int(lengths.sum()), generator=generator, dtype=dtype) * 5
    near = torch.stack([part.sum() for part in logps.split(lengths.tolist())]) if len(lengths) else logps
    reference = near + torch.randn(len(lengths), generator=generator, dtype=dtype) * spread
    d_values = torch.randn(len(lengths) // 2, generator=generator, dtype=dtype)
    d_sums = torch.randn(len(lengths), generator=generator, dtype=dtype) * 0.1
    return logps.requires_grad_(), lengths, reference if with_reference else None, d_values, d_sums


def options(eps, margin, normalised):
    return {"beta": BETA, "label_smoothing": eps, "margin": margin, "length_normalised": normalised}


def test_every_kind_is_tested():
    assert {row[0] for row in OPTIONS} == set(KINDS)


@pytest.mark.parametrize(("kind", "eps", "margin", "normalised", "with_reference"), OPTIONS)
def test_value_and_gradient(implementation, kind, eps, margin, normalised, with_reference):
    logps, lengths, reference, d_values, d_sums = case(with_reference=with_reference)
    values, sums = preference_loss(logps, lengths, reference, kind=kind, **options(eps, margin, normalised))
    assert values.dtype == sums.dtype == torch.float32 and values.shape == (3,) and sums.shape == (6,)
    (gradient,) = torch.autograd.grad((values, sums), logps, (d_values, d_sums))
    e_values, e_sums = exact(logps, lengths, reference, kind, eps, margin, normalised)
    (e_gradient,) = torch.autograd.grad((e_values, e_sums), logps, (d_values.double(), d_sums.double()))
    assert torch.equal(sums, e_sums.float())
    assert relative_error(values, e_values) < 1e-6
    assert relative_error(gradient, e_gradient) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_small_probability_keep_their_digits(implementation, kind):
    """Rewards of +-12: sigmoids of e^-12 must be relatively right, not only absolutely."""
    lengths, eps = torch.ones(8, dtype=torch.int64), 0.05 if kind == "exo_pair" else 0.0
    logps = torch.tensor([120.0, 0.0, 0.0, 120.0, -120.0, 0.0, 0.0, -120.0], requires_grad=True)
    values, _ = preference_loss(logps, lengths, None, kind=kind, **options(eps, 0.0, False))
    e_values, _ = exact(logps, lengths, None, kind, eps, 0.0, False)
    torch.testing.assert_close(values, e_values.float(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    (e_gradient,) = torch.autograd.grad(e_values.sum(), logps)
    torch.testing.assert_close(gradient, e_gradient, rtol=1e-5, atol=1e-12)


EXTREMES = {  # value at margins +1e4 and -1e4 (rewards +-5e3), and its slope there
    "sigmoid": ((0.0, 1e4), (0.0, -1.0)),
    "robust": ((0.0, 1e4), (0.0, -1.0)),
    "hinge": ((0.0, 10001.0), (0.0, -1.0)),
    "ipo": ((9999.5**2 * 100, 10000.5**2 * 100), (9999.5 * 200, -10000.5 * 200)),
    "exo_pair": ((0.05129329438755058, 2.995732273553991), (0.0, 0.0)),
    "discopop": ((0.0, 1e4), (0.0, -1.0)),
    "nca_pair": ((2500.0, 7500.0), (0.5, -1.0)),
    "sppo_hard": ((4999.5**2 * 200, 5000.5**2 * 200), (4999.5 * 200, -5000.5 * 200)),
    "apo_zero": ((0.0, 2.0), (0.0, 0.0)),
    "apo_down": ((1.0, 1.0), (0.0, 0.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_margins(implementation, kind):
    rewards = torch.tensor([5e3, -5e3, -5e3, 5e3])
    logps = (rewards / BETA).requires_grad_()
    eps = 0.05 if kind == "exo_pair" else 0.0
    values, _ = preference_loss(logps, torch.ones(4, dtype=torch.int64), None, kind=kind, **options(eps, 0.0, False))
    expected, slopes = EXTREMES[kind]
    torch.testing.assert_close(values.detach(), torch.tensor(expected), rtol=1e-6, atol=1e-30)
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    torch.testing.assert_close(gradient[0::2], BETA * torch.tensor(slopes), rtol=1e-6, atol=1e-30)


def test_the_reference_itself_costs_exactly_ln_2(implementation):
    logps, lengths, *_ = case((7, 300, 2000, 5))
    _, sums = preference_loss(logps, lengths, None, kind="sigmoid", beta=BETA)
    values, _ = preference_loss(logps, lengths, sums.detach(), kind="sigmoid", beta=BETA)
    assert values.tolist() == [torch.tensor(2.0).log().item()] * 2
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat_interleave(lengths)
    assert torch.equal(gradient, BETA / 2 * signs)


def test_long_sums_are_rounded_once(implementation):
    lengths = (3000, 1500)
    logps = -torch.rand(4500, generator=torch.Generator().manual_seed(0)) * 5
    _, sums = preference_loss(logps, torch.tensor(lengths), None, kind="sigmoid", beta=BETA)
    assert sums.tolist() == [float(part.double().sum().float()) for part in logps.split(lengths)]


def test_more_sequences_than_a_block(implementation):
    """Offsets of responses behind the first 1024."""
    n = 1030
    logps = torch.arange(n * 1.0).requires_grad_()
    values, sums = preference_loss(logps, torch.ones(n, dtype=torch.int64), None, kind="ipo", beta=BETA)
    assert torch.equal(sums, logps)
    (gradient,) = torch.autograd.grad(values[-1], logps)
    assert gradient.nonzero().flatten().tolist() == [n - 2, n - 1]


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_tokens(implementation, lengths):
    logps = torch.zeros(0, requires_grad=True)
    lengths = torch.tensor(lengths, dtype=torch.int64)
    values, sums = preference_loss(logps, lengths, None, kind="hinge", beta=BETA, length_normalised=True)
    assert values.tolist() == [1.0] * (len(lengths) // 2) and sums.tolist() == [0.0] * len(lengths)
    assert torch.autograd.grad(values.sum(), logps)[0].shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_pair(implementation, kind):
    logps, lengths, reference, *_ = case((2, 3, 4, 1))
    logps = logps.detach().clone()
    logps[6] = float("nan")
    eps = 0.05 if kind == "exo_pair" else 0.0
    values, sums = preference_loss(logps, lengths, reference, kind=kind, **options(eps, 0.0, False))
    assert values.isnan().tolist() == [False, True] and sums.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
@pytest.mark.parametrize(("kind", "eps", "margin", "normalised", "with_reference"), OPTIONS)
def test_gradcheck(implementation, kind, eps, margin, normalised, with_reference):
    logps, lengths, reference, *_ = case(dtype=torch.float64, with_reference=with_reference, spread=8.0)

    def loss(logps):
        return preference_loss(logps, lengths, reference, kind=kind, **options(eps, margin, normalised))

    assert torch.autograd.gradcheck(loss, logps)


@pytest.mark.parametrize(("kind", "eps", "margin", "normalised", "with_reference"), OPTIONS)
def test_reference_switch_agrees(kind, eps, margin, normalised, with_reference):
    logps, lengths, reference, d_values, d_sums = case(with_reference=with_reference)

    def run():
        outputs = preference_loss(logps, lengths, reference, kind=kind, **options(eps, margin, normalised))
        return *outputs, *torch.autograd.grad(outputs, logps, (d_values, d_sums))

    with library.using("reference"):
        expected = run()
    torch.testing.assert_close(run(), expected)


def test_repeatable_whatever_the_threads(implementation):
    logps, lengths, reference, d_values, d_sums = case(tuple(range(1, 65)))

    def run():
        outputs = preference_loss(logps, lengths, reference, kind="sigmoid", beta=BETA)
        return *outputs, *torch.autograd.grad(outputs, logps, (d_values, d_sums))

    first = run()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, run()))
    finally:
        torch.set_num_threads(1)


def test_compiles_to_one_node():
    logps, lengths, reference, d_values, d_sums = case()

    def loss(logps):
        return preference_loss(logps, lengths, reference, kind="sigmoid", beta=BETA)

    expected = loss(logps)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logps)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, logps, (d_values, d_sums)),
        torch.autograd.grad(expected, logps, (d_values, d_sums)),
        rtol=0,
        atol=0,
    )


def test_operators_are_registered_soundly():
    logps, lengths, reference, d_values, d_sums = case()
    torch.library.opcheck(
        torch.ops.srlm.preference_loss.default, (logps, lengths, reference, "sigmoid", BETA, 0.0, 0.0, False)
    )
    torch.library.opcheck(torch.ops.srlm.preference_loss_backward.default, (d_values, d_sums, reference, lengths, 19))


TOKENS, LENGTHS = torch.zeros(4), torch.tensor([2, 2])


@pytest.mark.parametrize(
    ("arguments", "changes", "says"),
    [
        ((torch.zeros(2, 2), LENGTHS, None), {}, r"logps.*\(2, 2\)"),
        ((TOKENS.bfloat16(), LENGTHS, None), {}, "logps.*bfloat16"),
        ((TOKENS, torch.tensor([4]), None), {}, r"lengths.*even.*\(1,\)"),
        ((TOKENS, LENGTHS.int(), None), {}, "lengths.*int32"),
        ((TOKENS, LENGTHS, torch.zeros(3)), {}, r"reference.*\(3,\)"),
        ((TOKENS, LENGTHS, torch.zeros(2).double()), {}, "reference.*float64"),
        ((TOKENS, LENGTHS, None), {"kind": "sigmoids"}, "kind.*'sigmoids'.*meant 'sigmoid'"),
        ((TOKENS, LENGTHS, None), {"beta": 0.0}, "beta.*0.0"),
        ((TOKENS, LENGTHS, None), {"label_smoothing": 0.5}, "label_smoothing.*0.5"),
        ((TOKENS, LENGTHS, None), {"kind": "exo_pair"}, "label_smoothing.*exo_pair"),
        ((TOKENS, LENGTHS, None), {"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1.*ipo"),
    ],
)
def test_bad_arguments_are_named(arguments, changes, says):
    with pytest.raises(ValueError, match=says):
        preference_loss(*arguments, **{"kind": "sigmoid", "beta": BETA, **changes})


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(MARGIN_LOSSES)))
def test_a_margin_is_refused_where_it_has_no_meaning(kind):
    with pytest.raises(ValueError, match=f"margin=0.5.*{kind}"):
        preference_loss(TOKENS, LENGTHS, None, kind=kind, beta=BETA, margin=0.5)


@pytest.mark.parametrize("implementation", ["cpp", "torch"], indirect=True)
@pytest.mark.parametrize("lengths", [(2, 1), (3, 2), (5, -1)])
def test_lengths_that_are_not_those_of_the_tokens(implementation, lengths):
    with pytest.raises((ValueError, RuntimeError), match="lengths"):
        preference_loss(TOKENS, torch.tensor(lengths), None, kind="sigmoid", beta=BETA)
