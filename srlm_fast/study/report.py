"""The page of a study: tables and plots of what its finished runs have measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from srlm_fast.errors import UserError
from srlm_fast.rundir import atomic_file
from srlm_fast.study import figures
from srlm_fast.study.arms import Study, run_folder
from srlm_fast.study.measure import read
from srlm_fast.study.statistics import Estimate, difference, estimate

Run = dict[str, Any]
JUDGE_COLUMNS = {
    "pairwise_accuracy": "pairwise",
    "five_best": "5-best",
    "exact_match": "exact",
    "spearman": "Spearman",
    "kendall": "Kendall",
    "tie_rate": "ties",
}
PAPER = {
    "m1/sft": (30.5, 38.7, 30.9),
    "m2/m1": (55.5, 32.8, 11.7),
    "m3/m2": (47.7, 39.8, 12.5),
    "m2/sft": (49.2, 36.3, 14.5),
    "m3/sft": (62.5, 27.7, 9.8),
    "m3/m1": (68.8, 22.7, 8.6),
}
"""Win, tie and loss of arXiv 2401.10020, figure 3, by GPT-4, in percent."""
PAPER_PAIRWISE = {"sft": 0.651, "m1": 0.787, "m2": 0.804, "m3": 0.817}
"""Pairwise accuracy of table 4 there."""


def check() -> None:
    """Raises UserError now when the page cannot be made later."""
    figures.pyplot()


def write(study: Study, root: Path, path: Path) -> None:
    """Writes the page, its plots (NAME-*.svg) and what all are made of (NAME.json) beside it.

    Raises:
        UserError: when no run of the first arm is finished.
    """
    runs = {
        arm.name: {seed: run for seed in study.seeds if (run := read(run_folder(root, arm, seed)))}
        for arm in study.arms
    }
    first = runs[study.arms[0].name]
    if not first:
        raise UserError(f"{root} holds no finished run of {study.arms[0].name}; run the study first")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(
        (*_head(study, runs), _claims(first), *_models(first, path), *_arms(study, runs, path), *_costs(runs))
    )
    with atomic_file(path.with_suffix(".json")) as file:
        json.dump({name: list(of_arm.values()) for name, of_arm in runs.items()}, file, separators=(",", ":"))
        file.write("\n")
    with atomic_file(path) as file:
        file.write(f"{text}\n")
    print(f"{path}: {sum(map(len, runs.values()))} of {len(study.arms) * len(study.seeds)} runs", flush=True)


def _head(study: Study, runs: dict[str, dict[int, Run]]) -> Iterable[str]:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scipy", "matplotlib")
    )
    yield f"# {study.path.stem.capitalize()}: SFT, M1, M2, M3 and the ablations"
    yield (
        f"Made by `python scripts/paper.py` from `configs/{study.path.name}` (seeds "
        f"{', '.join(map(str, study.seeds))}); Python {platform.python_version()}, {versions}, one thread a run. "
        "Means over seeds; ± is half a 95 % interval over seeds (Student's t), so it holds the draw of the data split, "
        "of prompts and answers and of the order of training, but not of the seed model, which is one. The world, its "
        "exact measure of quality (0 to 5) and what it can and cannot tell are explained in the README. Every value "
        f"behind this page is in `{study.path.stem}.json`."
    )
    missing = [
        f"{arm.name} (seeds {', '.join(str(seed) for seed in study.seeds if seed not in runs[arm.name])})"
        for arm in study.arms
        if len(runs[arm.name]) < len(study.seeds)
    ]
    if missing:
        yield f"**Not finished yet:** {'; '.join(missing)}."


def _claims(first: dict[int, Run]) -> str:
    """What the paper says, and whether it is so here."""

    def more(value: Callable[[Run, str], float], new: str, old: str) -> Estimate:
        return estimate([value(run, new) - value(run, old) for run in first.values()])

    def row(says: str, found: Estimate, text: str, *, better: bool = True) -> list[str]:
        if better:
            verdict = "yes" if found.clear and found.mean > 0 else "no" if found.clear else "not clear"
        else:
            verdict = "no" if found.clear and found.mean < 0 else "yes"
        return [says, verdict, text]

    rows = []
    steps = [("m1", "sft"), ("m2", "m1"), ("m3", "m2"), ("m3", "sft")]
    for new, old in steps:
        if new in next(iter(first.values()))["models"]:
            found = more(_quality, new, old)
            name = f"{new.upper()} answers {'no worse' if new == 'm1' else 'better'} than {old.upper()}"
            rows.append(row(name, found, f"quality {_shown(found, 2, sign=True)}", better=new != "m1"))
    for new, old in steps:
        if new in next(iter(first.values()))["models"]:
            found = more(_judged, new, old)
            name = f"{new.upper()} judges better than {old.upper()}"
            rows.append(row(name, found, f"pairwise accuracy {_percent(found, sign=True, unit='points')}"))
    return (
        "## In short\n\nDifferences within a seed. *yes*: the interval lies on that side of zero, *not clear*: it "
        "holds zero; *no worse* is denied only by an interval below zero.\n\n"
        + _table(["the paper", "here", "by"], rows)
    )


def _models(first: dict[int, Run], path: Path) -> Iterable[str]:
    """The first arm, model by model."""
    names = list(next(iter(first.values()))["models"])

    def over_seeds(name: str, *keys: str) -> list[float | None]:
        return [_dig(run["models"][name], *keys) for run in first.values()]

    def series(*keys: str) -> figures.Series:
        return {name: (estimate(over_seeds(name, *keys)), over_seeds(name, *keys)) for name in names}

    human = estimate([run["human_quality"] for run in first.values()])
    m0 = estimate([run["m0_quality"] for run in first.values()])
    panels = {
        "true quality of answers": (series("true_quality"), {"best human replies": human.mean, "M0": m0.mean}),
        "judge: pairwise accuracy": (series("judge_truth", "pairwise_accuracy"), {}),
        "characters of an answer": (series("answer_characters"), {}),
    }
    figures.models(path.with_name(f"{path.stem}-models.svg"), panels)
    yield "## The models"
    yield f"![Quality, judge and length by model]({path.stem}-models.svg)"
    rows = [
        [
            name.upper(),
            _shown(estimate(over_seeds(name, "true_quality")), 2),
            _shown(estimate(over_seeds(name, "answer_characters")), 1),
            _percent(estimate(over_seeds(name, "answers_truncated"))),
        ]
        for name in names
    ]
    yield _table(["model", "true quality", "characters", "cut off"], rows)
    yield (
        f"M0, prompted as in its pretraining, answers with a quality of {_shown(m0, 2)}; the best human replies, which "
        f"IFT consists of, have {_shown(human, 2)}."
    )
    yield "### Head to head"
    yield (
        "Shares of held-out prompts at which the model's answer is better, as good, or worse: by the exact scores (4 "
        "answers a prompt), and by the scores that the run's own last model gives them (the first answer; the mean of "
        "its judgements, one answer at a time, so there is no order to prefer). The last column is the paper's, by "
        "GPT-4."
    )
    yield _table(["", "exact: win", "tie", "loss", "own judge: win", "tie", "loss", "paper"], list(_wins(first)))
    for which, against in (("judge", "the human ranks"), ("judge_truth", "the exact scores")):
        yield f"### The judge against {against}"
        yield _table(
            ["model", *JUDGE_COLUMNS.values(), "unparsable", *(["paper: pairwise"] if which == "judge" else [])],
            [
                [
                    name.upper(),
                    *(
                        _shown(estimate(over_seeds(name, which, key)), 2)
                        if key in ("spearman", "kendall")
                        else _percent(estimate(over_seeds(name, which, key)))
                        for key in JUDGE_COLUMNS
                    ),
                    _percent(estimate(over_seeds(name, "unparsable_judgements"))),
                    *([f"{100 * PAPER_PAIRWISE[name]:.1f} %"] if which == "judge" and name in PAPER_PAIRWISE else []),
                ]
                for name in names
            ],
        )
    yield "### The rounds"
    yield _rounds(first)
    shares = {f"answers of {t.upper()}": _scores(first, t) for t in next(iter(first.values()))["rounds"]}
    figures.histograms(path.with_name(f"{path.stem}-scores.svg"), shares)
    yield f"![Scores that a model gives its own answers]({path.stem}-scores.svg)"


def _wins(runs: dict[int, Run]) -> Iterable[list[str]]:
    for pair in PAPER:
        found = [run["wins"][pair] for run in runs.values() if pair in run["wins"]]
        if found:
            new, _, old = pair.partition("/")
            cells = [
                _percent(estimate([run.get(judge, {}).get(result) for run in found]))
                for judge in ("truth", "own")
                for result in ("win", "tie", "loss")
            ]
            yield [f"{new.upper()} against {old.upper()}", *cells, " / ".join(f"{share:g}" for share in PAPER[pair])]


def _rounds(runs: dict[int, Run]) -> str:
    names = list(next(iter(runs.values()))["rounds"])

    def of(name: str, *keys: str) -> Estimate | None:
        return estimate([_dig(run["rounds"].get(name, {}), *keys) for run in runs.values()])

    return _table(
        ["made by", "pairs of 100 prompts", "right", "mean score given", "unparsable", "tokens of an answer"],
        [
            [
                name.upper(),
                _shown(_yield(runs, name), 1),
                _percent(of(name, "right")),
                _shown(of(name, "candidates", "mean_score"), 2),
                _percent(of(name, "candidates", "unparsable")),
                _shown(of(name, "candidates", "mean_tokens"), 1),
            ]
            for name in names
        ],
    )


def _arms(study: Study, runs: dict[str, dict[int, Run]], path: Path) -> Iterable[str]:
    """The other arms beside the first, at M2 and the seeds that both have."""
    first = runs[study.arms[0].name]
    others = [arm for arm in study.arms[1:] if runs[arm.name]]
    if not others:
        return
    yield "## Ablations"
    yield (
        "One round (M1 to M2) with one thing changed. Differences are within a seed: those runs share the data and "
        "every phase before the change. *Clear* differences, whose interval leaves out zero, are bold."
    )
    rows, quality, judge = [], {}, {}
    for arm in (study.arms[0], *others):
        mine = runs[arm.name]
        better = _paired(mine, first, lambda run: run["models"]["m2"]["true_quality"])
        surer = _paired(mine, first, lambda run: _judged(run, "m1"))
        if arm in others:
            quality[arm.name], judge[arm.name] = better, surer
        rows.append(
            [
                f"{arm.name}: {arm.says}",
                str(len(mine)),
                _shown(estimate([run["models"]["m1"]["true_quality"] for run in mine.values()]), 2),
                _shown(estimate([run["models"]["m2"]["true_quality"] for run in mine.values()]), 2),
                _clear(better, _shown(better, 2, sign=True)) if arm in others else "",
                _percent(estimate([_judged(run, "m1") for run in mine.values()])),
                _percent(estimate([_judged(run, "m2") for run in mine.values()])),
                _shown(_yield(mine, "m1"), 1),
                _percent(estimate([run["rounds"]["m1"]["right"] for run in mine.values()])),
                _percent(estimate([run["models"]["m1"]["unparsable_judgements"] for run in mine.values()])),
            ]
        )
    columns = ["arm", "seeds", "M1", "M2", "M2 - M2 of the first", "judge M1", "judge M2"]
    yield _table([*columns, "pairs of 100 prompts", "right", "unparsable (M1)"], rows)
    figures.bars(
        path.with_name(f"{path.stem}-ablations.svg"),
        {"true quality of M2, difference": quality, "pairwise accuracy of M1, difference": judge},
    )
    yield f"![Differences to the first arm]({path.stem}-ablations.svg)"
    longer = [arm for arm in others if any("m3" in run["models"] for run in runs[arm.name].values())]
    for arm in longer:
        yield f"### {arm.name}: {arm.says}, every round"
        mine = runs[arm.name]
        names = list(next(iter(mine.values()))["models"])
        yield _table(
            ["model", "true quality", "judge: pairwise", "unparsable"],
            [
                [
                    name.upper(),
                    _shown(estimate([run["models"][name]["true_quality"] for run in mine.values()]), 2),
                    _percent(estimate([_judged(run, name) for run in mine.values()])),
                    _percent(estimate([run["models"][name]["unparsable_judgements"] for run in mine.values()])),
                ]
                for name in names
            ],
        )
        yield _rounds(mine)


def _costs(runs: dict[str, dict[int, Run]]) -> Iterable[str]:
    """What the runs took."""
    every = [run for of_arm in runs.values() for run in of_arm.values()]
    wall = sum(sum(run["seconds"].values()) for run in every)
    cpu = [run["cpu_seconds"] for run in every if run["cpu_seconds"] is not None]
    yield "## Times"
    text = (
        f"The phases of the {len(every)} runs took {wall / 60:.0f} minutes one after the other, on a machine that may "
        "have had other work to do."
    )
    if cpu:
        mean = sum(cpu) / len(cpu)
        text += (
            f" Processor time of the {len(cpu)} runs that were made in one go: {mean:.0f} seconds a run; so about "
            f"{mean * len(every) / 2 / 60:.0f} minutes for all of them on two idle cores (an estimate)."
        )
    yield text


def _quality(run: Run, name: str) -> float:
    return run["models"][name]["true_quality"]


def _judged(run: Run, name: str) -> float:
    return run["models"][name]["judge_truth"]["pairwise_accuracy"]


def _paired(new: dict[int, Run], old: dict[int, Run], value: Callable[[Run], float]) -> Estimate | None:
    """Mean difference within a seed; with new = old the mean of the value."""
    if new is old:
        return estimate([value(run) for run in new.values()])
    return difference({s: value(run) for s, run in new.items()}, {s: value(run) for s, run in old.items()})


def _yield(runs: dict[int, Run], name: str) -> Estimate | None:
    """Pairs out of 100 prompts."""
    counts = [run["rounds"].get(name, {}).get("pairs") for run in runs.values()]
    return estimate([100 * c["pairs"] / c["prompts"] if c else None for c in counts])


def _scores(runs: dict[int, Run], name: str) -> dict[int, float]:
    """Shares of the scores 0 to 5 among the judgements of a round, of all seeds together."""
    counts = [run["rounds"][name]["candidates"]["scores"] for run in runs.values()]
    total = sum(sum(of_run.values()) for of_run in counts)
    return {score: sum(of_run.get(str(score), 0) for of_run in counts) / total for score in range(6)}


def _dig(value: Any, *keys: str) -> Any:
    """value[key][key]..., None where one is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _shown(found: Estimate | None, digits: int, *, sign: bool = False) -> str:
    if found is None:
        return "-"
    mean = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if found.n == 1 else f"{mean} ± {found.half:.{digits}f}"


def _percent(found: Estimate | None, *, sign: bool = False, unit: str = "%") -> str:
    if found is None:
        return "-"
    return f"{_shown(Estimate(100 * found.mean, 100 * found.half, found.n), 1, sign=sign)} {unit}"


def _clear(found: Estimate | None, text: str) -> str:
    return f"**{text}**" if found is not None and found.clear else text


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
