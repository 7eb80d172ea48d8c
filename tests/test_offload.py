"""Moments on their way to the host and back: storage that is really freed, the same bits, sharded and in 8 bits too.

What is not tested for want of a GPU: pinned memory, copies that do not block, and that the allocator gives memory back.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimizer_case import make_model, make_optimizer, train, weights
from training_case import build

from srlm_fast.trainer import Evaluation, offload_state, offloaded, reload_state

KINDS = ["fp32", "bf16", "8bit", "torch"]


def trained(kind: str):
    model = make_model(moments=kind)
    if kind == "torch":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    else:
        optimizer = make_optimizer(model, kind)
    train(model, optimizer, range(4))
    return model, optimizer


def resident(optimizer) -> int:
    """Bytes of all storages of moments."""
    total = 0
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            value = state[name]
            parts = [value.codes, value.scale, value.qmap] if hasattr(value, "codes") else [value]
            total += sum(part.untyped_storage().nbytes() for part in parts)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_if_nothing_had_been(kind):
    model, optimizer = trained(kind)
    expected, undisturbed = trained(kind)
    before = resident(optimizer)
    steps = [float(state["step"]) for state in optimizer.state.values()]
    assert offload_state(optimizer) == before > 0
    assert resident(optimizer) == 0 and all(p.grad is None for p in model.parameters())
    assert [float(state["step"]) for state in optimizer.state.values()] == steps
    assert offload_state(optimizer) == 0
    assert reload_state(optimizer) == before == resident(optimizer)
    assert reload_state(optimizer) == 0
    train(model, optimizer, range(4, 8))
    train(expected, undisturbed, range(4, 8))
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0)


def test_no_step_and_no_checkpoint_in_between():
    """Both are refused while moments are away; a block that fails brings them back."""
    model, optimizer = trained("fp32")
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    copies = [moment.clone() for moment in moments]
    with pytest.raises(ZeroDivisionError), offloaded(optimizer):
        for moment in moments:
            assert moment.untyped_storage().nbytes() == 0
        for use in (optimizer.step, optimizer.state_dict):
            with pytest.raises(RuntimeError, match="reload_state comes first"):
                use()
        raise ZeroDivisionError
    assert all(torch.equal(moment, copy) for moment, copy in zip(moments, copies))
    optimizer.step()
    with offloaded(optimizer, False):
        assert resident(optimizer) and optimizer.state_dict()


def test_a_measurement_runs_without_them():
    sizes = []

    def fit(offload: bool):
        def measure(step: int) -> dict[str, float]:
            sizes.append(resident(trainer.optimizer))
            return {"x": step}

        trainer = build("dpo", evaluation=Evaluation(every=2, measure=measure, offload=offload))
        trainer.fit()
        return trainer

    away, present = fit(True), fit(False)
    assert sizes[: len(sizes) // 2] == [0] * (len(sizes) // 2) and all(sizes[len(sizes) // 2 :])
    for ours, theirs in zip(away.model.parameters(), present.model.parameters()):
        assert torch.equal(ours, theirs)


SHARDED = """
import sys
import torch
from optimizer_case import make_model, make_optimizer, train, weights
from srlm_fast.parallel import World
from srlm_fast.trainer import offload_state, reload_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
world = World()
mesh = init_device_mesh("cpu", (2,))
for kind in ("fp32", "8bit"):
    results = []
    for away in (False, True):
        model = fully_shard(make_model(moments=kind), mesh=mesh)
        optimizer = make_optimizer(model, kind)
        train(model, optimizer, range(3))
        if away:
            before = [state["exp_avg"].placements for state in optimizer.state.values()]
            moved = offload_state(optimizer)
            local = next(iter(optimizer.state.values()))["exp_avg"].to_local()
            assert moved > 0 and local.untyped_storage().nbytes() == 0
            assert reload_state(optimizer) == moved
            assert before == [state["exp_avg"].placements for state in optimizer.state.values()]
        train(model, optimizer, range(3, 6))
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0]), kind
world.exit(0)
"""


@pytest.mark.distributed
def test_shards_come_back_as_they_were(tmp_path):
    file = tmp_path / "sharded.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{SHARDED}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(file)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
