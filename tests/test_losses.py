"""Every registered loss against its equation, written out here in float64, and against known values.

The equations are the papers'; `TRL` marks those that are also TRL 1.16's (trl/trainer/dpo_trainer.py, kto_trainer.py,
trl/experimental/cpo, orpo), which was read, not imported.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernel_case import relative_error
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.kernels import library
from srlm_fast.losses import LOSSES, LogProbs, evaluate, get_loss, preference_metrics, sequence_sums
from srlm_fast.losses.logprobs import head_sums, label_metrics
from srlm_fast.losses.margins import dpo, wpo, wpo_weights

BETA, EPS = 0.1, 0.2
PAIRS = ((3, 5), (7, 7), (1, 4), (9, 2), (6, 1), (4, 8))


class Batch(NamedTuple):
    """Responses token by token and summed, chosen and rejected in turn."""

    tokens: Tensor
    lengths: Tensor
    reference: Tensor
    heads: Tensor
    labels: Tensor

    def run(self, name: str, *, eps: float = 0.0, **options: object) -> Tensor:
        return evaluate(
            get_loss(name),
            self.tokens,
            self.lengths,
            self.reference if get_loss(name).needs_reference else None,
            beta=BETA,
            label_smoothing=eps,
            options=options,
            reference_heads=self.heads,
            labels=self.labels,
            baseline=torch.tensor(1.5, dtype=self.tokens.dtype),
        )[0]


def batch(dtype: torch.dtype = torch.float64, spread: float = 4.0) -> Batch:
    """Random log-probabilities whose reference is some nats away."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(PAIRS).flatten()
    tokens = (-4 * torch.rand(int(lengths.sum()), generator=generator, dtype=torch.float64)).to(dtype)
    heads = torch.stack([part[: min(PAIRS[i // 2])].sum() for i, part in enumerate(tokens.split(lengths.tolist()))])
    sums = torch.stack([part.sum() for part in tokens.split(lengths.tolist())])
    shift = spread * torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.rand(len(lengths), generator=generator, dtype=torch.float64).to(dtype)
    return Batch(tokens.requires_grad_(), lengths, sums.detach() + shift, heads.detach() + 0.6 * shift, labels)


class Pair(NamedTuple):
    """One pair as an equation sees it: c the chosen, r the rejected response."""

    c: Tensor  # log pi(y_c)
    r: Tensor
    ref_c: Tensor
    ref_r: Tensor
    n_c: int
    n_r: int
    first_c: Tensor  # log pi of the first min(n_c, n_r) tokens
    first_r: Tensor
    ref_first_c: Tensor
    ref_first_r: Tensor
    p_c: Tensor
    p_r: Tensor

    @property
    def u_c(self) -> Tensor:
        return self.c - self.ref_c

    @property
    def u_r(self) -> Tensor:
        return self.r - self.ref_r

    @property
    def h(self) -> Tensor:
        return BETA * (self.u_c - self.u_r)

    @property
    def h_mean(self) -> Tensor:
        return BETA * (self.u_c / self.n_c - self.u_r / self.n_r)


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def log_sigma(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def smoothed(x: Tensor) -> Tensor:
    return -(1 - EPS) * log_sigma(x) - EPS * log_sigma(-x)


def divergence(f: Callable[[Tensor], Tensor]) -> Callable[[Pair], Tensor]:
    """DPO with f' of the ratio pi / pi_ref in place of its logarithm."""
    return lambda p: -log_sigma(BETA * (f(torch.exp(p.u_c)) - f(torch.exp(p.u_r))))


def excess(p: Pair, alpha: float) -> Tensor:
    def log_ratio(whole, first, ref_whole, ref_first):
        return first + alpha * (whole - first) - ref_first - alpha * (ref_whole - ref_first)

    chosen = log_ratio(p.c, p.first_c, p.ref_c, p.ref_first_c)
    return BETA * (chosen - log_ratio(p.r, p.first_r, p.ref_r, p.ref_first_r))


def discopop_by_paper(p: Pair, tau: float = 0.05) -> Tensor:
    m = sigma(p.h / tau)
    return -(1 - m) * log_sigma(p.h) + m * torch.exp(-p.h)


def orpo_by_paper(p: Pair) -> Tensor:
    def odds(logp, n):
        return torch.exp(logp / n) / (1 - torch.exp(logp / n))

    return -p.c / p.n_c - BETA * log_sigma(torch.log(odds(p.c, p.n_c) / odds(p.r, p.n_r)))


def exo_by_paper(p: Pair) -> Tensor:
    """KL of the policy's preference from the smoothed label."""
    return sigma(p.h) * torch.log(sigma(p.h) / (1 - EPS)) + sigma(-p.h) * torch.log(sigma(-p.h) / EPS)


class Row(NamedTuple):
    """A loss, its label smoothing and options, and the same of one pair."""

    name: str
    equation: Callable[[Pair], Tensor]
    eps: float = 0.0
    options: dict = {}

    @property
    def id(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.options.items()), f"{self.eps}"])


OF_PAIRS = [
    Row("nll", lambda p: -p.c),  # TRL sft, before the division
    Row("dpo", lambda p: -log_sigma(p.h)),  # TRL sigmoid
    Row("dpo", lambda p: smoothed(p.h), EPS),  # TRL cpo, aot
    Row("dpo", lambda p: -log_sigma(p.h - 0.7), options={"margin": 0.7}),
    Row("dpo", lambda p: -log_sigma(p.h_mean - 0.3), options={"margin": 0.3, "length_normalised": True}),
    Row("dpo", divergence(lambda t: 1 - 1 / t), options={"divergence": "forward_kl"}),  # TRL
    Row("dpo", divergence(lambda t: torch.log(2 * t / (t + 1))), options={"divergence": "js_divergence"}),  # TRL
    Row("dpo", divergence(lambda t: (t**-0.5 - 1) / -0.5), options={"divergence": "alpha_divergence"}),  # TRL
    Row(
        "dpo",
        divergence(lambda t: (t**0.3 - 1) / 0.3),
        options={"divergence": "alpha_divergence", "divergence_alpha": 1.3},
    ),
    Row("dpo", divergence(torch.log), options={"divergence": "alpha_divergence", "divergence_alpha": 1.0}),
    Row("dpo_norm", lambda p: -log_sigma(p.h_mean)),  # TRL sigmoid_norm
    Row("robust", lambda p: (-(1 - EPS) * log_sigma(p.h) + EPS * log_sigma(-p.h)) / (1 - 2 * EPS), EPS),  # TRL
    Row("hinge", lambda p: torch.clamp(1 - p.h, min=0)),  # TRL
    Row("hinge", lambda p: torch.clamp(1 - p.h + 0.5, min=0), options={"margin": 0.5}),
    Row("ipo", lambda p: (p.u_c / p.n_c - p.u_r / p.n_r - 1 / (2 * BETA)) ** 2),  # TRL
    Row("ipo", lambda p: (p.u_c - p.u_r - 1 / (2 * BETA)) ** 2, options={"length_normalised": False}),
    Row("exo_pair", exo_by_paper, EPS),  # TRL
    Row("discopop", discopop_by_paper),  # TRL
    Row("discopop", lambda p: discopop_by_paper(p, 0.4), options={"tau": 0.4}),  # TRL
    Row("r_dpo", lambda p: -log_sigma(p.h + 0.05 * (p.n_c - p.n_r)), options={"alpha": 0.05}),
    Row("ld_dpo", lambda p: -log_sigma(excess(p, 0.5))),  # TRL ld_alpha
    Row("ld_dpo", lambda p: smoothed(excess(p, 0.0)), EPS, {"alpha": 0.0}),  # TRL ld_alpha
    Row("dpop", lambda p: -log_sigma(p.h - BETA * 5 * torch.clamp(-p.u_c, min=0)), options={"penalty": 5}),
    Row("wpo", lambda p: -torch.exp(p.c / p.n_c + p.r / p.n_r).detach() * log_sigma(p.h)),
    Row("cream", lambda p: -p.p_c * log_sigma(p.h) - (1 - p.p_c) * log_sigma(-p.h)),
    Row(
        "nca_pair",  # TRL
        lambda p: -log_sigma(BETA * p.u_c) - 0.5 * log_sigma(-BETA * p.u_c) - 0.5 * log_sigma(-BETA * p.u_r),
    ),
    Row("bco_pair", lambda p: -log_sigma(BETA * p.u_c) - log_sigma(-BETA * p.u_r)),  # TRL
    Row("sppo", lambda p: (p.u_c - (p.p_c - 0.5) / BETA) ** 2 + (p.u_r - (p.p_r - 0.5) / BETA) ** 2),
    Row("sppo_hard", lambda p: (p.u_c - 0.5 / BETA) ** 2 + (p.u_r + 0.5 / BETA) ** 2),  # TRL
    Row("apo_zero", lambda p: 1 - sigma(BETA * p.u_c) + sigma(BETA * p.u_r)),  # TRL
    Row("apo_down", lambda p: sigma(BETA * p.u_c) + 1 - sigma(p.h)),  # TRL
    Row("irpo", lambda p: -log_sigma(p.h) - 0.5 * p.c / p.n_c, options={"alpha": 0.5}),
    Row("irpo", lambda p: -log_sigma(p.h) - p.c, options={"nll_per_token": False}),
    Row("simpo", lambda p: -log_sigma(BETA * (p.c / p.n_c - p.r / p.n_r) - 0.5)),  # TRL cpo, simpo
    Row("simpo", lambda p: smoothed(BETA * (p.c / p.n_c - p.r / p.n_r) - 1.2), EPS, {"gamma": 1.2}),  # TRL cpo, simpo
    Row("cpo", lambda p: -log_sigma(BETA * (p.c - p.r)) - p.c / p.n_c),  # TRL cpo, of one pair
    Row("cpo", lambda p: smoothed(BETA * (p.c - p.r)) - 2 * p.c, EPS, {"alpha": 2, "nll_per_token": False}),
    Row("orpo", orpo_by_paper),  # TRL, but for the prompt's tokens in its NLL
]


def in_order(values: list[Tensor]) -> list[Tensor]:
    return sorted(values, key=lambda value: value.item())


def aot_by_paper(pairs: list[Pair]) -> list[Tensor]:
    """TRL."""
    policy, reference = in_order([p.c - p.r for p in pairs]), in_order([p.ref_c - p.ref_r for p in pairs])
    return [smoothed(BETA * (a - b)) for a, b in zip(policy, reference)]


def aot_unpaired_by_paper(pairs: list[Pair]) -> list[Tensor]:
    """TRL."""
    return [
        smoothed(BETA * (a - b)) for a, b in zip(in_order([p.u_c for p in pairs]), in_order([p.u_r for p in pairs]))
    ]


class Response(NamedTuple):
    """One labelled response: u its log-ratio, p its label, z the baseline."""

    u: Tensor
    p: Tensor
    z: float = 1.5


def kto_by_paper(r: Response, desirable: float = 1.0, undesirable: float = 1.0) -> Tensor:
    if r.p > 0.5:
        return desirable * (1 - sigma(BETA * (r.u - r.z)))
    return undesirable * (1 - sigma(BETA * (r.z - r.u)))


OF_RESPONSES = [
    Row("sft", None),
    Row("kto", kto_by_paper),  # TRL
    Row(
        "kto",  # TRL
        lambda r: kto_by_paper(r, 1.3, 0.7),
        options={"desirable_weight": 1.3, "undesirable_weight": 0.7},
    ),
    Row("apo_zero_unpaired", lambda r: kto_by_paper(r._replace(z=0.0))),  # TRL
    Row("bco", lambda r: -log_sigma(BETA * (r.u - r.z) * (1 if r.p > 0.5 else -1))),
]


def pairs_of(made: Batch) -> list[Pair]:
    parts = [part.double() for part in made.tokens.split(made.lengths.tolist())]
    found = []
    for i, (n_c, n_r) in enumerate(PAIRS):
        two, least = parts[2 * i : 2 * i + 2], min(n_c, n_r)
        references = [*made.reference[2 * i : 2 * i + 2].double()], [*made.heads[2 * i : 2 * i + 2].double()]
        sums, firsts = [part.sum() for part in two], [part[:least].sum() for part in two]
        labels = made.labels[2 * i : 2 * i + 2].double()
        found.append(Pair(*sums, *references[0], n_c, n_r, *firsts, *references[1], *labels))
    return found


def compare(made: Batch, values: Tensor, expected: list[Tensor]) -> None:
    """Values and their gradients, weighted differently."""
    values, expected = values.double(), torch.stack(expected)
    weights = torch.linspace(1, 2, len(values), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((values * weights).sum(), made.tokens)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), made.tokens)
    assert values.shape == expected.shape
    within = 1e-10 if made.tokens.dtype == torch.float64 else 5e-6
    assert relative_error(values, expected) < within
    assert relative_error(gradient, expected_gradient) < within
    if made.tokens.dtype == torch.float64:
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-6)


EVERYWHERE = [
    pytest.mark.parametrize("kernels", library.IMPLEMENTATIONS),
    pytest.mark.parametrize("dtype", [torch.float64, torch.float32]),
]


def everywhere(test: Callable) -> Callable:
    for mark in EVERYWHERE:
        test = mark(test)
    return test


@everywhere
@pytest.mark.parametrize("row", OF_PAIRS, ids=[row.id for row in OF_PAIRS])
def test_value_and_gradient(row, dtype, kernels):
    made = batch(dtype)
    with library.using(kernels):
        values = made.run(row.name, eps=row.eps, **row.options)
    compare(made, values, [row.equation(pair) for pair in pairs_of(made)])


@everywhere
@pytest.mark.parametrize(("name", "equation"), [("aot", aot_by_paper), ("aot_unpaired", aot_unpaired_by_paper)])
def test_value_and_gradient_of_sorted_losses(name, equation, dtype, kernels):
    made = batch(dtype)
    with library.using(kernels):
        values = made.run(name, eps=EPS)
    compare(made, values, equation(pairs_of(made)))


@everywhere
@pytest.mark.parametrize("row", OF_RESPONSES, ids=[row.id for row in OF_RESPONSES])
def test_value_and_gradient_of_single_responses(row, dtype, kernels):
    made = batch(dtype)
    with library.using(kernels):
        values = made.run(row.name, **row.options)
    sums = [part.double().sum() for part in made.tokens.split(made.lengths.tolist())]
    if row.name == "sft":
        expected = [-value for value in sums]
    else:
        ratios = [value - reference for value, reference in zip(sums, made.reference.double())]
        expected = [row.equation(Response(u, p)) for u, p in zip(ratios, made.labels)]
    compare(made, values, expected)


def test_every_loss_has_a_row():
    assert {row.name for row in [*OF_PAIRS, *OF_RESPONSES]} | {"aot", "aot_unpaired"} == set(LOSSES)


def test_wpo_with_sampled_alignment():
    """TRL's use_weighting."""
    made = batch()
    collisions = -3 * torch.rand(int(made.lengths.sum()), dtype=torch.float64)
    sums = sequence_sums(made.tokens, made.lengths)
    logps = LogProbs(sums, made.reference, made.lengths, log_collisions=sequence_sums(collisions, made.lengths))
    aligned = [
        (a - b).mean().exp() for a, b in zip(*(x.split(made.lengths.tolist()) for x in (made.tokens, collisions)))
    ]
    weights = torch.stack([chosen * rejected for chosen, rejected in zip(aligned[0::2], aligned[1::2])])
    torch.testing.assert_close(wpo_weights(logps, sampled_alignment=True), weights.detach())
    assert not wpo_weights(logps, sampled_alignment=True).requires_grad
    expected = weights.detach() * dpo(logps, beta=BETA)
    torch.testing.assert_close(wpo(logps, beta=BETA, sampled_alignment=True), expected)


def test_special_cases_are_each_other():
    made = batch()

    def equal(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    sure = made._replace(labels=torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(PAIRS)))
    plain = made.run("dpo")
    for name, options in (("r_dpo", {"alpha": 0.0}), ("ld_dpo", {"alpha": 1.0}), ("dpop", {"penalty": 0.0})):
        equal(made.run(name, **options), plain)
    equal(sure.run("cream"), plain)
    equal(made.run("robust"), plain)
    equal(made.run("irpo", alpha=0.0), plain)
    equal(sure.run("sppo"), made.run("sppo_hard"))
    equal(made.run("dpo", length_normalised=True), made.run("dpo_norm"))
    equal(made.run("irpo"), plain + made.run("nll") / made.lengths[0::2])
    equal(made.run("aot_unpaired").sum(), made._replace(reference=made.reference).run("aot_unpaired").sum())


def test_cream_of_one_consistency_is_cdpo():
    made = batch()
    same = made._replace(labels=torch.full_like(made.labels, 1 - EPS))
    torch.testing.assert_close(same.run("cream"), made.run("dpo", eps=EPS), rtol=1e-12, atol=0)


def test_dpo_at_the_reference_is_ln_2_with_gradient_half_beta():
    policy = batch().reference.requires_grad_()
    losses = dpo(LogProbs(policy, policy.detach(), torch.full((12,), 7)), beta=0.1)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), atol=1e-15, rtol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    torch.testing.assert_close(gradient, torch.tensor([-0.05, 0.05], dtype=torch.float64).repeat(6))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "divergence" in loss.options])
