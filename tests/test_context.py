"""What a run refuses before any work starts, and what its phases share."""

import json
import os
import shutil
from pathlib import Path

import pytest

from srlm_fast.config import input_paths, load_config
from srlm_fast.context import Context
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.kernels import library
from srlm_fast.parallel import World

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs/tiny"


def context(tmp_path: Path, *overrides: str) -> Context:
    return Context(load_config(ROOT / "configs/tiny.yaml", [f"run_dir={tmp_path / 'run'}", *overrides]), World())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["dpo.loss=sft"], "dpo.loss=sft does not compare pairs"),
        (["sft.loss=dpo"], "sft.loss=dpo compares pairs"),
        (["dpo.loss=dpoo"], "unknown loss 'dpoo'; did you mean 'dpo'"),
        (
            ["dpo.loss=simpo", "dpo.loss_options={gama: 1}"],
            "unknown option 'gama' of loss 'simpo'; did you mean 'gamma'",
        ),
        (["dpo.loss=kto"], "dpo.loss=kto does not compare pairs"),
        (["sft.loss=kto"], "sft.loss=kto needs labels"),
        (["dpo.loss=cream"], "dpo.loss=cream reads labels: choose how they are made by pairs.labels"),
        (["prompts.generator=bas"], "prompts.generator='bas' is none of base, sft, current and no model folder"),
        (["prompts.shots_template=tiny.txt"], "task-list template has no place {tasks}"),
        (["judge.template=tiny.txt"], "judge template has no place"),
        (["evaluate.prompts=tiny.txt"], "tiny.txt:1: broken JSON"),
        (["evaluate.prompts=empty.jsonl"], "empty.jsonl: no usable row"),
        (["model.path=config_only"], "model.path: no safetensors in .*config_only; .*model.random_init=true"),
        (["model.path=truncated"], "truncated/model.safetensors: cannot be read as safetensors, truncated or damaged"),
        (["prompts.generator=truncated"], "truncated/model.safetensors: cannot be read as safetensors"),
        (["prompts.generator=short"], "prompts.generator=short has max_position_embeddings=100, below"),
        (["engine.tensor_parallel=2"], "engine.tensor_parallel=2: the native engine has the whole model in"),
        (["engine.name=vllm", "prompts.generator=wide"], "prompts.generator=wide has another shape than model.path"),
    ],
)
def test_what_could_only_fail_later_is_refused_at_once(tmp_path, monkeypatch, overrides, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.txt").write_text("no place")
    (tmp_path / "empty.jsonl").write_text("")
    for name, changes in (
        ("config_only", {}),
        ("short", {"max_position_embeddings": 100}),
        ("wide", {"hidden_size": 256}),
    ):
        (tmp_path / name).mkdir()
        shutil.copy(TINY / "tokenizer.model", tmp_path / name)
        hf = {**json.loads((TINY / "config.json").read_text()), **changes}
        (tmp_path / name / "config.json").write_text(json.dumps(hf))
    shutil.copytree(TINY, tmp_path / "truncated")
    os.truncate(tmp_path / "truncated/model.safetensors", 100_000)
    with pytest.raises(UserError, match=says):
        context(tmp_path, *overrides)
    assert not (tmp_path / "run").exists()


def test_kernels_are_chosen_by_the_configuration(tmp_path):
    with library.using("fused"):
        context(tmp_path, "kernels=reference")
        assert not library.fused()
        context(tmp_path)
        assert library.fused()
    with pytest.raises(UserError, match="kernels='fussed': must be one of fused, reference"):
        context(tmp_path, "kernels=fussed")


def test_the_generator_of_new_prompts(tmp_path):
    models = tmp_path / "run/models"
    assert context(tmp_path).generator(2) == TINY, "M0 by default"
    assert context(tmp_path, "prompts.generator=sft").generator(2) == models / "sft"
    assert context(tmp_path, "prompts.generator=current").generator(2) == models / "m2"
    other = context(tmp_path, f"prompts.generator={TINY}")
    assert other.generator(2) == TINY and input_paths(other.config)["prompts.generator"] == [TINY]


def test_without_held_out_prompts(tmp_path):
    assert len(context(tmp_path).held_out) > 100
    assert context(tmp_path, "evaluate.prompts=none").held_out == []


def test_shards_are_resumed_and_empty_input_has_none(tmp_path):
    run = context(tmp_path, "candidates.shard_size=2")
    worked = []

    def work(rows):
        worked.append([row["id"] for row in rows])
        return ({"prompt_id": row["id"], "twice": 2 * row["id"]} for row in reversed(rows))

    rows = [{"id": name} for name in "abcde"]
    files = run.shards("x", rows, work)
    assert [file.name for file in files] == ["shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl"]
    assert worked == [["a", "b"], ["c", "d"], ["e"]]
    files[1].unlink()
    assert run.shards("x", rows, work) == files and worked[3:] == [["c", "d"]]
    assert run.rows("x/shard-00001.jsonl") == [{"prompt_id": "c", "twice": "cc"}, {"prompt_id": "d", "twice": "dd"}]
    assert run.shards("y", [], work) == []


def test_shards_may_overlap(tmp_path):
    run = context(tmp_path, "candidates.shard_size=2")
    rows = [{"id": name} for name in "abcde"]

    def work(parts):
        first, second = next(parts), next(parts)
        yield first[0]
        yield from second
        assert (run.run_dir / "x/shard-00001.jsonl").exists(), "sealed when its last row is there"
        assert not (run.run_dir / "x/shard-00000.jsonl").exists()
        yield from next(parts)
        yield first[1]

    files = run.overlapping_shards("x", rows, work)
    assert [run.rows(f"x/{file.name}") for file in files] == [rows[:2], rows[2:4], rows[4:]]
    assert sorted(files[0].parent.iterdir()) == files, "no parts are left"


def test_finished_rows_of_a_stopped_shard_are_kept(tmp_path):
    run = context(tmp_path, "candidates.shard_size=4")
    worked = []

    def work(rows):
        for row in rows[::-1]:
            worked.append(row["id"])
            run.stopping = len(worked) == 2
            yield row

    rows = [{"id": name} for name in "abcd"]
    with pytest.raises(Interrupted):
        run.shards("x", rows, work)
    [file] = run.shards("x", rows, work)
    assert worked == ["d", "c", "b", "a"]
    assert run.rows("x/shard-00000.jsonl") == rows and list(file.parent.iterdir()) == [file]
