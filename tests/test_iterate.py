"""The driver through real processes: every phase, one rank and two, killed in every phase, bad input, status."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from srlm_fast.adapters import merge_folders
from srlm_fast.checkpoint import weights_id
from srlm_fast.config import Config, load_config
from srlm_fast.iterate import phases, status
from srlm_fast.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PHASES, PHASES_OF_ONE = phases(Config()), phases(Config(iterations=1))
SCRIPT = str(ROOT / "scripts/iterate.py")
SMALL = [
    "oasst.ift_examples=64",
    "oasst.eft_share=0.04",
    "evaluate.n=1",
    "evaluate.bootstrap=20",
    "judge.n=1",
    "eft.attempts=1",
    "prompts.count=12",
    "prompts.requests_per_round=4",
    "candidates.shard_size=6",
    "sft.epochs=1",
    "sft.max_steps=4",
    "dpo.max_steps=3",
    "dpo.batch_size=4",
    "sft.checkpoint_every=1",
    "dpo.checkpoint_every=1",
]


def command(run_dir: Path, *overrides: str, ranks: int = 0, config: str = "tiny") -> list[str]:
    """ranks 0: a plain process; else torchrun with that many."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    small = SMALL if config == "tiny" else []
    return [
        sys.executable,
        *launcher,
        SCRIPT,
        "--config",
        str(ROOT / f"configs/{config}.yaml"),
        f"run_dir={run_dir}",
        *small,
        *overrides,
    ]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(arguments: list[str], timeout: float = 280) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def model_names(iterations: int = 2) -> list[str]:
    return ["sft", *(f"m{t}" for t in range(1, iterations + 2))]


