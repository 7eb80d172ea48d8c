"""Shards: what a killed process leaves, and what the next one makes of it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from srlm_fast.errors import UserError
from srlm_fast.shards import Shard

IDS = ["a", "b", "c"]
ROWS = {name: {"id": name, "text": f"Grüße {name}\n", "x": 0.1 + i} for i, name in enumerate(IDS)}


def shard(folder, ids=IDS):
    return Shard(folder / "p/shard-00000.jsonl", ids, lambda row: row["id"])


def test_rows_in_any_order_give_one_file(tmp_path):
    one, other = shard(tmp_path / "one"), shard(tmp_path / "other")
    for name in "cab":
        one.add(ROWS[name])
    for name in "abc":
        other.add(ROWS[name])
    one.seal()
    other.seal()
    assert one.file.read_bytes() == other.file.read_bytes()
    assert [json.loads(line) for line in one.file.read_text().splitlines()] == list(ROWS.values())
    assert not one.part.exists()


@pytest.mark.parametrize("torn", [b'{"id": "b", "te', b'{"id": "b"', b"\x00\x00\n", b"3\n", "ü".encode()[:1]])
def test_a_torn_line_is_dropped_and_overwritten(tmp_path, torn):
    first = shard(tmp_path)
    first.add(ROWS["c"])
    with open(first.part, "ab") as file:
        file.write(torn)
    again = shard(tmp_path)
    assert again.missing == [0, 1]
    for name in "ab":
        again.add(ROWS[name])
    assert len(again.part.read_bytes().splitlines()) == 3
    assert shard(tmp_path).missing == []
    again.seal()
    assert [json.loads(line) for line in again.file.read_text().splitlines()] == list(ROWS.values())


def test_rows_of_other_ids_do_not_count(tmp_path):
    shard(tmp_path).add(ROWS["b"])
    assert shard(tmp_path, ["a", "c"]).missing == [0, 1]


def test_a_killed_process_loses_no_row_that_it_added(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from srlm_fast.shards import Shard
shard = Shard(Path({str(tmp_path)!r}) / "p/shard-00000.jsonl", {IDS!r}, lambda row: row["id"])
for row in {[ROWS["b"], ROWS["a"]]!r}:
    shard.add(row)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert shard(tmp_path).missing == [2]


def test_what_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "p").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot (read|write)"):
        shard(tmp_path).add(ROWS["a"])
