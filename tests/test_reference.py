"""The reference cache: keyed by content, complete or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_case import make_items, make_model, make_reference

from srlm_fast import reference
from srlm_fast.errors import UserError
from srlm_fast.packing import Item
from srlm_fast.parallel import World
from srlm_fast.phases.training import rollout_logps
from srlm_fast.reference import ReferenceCache, compute, fill, response_keys


def test_round_trip_and_lookup_by_content(tmp_path):
    items = make_items(6, 2)
    cache = make_reference(items)
    cache.save(tmp_path / "reference.safetensors")
    read = ReferenceCache.read(tmp_path / "reference.safetensors")
    assert read.weights_id == "weights-0" and len(read) == 12
    shuffled = items[::-1]
    expected = cache.lookup(items).view(6, 2).flip(0).flatten()
    assert torch.equal(read.lookup(shuffled), expected)


def test_values_are_the_models():
    items = make_items(3, 2)
    one_by_one = [value for i in range(3) for _, value in compute(make_model(), items, "w", [[i]])]
    torch.testing.assert_close(make_reference(items).lookup(items), torch.tensor(one_by_one), atol=1e-5, rtol=0)


def test_other_weights_or_other_tokens_are_not_found():
    items = make_items(3, 2)
    cache = make_reference(items)
    with pytest.raises(UserError, match=r"lacks 1 of 3 items \(positions 1\)"):
        cache.lookup([items[0], Item(items[1].prompt, (items[1].responses[0], (1, 2, 3))), items[2]])
    cache.weights_id = "weights-1"
    with pytest.raises(UserError, match="weights weights-1 lacks 3 of 3"):
        cache.lookup(items)


def test_keys_tell_prompt_from_response():
    assert len({*response_keys("w", Item((1, 2), ((3,),))), *response_keys("w", Item((1,), ((2, 3),)))}) == 2


@pytest.mark.parametrize("damage", ["absent", "truncated", "foreign"])
def test_broken_files_are_refused(tmp_path, damage):
    path = tmp_path / "reference.safetensors"
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    elif damage == "truncated":
        make_reference(make_items(6, 2)).save(path)
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="reference cache"):
        ReferenceCache.read(path)


def test_model_mode_is_restored():
    model = make_model(dropout=0.5).train()
    items = make_items(2, 2)
    assert list(compute(model, items, "w", [[0, 1]])) == list(compute(model, items, "w", [[0, 1]]))
    assert model.training


def fill_into(folder, items, load_model=make_model, **arguments):
    return fill(folder, "weights-0", items, load_model, tokens_per_microbatch=60, world=World(), **arguments)


def no_model():
    raise AssertionError("nothing is missing, so no model is needed")


def test_filled_cache_is_complete_and_computed_once(tmp_path):
    items = make_items(12, 2)
    expected = make_reference(items).lookup(items)
    torch.testing.assert_close(fill_into(tmp_path, items[:5]).lookup(items[:5]), expected[:10], atol=1e-5, rtol=0)
    done = []
    cache = fill_into(tmp_path, items, progress=done.append)
    assert sum(done) == 7, "five are there already"
    torch.testing.assert_close(cache.lookup(items), expected, atol=1e-5, rtol=0)
    again = fill_into(tmp_path, items, no_model)
    assert torch.equal(again.lookup(items), cache.lookup(items))
    assert len(fill_into(tmp_path, items[3:5], no_model)) == 4, "only what was asked for"


@pytest.mark.parametrize("seconds_per_part", [0.0, 60.0])
def test_stopped_computation_goes_on(tmp_path, monkeypatch, seconds_per_part):
    """Nothing that was computed is lost, whenever the last part was written."""
    monkeypatch.setattr(reference, "SECONDS_PER_PART", seconds_per_part)
    items, done = make_items(12, 2), []

    def kill(n):
        done.append(n)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_into(tmp_path, items, progress=kill)
    missing = ReferenceCache.read_parts(tmp_path, "weights-0").missing(items)
    assert len(missing) == 12 - sum(done) > 0
    rest = []
    cache = fill_into(tmp_path, items, progress=rest.append)
    assert sum(rest) == len(missing)
    torch.testing.assert_close(cache.lookup(items), make_reference(items).lookup(items), atol=1e-5, rtol=0)


def test_parts_of_other_weights_are_passed_over_and_broken_ones_refused(tmp_path):
    items = make_items(4, 2)
    other = ReferenceCache("weights-1")
    other.update(compute(make_model(), items, "weights-1", [[0, 1, 2, 3]]))
    other.add_part(tmp_path)
    assert ReferenceCache.read_parts(tmp_path, "weights-0").missing(items) == [0, 1, 2, 3]
    assert ReferenceCache.read_parts(tmp_path, "weights-1").missing(items) == []
    (part,) = tmp_path.iterdir()
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"cannot read the reference cache {part}"):
        fill_into(tmp_path, items)


RANKS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from training_case import make_items, make_model
from srlm_fast.parallel import World, shard
from srlm_fast.reference import fill
world = World()
items = make_items(13, 2)
cache = fill(Path(sys.argv[1]), "weights-0", items, lambda: shard(make_model(), world), tokens_per_microbatch=60,
             world=world)
Path(sys.argv[1], f"rank-{world.rank}.txt").write_text(" ".join(map(str, cache.lookup(items).tolist())))
world.exit(0)
"""


@pytest.mark.distributed
def test_two_ranks_fill_one_folder(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    tests = {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [*launcher, str(tmp_path)], capture_output=True, text=True, timeout=120, env={**os.environ, **tests}
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.safetensors"))) == 2, "a part from each rank"
    items = make_items(13, 2)
    expected = make_reference(items).lookup(items)
    for rank in range(2):
        values = torch.tensor([float(v) for v in (tmp_path / f"rank-{rank}.txt").read_text().split()])
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


def pair_row(weights_id="w"):
    candidates = [
        {"index": 0, "token_ids": [4, 2], "logprob": -1.5},
        {"index": 1, "token_ids": [5], "logprob": -9.0},
        {"index": 2, "token_ids": [6, 7, 2], "logprob": -2.5},
    ]
    return {
        "prompt_ids": [1, 3],
        "chosen_index": 2,
        "rejected_index": 0,
        "weights_id": weights_id,
        "candidates": candidates,
    }


def test_rollout_takes_the_engines_log_probs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair_row()) + "\n")
    cache = rollout_logps(path, "w")
    assert cache.lookup([Item((1, 3), ((6, 7, 2), (4, 2)))]).tolist() == [-2.5, -1.5]
    with pytest.raises(UserError, match=r"pairs.jsonl.*1: an answer by weights w, not other"):
        rollout_logps(path, "other")
