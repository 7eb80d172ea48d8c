"""scripts/train.py: from files of rows to a model folder, on real preference data with a small model."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srlm_fast import train_run
from srlm_fast.adapters import merge_folders
from srlm_fast.checkpoint import load_model, save_weights, weights_id
from srlm_fast.config.train import TrainRunConfig
from srlm_fast.config.tree import read
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.parallel import World
from srlm_fast.stop import Stop
from srlm_fast.tokenizer import load_tokenizer
from srlm_fast.train_run import train

ROOT = Path(__file__).resolve().parents[1]
DPO, KTO = "preference_formats/dpo_en_demo.json", "preference_formats/kto_en_demo.json"
HH = "hh_rlhf/harmless-base-test.jsonl.gz"


@pytest.fixture(scope="module")
def model_folder(shared_data, tmp_path_factory) -> Path:
    """A model folder of 2 layers with the sentencepiece model of the real data."""
    tokenizer = load_tokenizer(shared_data("spm/test_model.model"))
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("model") / "m0"
    save_weights(model, folder, extra_files=tokenizer.files)
    return folder


def configured(model_folder: Path, run_dir: Path, data: Path, *overrides: str) -> list[str]:
    return [
        f"model={model_folder}",
        f"run_dir={run_dir}",
        f"data={data}",
        *("chat_format=plain", "max_length=1000", "training.tokens_per_microbatch=4000", "training.batch_size=8"),
        *("training.lr=3e-3", "training.min_lr=3e-3", "training.max_steps=6", "training.epochs=100", *overrides),
    ]


def run(*arguments) -> dict:
    return train(read(TrainRunConfig(), None, configured(*arguments)), World())


def head(path: Path, source: Path, n: int) -> Path:
    """The first rows of a real file of an array."""
    path.write_text(json.dumps(json.loads(source.read_text(encoding="utf-8"))[:n]))
    return path


def rows_kept(run_dir: Path) -> int:
    return json.loads((run_dir / "data.json").read_text())["data"]["counts"]["kept"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "loss", "first"),
    [(DPO, "dpo", math.log(2)), (DPO, "simpo + 0.1 * nll", None), (HH, "ipo", 25.0), (KTO, "kto", 0.5)],
)
def test_real_data_train(tmp_path, shared_data, model_folder, name, loss, first):
    """40 rows again and again: the loss falls, and what comes out loads."""
    source = shared_data(name)
    if source.suffix == ".gz":
        import gzip

        data = tmp_path / "rows.jsonl"
        data.write_text("".join(gzip.open(source, "rt").readlines()[:40]))
    else:
        data = head(tmp_path / "rows.json", source, 40)
    counts = run(
        model_folder,
        tmp_path / "run",
        data,
        f"training.loss={loss}",
        "eval_share=0.2",
        "eval_every=3",
        "training.max_steps=12",
    )
    assert counts["items"] + counts["held_out"] >= 20 and counts["steps"] == 12
    steps = [row for row in lines(tmp_path / "run/metrics.jsonl") if row["phase"] == "train"]
    if first is not None:
        assert steps[0]["loss"] == pytest.approx(first, rel=1e-4)
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluations = [row for row in lines(tmp_path / "run/metrics.jsonl") if row["phase"] == "evaluation"]
    assert [row["step"] for row in evaluations] == [3, 6, 9, 12]
    assert counts["eval_loss"] == evaluations[-1]["eval_loss"]
    assert rows_kept(tmp_path / "run") == counts["items"] + counts["held_out"]
    before, after = load_model(model_folder), load_model(tmp_path / "run/model")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert load_tokenizer(tmp_path / "run/model").vocab_size == after.config.vocab_size
    assert not (tmp_path / "run/checkpoints").exists()


def test_stopped_and_started_again_equals_undisturbed(tmp_path, shared_data, model_folder, monkeypatch):
    data = head(tmp_path / "rows.json", shared_data(DPO), 30)
    options = ("eval_share=0.2", "eval_every=2", "dropout=0.1", "training.checkpoint_every=1")
    expected = run(model_folder, tmp_path / "a", data, *options)
    stopping = Stop()
    real = train_run.RunDir.log

    def log(self, record):
        real(self, record)
        if record.get("phase") == "train" and record["step"] == 3:
            stopping.request(signal.SIGUSR1)

    monkeypatch.setattr(train_run, "Stop", lambda save_by: stopping)
    monkeypatch.setattr(train_run.RunDir, "log", log)
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        run(model_folder, tmp_path / "b", data, *options)
    assert (tmp_path / "b/state").read_text() == "stopped\n"
    stopping = Stop()
    counts = run(model_folder, tmp_path / "b", data, *options)
    assert (tmp_path / "b/state").read_text() == "done\n"
    assert [row["step"] for row in lines(tmp_path / "b/metrics.jsonl") if row["phase"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert counts["eval_loss"] == expected["eval_loss"]
    ours, theirs = (load_file(tmp_path / name / "model/model.safetensors") for name in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    changed = (tmp_path / "b/metrics.jsonl").stat().st_mtime_ns
    assert run(model_folder, tmp_path / "b", data, *options) == counts
    assert (tmp_path / "b/metrics.jsonl").stat().st_mtime_ns == changed, "a finished run was trained again"
    with pytest.raises(UserError, match=r"training.lr: was 0.003, now 0.1"):
        run(model_folder, tmp_path / "b", data, *options, "training.lr=0.1")


def test_adapters_train_and_are_merged(tmp_path, shared_data, model_folder, monkeypatch):
    """The loss falls; RUN/model is the base with RUN/adapter; stopped and resumed ends with the same bits."""
    data = head(tmp_path / "rows.json", shared_data(DPO), 30)
    options = ("dropout=0.1", "lora.rank=4", "lora.dropout=0.1", "training.lr=0.03", "training.max_steps=16")
    expected = run(model_folder, tmp_path / "a", data, *options)
    steps = [row for row in lines(tmp_path / "a/metrics.jsonl") if row["phase"] == "train"]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"] < 0.9
    stopping = Stop()
    stopping.request(signal.SIGUSR1)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(train_run, "Stop", lambda save_by: stopping)
        run(model_folder, tmp_path / "b", data, *options)
    assert run(model_folder, tmp_path / "b", data, *options)["loss"] == expected["loss"]
    models = {name: load_model(tmp_path / name / "model").state_dict() for name in "ab"}
    assert all(torch.equal(models["a"][name], value) for name, value in models["b"].items())
    merge_folders(model_folder, tmp_path / "b/adapter", tmp_path / "merged")
    assert weights_id(tmp_path / "merged") == weights_id(tmp_path / "a/model") != weights_id(model_folder)
    assert load_tokenizer(tmp_path / "a/model").vocab_size == load_model(model_folder).config.vocab_size
    with pytest.raises(UserError, match="lora.targets: 'lm_head' has no adapters; choose from q_proj"):
        run(model_folder, tmp_path / "c", data, "lora.rank=4", "lora.targets=lm_head")


def test_runs_share_a_reference_cache_and_stop_early(tmp_path, shared_data, model_folder, monkeypatch):
    data = head(tmp_path / "rows.json", shared_data(DPO), 30)
    options = ("eval_share=0.3", f"reference_cache={tmp_path / 'cache'}")
    config = read(TrainRunConfig(), None, configured(model_folder, tmp_path / "a", data, *options))
    assert train(config, World(), cache_only=True)["responses"] == 2 * rows_kept(tmp_path / "a")
    assert not (tmp_path / "a/model").exists()
    monkeypatch.setattr("srlm_fast.reference.compute", lambda *args, **kwargs: pytest.fail("computed again"))
    every = ("eval_every=1", "stop_on=eval_loss", "training.lr=0.5", "training.min_lr=0.5")
    counts = run(model_folder, tmp_path / "b", data, *options, *every)
    losses = [row["eval_loss"] for row in lines(tmp_path / "b/metrics.jsonl") if row["phase"] == "evaluation"]
    assert counts["steps"] < 6 and losses[-1] > losses[-2]
    with pytest.raises(UserError, match="stop_on=eval_accuracy is no metric of dpo: eval_entropy, eval_logps/chosen"):
        run(model_folder, tmp_path / "c", data, *options, "eval_every=1", "stop_on=eval_accuracy")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_batch_without_a_finite_loss_stays_in_the_run_folder(
    tmp_path, shared_data, model_folder, monkeypatch, on_nonfinite
):
    """The reference of the first row's replies is infinite."""
    from srlm_fast.reference import ReferenceCache

    data = head(tmp_path / "rows.json", shared_data(DPO), 20)
    lookup, broken = ReferenceCache.lookup, []

    def broken_lookup(self, items):
        values = lookup(self, items)
        broken.append(items[0].source)
        values[0] = -math.inf
        return values

    monkeypatch.setattr(ReferenceCache, "lookup", broken_lookup)
    options = (f"on_nonfinite={on_nonfinite}", "training.max_steps=2", "training.checkpoint_every=1")
    if on_nonfinite == "stop":
        with pytest.raises(UserError, match="loss is .*; the batch is in .*nonfinite-step-"):
            run(model_folder, tmp_path / "run", data, *options)
    else:
        assert run(model_folder, tmp_path / "run", data, *options)["steps"] == 2
        assert (tmp_path / "run/model").exists()
    (kept,) = (tmp_path / "run/checkpoints").glob("nonfinite-step-*.json")
    assert broken[0] in {row["source"] for row in json.loads(kept.read_text())["items"]}
    assert on_nonfinite == "stop" or not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_data_that_were_refused_are_mended(tmp_path, shared_data, model_folder):
    data = head(tmp_path / "rows.json", shared_data(KTO), 10)
    with pytest.raises(UserError, match="loss dpo compares pairs"):
        run(model_folder, tmp_path / "run", data)
    assert run(model_folder, tmp_path / "run", head(data, shared_data(DPO), 10))["steps"] == 6


