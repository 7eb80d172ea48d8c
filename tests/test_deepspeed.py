"""DeepSpeed's ZeRO against the trainer in one process and against FSDP2; what it refuses; a run with it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_case import FSDP2, build, zero
from safetensors.torch import load_file
from test_iterate import ENVIRONMENT, command
from test_parallel import folder  # noqa: F401

from srlm_fast.checkpoint import load_model
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.errors import UserError
from srlm_fast.parallel import World, check_parallel

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def expected() -> dict:
    """Losses, norms and weights of the trainer in one process."""
    trainer, steps = build(World(), FSDP2)
    trainer.fit()
    names = {"losses": "loss", "norms": "grad_norm"}
    weights = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    return {"weights": weights, **{name: [step[key] for step in steps] for name, key in names.items()}}


def torchrun(n_ranks: int, models: Path, out: Path, *cases: str) -> dict:
    """What tests/deepspeed_case.py finds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    script = str(Path(__file__).with_name("deepspeed_case.py"))
    command = [sys.executable, *launcher, script, str(models), str(out), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "result.pt", weights_only=True)


def assert_close(found: dict, wanted: dict, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0, msg=name)


CROSSED = ["stopped fsdp2", "zero 2 after fsdp2", "stopped zero 3", "fsdp2 after zero 3"]
"""Checkpoints of one backend, and who goes on from them."""


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory) -> tuple[Path, dict]:  # noqa: F811
    """What two ranks have written, and found."""
    out = tmp_path_factory.mktemp("two")
    trained = ["zero 1", "zero 2", "zero 3", "selective", "dropout", "dropout full", "bf16 1", "bf16 2", "bf16 3"]
    stages = [f"{case} {stage}" for case in ("resumed", "skipped") for stage in (1, 2, 3)]
    return out, torchrun(2, folder, out, *trained, "freed", "refused", "loaded", *stages, "skipped fsdp2", *CROSSED)


@pytest.mark.slow
def test_two_ranks_train_the_same(two_ranks, expected):
    _, found = two_ranks
    assert min(expected["norms"]) > 0.5, "clipping has something to do"
    for case in ("zero 1", "zero 2", "zero 3", "selective"):
        assert found[case]["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert found[case]["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert_close(found[case]["weights"], expected["weights"], 1e-5)
    assert found["dropout"]["losses"] != pytest.approx(expected["losses"], abs=1e-3)
    assert_close(found["dropout full"]["weights"], found["dropout"]["weights"], 1e-6)
    for stage in (1, 2, 3):
        losses = found[f"bf16 {stage}"]["losses"]
        assert losses == pytest.approx(expected["losses"], abs=0.01) and losses != expected["losses"]


def test_two_ranks_refuse_what_it_does_not_do(two_ranks):
    messages = two_ranks[1]["refused"]
    foreign = "parallel.replicate=2, parallel.reduce=microbatch, parallel.compile=True"
    assert messages["fsdp2's"].startswith(f"{foreign}: not with parallel.backend=deepspeed")
    assert "use parallel.checkpointing=full" in messages["selective"]
    assert messages["moments"].startswith("moments=bf16: parallel.backend=deepspeed has fp32 moments")


@pytest.mark.slow
def test_two_ranks_load_save_and_resume(two_ranks, folder, expected):  # noqa: F811
    out, found = two_ranks
    for stage in (1, 2, 3):
        resumed = found[f"resumed {stage}"]
        assert_close(resumed["resumed"], resumed["undisturbed"], 0.0)
        assert_close(found[f"skipped {stage}"]["weights"], found["skipped fsdp2"]["weights"], 1e-5)
        for name in ("untied", "tied", "bf16"):
            original = dict(load_model(folder / name).named_parameters())
            exported = load_file(out / f"{name}-{stage}/model.safetensors")
            assert_close(exported, {n: p.detach() for n, p in original.items()}, 0.0)
    for case in CROSSED[1::2]:
        assert_close(found[case]["weights"], expected["weights"], 1e-5)


@pytest.mark.slow
def test_four_ranks_train_the_same_and_go_on_where_two_stopped(two_ranks, folder, tmp_path, expected):  # noqa: F811
    for name in ("from-zero", "from-fsdp2"):
        shutil.copytree(two_ranks[0] / name, tmp_path / name)
    found = torchrun(4, folder, tmp_path, "loaded", "zero 3", "zero 3 after zero 3", "zero 2 after fsdp2")
    for case in found.keys() - {"loaded"}:
        assert_close(found[case]["weights"], expected["weights"], 1e-5)


@pytest.mark.slow
def test_a_run_of_all_phases(tmp_path):
    keys = ("parallel.backend=deepspeed", "parallel.zero_stage=3", "iterations=1", "model.dropout=0")
    done = subprocess.run(
        command(tmp_path / "run", *keys, ranks=2), capture_output=True, text=True, timeout=800, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(step for step in steps if step["phase"] == "m2/train")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4), "policy and reference are the same model"
    assert (tmp_path / "run/models/m2/model.safetensors").is_file()


def test_what_it_does_not_do_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"divides a model among processes, here is one; start several with torchrun"):
        check_parallel(1, ParallelConfig(**zero(3)))
    with pytest.raises(UserError, match=r"parallel.shard=2: not with parallel.backend=deepspeed"):
        check_parallel(2, ParallelConfig(**zero(3, shard=2)))
    check_parallel(2, ParallelConfig(**zero(1)), ["fp32"])
    with pytest.raises(UserError, match=r"lora.rank=8: not with parallel.backend=deepspeed"):
        check_parallel(2, ParallelConfig(**zero(1)), lora=8)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"needs the package deepspeed; .*DS_BUILD_OPS=0 pip install --no-build-iso"):
        check_parallel(2, ParallelConfig(**zero(1)))
