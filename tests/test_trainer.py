"""The trainer: ln 2 at step 1, micro-batching, schedules, resume, refusals; sharded against not."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_case import build, full_weights, make_items, make_model, make_reference, options

from srlm_fast.errors import Interrupted, UserError
from srlm_fast.kernels import library
from srlm_fast.packing import Item
from srlm_fast.reference import ReferenceCache
from srlm_fast.trainer import Trainer, learning_rate


def run(loss: str, **arguments) -> tuple[dict[str, torch.Tensor], list[dict]]:
    steps: list[dict] = []
    trainer = build(loss, on_step=steps.append, **arguments)
    trainer.fit()
    return full_weights(trainer.model), steps


def torchrun(out: Path, *arguments: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    case = Path(__file__).with_name("training_case.py")
    done = subprocess.run([*command, str(case), str(out), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "result.pt", weights_only=True)


def test_first_dpo_loss_is_ln_2_and_it_falls():
    _, steps = run("dpo")
    assert abs(steps[0]["loss"] - math.log(2)) < 1e-6
    assert abs(steps[0]["rewards/margins"]) < 1e-5
    assert steps[-1]["loss"] < 0.6 and steps[-1]["rewards/accuracies"] > 0.8


def test_sft_loss_is_the_mean_over_target_tokens_and_falls():
    trainer = build("sft", changes={"batch_size": 24, "epochs": 1})
    items, model = trainer.items, make_model()
    total = sum(value for _, value in _sums(model, items))
    steps: list[dict] = []
    trainer.on_step = steps.append
    trainer.fit()
    n_tokens = sum(len(r) for item in items for r in item.responses)
    assert steps[0]["loss"] == pytest.approx(-total / n_tokens, abs=1e-5)
    _, steps = run("sft", changes={"epochs": 20})
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]


def _sums(model, items):
    from srlm_fast.reference import compute

    return compute(model, items, "w", [[i] for i in range(len(items))])


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_micro_batches_do_not_change_the_result(loss):
    whole, _ = run(loss, changes={"tokens_per_microbatch": 10_000})
    divided, _ = run(loss, changes={"tokens_per_microbatch": 40})
    for name in whole:
        torch.testing.assert_close(divided[name], whole[name], atol=2e-5, rtol=0, msg=name)


def test_only_matrices_decay():
    changes = {"lr": 1e-3, "weight_decay": 0.5, "schedule": "constant"}
    decayed, _ = run("sft", changes=changes)
    free, _ = run("sft", changes={**changes, "weight_decay": 0.0})
    assert decayed["model.embed_tokens.weight"].norm() < 0.999 * free["model.embed_tokens.weight"].norm()
    trainer = build("sft")
    assert {p.dim() for p in trainer.optimizer.param_groups[1]["params"]} == {1}


def test_schedules():
    base = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4}
    for shape, middle in (("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)):
        rates = [learning_rate(options("sft", **base, schedule=shape), step, 25) for step in range(25)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == 1.0 and rates[14] == pytest.approx(middle)
        assert rates[-1] == pytest.approx(1.0 if shape == "constant" else 0.1)
        assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_kernels_train_as_plain_torch_does(loss):
    fused, fused_steps = run(loss)
    with library.using("reference"):
        plain, plain_steps = run(loss)
    assert [s["loss"] for s in fused_steps] == pytest.approx([s["loss"] for s in plain_steps], abs=1e-5)
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], atol=2e-5, rtol=0, msg=name)


def test_bf16_moments_train_alike_and_need_kernels():
    _, steps = run("dpo")
    _, halved = run("dpo", changes={"moments": "bf16"})
    assert halved[-1]["loss"] == pytest.approx(steps[-1]["loss"], abs=0.02)
    assert halved[-1]["loss"] != steps[-1]["loss"]
    with library.using("reference"), pytest.raises(UserError, match="moments=bf16 needs kernels=fused"):
        build("dpo", changes={"moments": "bf16"})


@pytest.mark.parametrize(("loss", "moments"), [("sft", "fp32"), ("dpo", "fp32"), ("kto", "fp32"), ("dpo", "bf16")])
def test_resumed_equals_undisturbed_bit_for_bit(tmp_path, loss, moments):
    changes = {"moments": moments}
    expected, expected_steps = run(loss, dropout=0.1, changes=changes)
    steps: list[dict] = []
    with pytest.raises(Interrupted):
        build(
            loss,
            dropout=0.1,
            changes=changes,
            checkpoint_dir=tmp_path,
            on_step=steps.append,
            should_stop=lambda: len(steps) == 2,
        ).fit()
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    resumed = build(loss, dropout=0.1, changes=changes, checkpoint_dir=tmp_path, on_step=steps.append)
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.zero_()
    resumed.fit()
    assert [s["loss"] for s in steps] == [s["loss"] for s in expected_steps]
    for name, value in full_weights(resumed.model).items():
        assert torch.equal(value, expected[name]), name


def test_dropout_differs_between_steps_and_is_off_in_the_reference():
    _, plain = run("dpo")
    _, dropped = run("dpo", dropout=0.1)
    assert dropped[0]["loss"] != plain[0]["loss"]
    assert torch.equal(*(make_reference(make_items(4, 2)).lookup(make_items(4, 2)) for _ in range(2)))


def test_training_leaves_the_callers_random_state_alone():
    trainer = build("sft", dropout=0.1)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    trainer.fit()
    assert torch.equal(torch.rand(3), expected)


def test_broken_checkpoint_is_refused_by_path(tmp_path):
    steps: list[dict] = []
    with pytest.raises(Interrupted):
        build("sft", checkpoint_dir=tmp_path, on_step=steps.append, should_stop=lambda: True).fit()
    for file in (tmp_path / "step-1").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot resume from .*step-1.*delete that folder"):
        build("sft", checkpoint_dir=tmp_path).fit()


def test_refusals_come_before_any_work():
    model, pairs = make_model(), make_items(4, 2)
    with pytest.raises(UserError, match="is empty"):
        Trainer(model, [], options("sft"))
    with pytest.raises(UserError, match="needs a chosen and a rejected"):
        Trainer(model, make_items(4, 1), options("dpo"), reference=ReferenceCache("w"))
    with pytest.raises(UserError, match="needs reference log-probabilities"):
        Trainer(model, pairs, options("dpo"))
    with pytest.raises(UserError, match="lacks 4 of 4 items"):
        Trainer(model, pairs, options("dpo"), reference=ReferenceCache("w"))
    with pytest.raises(UserError, match="does not fit tokens_per_microbatch=10"):
        Trainer(model, make_items(4, 1), options("sft", tokens_per_microbatch=10))
    with pytest.raises(UserError, match="unknown loss 'sftt'"):
        Trainer(model, pairs, options("sftt"))


def test_a_training_without_checkpoints_stops_too():
    steps = []
    with pytest.raises(Interrupted, match="stopped after step 2 of 6"):
        build("sft", on_step=steps.append, should_stop=lambda: len(steps) == 1).fit()
    assert len(steps) == 2


def test_nan_is_reported_and_nothing_is_updated():
    trainer = build("sft")
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    before = full_weights(trainer.model)
    with pytest.raises(UserError, match="sft step 1: loss is nan.*The model is broken: model.norm.weight has values"):
        trainer.fit()
    for name, value in full_weights(trainer.model).items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7))


def test_one_pair_and_a_single_token_response():
    item = Item((1, 2), ((3,), (4, 5)))
    trainer = Trainer(make_model(), [item], options("dpo", epochs=3), reference=make_reference([item]))
    assert trainer.fit()["step"] == 3


@pytest.mark.distributed
@pytest.mark.parametrize("loss", ["sft", "dpo", "kto", "simpo + 0.5 * nll"])
def test_two_ranks_equal_one(tmp_path, loss):
    expected, expected_steps = run(loss)
    result = torchrun(tmp_path, loss)
    assert len(result["steps"]) == len(expected_steps) == 6
    for ours, step in zip(result["steps"], expected_steps, strict=True):
        assert ours["loss"] == pytest.approx(step["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
    for name, value in result["weights"].items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.distributed
def test_two_ranks_resume_bit_for_bit(tmp_path):
    undisturbed, stopped = tmp_path / "a", tmp_path / "b"
    undisturbed.mkdir()
    stopped.mkdir()
    expected = torchrun(undisturbed, "dpo", "1000")
    torchrun(stopped, "dpo", "3")
    assert (stopped / "checkpoints/step-3").is_dir()
    result = torchrun(stopped, "dpo", "1000")
    assert [s["step"] for s in result["steps"]] == [4, 5, 6]
    for name, value in expected["weights"].items():
        assert torch.equal(value, result["weights"][name]), name
