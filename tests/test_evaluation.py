"""Evaluation during training, early stopping, and batches that give no finite loss."""

import json
import math

import pytest
import torch
from training_case import build, full_weights, label, make_items, make_model, make_reference, options

from srlm_fast.errors import Interrupted, UserError
from srlm_fast.kernels import library
from srlm_fast.losses import get_objective
from srlm_fast.packing import Item, pack
from srlm_fast.reference import reference_items
from srlm_fast.trainer import AgainstPrevious, Evaluation, Trainer, below, worse_than_before
from srlm_fast.trainer.machine import model_cost


def trainer(loss: str = "dpo", *, changes: dict | None = None, n: int = 16, **arguments) -> Trainer:
    """16 items to train on in batches of 8, 6 held out."""
    config = options(loss, **{"epochs": 2, **(changes or {})})
    objective = get_objective(loss)
    items = make_items(n + 6, 2 if objective.paired else 1)
    items = label(items) if objective.needs_labels else items
    seen, held_out = items[:n], items[n:]
    cache = make_reference(reference_items(seen, objective) + reference_items(held_out, objective))
    evaluation = arguments.pop("evaluation", Evaluation(every=2))
    evaluation.items = held_out
    return Trainer(make_model(), seen, config, reference=cache, seed=5, evaluation=evaluation, **arguments)


@pytest.mark.parametrize("loss", ["dpo", "kto", "simpo + 0.5 * nll", "sft"])
def test_held_out_metrics_are_those_of_a_step_on_the_held_out_items(loss):
    """The evaluation after the last step, against the first step of a trainer whose batch is the held-out items."""
    found: list[dict] = []
    trained = trainer(loss, evaluation=Evaluation(every=3, report=found.append))
    last = trained.fit()
    assert [metrics["step"] for metrics in found] == [3, 4] and trained.total_steps == 4
    items = trained.held_out.items
    reference = make_reference(reference_items(items, trained.objective)) if trained.objective.needs_reference else None
    expected = Trainer(trained.model, items, options(loss, max_steps=1), reference=reference).fit()
    names = [name for name in found[-1] if name != "step"]
    assert {f"eval_{name}" for name in trained.objective.metric_names()} == set(names)
    if loss != "sft":
        assert {"eval_loss", "eval_rewards/margins", "eval_logps/chosen"} <= set(names)
    for name in names:
        assert found[-1][name] == pytest.approx(expected[name.removeprefix("eval_")], rel=1e-5, abs=1e-6), name
    assert last["eval_loss"] == found[-1]["eval_loss"] and "loss" in last


def test_evaluation_changes_nothing_in_training():
    plain, evaluated = trainer(evaluation=Evaluation(every=100)), trainer(evaluation=Evaluation(every=1))
    plain.fit(), evaluated.fit()
    for name, value in full_weights(plain.model).items():
        assert torch.equal(value, full_weights(evaluated.model)[name]), name


def test_stopping_leaves_the_weights_of_the_evaluation_before(tmp_path):
    """The rule fires at step 3, also after a restart between the evaluations; the weights are those of step 2."""
    expected = trainer(changes={"schedule": "constant", "max_steps": 2})
    expected.fit()

    def stopping(**arguments) -> Trainer:
        rule = Evaluation(every=1, stop_when=lambda history: len(history) == 3)
        return trainer(changes={"schedule": "constant"}, evaluation=rule, checkpoint_dir=tmp_path, **arguments)

    with pytest.raises(Interrupted):
        stopping(should_stop=lambda: True).fit()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    stopped = stopping()
    assert stopped.fit()["step"] == 3
    for name, value in full_weights(stopped.model).items():
        assert torch.equal(value, full_weights(expected.model)[name]), name
    with pytest.raises(UserError, match="early stopping .* give checkpoint_dir"):
        trainer(evaluation=Evaluation(every=1, stop_when=lambda history: False))


def test_rules():
    accuracies = [{"eval_rewards/accuracies": value, "eval_loss": 1 - value} for value in (0.5, 0.6, 0.6, 0.5)]
    for rule in (worse_than_before(), worse_than_before("eval_loss", lower_is_better=True)):
        assert [rule(accuracies[: n + 1]) for n in range(4)] == [False, False, False, True]
    assert worse_than_before("x")([{"x": 1.0}, {"x": math.nan}])
    rule = below("eval_win_rate", 0.5)
    assert [rule([metrics]) for metrics in ({}, {"eval_win_rate": 0.5}, {"eval_win_rate": 0.4})] == [False, False, True]


def test_answers_against_those_of_the_evaluation_before(tmp_path):
    """Longer answers win here; the model's get longer, then shorter; a new object goes on with the kept answers."""
    lengths = iter([1, 2, 3, 1])

    def pairwise() -> AgainstPrevious:
        def answer(prompts):
            length = next(lengths)
            return [prompt * length for prompt in prompts]

        def prefer(prompt: str, new: str, old: str) -> float:
            assert new.startswith(prompt) and old.startswith(prompt)
            return float(len(new) > len(old))

        return AgainstPrevious(["a", "b"], answer, prefer, folder=tmp_path, every=2)

    first = pairwise()
    assert [first(2), first(4)] == [{}, {"win_rate": 1.0}]
    second = pairwise()
    assert [second(6), second(7)] == [{"win_rate": 1.0}, {"win_rate": 0.0}]
    assert json.loads((tmp_path / "answers-4.json").read_text()) == ["aa", "bb"]


