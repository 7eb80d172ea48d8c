"""The AdamW class against torch.optim.AdamW; its state and checkpoints, alone and sharded."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_case
from optimizer_case import OPTIONS, groups, load, make_model, make_optimizer, save, train, weights
from training_case import build

from srlm_fast.errors import Interrupted, UserError
from srlm_fast.kernels.optimizer import MOMENTS, AdamW
from srlm_fast.trainer import Trainer

MODES = [("fp32", torch.float32), ("bf16", torch.float32), ("bf16", torch.bfloat16)]


def trained(steps, moments="fp32", dtype=torch.float32):
    model = make_model(dtype, moments)
    optimizer = make_optimizer(model, moments)
    if steps:
        train(model, optimizer, range(steps))
    return model, optimizer


def test_twenty_steps_are_torchs(implementation):
    ours, theirs = make_model(), make_model()
    optimizers = AdamW(groups(ours), **OPTIONS), torch.optim.AdamW(groups(theirs), **OPTIONS)
    for model, optimizer in zip((ours, theirs), optimizers):
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
        for step in range(20):
            train(model, optimizer, [step])
            schedule.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("moments", "dtype"), MODES)
def test_bf16_trains_as_well(moments, dtype):
    model, exact = make_model(dtype), make_model()
    expected = train(exact, torch.optim.AdamW(groups(exact), **OPTIONS), range(400))
    assert train(model, AdamW(groups(model), **OPTIONS, moments=moments), range(400)) < 1.1 * expected


@pytest.mark.parametrize("through", ["state_dict", "checkpoint"])
@pytest.mark.parametrize(("moments", "dtype"), MODES)
def test_a_resumed_run_equals_an_undisturbed_one(through, moments, dtype, tmp_path):
    model, optimizer = trained(4, moments, dtype)
    resumed, again = trained(0, moments, dtype)
    if through == "state_dict":
        resumed.load_state_dict(model.state_dict())
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        save(model, optimizer, tmp_path)
        load(resumed, again, tmp_path)
    train(model, optimizer, range(4, 8))
    train(resumed, again, range(4, 8))
    torch.testing.assert_close(weights(resumed), weights(model), rtol=0, atol=0)
    for state in again.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == MOMENTS[moments]
        assert state["step"] == 8


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_either_loads_the_state_of_torchs(options):
    ours, our_optimizer = trained(5)
    theirs = make_model()
    their_optimizer = torch.optim.AdamW(groups(theirs), **OPTIONS, **options)
    train(theirs, their_optimizer, range(5))
    our_state, their_state = (copy.deepcopy(each.state_dict()) for each in (our_optimizer, their_optimizer))
    our_optimizer.load_state_dict(their_state)
    their_optimizer.load_state_dict(our_state)
    train(ours, our_optimizer, range(5, 10))
    train(theirs, their_optimizer, range(5, 10))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)
    assert their_optimizer.state[theirs[0].weight]["step"] == our_optimizer.state[ours[0].weight]["step"] == 10


def test_fp32_state_becomes_bf16_and_stays_on_load():
    model, optimizer = trained(3)
    _, narrow = trained(0, "bf16")
    narrow.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(narrow.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(ours["exp_avg_sq"], theirs["exp_avg_sq"].bfloat16())


def test_a_state_of_another_shape_is_refused():
    _, optimizer = trained(1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg.*\(20, 12\).*\(3,\)"):
        optimizer.load_state_dict(state)


def test_parameters_without_a_gradient_wait():
    """They keep their value, and count their own steps from their first gradient."""
    model, optimizer = trained(2)
    frozen, before = model[0].weight, weights(model)
    frozen.requires_grad_(False)
    train(model, optimizer, range(2, 4))
    assert torch.equal(frozen, before["0.weight"])
    assert optimizer.state[frozen]["step"] == 2 and optimizer.state[model[0].bias]["step"] == 4


def test_every_parameter_has_its_own_rounding():
    """Two equal bf16 parameters with equal gradients do not stay equal."""
    twins = [torch.ones(1000, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    optimizer = AdamW([{"params": [twin]} for twin in twins], lr=1e-3, moments="bf16")
    for twin in twins:
        twin.grad = torch.ones_like(twin)
    optimizer.step()
    assert 0.1 < float((twins[0] != twins[1]).float().mean()) < 0.9


def test_gradients_of_any_layout():
    a, b = (torch.ones(3, 4).requires_grad_() for _ in range(2))
    gradient = torch.arange(12.0).view(4, 3).t()
    a.grad, b.grad = gradient, gradient.contiguous()
    AdamW([a, b]).step()
    assert torch.equal(a, b)


def test_closure():
    model, optimizer = trained(0)
    x = torch.ones(2, 12)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"moments": "fp16"}, "moments.*fp32, bf16.*'fp16'"),
        ({"lr": -1.0}, "lr.*-1.0"),
        ({"eps": -1.0}, "eps.*-1.0"),
        ({"weight_decay": -0.1}, "weight_decay.*-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas.*\(0.9, 1.0\)"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        AdamW(make_model().parameters(), **options)


@pytest.mark.distributed
@pytest.mark.parametrize("moments", [*MOMENTS, "8bit"])
def test_sharded(moments, tmp_path):
    """Two ranks resume exactly; with fp32 moments they do what one process does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    case = str(Path(__file__).with_name("optimizer_case.py"))
    done = subprocess.run([*command, case, str(tmp_path), moments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    undisturbed, resumed = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(resumed, undisturbed, rtol=0, atol=0)
    alone = weights(trained(8, "8bit" if moments == "8bit" else "fp32")[0])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if moments == "fp32" else {"rtol": 0, "atol": 2e-3}
    torch.testing.assert_close(undisturbed, alone, **tolerance)


def test_8_bit_moments_train_as_well():
    """Over 200 steps the loss of fp32 moments, in a quarter of their bytes."""
    model, exact = make_model(moments="8bit"), make_model(moments="8bit")
    start = weights(exact)
    expected = train(exact, torch.optim.AdamW(groups(exact), **OPTIONS), range(200))
    optimizer = make_optimizer(model, "8bit")
    assert train(model, optimizer, range(200)) < 1.1 * expected
    for (name, ours), theirs in zip(weights(model).items(), exact.parameters()):
        moved = (theirs - start[name]).norm()
        assert (ours - theirs).norm() < 0.25 * moved, name
    states = {p.numel(): optimizer.state[p] for p in model.parameters()}
    large = states[128 * 128]["exp_avg_sq"]
    assert type(large).__name__ == "OptimState8bit" and large.codes.nbytes + large.scale.nbytes < 1.02 * 128 * 128
    assert states[12 * 128]["exp_avg"].dtype == torch.float32 and type(states[12 * 128]["exp_avg"]) is torch.Tensor


def test_8_bit_moments_resume(tmp_path, monkeypatch):
    """A training with dropout that is stopped and resumed equals an undisturbed one to the bit."""
    wider = replace(training_case.CONFIG, hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    monkeypatch.setattr(training_case, "CONFIG", wider)

    def run(folder: Path, stop_after: int = 0) -> Trainer:
        folder.mkdir(exist_ok=True)
        steps: list[dict] = []
        changes = {"moments": "8bit", "max_steps": 5, "checkpoint_every": 1}
        arguments = {"on_step": steps.append, "should_stop": lambda: len(steps) == stop_after - 1}
        trainer = build("dpo", dropout=0.1, changes=changes, checkpoint_dir=folder, **arguments)
        with pytest.raises(Interrupted) if stop_after else nullcontext():
            trainer.fit()
        return trainer

    undisturbed = run(tmp_path / "whole")
    run(tmp_path / "stopped", stop_after=3)
    resumed = run(tmp_path / "stopped")
    kinds = {type(state["exp_avg"]).__name__ for state in resumed.optimizer.state.values()}
    assert kinds == {"OptimState8bit", "Tensor"}
    for ours, theirs in zip(resumed.model.parameters(), undisturbed.model.parameters()):
        assert torch.equal(ours, theirs)


def test_8_bit_moments_by_the_trainer(monkeypatch):
    """The schedule reaches torchao's optimizer; without torchao one line says what to install."""
    steps: list[dict] = []
    trainer = build("dpo", changes={"moments": "8bit", "max_steps": 3}, on_step=steps.append)
    trainer.fit()
    assert float(trainer.optimizer.param_groups[0]["lr"]) == pytest.approx(steps[-1]["lr"])
    exact = build("dpo", changes={"max_steps": 3})
    exact.fit()
    for ours, theirs in zip(trainer.model.parameters(), exact.model.parameters()):  # too small for 8 bits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="moments=8bit needs torchao: pip install"):
        build("dpo", changes={"moments": "8bit"})
