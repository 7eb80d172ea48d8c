"""Names, weighted sums and options of losses, as the configuration has them."""

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.kernels import library
from srlm_fast.losses import LOSSES, Loss, get_objective
from srlm_fast.losses.logprobs import halves

TOKENS = -torch.rand(14, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([3, 4, 5, 2])
REFERENCE = torch.tensor([-1.0, -3.0, -2.0, -0.5])


def evaluated(expression: str, **arguments) -> dict[str, torch.Tensor]:
    return get_objective(expression, **arguments).evaluate(TOKENS, LENGTHS, REFERENCE)[0]


@pytest.mark.parametrize(
    "expression", ["dpo + 0.2 * nll", "dpo+0.2*nll", " 1*dpo +2e-1 * nll ", "1.0 * dpo + 2e-1*nll"]
)
def test_a_weighted_sum(expression):
    objective = get_objective(expression)
    assert [(term.name, term.weight) for term in objective.terms] == [("dpo", 1.0), ("nll", 0.2)]
    values, logps = objective.evaluate(TOKENS, LENGTHS, REFERENCE)
    counts = {"pairs": 2, "chosen_tokens": 8}
    expected = evaluated("dpo")["dpo"].sum() / 2 + 0.2 * -logps.policy[0::2].sum() / 8
    torch.testing.assert_close(objective.total(values, counts), expected)
    assert objective.paired and objective.needs_reference


def test_exponents_are_no_sums():
    assert [term.weight for term in get_objective("1e+2*simpo + 1.5E-1*nll").terms] == [100.0, 0.15]
    assert [term.name for term in get_objective("hinge+nll").terms] == ["hinge", "nll"]


def test_options_go_to_every_term_that_has_them():
    objective = get_objective(
        "irpo + 0.5*hinge + simpo", options={"margin": 1, "gamma": "2e-1", "nll_per_token": False}
    )
    assert [term.options for term in objective.terms] == [
        {"margin": 1.0, "nll_per_token": False},
        {"margin": 1.0},
        {"gamma": 0.2},
    ]
    plain, changed = evaluated("hinge"), evaluated("hinge", options={"margin": 0.5})
    torch.testing.assert_close(changed["hinge"], plain["hinge"] + 0.5)


@pytest.mark.parametrize(
    ("expression", "arguments", "says"),
    [
        ("dpoo", {}, "unknown loss 'dpoo'; did you mean 'dpo'"),
        ("dpo + nnl", {}, "unknown loss 'nnl'; did you mean 'nll'"),
        ("", {}, "cannot read ''"),
        ("dpo +", {}, "cannot read ''; write it like"),
        ("dpo 0.2 nll", {}, "cannot read 'dpo 0.2 nll'"),
        ("two * dpo", {}, "weight 'two' is not a number above 0"),
        ("-1 * dpo", {}, "weight '-1' is not"),
        ("0*dpo + nll", {}, "weight '0' is not"),
        ("inf * dpo", {}, "weight 'inf' is not"),
        ("dpo + 0.2*dpo", {}, "has dpo twice"),
        ("dpo + 0.1 * sft", {}, "sft is of single responses, the rest of pairs; nll is that of the chosen ones"),
        ("kto + dpo", {}, "kto is of single responses, the rest of pairs$"),
        ("kto + bco", {}, "different baselines"),
        ("dpo", {"beta": 0.0}, "beta=0.0: must be above 0"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing=0.5: must be at least 0 and below 0.5"),
        ("ipo", {"label_smoothing": 0.1}, "label_smoothing=0.1 has no meaning for loss 'ipo'"),
        ("exo_pair", {}, "'exo_pair' needs label_smoothing above 0; its paper takes 0.001"),
        (
            "simpo",
            {"options": {"gama": 1}},
            r"unknown option 'gama' of loss 'simpo'; did you mean 'gamma'\? \(it has gamma",
        ),
        ("nca_pair", {"options": {"gamma": 1}}, r"unknown option 'gamma' of loss 'nca_pair' \(it has none\)"),
        ("simpo", {"options": {"gamma": "much"}}, "gamma='much': must be a number$"),
        ("simpo", {"options": {"gamma": True}}, "gamma=True: must be a number"),
        ("simpo", {"options": {"gamma": float("nan")}}, "gamma=nan: must be a number"),
        ("ipo", {"options": {"length_normalised": 1}}, "length_normalised=1: must be true or false"),
        ("dpo", {"options": {"divergence": "kl"}}, "divergence='kl': must be one of reverse_kl, forward_kl"),
        ("discopop", {"options": {"tau": 0}}, "tau=0: must be a number above 0"),
        ("dpop", {"options": {"penalty": -1}}, "penalty=-1: must be a number at least 0"),
        ("ld_dpo", {"options": {"alpha": 1.5}}, "alpha=1.5: must be a number from 0 to 1"),
    ],
)
def test_refusals_name_what_is_wrong(expression, arguments, says):
    with pytest.raises(UserError, match=says):
        get_objective(expression, **arguments)


@pytest.mark.parametrize("kernels", library.IMPLEMENTATIONS)
def test_label_smoothing_goes_to_the_terms_that_have_it(kernels):
    with library.using(kernels):
        together = evaluated("dpo + ipo + nll", label_smoothing=0.1)
        assert torch.equal(together["dpo"], evaluated("dpo", label_smoothing=0.1)["dpo"])
        assert torch.equal(together["ipo"], evaluated("ipo")["ipo"])


def test_beta_is_free_where_no_loss_has_it():
    assert get_objective("sft", beta=0.0).terms[0].name == "sft"


def test_metrics():
    _, logps = get_objective("dpo").evaluate(TOKENS, LENGTHS, REFERENCE)

    def chosen(expression: str) -> float:
        return get_objective(expression, beta=0.5).metrics(logps)["rewards/chosen"].item()

    with_reference = 0.5 * (logps.policy - REFERENCE)[0::2].sum().item()
    per_token = 0.5 * (logps.policy / LENGTHS)[0::2].sum().item()
    assert chosen("dpo") == chosen("dpo + nll") == chosen("dpo + simpo") == pytest.approx(with_reference)
    assert chosen("simpo") == chosen("nll + simpo") == chosen("orpo") == pytest.approx(per_token)
    assert get_objective("sft").metrics(logps) == {}


def test_a_loss_of_ones_own(monkeypatch):
    """A function with keyword-only options and one line of the registry."""

    def squared(logps, *, beta: float, target: float = 2.0):
        chosen, rejected = halves(logps.rewards(beta))
        return (chosen - rejected - target).square()

    monkeypatch.setitem(LOSSES, "squared", Loss(squared, unit="pairs", paired=True, needs_reference=True))
    values = evaluated("squared + 0.5 * nll", beta=1.0, options={"target": 1})["squared"]
    sums = torch.stack([part.sum() for part in TOKENS.split(LENGTHS.tolist())]) - REFERENCE
    torch.testing.assert_close(values, (sums[0::2] - sums[1::2] - 1).square())