def test_measure_is_added_and_ends_training(tmp_path):
    rates = iter([{}, {"win_rate": 0.9}, {"win_rate": 0.2}])
    rule = Evaluation(every=1, measure=lambda step: next(rates), stop_when=below("eval_win_rate", 0.5))
    stopped = trainer(evaluation=rule, checkpoint_dir=tmp_path)
    assert stopped.fit()["step"] == 3
    assert [metrics.get("eval_win_rate") for metrics in stopped.history] == [None, 0.9, 0.2]


def broken(loss: str, position: int = 0, **arguments) -> Trainer:
    """Its reference of one item is infinite."""
    built = build(loss, **arguments)
    built.examples.columns["reference"][position][0] = float("nan")
    return built


def test_a_batch_without_a_finite_loss_is_kept_and_ends_training(tmp_path):
    stopped = broken("dpo", checkpoint_dir=tmp_path)
    step = next(step for step in range(3) if 0 in stopped._batch(step))
    with pytest.raises(
        UserError, match=rf"dpo step {step + 1}: loss is nan.*the batch is in .*nonfinite-step-{step + 1}"
    ):
        stopped.fit()
    kept = json.loads((tmp_path / f"nonfinite-step-{step + 1}.json").read_text())
    assert kept["loss"] == "nan" and [row["item"] for row in kept["items"]] == stopped._batch(step)
    (row,) = (row for row in kept["items"] if row["item"] == 0)
    item = stopped.items[0]
    assert (row["prompt"], row["responses"]) == (list(item.prompt), [list(one) for one in item.responses])
    assert "nan" in row["reference"]


def test_a_batch_without_a_finite_loss_can_be_skipped(tmp_path):
    """The steps without it go on as if it were not there: with a constant rate the others' order is all that counts."""
    steps: list[dict] = []
    changes = {"max_steps": 3, "schedule": "constant"}
    skipping = broken("dpo", changes=changes, checkpoint_dir=tmp_path, on_step=steps.append, on_nonfinite="skip")
    where = next(step for step in range(3) if 0 in skipping._batch(step))
    skipping.fit()
    assert [step.get("skipped") for step in steps] == [1 if step == where else None for step in range(3)]
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert "loss" not in steps[where] and json.dumps(steps)
    expected = build("dpo", changes=changes)
    real = expected._batch
    order = [step for step in range(3) if step != where]
    expected.total_steps, expected._batch = 2, lambda step: real(order[step])
    expected.fit()
    for name, value in full_weights(skipping.model).items():
        torch.testing.assert_close(value, full_weights(expected.model)[name], atol=1e-6, rtol=0, msg=name)


def test_skipping_ends_when_nothing_is_finite():
    broken_model = build("sft", changes={"epochs": 20}, on_nonfinite="skip")
    with torch.no_grad():
        broken_model.model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="sft step 10: loss is nan"):
        broken_model.fit()
    with pytest.raises(UserError, match="on_nonfinite='ignore': must be one of stop, skip"):
        build("sft", on_nonfinite="ignore")


def test_entropy_is_that_of_the_response_tokens():
    """Against full logits in plain torch, every response by itself."""
    trainer = build("dpo", changes={"max_steps": 1, "batch_size": 24})
    model, entropies = make_model().double(), []
    for item in trainer.items:
        for response in item.responses:
            ids = torch.tensor(item.prompt + response)
            packed = pack([Item(tuple(ids[:1].tolist()), (tuple(ids[1:].tolist()),))])
            logits = model(packed.input_ids, packed.positions, packed.attend)[len(item.prompt) - 1 :]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    expected = torch.cat(entropies)
    assert len(expected) == sum(len(response) for item in trainer.items for response in item.responses)
    assert trainer.fit()["entropy"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_cost_counts_every_product():
    """Against torch's own counter over forward and backward, without kernels."""
    from torch.utils.flop_counter import FlopCounterMode

    from srlm_fast.kernels.attention import Segments
    from srlm_fast.reference import token_logps

    model, items = make_model(), make_items(6, 2)
    packed = pack(items)
    with library.using("reference"), FlopCounterMode(display=False) as counter:
        token_logps(model, packed).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counted.items() if "mm" in str(op) and "bmm" not in str(op))
    cost = model_cost(model)
    ours = sum(cost.per_token * item.n_tokens + cost.per_target * sum(map(len, item.responses)) for item in items)
    assert ours == pytest.approx(products, rel=1e-6)
    assert isinstance(packed.segments, Segments)
    attended = sum(cost.of(item) for item in items) - ours
    heads = model.config.num_attention_heads * model.config.head_dim
    by_hand = 0
    for item in items:
        for query in range(item.n_tokens):
            by_hand += query + 1 if query < len(item.prompt) else 0
        for response in item.responses:
            by_hand += sum(len(item.prompt) + own + 1 for own in range(len(response) - 1))
    assert attended == pytest.approx(12 * heads * model.config.num_hidden_layers * by_hand)
