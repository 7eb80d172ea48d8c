"""Training with every registered loss: a tiny model, all items in every step."""

import math
from dataclasses import replace

import pytest
import torch
from test_trainer import run
from training_case import build, label, make_items, make_model, make_reference, options

from srlm_fast.errors import UserError
from srlm_fast.losses import LOSSES
from srlm_fast.packing import Item
from srlm_fast.reference import compute, head_item, mismatched_items, reference_items
from srlm_fast.trainer import Trainer, training_objective

WHOLE = {"batch_size": 24, "epochs": 6, "tokens_per_microbatch": 10_000, "schedule": "constant"}


def smoothing(name: str) -> dict[str, float]:
    return {"label_smoothing": 0.01 if LOSSES[name].needs_smoothing else 0.0}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_falls(name):
    weights, steps = run(name, changes=WHOLE | smoothing(name))
    losses = [step["loss"] for step in steps]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.needs_reference])
def test_without_a_cache(name):
    trainer = build(name, changes={"max_steps": 1})
    assert trainer.examples.columns == {}
    metrics = trainer.fit()
    assert ("rewards/margins" in metrics) == LOSSES[name].paired


AT_REFERENCE = {
    "dpo": math.log(2),
    "dpo_norm": math.log(2),
    "robust": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "discopop": (math.log(2) + 1) / 2,
    "ld_dpo": math.log(2),
    "dpop": math.log(2),
    "cream": math.log(2),
    "aot": math.log(2),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "apo_zero_unpaired": 0.5,
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_first_loss_is_that_of_the_reference(name):
    _, steps = run(name, changes={"max_steps": 1})
    assert steps[0]["loss"] == pytest.approx(AT_REFERENCE[name], rel=2e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("aot", "aot_unpaired")])