def test_refusals(tmp_path, model_folder, shared_data):
    data = head(tmp_path / "rows.json", shared_data(DPO), 4)
    cases = {
        "model is empty: name the folder": [f"data={data}"],
        "data is empty: name at least one file": [f"model={model_folder}"],
        "data: .*absent.json does not exist": [f"model={model_folder}", f"data={tmp_path / 'absent.json'}"],
        "training.min_lr=1e-07, .* is above training.lr=1e-08": [
            f"model={model_folder}",
            f"data={data}",
            "training.lr=1e-8",
        ],
        "eval_share=0.9 of . items leaves 0 to train on": [
            f"model={model_folder}",
            f"data={head(tmp_path / 'one.json', shared_data(DPO), 1)}",
            "eval_share=0.9",
            "chat_format=plain",
            f"run_dir={tmp_path / 't'}",
        ],
        "stop_on=eval_loss needs held-out rows": [f"model={model_folder}", f"data={data}", "stop_on=eval_loss"],
        "unknown loss 'dpoo'": [f"model={model_folder}", f"data={data}", "training.loss=dpoo"],
        "has no chat_template": [f"model={model_folder}", f"data={data}", f"run_dir={tmp_path / 'r'}"],
        r"labelled.json\[0\]: loss dpo compares pairs": [
            f"model={model_folder}",
            f"data={head(tmp_path / 'labelled.json', shared_data(KTO), 4)}",
            "chat_format=plain",
            f"run_dir={tmp_path / 's'}",
        ],
    }
    for message, overrides in cases.items():
        with pytest.raises(UserError, match=message):
            train(read(TrainRunConfig(), None, overrides), World())