def test_at_the_reference_no_divergence_matters(name, divergence):
    """f'(1) = 0 for all of them."""
    made = batch()
    sums = sequence_sums(made.tokens, made.lengths).detach()
    same = made._replace(reference=sums)
    eps = 0.01 if LOSSES[name].needs_smoothing else 0.0
    values, plain = same.run(name, eps=eps, divergence=divergence), same.run(name, eps=eps)
    torch.testing.assert_close(values, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.paired])
def test_finite_at_extreme_values(name, divergence):
    """Every token certain, or of probability e^-1000; the reference the other way round."""
    lengths = torch.tensor([2, 2, 3, 1])
    tokens = torch.tensor([0.0, 0.0, -1e3, -1e3, -1e3, -1e3, -1e3, 0.0], requires_grad=True)
    reference = torch.tensor([-2e3, 0.0, 0.0, -1e3])
    loss = LOSSES[name]
    options = {"divergence": divergence} if "divergence" in loss.options else {}
    values, _ = evaluate(
        loss,
        tokens,
        lengths,
        reference,
        beta=0.1,
        label_smoothing=0.01 if loss.needs_smoothing else 0.0,
        options=options,
        reference_heads=reference,
        labels=torch.tensor([1.0, 0.0, 0.7, 0.1]),
    )
    (gradient,) = torch.autograd.grad(values.sum(), tokens)
    if name != "ipo" or divergence in ("reverse_kl", "js_divergence"):  # else it is exp(80) squared
        assert values.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.needs_reference])
