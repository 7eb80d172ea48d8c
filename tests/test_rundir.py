"""The run folder: atomic files, verified phases, refusals."""

import json
import os
from pathlib import Path

import pytest

from srlm_fast.errors import UserError
from srlm_fast.rundir import RunDir, atomic_file, fingerprint, write_json, write_jsonl


def test_atomic_file_keeps_the_old_content_on_failure(tmp_path):
    path = tmp_path / "a/b.json"
    write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write("half of")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1}
    assert os.listdir(path.parent) == ["b.json"]


def test_full_disk_is_one_clear_message():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux's /dev/full")
    with pytest.raises(UserError, match="cannot write .*full.*No space left"):
        with atomic_file_on("/dev/full") as file:
            file.write("x" * 100000)


def atomic_file_on(device):
    """atomic_file whose temporary file is a device that is always full."""
    import pathlib

    class Full(type(pathlib.Path())):
        def with_name(self, name):
            return Full(device) if name.endswith(".tmp") else super().with_name(name)

        def unlink(self, missing_ok=False):
            pass

    return atomic_file(Full(device + "-target"))


def test_a_folder_below_a_file_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*run.json: Not a directory"):
        write_json(tmp_path / "file/run/run.json", {})


def test_phase_is_done_only_while_its_files_are_intact(tmp_path):
    run = RunDir(tmp_path / "run")
    run.open({"seed": 1}, {})
    out = run / "m1/pairs.jsonl"
    write_jsonl(out, [{"a": 1}, {"a": 2}])
    assert run.phase("m1/pairs") is None
    run.finish("m1/pairs", [out], 1.5, {"pairs": 2})
    record = run.phase("m1/pairs")
    assert record["counts"] == {"pairs": 2} and record["outputs"]["m1/pairs.jsonl"]["bytes"] == out.stat().st_size
    changed = out.read_text().replace("2", "3")
    out.write_text(changed)
    assert run.phase("m1/pairs") is None
    out.unlink()
    assert run.phase("m1/pairs") is None


def test_shards_that_changed_are_made_again(tmp_path):
    run = RunDir(tmp_path / "run")
    run.open({}, {})
    shards = [run / f"m1/candidates/shard-0000{i}.jsonl" for i in range(3)]
    for shard in shards:
        write_jsonl(shard, [{"a": 1}])
    run.discard_changed("m1/candidates")
    run.finish("m1/candidates", shards, 1.0, {})
    shards[1].write_text('{"a": 2}\n')
    assert run.phase("m1/candidates") is None
    run.discard_changed("m1/candidates")
    assert [shard.exists() for shard in shards] == [True, False, True]


def test_what_a_killed_process_left_is_no_output_and_no_obstacle(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run / ".run.json.123.tmp").write_text("{")
    run.open({}, {})
    write_jsonl(run / "data/ift.jsonl", [])
    (run / "data/.ift.jsonl.123.tmp").write_text("{")
    run.finish("prepare", [run / "data"], 1.0, {})
    assert list(run.phase("prepare")["outputs"]) == ["data/ift.jsonl"]


def test_a_run_is_worked_on_by_one_process_at_a_time(tmp_path):
    one, other = RunDir(tmp_path), RunDir(tmp_path)
    one.lock()
    with pytest.raises(UserError, match="another process works in"):
        other.lock()
    one.unlock()
    other.lock()
    other.unlock()


def test_metrics_that_are_not_finite_are_null(tmp_path):
    RunDir(tmp_path).log({"phase": "x", "loss": float("nan"), "norm": float("inf"), "lr": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"phase": "x", "loss": null, "norm": null, "lr": 0.5}\n'


def test_metrics_that_cannot_be_written_are_a_user_error(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
        run.log({"phase": "x"})


def test_reopening_with_other_keys_or_inputs_names_them(tmp_path):
    run = RunDir(tmp_path)
    run.open({"seed": 1, "dpo.lr": 0.1}, {"model.path": "abc"})
    run.open({"seed": 1, "dpo.lr": 0.1}, {"model.path": "abc"})
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/ift.jsonl", [])
    with pytest.raises(UserError, match=r"other keys \(dpo.lr: was 0.1, now 0.2\)"):
        run.open({"seed": 1, "dpo.lr": 0.2}, {"model.path": "abc"})
    with pytest.raises(UserError, match=r"other inputs \(model.path"):
        run.open({"seed": 1, "dpo.lr": 0.1}, {"model.path": "abd"})


def test_a_run_that_made_nothing_takes_other_keys_unless_it_is_worked_on(tmp_path):
    run, other = RunDir(tmp_path), RunDir(tmp_path)
    run.open({"seed": 1}, {"data": "wrong"})
    run.lock()
    run.set_state("running")
    with pytest.raises(UserError, match="another process works in"):
        other.open({"seed": 1}, {"data": "mended"})
    run.open({"seed": 1}, {"data": "wrong"})
    run.unlock()
    other.open({"seed": 1}, {"data": "mended"})
    other.open({"seed": 1}, {"data": "mended"})
    other.log({"phase": "x"})
    with pytest.raises(UserError, match=r"other inputs \(data: was 'mended', now 'wrong'"):
        run.open({"seed": 1}, {"data": "wrong"})


def test_foreign_folders_and_broken_or_newer_records_are_refused(tmp_path):
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run.json"):
        RunDir(tmp_path).open({}, {})
    (tmp_path / "run.json").write_text('{"format_')
    with pytest.raises(UserError, match="cannot read .*run.json"):
        RunDir(tmp_path).open({}, {})
    (tmp_path / "run.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format version 99"):
        RunDir(tmp_path).open({}, {})
    with pytest.raises(UserError, match="thesis.doc is no folder"):
        RunDir(tmp_path / "thesis.doc").open({}, {})


def test_fingerprint_is_of_content(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w").write_bytes(b"123")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b/w").write_bytes(b"124")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(65 << 20)
    before = fingerprint(big)
    with open(big, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert fingerprint(big) != before


def test_fingerprint_of_an_unreadable_file_is_a_user_error():
    unreadable = Path("/proc/self/mem")
    if not unreadable.exists():
        pytest.skip("needs Linux's /proc")
    with pytest.raises(UserError, match="cannot read /proc/self/mem"):
        fingerprint(unreadable)
