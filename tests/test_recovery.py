"""Training checkpoints: resumed, resharded, refused, damaged, killed and out of space."""

import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import recovery_case
import torch
from nodes import torchrun
from test_model import packed_logits
from training_case import build, full_weights

from srlm_fast.checkpoint import load_model
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.parallel import World
from srlm_fast.rundir import digest
from srlm_fast.trainer import checkpoints
from srlm_fast.trainer.storage import Writer

CASE = str(Path(__file__).with_name("recovery_case.py"))


def ranks(n: int, folder: Path, *cases: str, code: int = 0) -> str:
    """Runs cases on n ranks, of which one at least ends with this code; what they wrote to stderr."""
    (done,) = torchrun(CASE, str(folder), str(folder), *cases, n_ranks=n)
    assert (done.returncode == 0) == (code == 0), done.stderr[-4000:]
    assert not code or f"failed (exitcode: {code})" in done.stderr, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks leave that were stopped after four steps."""
    folder = tmp_path_factory.mktemp("recovery")
    ranks(2, folder, "undisturbed", "stop", "refuse")
    return folder


def read(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_same(ours: dict, theirs: dict) -> None:
    for part in ("weights", "moments"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), name


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_saved_by_two_ranks_loaded_by_four_three_and_one(folder):
    ranks(4, folder, "load")
    ranks(3, folder, "load")
    recovery_case.load(folder, folder, World())
    whole = dict(load_model(folder / "at-stop").named_parameters())
    for n in (1, 3, 4):
        found = read(folder, f"load-{n}")
        assert found["weights"].keys() == whole.keys()
        assert all(torch.equal(found["weights"][name], whole[name]) for name in whole)
        assert_same(found, read(folder, "load-1"))
        assert any(value.abs().max() > 0 for value in found["moments"].values())
    exported = [{file.name: file.read_bytes() for file in (folder / f"export-{n}").iterdir()} for n in (1, 3, 4)]
    assert exported[0] == exported[1] == exported[2] and len(exported[0]) > 4
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(folder / "export-4").eval()
    ids = list(range(2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(packed_logits(load_model(folder / "at-stop"), [ids])[0], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_killed_damaged_and_out_of_space(folder):
    """The resumed one starts from a checkpoint that was written while training went on, for the newest is damaged."""
    assert "SIGKILL" in ranks(2, folder, "kill", code=-9)
    assert (folder / "killed/.saving/__1_0.distcp").read_bytes() == b"half of it"
    (newest,) = (folder / "run/step-4").glob("__1_*.distcp")
    os.truncate(newest, newest.stat().st_size // 2)
    said = ranks(2, folder, "resume", "after_kill", "full_disk", code=2)
    (line,) = re.findall("^warning: .*", said, re.MULTILINE)
    assert re.match(r"warning: cannot resume from .*/step-4: .*; trying step-3, which is older$", line)
    for name in ("resume", "after_kill"):
        assert_same(read(folder, name), read(folder, "undisturbed"))
    (line,) = re.findall("^error: .*", said.partition("] failed (exitcode")[0], re.MULTILINE)
    assert "cannot write a training checkpoint below" in line and "File too large; older ones are as they were" in line
    assert [path.name for path in (folder / "full").iterdir()] == ["step-1"]
    made = build("dpo", dropout=0.1, changes=recovery_case.CHANGES, checkpoint_dir=folder / "full")
    assert made.checkpoints.resume(made.sharding) == (1, [])


# ------------------------------------------------------------------------------------------------------- one process


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A folder with the checkpoints of steps 2 and 3."""
    steps: list[dict] = []
    made = build(
        "sft",
        changes=recovery_case.CHANGES,
        checkpoint_dir=tmp_path,
        on_step=steps.append,
        should_stop=lambda: len(steps) == 2,
    )
    with pytest.raises(Interrupted, match="stopped after step 3 of 6"):
        made.fit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    return tmp_path


def resumed(folder: Path, **changes) -> dict[str, torch.Tensor]:
    made = build("sft", changes=recovery_case.CHANGES | changes, checkpoint_dir=folder)
    made.fit()
    return full_weights(made.model)


def poison(value: str) -> bytes:
    """A pickle that runs a command when it is loaded."""

    class Run:
        def __reduce__(self):
            return os.system, (value,)

    return pickle.dumps(Run())


