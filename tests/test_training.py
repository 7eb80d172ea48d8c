"""The parts of the training phases that need no run; the phases themselves run in test_iterate.py."""

import pytest

from srlm_fast.errors import UserError
from srlm_fast.packing import Item
from srlm_fast.pairs import FORMAT, make_pairs
from srlm_fast.phases.training import discard, pair_items
from srlm_fast.rundir import write_jsonl


def candidate(index, score):
    return {"index": index, "text": f"{index}", "token_ids": [index, 2], "finish_reason": "stop", "score": score}


def test_pairs_become_items_and_other_formats_are_refused(tmp_path):
    record = {
        "prompt_id": "p",
        "prompt": "q",
        "prompt_ids": [1, 5],
        "candidates": [candidate(7, 2.0), candidate(8, 4.0)],
    }
    rows, _ = make_pairs([record], weights_id="w")
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    assert pair_items(path) == [Item((1, 5), ((8, 2), (7, 2)))]
    for other in ({**rows[0], "format": FORMAT + 1}, {k: v for k, v in rows[0].items() if k != "format"}):
        write_jsonl(path, [rows[0], other])
        with pytest.raises(
            UserError, match=rf"pairs.jsonl:2: a pair of format .*, this program reads {FORMAT}; delete"
        ):
            pair_items(path)


def test_a_kill_while_checkpoints_are_deleted_leaves_none_that_looks_whole(tmp_path, monkeypatch):
    checkpoints = tmp_path / "m1"
    write_jsonl(checkpoints / "step-3/state", [])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda folder, ignore_errors: folder.exists() and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            discard(checkpoints)
    assert not checkpoints.exists()
    write_jsonl(checkpoints / "step-4/state", [])
    discard(checkpoints)
    assert list(tmp_path.iterdir()) == []
