"""scripts/slurm/ without Slurm: stand-ins for its commands start real agents that train for real on two "nodes"."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodes import ENVIRONMENT, torchrun
from test_iterate import SMALL

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "scripts/slurm/iterate.sbatch")
JOB = ["--config", str(ROOT / "configs/tiny.yaml"), *SMALL, "iterations=1", "oasst.ift_examples=32"]
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--")):]
node = {{"SLURMD_NODENAME": "127.0.0.1"}}
tasks = [
    subprocess.Popen(command, env={{**os.environ, **node, "SLURM_NODEID": str(i)}}, start_new_session=True)
    for i in range(int(os.environ["SLURM_NNODES"]))
]
open(os.environ["SLURM_STUB"] + "/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    *) echo "$*" >> "$SLURM_STUB/requeued" ;;
esac
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Of a job on two nodes, with stand-ins for srun and scontrol on the PATH."""
    stub = tmp_path / "slurm"
    stub.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stub / name).write_text(text)
        (stub / name).chmod(0o755)
    path = f"{stub}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    return {**ENVIRONMENT, **job, "PATH": path, "SLURM_STUB": str(stub), "RANKS_PER_NODE": "1"}


def submit(environment: dict[str, str], start: int, *arguments: str) -> subprocess.Popen:
    """What Slurm does when the job starts for the first or another time."""
    log = open(Path(environment["SLURM_STUB"]) / f"log-{start}", "w")
    started = {**environment, "SLURM_RESTART_COUNT": str(start)} if start else environment
    return subprocess.Popen(["bash", SCRIPT, *arguments], env=started, cwd=ROOT, stdout=log, stderr=log)


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.exists() and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_job_is_requeued_until_it_is_done_and_ends_as_one_node_does(tmp_path, environment):
    """USR1 goes, as sites differ, to the shell alone that srun started (node 0) or to all processes of a node (1)."""
    stub, run_dir, job = Path(environment["SLURM_STUB"]), tmp_path / "two", environment["SLURM_JOB_ID"]
    process = submit(environment, 0, *JOB, f"run_dir={run_dir}")
    wait_for(run_dir / "phases/m1/train.json", process)
    for task, send in zip((stub / "tasks").read_text().split(), (os.kill, os.killpg), strict=True):
        send(int(task), signal.SIGUSR1)
    assert process.wait(280) == 0, (stub / "log-0").read_text()[-3000:]
    assert (run_dir / "state").read_text() == "stopped\n" and (stub / "requeued").read_text() == f"requeue {job}\n"
    assert not (run_dir / "phases/m2/train.json").exists()
    assert submit(environment, 1, *JOB, f"run_dir={run_dir}").wait(280) == 0, (stub / "log-1").read_text()[-3000:]
    assert (run_dir / "state").read_text() == "done\n" and (stub / "requeued").read_text() == f"requeue {job}\n"
    (node,) = torchrun(str(ROOT / "scripts/iterate.py"), *JOB, f"run_dir={tmp_path / 'one'}")
    assert node.returncode == 0, node.stderr[-3000:]
    files = [f"models/{model}/model.safetensors" for model in ("sft", "m1", "m2")]
    for file in (*files, "m1/pairs.jsonl", "m2/metrics.json"):
        assert (run_dir / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert len((tmp_path / "one/m1/pairs.jsonl").read_text().splitlines()) > 2


def test_a_job_that_fails_is_not_requeued(tmp_path, environment):
    """Whatever the start before it left."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/state").write_text("stopped\n")
    process = submit(environment, 0, *JOB, f"run_dir={tmp_path / 'run'}", "sft.lrr=1")
    assert process.wait(280) not in (0, None)
    stub = Path(environment["SLURM_STUB"])
    log = (stub / "log-0").read_text()
    assert not (stub / "requeued").exists() and "exit code 1, not started" in log
    assert log.count("\nerror: ") + log.startswith("error: ") == 1 and "did you mean 'sft.lr'" in log


def test_the_folder_of_the_run_must_be_named(environment):
    process = submit(environment, 0, *JOB)
    assert process.wait(60) == 2
    assert "error: give run_dir=FOLDER" in (Path(environment["SLURM_STUB"]) / "log-0").read_text()


def test_shellcheck_has_nothing_to_say():
    checker = Path(sys.executable).with_name("shellcheck")
    files = sorted(str(file) for file in (ROOT / "scripts/slurm").iterdir())
    assert len(files) == 2
    done = subprocess.run([str(checker), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
