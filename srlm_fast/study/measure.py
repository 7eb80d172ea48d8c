"""What a finished run is reduced to: study.json in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from srlm_fast.config import Config
from srlm_fast.context import Context
from srlm_fast.errors import UserError
from srlm_fast.head_to_head import Verdict, compare_rows, rates
from srlm_fast.parallel import World
from srlm_fast.phases.evaluation import TRUTHS
from srlm_fast.phases.generation import shard_rows
from srlm_fast.rollout import Reply, answer_each, judge_each
from srlm_fast.rundir import write_json
from srlm_fast.seeds import derive_seed
from srlm_fast.summary import summarize

FORMAT = 1
FILE = "study.json"
JUDGE_METRICS = ("pairwise_accuracy", "five_best", "exact_match", "spearman", "kendall", "tie_rate", "unparsable")
MODEL_METRICS = ("true_quality", "answer_characters", "answer_tokens", "answers_truncated", "unparsable_judgements")


def measure(config: Config, arm: str, *, with_own_judge: bool, cpu_seconds: float | None = None) -> dict[str, Any]:
    """Writes and returns the measurements of a run whose phases are all done.

    Args:
        arm: its name, recorded.
        with_own_judge: whether the last model judges the held-out answers of all of them, and M0's are measured too.
        cpu_seconds: what the whole run cost, recorded; None where it was resumed and is not known.

    Returns:
        "models": {name: metrics}, with "judge" (against the human ranks) and "judge_truth" (against the exact scores);
        "rounds": {"m1": counts of its candidates and pairs};
        "wins": {"m1/sft": {"truth": {"win", "tie", "loss"}, "own": ...}}, shares of the held-out answers, compared by
        their exact scores and by those that the last model gives them;
        "human_quality", "m0_quality": of the IFT replies and of M0's held-out answers; "seconds": {phase: seconds}.

    Raises:
        UserError: when the run has no held-out prompts or no exact scorer.
    """
    if config.evaluate.prompts is None or config.evaluate.truth is None:
        raise UserError("a study measures answers exactly: set evaluate.prompts and evaluate.truth")
    run = Context(config, World())
    rows = {row["model"].lower(): row for row in summarize(run)}
    answers = {name: shard_rows(run, f"{name}/answers") for name in rows}
    own = _own_scores(run, answers) if with_own_judge else {}

    def exactly(prompt: str, candidate: dict[str, Any]) -> int:
        return _truth(run, prompt, candidate["text"])

    result = {
        "format": FORMAT,
        "arm": arm,
        "seed": config.seed,
        "models": {name: _model(run, name) for name in rows},
        "rounds": {f"m{t}": _round(run, t, rows) for t in range(1, config.iterations + 1)},
        "wins": {
            f"{new}/{old}": {
                "truth": _rates(compare_rows(answers[new], answers[old], exactly)),
                **({"own": _rates(compare_rows(own[new], own[old], lambda _, c: c["own"]))} if own else {}),
            }
            for old, new in combinations(rows, 2)
        },
        "human_quality": _mean([_truth(run, row["prompt"], row["response"]) for row in run.rows("data/ift.jsonl")]),
        "m0_quality": _mean(_m0(run)) if with_own_judge else None,
        "seconds": {path: record["seconds"] for path, record in _records(run).items()},
        "cpu_seconds": cpu_seconds,
    }
    run.close()
    write_json(run.run_dir / FILE, result)
    return result


def read(folder: Path) -> dict[str, Any] | None:
    """The measurements in a run folder; None where the run is not finished.

    Raises:
        UserError: for a file that cannot be read or of another format.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}; delete it to have it made again") from None
    if found.get("format") != FORMAT:
        raise UserError(f"{path} has format {found.get('format')}, this program reads {FORMAT}; delete it")
    return found


def _rates(verdicts: list[Verdict]) -> dict[str, float]:
    """Shares of wins, ties and losses. Their intervals are over seeds, not over prompts."""
    found = rates(verdicts, bootstrap=0)
    return {name: found[name] for name in ("win", "tie", "loss")}


def _truth(run: Context, prompt: str, text: str) -> int:
    return TRUTHS[run.config.evaluate.truth](prompt, text)


def _model(run: Context, name: str) -> dict[str, Any]:
    metrics = json.loads((run.run_dir / f"{name}/metrics.json").read_text(encoding="utf-8"))
    judges = {which: {key: metrics[which][key] for key in JUDGE_METRICS} for which in ("judge", "judge_truth")}
    return {**{key: metrics[key] for key in MODEL_METRICS}, **judges}


def _round(run: Context, t: int, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts of an iteration, and the share of its pairs that the truth orders the same way."""
    records = {name.partition("/")[2]: record for name, record in _records(run).items() if name.startswith(f"m{t}/")}
    kept = {
        "prompts": ("requests", "proposed", "accepted"),
        "candidates": ("candidates", "mean_score", "unparsable", "mean_tokens", "scores"),
        "pairs": ("prompts", "pairs", "equal", "tied", "unscored"),
        "positives": ("positives",),
    }
    counts = {
        phase: {key: records[phase]["counts"].get(key) for key in keys}
        for phase, keys in kept.items()
        if phase in records
    }
    return {**counts, "right": rows[f"m{t + 1}"]["right"]}


def _records(run: Context) -> dict[str, dict[str, Any]]:
    """The records of all phases that are done, by name."""
    folder = run.run_dir / "phases"
    return {
        str(path.relative_to(folder).with_suffix("")): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.json"))
    }


def _own_scores(run: Context, answers: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows with the first answer of each alone, and in its "own" what the last model scores it."""
    last = list(answers)[-1]
    replies = [
        Reply(f"{name}/{row['prompt_id']}", row["prompt"], row["candidates"][0]["text"])
        for name, rows in answers.items()
        for row in rows
    ]
    engine, seed = run.engine(run.weights(last)), derive_seed(run.config.seed, "study/judge")
    judged = dict(judge_each(engine, run.judge, replies, seed))
    return {
        name: [
            {
                **row,
                "candidates": [{**row["candidates"][0], "own": run.judge.score(judged[f"{name}/{row['prompt_id']}"])}],
            }
            for row in rows
        ]
        for name, rows in answers.items()
    }


def _m0(run: Context) -> list[int]:
    """Exact scores of M0's answers to the held-out prompts."""
    config = run.config
    rows = answer_each(
        run.engine(run.weights("base")),
        run.chat,
        config.candidates,
        run.held_out,
        derive_seed(config.seed, "study/m0"),
        config.model.max_seq_len,
        n=config.evaluate.n,
    )
    return [_truth(run, row["prompt"], candidate["text"]) for row in rows for candidate in row["candidates"]]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
