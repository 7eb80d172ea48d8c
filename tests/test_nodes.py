"""Several nodes: torchrun agents that meet on the loopback, each with ranks of its own, and one run folder."""

import json
from pathlib import Path

import pytest
import torch
from nodes import torchrun
from safetensors.torch import load_file
from test_iterate import SMALL
from test_train_script import DPO, configured, head, model_folder, run  # noqa: F401 (a fixture)

from srlm_fast.checkpoint import load_model, save_weights

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {name: str(ROOT / f"scripts/{name}.py") for name in ("train", "iterate")}


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
    nodes = torchrun(SCRIPTS["train"], *arguments, n_nodes=2)
    assert all(node.returncode == 0 for node in nodes), nodes[0].stderr[-3000:]
    assert "steps 3" in nodes[0].stdout and not nodes[1].stdout
    ours, expected = weights(tmp_path / "nodes/model"), weights(tmp_path / "one/model")
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0, msg=name)
    start = weights(model_folder)
    assert all((expected[name] - start[name]).abs().max() > 1e-4 for name in start if value.dim() > 1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_the_loop_on_two_nodes_writes_the_models_of_one(tmp_path):
    """Two ranks, on one node and on two: the same bytes in every model, pair and metric."""
    config = ["--config", str(ROOT / "configs/tiny.yaml"), *SMALL, "iterations=1", "oasst.ift_examples=32"]
    for name, n_nodes in (("one", 1), ("two", 2)):
        arguments = [SCRIPTS["iterate"], *config, f"run_dir={tmp_path / name}"]
        nodes = torchrun(*arguments, n_nodes=n_nodes, n_ranks=2 // n_nodes)
        assert all(node.returncode == 0 for node in nodes), nodes[-1].stderr[-3000:]
    files = [f"models/{model}/model.safetensors" for model in ("sft", "m1", "m2")]
    for file in (*files, "m1/pairs.jsonl", "m2/metrics.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert len((tmp_path / "one/m1/pairs.jsonl").read_text().splitlines()) > 2


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
    (node,) = torchrun(SCRIPTS["train"], *configured(model, tmp_path / "run", data, *options))
    assert node.returncode and "exitcode  : 2" in node.stderr
    errors = [line for line in node.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(says), node.stderr
    assert not (tmp_path / "run/model").exists()
