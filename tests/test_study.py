"""A study: arms, resuming, statistics, and the paper's result in its smallest form, with bounds that can fail."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from srlm_fast.config import walk
from srlm_fast.errors import UserError
from srlm_fast.study import report
from srlm_fast.study.arms import Study, run_folder
from srlm_fast.study.statistics import difference, estimate

ROOT = Path(__file__).resolve().parents[1]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_the_papers_study_is_of_all_its_ablations():
    study = Study.read(ROOT / "configs/miniature.yaml")
    assert len(study.seeds) == 5 and study.arms[0].name == "paper"
    base = dict((name, value) for name, _, value in walk(study.configuration(study.arms[0], 0, Path("runs"))))
    changed = {}
    for arm in study.arms[1:]:
        mine = {name: value for name, _, value in walk(study.configuration(arm, 0, Path("runs")))}
        changed[arm.name] = {k: v for k, v in mine.items() if v != base[k] and k not in ("run_dir", "iterations")}
    assert all(len(keys) == 1 for keys in changed.values())
    values = {(key, value) for keys in changed.values() for key, value in keys.items() if key != "judge.template"}
    assert values == {
        ("eft.enabled", False),
        ("learn_from", "positives"),
        *(("judge.n", n) for n in (1, 5)),
        *(("candidates.n", n) for n in (2, 8)),
    }
    assert "Explain" not in Path(changed["score-only"]["judge.template"]).read_text()


def test_jobs_begin_with_the_first_arm_and_then_go_seed_by_seed(tmp_path):
    arms = "{a: {says: x, set: {}}, b: {says: y, set: {judge.n: 2}}, c: {says: z, set: {iterations: 1}}}"
    study = Study.read(written(tmp_path, f"config: {ROOT}/configs/tiny.yaml\nseeds: [4, 7]\narms: {arms}"))
    jobs = [(arm.name, seed) for arm, seed in study.jobs()]
    assert jobs == [("a", 4), ("a", 7), ("b", 4), ("c", 4), ("b", 7), ("c", 7)]
    config = study.configuration(study.arm("b"), 7, tmp_path)
    assert (config.judge.n, config.seed, config.run_dir) == (2, 7, str(tmp_path / "b-7"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds: [0]", "must hold config, seeds and arms"),
        ("config: {tiny}\nseeds: 3\narms: {{a: {{says: x, set: {{}}}}}}", "seeds is 3"),
        ("config: {tiny}\nseeds: [0]\narms: {{}}", "arms is empty"),
        ("config: {tiny}\nseeds: [0]\narms: {{a: {{set: {{}}}}}}", "arm a must hold says"),
        ("config: {tiny}\nseeds: [0]\narms: {{a: {{says: x, set: {{judge.m: 2}}}}}}", "arm a: .*unknown key 'judge.m'"),
        ("config: nowhere.yaml\nseeds: [0]\narms: {{a: {{says: x, set: {{}}}}}}", "arm a: cannot read .*nowhere.yaml"),
        ("arms: [", "cannot read the study"),
    ],
)
def test_a_bad_study_is_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        Study.read(written(tmp_path, text.format(tiny=ROOT / "configs/tiny.yaml")))


def test_intervals_are_those_of_scipy():
    values = [0.31, 0.42, 0.28, 0.39, 0.35]
    found = estimate([*values, None])
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half, found.n) == pytest.approx((low, high, 5))
    assert estimate([None]) is None and np.isnan(estimate([1.0]).half)


def test_differences_are_within_seeds():
    old = {0: 1.0, 1: 2.0, 2: 3.0}
    found = difference({0: 1.5, 1: 2.4, 2: 3.6, 9: 100.0}, old)
    expected = estimate([0.5, 0.4, 0.6])
    assert (found.mean, found.half, found.n) == pytest.approx((expected.mean, expected.half, 3)) and found.clear
    assert not difference({0: 2.0, 1: 1.0, 2: 3.1}, old).clear


SMALL = """\
config: {tiny}
seeds: [{seeds}]
arms:
  paper: {{says: the recipe, set: {{iterations: 1, prompts.count: 200, evaluate.bootstrap: 20}}}}
"""


def paper(path: Path, tmp_path: Path) -> str:
    script = [sys.executable, str(ROOT / "scripts/paper.py"), "--study", str(path)]
    done = subprocess.run(
        [*script, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "page/small.md")],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_papers_result_in_its_smallest_form(tmp_path):
    """EFT makes the judge better, one round of its own judgements the answers; a second seed adds to the first."""
    tiny = ROOT / "configs/tiny.yaml"
    assert "0 of 1 runs done" in paper(written(tmp_path, SMALL.format(tiny=tiny, seeds="0")), tmp_path)
    first = (tmp_path / "runs/paper-0/study.json").stat().st_mtime_ns
    path = written(tmp_path, SMALL.format(tiny=tiny, seeds="0, 1"))
    assert "1 of 2 runs done" in paper(path, tmp_path)
    assert (tmp_path / "runs/paper-0/study.json").stat().st_mtime_ns == first

    runs = json.loads((tmp_path / "page/small.json").read_text())["paper"]
    assert [run["seed"] for run in runs] == [0, 1]
    judged = {
        name: np.mean([run["models"][name]["judge_truth"]["pairwise_accuracy"] for run in runs]) for name in MODELS
    }
    quality = {name: np.mean([run["models"][name]["true_quality"] for run in runs]) for name in MODELS}
    assert judged["m1"] > judged["sft"] + 0.04 and judged["m2"] > judged["sft"]
    assert abs(quality["m1"] - quality["sft"]) < 0.25
    assert quality["m2"] > quality["m1"] + 0.1
    wins = np.mean([[run["wins"]["m2/m1"]["truth"][name] for name in ("win", "loss")] for run in runs], axis=0)
    assert wins[0] > wins[1] + 0.03
    assert all(run["rounds"]["m1"]["right"] > 0.8 for run in runs)

    page = (tmp_path / "page/small.md").read_text()
    assert f"{quality['m2']:.2f} ±" in page and "NaN" not in page and "nan" not in page
    for name in re.findall(r"\]\((.*?\.svg)\)", page):
        assert (tmp_path / "page" / name).stat().st_size > 1000
    with pytest.raises(UserError, match="no finished run"):
        report.write(Study.read(path), tmp_path / "elsewhere", tmp_path / "page/none.md")
    assert run_folder(tmp_path / "runs", Study.read(path).arms[0], 1).is_dir()


MODELS = ("sft", "m1", "m2")
