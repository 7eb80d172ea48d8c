"""Guards: each against counts made for it, and in runs that truly trip them."""

import json
import math

import pytest
from test_methods import loop

from srlm_fast import guards
from srlm_fast.config import Config
from srlm_fast.errors import UserError


def findings(records: dict[str, dict], phase: str, **bounds: float | None) -> dict[str, float]:
    config = Config().guards
    for name, value in bounds.items():
        setattr(config, name, value)
    return {finding.guard: finding.value for finding in guards.check(phase, records.get, config)}


def test_scores():
    records = {"m1/candidates": {"scores": {"4": 81, "5": 19}, "mean_tokens": 10.0}}
    assert findings(records, "m1/candidates") == {"score_share": 0.81}
    assert findings(records, "m1/candidates", score_share=0.81) == {}
    entropy = -(0.81 * math.log2(0.81) + 0.19 * math.log2(0.19))
    found = findings(records, "m1/candidates", score_share=None, score_entropy=0.8)
    assert found == {"score_entropy": pytest.approx(entropy, abs=1e-4)}
    assert findings({"m1/candidates": {"scores": {}, "mean_tokens": None}}, "m1/candidates", score_entropy=9) == {}


def test_lengths_of_held_out_answers_or_else_of_candidates():
    records = {"m1/evaluate": {"answer_tokens": 10.0}, "m2/evaluate": {"answer_tokens": 15.1}}
    assert findings(records, "m2/evaluate") == {"length_ratio": 1.51}
    assert findings(records, "m1/evaluate") == {}, "nothing before M1"
    candidates = {f"m{t}/candidates": {"scores": {}, "mean_tokens": tokens} for t, tokens in ((1, 10.0), (2, 16.0))}
    assert findings(records | candidates, "m2/candidates") == {}, "measured on held-out answers already"
    assert findings(candidates, "m2/candidates") == {"length_ratio": 1.6}


def test_a_slow_fall_of_the_judge_is_seen():
    records = {f"m{t}/evaluate": {"judge_pairwise": value} for t, value in enumerate((0.8, 0.83, 0.8, 0.77), 1)}
    assert [findings(records, f"m{t}/evaluate") for t in (1, 2, 3)] == [{}, {}, {}]
    assert findings(records, "m4/evaluate") == {"judge_drop": 0.06}


def test_chosen_log_probs():
    assert findings({"m2/train": {"chosen_fall": 10.5}}, "m2/train") == {"chosen_fall": 10.5}
    assert findings({"m2/train": {"chosen_fall": 9.5}}, "m2/train") == {}
    assert findings({"m1/train": {"last_loss": 1.0}}, "m1/train") == {}, "SFT has no chosen responses"


def metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_broken_model_trips_every_guard(tmp_path, capsys):
    """A learning rate a thousand times too high: answers run to the limit, judgements fall apart."""
    broken = ("iterations=1", "dpo.lr=1.0", "dpo.min_lr=1.0", "guards.score_share=0.2", "guards.score_entropy=2.5")
    run = loop(tmp_path / "run", *broken)
    said = capsys.readouterr().out
    found = {row["phase"]: row["guards"] for row in metrics(run.run_dir.path) if "guards" in row}
    assert found.keys() == {"m1/candidates", "m2/train", "m2/evaluate"}
    assert found["m1/candidates"].keys() == {"score_share", "score_entropy"}
    assert found["m2/train"]["chosen_fall"] > 10
    assert found["m2/evaluate"]["length_ratio"] > 1.5 and found["m2/evaluate"]["judge_drop"] > 0.05
    for guard in ("score_share", "score_entropy", "length_ratio", "judge_drop", "chosen_fall"):
        assert f"warning: guards.{guard}: " in said
    rows = {row["model"]: row["guards"] for row in json.loads((run.run_dir / "summary.json").read_text())}
    assert rows["SFT"] is None and rows["M2"].split(", ") == ["chosen_fall", "length_ratio", "judge_drop"]
    tail = [row for row in metrics(run.run_dir.path) if row["phase"] == "m2/train" and "rewards/chosen" in row]
    assert found["m2/train"]["chosen_fall"] == pytest.approx(-tail[-1]["rewards/chosen"] / 0.1, abs=1e-3)


@pytest.mark.slow
def test_stop_keeps_the_phase_and_a_changed_bound_goes_on(tmp_path):
    run_dir, small = tmp_path / "run", ("iterations=1", "guards.action=stop")
    for _ in range(2):  # the same command stops at the same place, and does nothing again
        with pytest.raises(UserError, match=r"stopped behind m1/candidates.*guards.score_share: .*guards.action=warn"):
            loop(run_dir, *small, "guards.score_share=0.2")
        assert (run_dir / "phases/m1/candidates.json").exists() and not (run_dir / "phases/m1/pairs.json").exists()
    shards = {path: path.stat().st_mtime_ns for path in run_dir.glob("m1/candidates/*")}
    loop(run_dir, *small)
    assert (run_dir / "summary.json").exists()
    assert shards == {path: path.stat().st_mtime_ns for path in run_dir.glob("m1/candidates/*")}
    assert len([row for row in metrics(run_dir) if "guards" in row]) == 1