def test_without_a_reference(name):
    made = batch()
    loss, arguments = LOSSES[name], {"beta": BETA}
    with_one, _ = evaluate(loss, made.tokens, made.lengths, made.reference, **arguments)
    without, logps = evaluate(loss, made.tokens, made.lengths, None, **arguments)
    assert torch.equal(with_one, without) and logps.reference is None


def test_which_options_run_in_one_launch():
    def kernel(name: str, **options: object) -> dict | None:
        loss = LOSSES[name]
        return loss.kernel({key: option.default for key, option in loss.options.items()} | options)

    assert kernel("dpo") == {"kind": "sigmoid", "margin": 0.0, "length_normalised": False}
    assert kernel("dpo", margin=0.5)["margin"] == 0.5
    assert kernel("dpo", divergence="forward_kl") is None
    assert kernel("dpo_norm")["length_normalised"] and kernel("ipo")["length_normalised"]
    assert kernel("simpo", gamma=0.7) == {"kind": "sigmoid", "margin": 0.7, "length_normalised": True}
    assert kernel("discopop") and kernel("discopop", tau=0.1) is None
    assert kernel("apo_zero") == {"kind": "apo_zero"}
    assert kernel("irpo") is None and kernel("sft") is None


def test_sequence_sums_with_gradient():
    tokens = torch.arange(6, dtype=torch.float64).requires_grad_()
    sums = sequence_sums(tokens, torch.tensor([1, 3, 2]))
    assert sums.tolist() == [0.0, 6.0, 9.0]
    (gradient,) = torch.autograd.grad(sums, tokens, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert gradient.tolist() == [1, 2, 2, 2, 3, 3]


def test_head_sums():
    tokens = torch.tensor([1.0, 2, 3, 10, 20, 100, 200, 1000, 2000, 3000])
    assert head_sums(tokens, torch.tensor([3, 2, 2, 3])).tolist() == [3, 30, 300, 3000]


def test_metrics_are_sums_over_pairs():
    logps = LogProbs(torch.tensor([-1.0, -5.0, -4.0, -2.0]), torch.tensor([-2.0, -2.0, -3.0, -3.0]), torch.ones(4))
    metrics = {name: value.item() for name, value in preference_metrics(logps, 0.5).items()}
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.0,
            "rewards/rejected": -1.0,
            "rewards/margins": 1.0,
            "rewards/accuracies": 1.0,
            "logps/chosen": -5.0,
            "logps/rejected": -7.0,
        }
    )