def test_micro_batches_do_not_change_the_result(name):
    """Not so with AOT, which sorts the responses of a micro-batch."""
    # A large epsilon: else AdamW turns the rounding errors of gradients near zero into whole steps.
    changes = {"max_steps": 2, "batch_size": 12, "schedule": "constant", "adam_eps": 1e-2} | smoothing(name)
    whole, whole_steps = run(name, changes=changes | {"tokens_per_microbatch": 10_000})
    divided, steps = run(name, changes=changes | {"tokens_per_microbatch": 40})
    for ours, expected in zip(steps, whole_steps):
        timed = ("seconds", "tokens_per_second", "tflops", "memory_gb")
        assert {key: value for key, value in ours.items() if key not in timed} == pytest.approx(
            {key: value for key, value in expected.items() if key not in timed}, rel=1e-4, abs=1e-5
        )
    for key in whole:
        torch.testing.assert_close(divided[key], whole[key], atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("name", ["dpo", "ipo + 0.5 * nll", "simpo", "cream", "kto", "sft"])
def test_pairs_of_one_prompt_in_one_item_change_nothing(name):
    """Three pairs (or replies) of each of 4 prompts, as 12 items and as 4, all in every step; KTO's KL is of others."""
    objective = training_objective(options(name))
    prompts = [item.prompt for item in make_items(4, 1)]
    alone = [
        replace(item, prompt=prompts[i // 3]) for i, item in enumerate(make_items(12, 2 if objective.paired else 1))
    ]
    alone = label(alone) if objective.needs_labels else alone
    groups = [alone[i : i + 3] for i in range(0, 12, 3)]
    together = [
        Item(group[0].prompt, sum((item.responses for item in group), ()), sum((item.labels for item in group), ()))
        for group in groups
    ]
    found = []
    for items in (alone, together):
        cache = make_reference(reference_items(items, objective)) if objective.needs_reference else None
        steps, model = [], make_model()
        changes = {"batch_size": 12, "epochs": 1 if name == "kto" else 3, "schedule": "constant", "adam_eps": 1e-2}
        Trainer(model, items, options(name, **changes), reference=cache, on_step=steps.append).fit()
        found.append((steps, model))
    ((steps, model), (grouped, other)) = found
    assert [step["items"] for step in grouped] == [4] * len(grouped) and grouped[0]["tokens"] < steps[0]["tokens"]
    timed = ("seconds", "tokens_per_second", "tflops", "memory_gb", "items", "tokens")
    for step, expected in zip(grouped, steps, strict=True):
        for key in expected.keys() - set(timed):
            assert step[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    for (key, value), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(theirs, value, atol=1e-5, rtol=0, msg=key)


def test_a_weighted_sum_and_its_parts():
    _, steps = run("dpo + 0.2 * nll", changes=WHOLE)
    _, alone = run("nll", changes=WHOLE)
    first = steps[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2)) and first["loss/nll"] == pytest.approx(alone[0]["loss"])
    for step in steps:
        assert step["loss"] == pytest.approx(step["loss/dpo"] + 0.2 * step["loss/nll"], rel=1e-6)
    assert not any(name.startswith("loss/") for name in alone[0])


def test_nll_is_per_chosen_token():
    items, model = make_items(24, 2), make_model()
    chosen = [Item(item.prompt, item.responses[:1]) for item in items]
    expected = -make_reference(chosen).lookup(chosen).sum() / sum(len(item.responses[0]) for item in items)
    steps: list[dict] = []
    Trainer(model, items, options("nll", **WHOLE), on_step=steps.append).fit()
    assert steps[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_options_reach_the_loss():
    _, plain = run("simpo", changes={"max_steps": 1, "loss_options": {"gamma": 0.0}})
    _, asked = run("simpo", changes={"max_steps": 1, "loss_options": {"gamma": 5.0}})
    assert plain[0]["loss"] < 1 < asked[0]["loss"]
    _, averaged = run("ipo", changes={"max_steps": 1})
    _, summed = run("ipo", changes={"max_steps": 1, "loss_options": {"length_normalised": False}})
    assert averaged[0]["loss"] == pytest.approx(summed[0]["loss"]) and averaged[0]["grad_norm"] < summed[0]["grad_norm"]


def test_kto_estimates_the_kl_of_mismatched_responses():
    """Once the policy has moved, z is the mean log-ratio of the next item's responses, at least 0."""
    items = label(make_items(24, 1))
    objective = training_objective(options("kto"))
    cache = make_reference(reference_items(items, objective))
    model, steps = softened(), []
    Trainer(model, items, options("kto", **WHOLE), reference=cache, on_step=steps.append).fit()
    partners = mismatched_items(items)
    ratios = torch.tensor([value for _, value in compute(softened(), partners, "w", [range(24)])])
    ratios -= cache.lookup(partners)
    assert ratios.mean() > 1 and steps[0]["kl"] == pytest.approx(ratios.mean().item(), rel=1e-5)
    _, fresh = run("kto", changes=WHOLE)
    assert fresh[0]["kl"] == pytest.approx(0, abs=1e-5) and all(step["kl"] >= 0 for step in fresh)


def softened() -> torch.nn.Module:
    """The model with flatter distributions, so that random tokens gain probability."""
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(0.7)
    return model


def test_bco_shifts_by_the_midpoint_of_the_rewards():
    _, steps = run("bco", changes=WHOLE)
    assert steps[0]["delta"] == pytest.approx(0, abs=1e-5)
    for step in steps:
        expected = (step["rewards/chosen"] + step["rewards/rejected"]) / 2
        assert step["delta"] == pytest.approx(expected, abs=1e-5)


def test_metrics_of_labelled_responses_are_means_of_their_label():
    items = label(make_items(4, 1))
    items[0] = replace(items[0], labels=(0,))
    items[1] = replace(items[1], labels=(0,))
    objective = training_objective(options("apo_zero_unpaired"))
    cache = make_reference(reference_items(items, objective))
    metrics = Trainer(make_model(), items, options("apo_zero_unpaired", max_steps=1), reference=cache).fit()
    logps = cache.lookup(items)
    assert metrics["logps/chosen"] == pytest.approx(logps[3].item(), rel=1e-5)
    assert metrics["logps/rejected"] == pytest.approx(logps[:3].mean().item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])
    only = [replace(item, labels=(0,)) for item in items]
    metrics = Trainer(make_model(), only, options("apo_zero_unpaired", max_steps=1), reference=cache).fit()
    assert "logps/rejected" in metrics and not metrics.keys() & {"logps/chosen", "rewards/chosen", "rewards/margins"}


def test_what_a_reference_has_to_hold():
    pair = Item((1, 2), ((3, 4, 5), (6, 7)))
    even = Item((1,), ((2,), (3,)))
    assert head_item(pair) == Item((1, 2), ((3, 4), (6, 7)))
    assert mismatched_items([pair, even]) == [Item((1, 2), ((2,), (3,))), Item((1,), ((3, 4, 5), (6, 7)))]

    def needed(loss: str) -> list[Item]:
        return reference_items([pair, even], training_objective(options(loss)))

    assert needed("simpo") == [] and needed("dpo") == [pair, even]
    assert needed("ld_dpo") == [pair, even, head_item(pair)]
    assert needed("kto") == [pair, even, *mismatched_items([pair, even])]


def test_refusals_come_before_any_work():
    model, pairs, singles = make_model(), make_items(4, 2), make_items(4, 1)
    for loss in ("cream", "sppo"):
        with pytest.raises(UserError, match=f"loss '{loss}' needs a label .* item 0 has 2 responses and the labels"):
            Trainer(model, pairs, options(loss), reference=make_reference(pairs))
    with pytest.raises(UserError, match=r"item 1 has 1 responses and the labels \[1.5\]"):
        bad = [replace(item, labels=(label,)) for item, label in zip(singles, (1, 1.5, 0, 0))]
        Trainer(model, bad, options("kto"), reference=make_reference(singles))
    with pytest.raises(UserError, match="'kto' estimates a KL .* two items"):
        Trainer(model, label(singles[:1]), options("kto"), reference=make_reference(singles))
    with pytest.raises(UserError, match="lacks .* of 4 items"):
        Trainer(model, label(singles), options("kto"), reference=make_reference(singles))
    with pytest.raises(UserError, match="lacks .* of 4 items"):
        Trainer(model, pairs, options("ld_dpo"), reference=make_reference(pairs))
    three = [replace(item, responses=(*item.responses, (1,))) for item in pairs]
    four = [replace(item, responses=item.responses * 2) for item in pairs]
    with pytest.raises(UserError, match="'dpo' compares pairs: .* item 0 has 3"):
        Trainer(model, three, options("dpo"), reference=make_reference(three))
    with pytest.raises(UserError, match="'ld_dpo' cuts pairs .* item 0 has 4 responses"):
        Trainer(model, four, options("ld_dpo"), reference=make_reference(four))
    with pytest.raises(UserError, match="'nll' compares pairs"):
        Trainer(model, singles, options("nll"))
    with pytest.raises(UserError, match="unknown option 'gama'"):
        Trainer(model, pairs, options("simpo", loss_options={"gama": 1}))
