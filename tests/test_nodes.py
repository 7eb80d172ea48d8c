"""Several nodes: torchrun agents that meet on the loopback, each with ranks of its own, and one run folder."""

import json
from pathlib import Path

import pytest
import torch
from nodes import torchrun
from safetensors.torch import load_file
from test_train_script import DPO, configured, head, model_folder, run  # noqa: F401 (a fixture)

from srlm_fast.checkpoint import load_model, save_weights

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "scripts/train.py")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_copy_of_the_model_on_each_node_trains_as_one_process(tmp_path, shared_data, model_folder):  # noqa: F811
    """HSDP: 2 nodes of 2 ranks; the weights of a node are gathered within it, gradients are summed over both."""
    data = head(tmp_path / "rows.json", shared_data(DPO), 24)
    options = ("training.adam_eps=1e-3", "training.max_steps=3")
    run(model_folder, tmp_path / "one", data, *options)
    arguments = configured(model_folder, tmp_path / "nodes", data, *options, "parallel.replicate=2")
    nodes = torchrun(TRAIN, *arguments, n_nodes=2)
    assert all(node.returncode == 0 for node in nodes), nodes[0].stderr[-3000:]
    assert "steps 3" in nodes[0].stdout and not nodes[1].stdout
    ours, expected = weights(tmp_path / "nodes/model"), weights(tmp_path / "one/model")
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0, msg=name)
    start = weights(model_folder)
    assert all((expected[name] - start[name]).abs().max() > 1e-4 for name in start if value.dim() > 1)


@pytest.mark.distributed
@pytest.mark.parametrize("broken", ["mesh", "shard"])
def test_what_does_not_fit_is_said_once(tmp_path, shared_data, model_folder, broken):  # noqa: F811
    """By both ranks of a job, before anything is trained."""
    data, model, options = head(tmp_path / "rows.json", shared_data(DPO), 8), model_folder, ("parallel.replicate=3",)
    says = "error: parallel.replicate=3 does not fit 2 processes"
    if broken == "shard":
        model, options = tmp_path / "model", ()
        save_weights(load_model(model_folder), model, max_shard_bytes=100_000)
        (model / "tokenizer.model").write_bytes((model_folder / "tokenizer.model").read_bytes())
        lost = sorted(json.loads((model / "model.safetensors.index.json").read_text())["weight_map"].values())[-1]
        (model / lost).unlink()
        says = f"error: {model / lost}: file is missing"
    (node,) = torchrun(TRAIN, *configured(model, tmp_path / "run", data, *options))
    assert node.returncode and "exitcode  : 2" in node.stderr
    errors = [line for line in node.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(says), node.stderr
    assert not (tmp_path / "run/model").exists()