def weights(run_dir: Path, name: str) -> dict:
    return load_file(run_dir / f"models/{name}/model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    for name in model_names():
        expected, found = weights(one, name), weights(other, name)
        assert expected.keys() == found.keys()
        for tensor in expected:
            assert (expected[tensor] == found[tensor]).all(), f"{name}: {tensor}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("iterate") / "undisturbed"
    done = run(command(run_dir))
    assert done.returncode == 0, done.stderr[-3000:]
    (run_dir.parent / "stdout").write_text(done.stdout)
    return run_dir


@pytest.mark.slow
def test_every_phase_leaves_its_files(undisturbed):
    for name, _ in PHASES:
        record = json.loads((undisturbed / f"phases/{name}.json").read_text())
        assert record["outputs"] and all((undisturbed / file).stat().st_size for file in record["outputs"])
    for t in (1, 2):
        prompts = [json.loads(line) for line in (undisturbed / f"m{t}/prompts.jsonl").read_text().splitlines()]
        assert len({row["prompt"] for row in prompts}) == len(prompts) == 12
        pairs = [json.loads(line) for line in (undisturbed / f"m{t}/pairs.jsonl").read_text().splitlines()]
        assert pairs and all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    steps = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    dpo = [row for row in steps if row["phase"] == "m2/train" and "rewards/margins" in row]
    assert len(dpo) == 3 and {"loss", "lr", "grad_norm", "tokens_per_second", "rewards/accuracies"} <= dpo[0].keys()


def fields(value) -> set[str]:
    """Keys of all objects in a JSON value, but those of tables of files, scores and settings."""
    if isinstance(value, list):
        return set().union(*map(fields, value))
    if not isinstance(value, dict):
        return set()
    inner = (fields(v) for k, v in value.items() if k not in ("outputs", "scores", "keys", "inputs"))
    return set(value).union(*inner)


@pytest.mark.slow
def test_every_field_is_in_the_documentation(undisturbed):
    named = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs/formats.md").read_text()))
    files = [p for p in undisturbed.rglob("*.json*") if not p.is_relative_to(undisturbed / "models")]
    assert len(files) > 30
    for file in files:
        text = file.read_text()
        values = map(json.loads, text.splitlines() if file.suffix == ".jsonl" else [text])
        found = {name.removesuffix("_interval") for name in fields(list(values))}
        assert found <= named, f"{file}: {sorted(found - named)}"


@pytest.mark.slow
def test_the_table_names_every_model(undisturbed):
    table = (undisturbed.parent / "stdout").read_text()
    for name in model_names():
        assert name.upper() in table
    assert "quality" in table and "pairwise" in table


def check_card(run_dir: Path, iterations: int) -> None:
    """Nothing is lost between two steps, and what is said to be kept is in the files."""
    steps = {step["name"]: step for step in json.loads((run_dir / "data_card.json").read_text())["steps"]}
    assert len(steps) == 5 + 4 * iterations
    for name, step in steps.items():
        assert step["rows"] == sum(step["removed"].values()) + sum(step["kept"].values()) > 0, name
        assert min(step["removed"].values()) >= 0, name
    files = {f"data/{part}": ("prompts", part) for part in ("ift", "eft_train", "eft_eval")}
    files |= {"eft/train": ("replies to eft_train", "EFT examples")}
    for t in range(1, iterations + 1):
        files[f"m{t}/prompts"] = (f"m{t}: proposed prompts", "new prompts")
        files[f"m{t}/pairs"] = (f"m{t}: judged prompts", "with a pair")
    for file, (step, kept) in files.items():
        lines = (run_dir / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        assert steps[step]["kept"][kept] == len(lines), file
    text = (run_dir / "data_card.md").read_text(encoding="utf-8")
    assert all(f"## {name}\n" in text for name in steps)


@pytest.mark.slow
def test_rows_tell_where_they_come_from(undisturbed):
    """Pairs to prompts, prompts to requests and their demonstrations, EFT examples to judgements."""

    def rows(pattern: str) -> list[dict]:
        files = sorted(undisturbed.glob(pattern))
        return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]

    ift = {row["id"] for row in rows("data/ift.jsonl")}
    for t in (1, 2):
        requests = {row["request"]: row for row in rows(f"m{t}/prompts/round-*.jsonl")}
        prompts = {row["id"]: row for row in rows(f"m{t}/prompts.jsonl")}
        for row in prompts.values():
            request = requests[row["request"]]
            assert " ".join(row["prompt"].split()[:3]) in " ".join(request["text"].split())
            assert row["shots"] == request["shots"] and len(row["shots"]) == 8
            earlier = {other["id"] for other in prompts.values() if other["request"] < row["request"]}
            assert set(row["shots"]) <= ift | earlier
        for pair in rows(f"m{t}/pairs.jsonl"):
            assert prompts[pair["prompt_id"]]["prompt"] == pair["prompt"]
            assert pair["weights_id"] == weights_id(undisturbed / f"models/m{t}")
    found = json.loads((undisturbed / "phases/eft/judge.json").read_text())["counts"]["weights_id"]
    assert found == weights_id(undisturbed / "models/sft")[:16]
    judged = {row["id"]: row["judgements"] for row in rows("eft/judge/shard-*.jsonl")}
    ranked = {row["id"]: row["replies"] for row in rows("data/eft_train.jsonl")}
    for row in rows("eft/train.jsonl"):
        prompt, _, place = row["id"].rpartition("/")
        judgement = judged[prompt][int(place)][row["attempt"]]
        assert judgement["text"].strip() == row["response"] and judgement["score"] == row["score"]
        assert ranked[prompt][int(place)][1] == row["rank"]


@pytest.mark.slow
def test_the_data_card_adds_up(undisturbed):
    check_card(undisturbed, iterations=2)


@pytest.mark.slow
def test_iterations_train_and_differ(undisturbed):
    models = {name: weights(undisturbed, name) for name in model_names()}
    for one, other in (("sft", "m1"), ("m1", "m2"), ("m2", "m3")):
        assert any((models[one][k] != models[other][k]).any() for k in models[one])


@pytest.mark.slow
def test_models_load_in_transformers(undisturbed):
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    model = transformers.AutoModelForCausalLM.from_pretrained(undisturbed / "models/m3")
    assert model.config.model_type == "llama"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_every_phase_ends_with_the_same_weights(undisturbed, tmp_path):
    """SIGKILL while each phase is under way, sooner or later in it, then the same command again."""
    run_dir = tmp_path / "killed"
    names = [name for name, _ in PHASES]
    killed = set()
    for i, name in enumerate(names):
        before = run_dir / f"phases/{names[i - 1]}.json" if i else run_dir / "run.json"
        process = subprocess.Popen(
            command(run_dir), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not before.exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep((0.0, 0.1, 0.3)[i % 3])
        if not (run_dir / f"phases/{name}.json").exists():
            killed.add(name)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(killed) >= 0.6 * len(names), f"the kills came too late: {killed}"
    done = run(command(run_dir))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(undisturbed, run_dir)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_with_a_stop_in_between(tmp_path):
    """FSDP2 on two ranks; a signal on the way saves what is done; the end is that of an undisturbed run."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = run(command(whole, ranks=2))
    assert done.returncode == 0, done.stderr[-3000:]
    python, *launch, nproc, ranks, script = command(stopped, ranks=2)[:7]
    hand_on = ["--signals-to-handle", "SIGTERM,SIGUSR1", "--shutdown-timeout", "240"]
    process = subprocess.Popen(
        [python, *launch, *hand_on, nproc, ranks, script, *command(stopped, ranks=2)[7:]],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (stopped / "phases/m1/pairs.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=240)
    assert (stopped / "state").read_text() == "stopped\n"
    assert not (stopped / "phases/m3/train.json").exists()
    done = run(command(stopped, "save_by=0s"))
    assert done.returncode == 75 and "stopped; the same command goes on from here" in done.stderr
    done = run(command(stopped, ranks=2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (stopped / "state").read_text() == "done\n"
    assert_same_weights(whole, stopped)


@pytest.mark.slow
def test_finished_run_does_nothing_again_and_status_says_so(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "models").rglob("*")}
    done = run(command(undisturbed))
    assert done.returncode == 0 and "M3" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (undisturbed / "models").rglob("*")}
    shown = run([*command(undisturbed), "--status"])
    assert f"{len(PHASES)} of {len(PHASES)} phases done" in shown.stdout


@pytest.mark.slow
def test_more_iterations_go_on_from_a_finished_run(undisturbed):
    config = load_config(ROOT / "configs/tiny.yaml", [f"run_dir={undisturbed}", *SMALL, "iterations=3"])
    assert "next     m3/prompts" in status(config)


@pytest.mark.slow
def test_other_keys_are_refused_by_name(undisturbed):
    done = run(command(undisturbed, "dpo.beta=0.5"))
    assert done.returncode == 2 and "dpo.beta: was 0.1, now 0.5" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "source", "responses_per_pair"),
    [("ld_dpo", "forward", 3), ("simpo + 0.5 * nll", "forward", 0), ("dpo", "rollout", 2)],
)
def test_losses_get_the_reference_values_that_they_need(tmp_path, loss, source, responses_per_pair):
    """ld_dpo wants one response of a pair cut to the other's length as well, a loss without a reference none."""
    overrides = (f"dpo.loss={loss}", f"reference.source={source}", "iterations=1", "kernels=reference")
    done = run(command(tmp_path / "run", *overrides))
    assert done.returncode == 0, done.stderr[-2000:]
    pairs = (tmp_path / "run/m1/pairs.jsonl").read_text(encoding="utf-8").splitlines()
    cached = load_file(tmp_path / "run/m1/reference.safetensors")["logps"]
    assert 2 * len(pairs) * bool(responses_per_pair) <= len(cached) <= responses_per_pair * len(pairs)
    assert (tmp_path / "run/models/m2/model.safetensors").is_file()
    counts = json.loads((tmp_path / "run/phases/m1/reference.json").read_text())["counts"]
    if source == "rollout":
        assert 0 < counts["compared"] <= len(pairs)
        assert 0 < counts["mean_difference"] <= counts["largest_difference"] < 1e-3
        assert counts["first_loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.slow
def test_adapters_in_every_training_phase(tmp_path):
    """Each phase starts from the merged model before it; its first DPO loss is ln 2 and its adapter is kept."""
    overrides = ("lora.rank=4", "dpo.lr=0.01", "model.dropout=0", "iterations=1")
    done = run(command(tmp_path / "run", *overrides))
    assert done.returncode == 0, done.stderr[-2000:]
    models = {"sft": ROOT / "configs/tiny", "m1": ROOT / "configs/tiny", "m2": tmp_path / "run/models/m1"}
    for name, base in models.items():
        merge_folders(base, tmp_path / f"run/adapters/{name}", tmp_path / "merged")
        assert weights_id(tmp_path / "merged") == weights_id(tmp_path / f"run/models/{name}") != weights_id(base)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    dpo = [row["loss"] for row in rows if row["phase"] == "m2/train" and "grad_norm" in row]
    assert dpo[0] == pytest.approx(math.log(2), abs=1e-5) and dpo[-1] != dpo[0]


@pytest.mark.slow
def test_real_oasst_through_every_phase(tmp_path, shared_data):
    shared_data("oasst1/oasst1-en-validation.jsonl")
    done = run(command(tmp_path / "smoke", config="oasst_smoke"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, _ in PHASES_OF_ONE:
        assert (tmp_path / f"smoke/phases/{name}.json").exists()
    counts = json.loads((tmp_path / "smoke/phases/prepare.json").read_text())["counts"]
    assert counts["deleted"] == 40 and counts["unranked"] == 85
    check_card(tmp_path / "smoke", iterations=1)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.path=nowhere"], "model.path: .*nowhere does not exist"),
        (["oasst.paths=nowhere.jsonl"], "oasst.paths: .*nowhere.jsonl does not exist"),
        (["dpo.betta=1"], "did you mean 'dpo.beta'"),
        (["dpo.tokens_per_microbatch=20"], "smaller than the longest pair"),
        (["model.path=tests"], "config.json"),
        (["model.tokenizer=tests/not_a_tokenizer.model"], "not_a_tokenizer.model"),
        (
            ["model.max_seq_len=100000", "sft.tokens_per_microbatch=200000", "dpo.tokens_per_microbatch=200000"],
            "max_position_embeddings",
        ),
        (["oasst.paths=tests/empty.jsonl"], "empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, overrides, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/not_a_tokenizer.model").write_bytes(b"123")
    (tmp_path / "tests/empty.jsonl").write_text("")
    done = run(command(tmp_path / "run", *overrides))
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(says, lines[0]), done.stderr
    assert not (tmp_path / "run/models").exists()


def test_status_tells_how_far_an_unfinished_phase_has_come(tmp_path):
    run_dir = RunDir(tmp_path)
    config = load_config(None, [f"run_dir={tmp_path}", "iterations=1"])
    parts = {
        "sft/train": ("checkpoints/sft/step-20/x", "checkpoint step-20"),
        "sft/evaluate": ("sft/answers/shard-00000.jsonl", "1 shards"),
        "eft/judge": ("eft/judge/shard-00000.jsonl", "1 shards"),
        "m1/prompts": ("m1/prompts/round-0000.jsonl", "1 rounds"),
    }
    for name, _ in PHASES_OF_ONE:
        if name in parts:
            file, says = parts[name]
            (tmp_path / file).parent.mkdir(parents=True)
            (tmp_path / file).write_text("")
            (line,) = (line for line in status(config).splitlines() if line.startswith("  next"))
            assert line.split(maxsplit=2) == ["next", name, says]
        run_dir.finish(name, [], 1.0, {})