def test_metrics_without_a_reference():
    logps = LogProbs(torch.tensor([-1.0, -6.0]), None, torch.tensor([1, 3]))
    assert preference_metrics(logps, 0.5)["rewards/rejected"].item() == -3.0
    per_token = preference_metrics(logps, 0.5, per_token=True)
    assert per_token["rewards/rejected"].item() == -1.0 and per_token["logps/rejected"].item() == -6.0


def test_metrics_of_labelled_responses():
    logps = LogProbs(
        torch.tensor([-1.0, -2.0, -4.0]),
        torch.tensor([-2.0, -2.0, -1.0]),
        torch.ones(3),
        labels=torch.tensor([1.0, 1, 0]),
    )
    metrics = {name: value.item() for name, value in label_metrics(logps, 0.5).items()}
    assert metrics == {"rewards/chosen": 0.5, "rewards/rejected": -1.5, "logps/chosen": -3.0, "logps/rejected": -4.0}


def test_registry():
    assert get_loss("dpo").needs_reference and get_loss("dpo").paired and not get_loss("sft").paired
    assert {loss.unit for loss in LOSSES.values()} <= {"tokens", "chosen_tokens", "pairs", "responses"}
    assert all("arXiv" in loss.fn.__doc__ or name in ("sft", "wpo", "sppo_hard") for name, loss in LOSSES.items())
    with pytest.raises(UserError, match="did you mean 'dpo'"):
        get_loss("dpoo")
    with pytest.raises(UserError, match="did you mean 'exo_pair'"):
        get_loss("exo")