def script(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)])]
    command = command if ranks > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "scripts/train.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env=environment,
    )


@pytest.mark.slow
def test_a_signal_or_save_by_saves_the_state(tmp_path, shared_data, model_folder):
    data = head(tmp_path / "rows.json", shared_data(DPO), 20)
    command = [sys.executable, "scripts/train.py", *configured(model_folder, tmp_path / "run", data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    long = subprocess.Popen([*command, "training.max_steps=100000"], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run/metrics.jsonl").exists() and long.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        long.send_signal(signal.SIGTERM)
        _, stderr = long.communicate(timeout=120)
    finally:
        long.kill()
    assert long.returncode == 143 and b"stopped after step" in stderr
    (state,) = (tmp_path / "run/checkpoints").iterdir()
    done = int(state.name.removeprefix("step-"))
    assert done == lines(tmp_path / "run/metrics.jsonl")[-1]["step"]
    again = script(*configured(model_folder, tmp_path / "run", data, "training.max_steps=100000", "save_by=0s"))
    assert again.returncode == 75 and f"stopped after step {done + 1} of" in again.stderr
    assert (tmp_path / "run/state").read_text() == "stopped\n"
    refused = script(*configured(model_folder, tmp_path / "run", data, "training.max_steps=7"))
    assert refused.returncode == 2 and "training.max_steps: was 100000, now 7" in refused.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_two_ranks_equal_one(tmp_path, shared_data, model_folder, loss):
    data = head(tmp_path / "rows.json", shared_data(DPO), 30)
    options = (f"training.loss={loss}", "eval_share=0.2", "eval_every=2", "training.adam_eps=1e-3")
    options = (*options, "training.checkpoint_every=2")
    run(model_folder, tmp_path / "one", data, *options)
    done = script(*configured(model_folder, tmp_path / "two", data, *options), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, expected in zip(
        lines(tmp_path / "two/metrics.jsonl"), lines(tmp_path / "one/metrics.jsonl"), strict=True
    ):
        for name in ("loss", "eval_loss", "rewards/margins", "eval_logps/chosen"):
            if name in expected:
                assert ours[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    ours, expected = (load_file(tmp_path / name / "model/model.safetensors") for name in ("two", "one"))
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0, msg=name)


def test_the_command_with_its_example(tmp_path, shared_data, model_folder):
    data = head(tmp_path / "rows.json", shared_data(DPO), 20)
    overrides = configured(model_folder, tmp_path / "run", data, "training.max_steps=1")
    done = script("--config", "configs/dpo.yaml", *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"items {rows_kept(tmp_path / 'run') - 1}" in done.stdout and "held_out 1" in done.stdout
    assert (tmp_path / "run/model/model.safetensors").exists()
    refused = script("--config", "configs/dpo.yaml", "training.los=dpo")
    assert refused.returncode == 2 and "did you mean 'training.loss'?" in refused.stderr
