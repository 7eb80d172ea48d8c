"""The table at the end of a run: one row per model."""

from __future__ import annotations

import json
import sys
from itertools import chain
from typing import Any

from srlm_fast import data_card, guards
from srlm_fast.context import Context
from srlm_fast.data import read_rows
from srlm_fast.phases.training import pair_files
from srlm_fast.rundir import RunDir, write_json

COLUMNS = {
    "model": "",
    "quality": "true quality of held-out answers, 0 to 5",
    "pairwise": "judge: pairwise accuracy",
    "5-best": "judge: share of its 5/5 that are ranked first",
    "exact": "judge: exact match of the order",
    "Spearman": "judge: rank correlation",
    "Kendall": "judge: tau-b",
    "unparsable": "share of judgements without a readable score",
    "ties": "judge: share of equal scores",
    "characters": "mean length of held-out answers",
    "pairs": "preference pairs the model was trained on",
    "right": "share of its pairs of answers that the truth orders the same way",
    "guards": "bounds that its phases crossed (guards.*)",
}
"""Columns of the table and of summary.json, with their meaning."""


def summarize(run: Context) -> list[dict[str, Any]]:
    """One row per trained model, with the keys of `COLUMNS`; None where something was not measured."""
    rows = []
    paired = range(1, run.config.iterations + 1) if run.config.learn_from == "pairs" else ()
    for t, name in enumerate(["sft", *(f"m{t}" for t in range(1, run.config.iterations + 2))], start=-1):
        metrics = json.loads((run.run_dir / f"{name}/metrics.json").read_text(encoding="utf-8"))
        judge = metrics.get("judge_truth", metrics["judge"])
        pairs = [row for _, row in chain(*map(read_rows, pair_files(run, t)))] if t in paired else []
        rows.append(
            {
                "model": name.upper(),
                "quality": metrics.get("true_quality"),
                "pairwise": judge["pairwise_accuracy"],
                "5-best": judge["five_best"],
                "exact": judge["exact_match"],
                "Spearman": judge["spearman"],
                "Kendall": judge["kendall"],
                "unparsable": metrics["unparsable_judgements"],
                "ties": judge["tie_rate"],
                "characters": metrics.get("answer_characters"),
                "pairs": len(pairs) or None,
                "right": _share_right(run, pairs),
                "guards": _crossed(run, name),
            }
        )
    return rows


def _crossed(run: Context, name: str) -> str | None:
    """The guards that a model's phases crossed, by the bounds of now."""
    phases = (f"{name}/{kind}" for kind in ("train", "evaluate", "candidates"))
    found = (guards.check(phase, run.run_dir.counts, run.config.guards) for phase in phases)
    return ", ".join(dict.fromkeys(finding.guard for of_phase in found for finding in of_phase)) or None


def _share_right(run: Context, pairs: list[dict[str, Any]]) -> float | None:
    """Among the pairs whose answers differ in true quality, those in which the chosen one is better."""
    if run.config.evaluate.truth is None:
        return None
    from srlm_fast.phases.evaluation import TRUTHS

    truth = TRUTHS[run.config.evaluate.truth]
    answers = [p for p in pairs if p["kind"] == "answers"]
    scores = [(truth(p["prompt"], p["chosen"]), truth(p["prompt"], p["rejected"])) for p in answers]
    decided = [
        (chosen, rejected) for chosen, rejected in scores if None not in (chosen, rejected) and chosen != rejected
    ]
    return sum(chosen > rejected for chosen, rejected in decided) / len(decided) if decided else None


def print_summary(run: Context) -> None:
    """Print the table and write summary.json."""
    from rich.console import Console
    from rich.table import Table

    rows = summarize(run)
    write_json(run.run_dir / "summary.json", rows)
    against = "the exact scores" if run.config.evaluate.truth else "the human ranks"
    table = Table(title=f"{run.run_dir.path}: judges measured against {against}")
    columns = [column for column in COLUMNS if column != "guards" or any(row["guards"] for row in rows)]
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "guards") else "right")
    for row in rows:
        table.add_row(*(_shown(column, row[column]) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 128)
    console.print(table)
    for column in columns[1:]:
        console.print(f"  {column}: {COLUMNS[column]}", style="dim", highlight=False)


def print_card(run_dir: RunDir) -> None:
    """What became of the data, a line for every step."""
    print(f"\ndata, by step (what each rule removed: {run_dir / 'data_card.md'})")
    for step in data_card.steps(run_dir):
        print(f"  {step.line()}")


def _shown(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if column in ("quality", "Spearman", "Kendall"):
        return f"{value:.2f}"
    return f"{value:.0f}" if column == "characters" else f"{100 * value:.1f} %"
