"""--dry-run: every configuration of configs/ to its last phase, what a real run then does, and what is refused."""

import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from test_iterate import PHASES, SMALL, command, run

from srlm_fast.checkpoint import load_model, save_weights
from srlm_fast.config import load_config
from srlm_fast.dry_run import Seeds, dry_run, walk
from srlm_fast.errors import UserError
from srlm_fast.model import LlamaConfig
from srlm_fast.plan import Machine, Plan

ROOT = Path(__file__).resolve().parents[1]


def lines(config: str, *overrides: str, gpus: str | None = None) -> list[str]:
    return list(dry_run(load_config(ROOT / f"configs/{config}.yaml", overrides), gpus))


@pytest.mark.parametrize("name", ["llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b"])
def test_configurations_reach_the_last_phase_without_weights_or_data(name):
    found = lines(name)
    assert [line for line in found if line in dict(PHASES)] == list(dict(PHASES))
    assert sum(line.endswith("as planned") for line in found) == 2  # the first rank and the last
    assert sum("forward and backward of 4 of" in line for line in found) == 2  # sft and dpo
    lacking = [line for line in found if line.startswith("missing: ")]
    assert any("no safetensors" in line for line in lacking) and any("oasst.paths" in line for line in lacking)
    assert found[-1] == "Nothing speaks against this run, once it has what is missing."


def test_other_machines_and_copies():
    found = lines("llama2_70b", "parallel.replicate=2", gpus="32xH200")
    assert "2 x 16 (replicate x shard)" in found[0]
    whole = Plan(
        load_config(ROOT / "configs/llama2_70b.yaml"), LlamaConfig.named("llama2-70b"), Machine.parse("16xH200")
    )
    assert f"rank 31: {whole.local_parameters(15):,} parameters, 16.1 GiB, as planned" in found


def test_adapters_are_sharded_as_planned():
    """7B on one GPU, and on two; the step leaves a gradient in every adapter."""
    for gpus, local in (("1xA100-80", 6_738_415_616 + 39_976_960), ("2xA100-80", (6_738_415_616 + 39_976_960) // 2)):
        found = lines("llama2_7b", "lora.rank=16", gpus=gpus)
        assert any(line.startswith(f"rank 0: {local:,} parameters, ") for line in found)
        assert any("memory: fits" in line for line in found)
        assert sum("forward and backward of 4 of" in line for line in found) == 2


def test_the_script_shows_it_and_leaves_no_run_folder(tmp_path):
    arguments = ["--config", str(ROOT / "configs/llama2_70b.yaml"), "--dry-run", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/iterate.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Nothing speaks against this run" in done.stdout, done.stderr[-2000:]
    assert not any(tmp_path.iterdir())
    refused = run([*command(tmp_path / "run"), "--dry-run", "--gpus", "8xV100"])
    assert refused.returncode == 2 and refused.stderr.startswith("error: --gpus '8xV100'") and not refused.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "n_compared"), [((), 14), (("learn_from=positives", "eft.enabled=false", "lora.rank=2"), 11)]
)
def test_a_run_reads_writes_and_counts_what_was_foretold(tmp_path, changes, n_compared):
    """One iteration of the demo: every output of a phase is of a foretold kind, every kind is there, counts hold."""
    changes = (*SMALL, "iterations=1", *changes)
    config = load_config(ROOT / "configs/tiny.yaml", [f"run_dir={tmp_path / 'run'}", *changes])
    shape = LlamaConfig.from_hf(json.loads((ROOT / "configs/tiny/config.json").read_text()))
    steps = list(walk(config, Plan(config, shape, Machine.parse("1xH100-80")), Seeds.read(config)))
    done = run(command(tmp_path / "run", *changes))
    assert done.returncode == 0, done.stderr[-3000:]
    compared = 0
    for step in steps:
        record = json.loads((tmp_path / f"run/phases/{step.name}.json").read_text())
        for file in record["outputs"]:
            assert any(fnmatch(file, pattern) for pattern in step.writes), (step.name, file)
        for pattern in step.writes:
            assert any(fnmatch(file, pattern) for file in record["outputs"]), (step.name, pattern)
        for read in step.reads:
            assert "/" not in read or list((tmp_path / "run").glob(read)), (step.name, read)
        for name in step.counts.keys() & record["counts"].keys():
            count, value = step.counts[name], record["counts"][name]
            assert value <= count.value if count.most else value == count.value, (step.name, name)
            compared += 1
    assert compared >= n_compared
    exact = {(step.name, name): count.value for step in steps for name, count in step.counts.items() if not count.most}
    answers = (tmp_path / "run/m2/answers").glob("shard-*.jsonl")
    assert exact["m2/evaluate", "answers"] == sum(
        len(json.loads(line)["candidates"]) for file in answers for line in file.read_text().splitlines()
    )


@pytest.mark.parametrize(
    ("config", "overrides", "gpus", "says"),
    [
        ("tiny", (), None, "which machine"),
        ("llama2_70b", (), "8xH100-80", "8 x H100-80 are too small by .* GiB each; scripts/plan.py"),
        ("llama2_70b", ("parallel.shard=3",), None, "parallel.shard=3 does not fit 16 processes"),
        ("llama2_7b", ("engine.kv_cache_gib=1",), None, "engine.kv_cache_gib=1.0 holds 2,048 tokens"),
        ("llama2_7b", ("model.path=nowhere",), None, "model.path: .*nowhere does not exist"),
        ("llama2_7b", ("oasst.paths=nowhere.jsonl",), None, "oasst.paths: .*nowhere.jsonl does not exist"),
        ("llama2_7b", ("judge.template=template.txt",), None, "judge template has no place"),
        ("llama2_7b", ("dpo.loss=kto",), None, "dpo.loss=kto does not compare pairs"),
        ("tiny", ("model.path=broken",), "1xH100-80", "00002-of-.*file is missing"),
        ("tiny", ("judge.max_new_tokens=480",), "1xH100-80", "leave no room for a question and an answer"),
        ("tiny", ("evaluate.prompts=template.txt",), "1xH100-80", "broken JSON"),
    ],
)
def test_refusals(tmp_path, monkeypatch, config, overrides, gpus, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.txt").write_text("no place")
    save_weights(load_model(ROOT / "configs/tiny"), tmp_path / "broken", dtype=torch.float32, max_shard_bytes=1 << 20)
    sorted((tmp_path / "broken").glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match=says):
        lines(config, *overrides, gpus=gpus)