def flip(file: Path) -> None:
    """One bit somewhere is another."""
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def point_outside(folder: Path) -> None:
    """The index names a file elsewhere, which is there."""
    index = (folder / ".metadata").read_bytes()
    shutil.copy(folder / "__0_0.distcp", folder.parent / "0.distcp")
    assert b"__0_0.distcp" in index
    (folder / ".metadata").write_bytes(index.replace(b"__0_0.distcp", b"..//0.distcp"))


DAMAGE = {
    "truncated data": lambda folder: os.truncate(folder / "__0_0.distcp", 5000),
    "a flipped bit": lambda folder: flip(folder / "__0_0.distcp"),
    "no data": lambda folder: (folder / "__0_0.distcp").unlink(),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "an index of other things": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])),
    "an index that runs commands": lambda folder: (folder / ".metadata").write_bytes(
        poison(f"touch {folder.parent}/ran")
    ),
    "an index of files elsewhere": point_outside,
    "no training.json": lambda folder: (folder / "training.json").unlink(),
    "half of training.json": lambda folder: (folder / "training.json").write_text('{"format": 1,'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(stopped, tmp_path, capsys, damage):
    expected = resumed(Path(shutil.copytree(stopped, tmp_path / "intact")))
    shutil.rmtree(tmp_path / "intact")
    assert not capsys.readouterr().err
    DAMAGE[damage](stopped / "step-3")
    ours = resumed(stopped)
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: cannot resume from .*/step-3: .+; trying step-2, which is older\n", said), said
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not (stopped / "ran").exists()
    assert sorted(path.name for path in stopped.glob("*step*")) == ["step-4", "step-5"]


def test_the_cause_behind_the_error_of_torchs_writer_is_told(tmp_path):
    """Of a disk that is full within a tensor it only says that it is not where it should be in its file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        written = Writer(None, background=False, pinned=False).begin({"x": torch.zeros(100_000)}, tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints._cause(written.exception()) == "File too large"


def test_values_that_run_commands_are_not_loaded(stopped):
    """What is no tensor lies in the data files as pickles."""
    import torch.distributed.checkpoint as dcp

    shutil.rmtree(stopped / "step-2")

    class Run:
        def __reduce__(self):
            return os.system, (f"touch {stopped}/ran",)

    made = build("sft", changes=recovery_case.CHANGES, checkpoint_dir=stopped)
    state = made.sharding.state()
    state["optimizer"]["param_groups"][0]["betas"] = Run()
    about = json.loads((stopped / "step-3/training.json").read_text())
    shutil.rmtree(stopped / "step-3")
    dcp.save(state, checkpoint_id=stopped / "step-3", no_dist=True)
    about["files"] = {file.name: digest(file) for file in (stopped / "step-3").glob("*.distcp")}
    (stopped / "step-3/training.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="cannot resume from .*step-3: .*; delete that folder"):
        made.fit()
    assert not (stopped / "ran").exists()


def test_another_format_and_another_training_are_refused(stopped):
    with pytest.raises(UserError, match=r"step-3 is a checkpoint of another training \(epochs: was 2, now 3\)"):
        resumed(stopped, epochs=3)
    with pytest.raises(UserError, match=r"another training \(items: was '.*', now '.*'\); restore what differs"):
        build("sft", changes=recovery_case.CHANGES, checkpoint_dir=stopped, n=23).fit()
    resumed(stopped, checkpoint_every=5, keep_last=1, checkpoint_in_background=False)
    assert [path.name for path in stopped.iterdir()] == ["step-5"]
    about = json.loads((stopped / "step-5/training.json").read_text())
    assert about["step"] == 5 and about["identity"]["loss"] == "sft" and "keep_last" not in about["identity"]
    (stopped / "step-5/training.json").write_text(json.dumps(about | {"format": 9}))
    with pytest.raises(UserError, match="step-5 is a checkpoint of format 9, this program reads 1"):
        resumed(stopped)


def test_save_by_leaves_time_for_a_step_and_a_save(tmp_path):
    """Whether to stop is asked with the longest step and save so far."""
    import time

    now = time.time()
    made = build("sft", changes=recovery_case.CHANGES, checkpoint_dir=tmp_path, save_by=now + 3600)
    assert not made._has_to_stop()
    made._longest_step, made.checkpoints.seconds = 600.0, 1200.0
    assert not made._has_to_stop()
    made.checkpoints.seconds = 2400.0
    assert made._has_to_stop()
    with pytest.raises(Interrupted, match="stopped after step 1 of 6"):
        made.fit()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
