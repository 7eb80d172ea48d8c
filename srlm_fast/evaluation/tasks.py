"""One evaluation from its configuration to its results, as scripts/evaluate.py does it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from srlm_fast.config.evaluate import EvaluateRunConfig
from srlm_fast.errors import UserError
from srlm_fast.evaluation.answers import alpaca_eval, answers
from srlm_fast.evaluation.compare import head_to_head
from srlm_fast.evaluation.judging import judge
from srlm_fast.evaluation.mt_bench import mt_bench, mt_bench_grade
from srlm_fast.evaluation.run import Evaluation
from srlm_fast.kernels import library
from srlm_fast.opening import existing_inputs, open_run
from srlm_fast.parallel import World
from srlm_fast.rundir import RunDir
from srlm_fast.stop import Stop

Task = Callable[[Evaluation], tuple[list[Path], dict[str, Any]]]
TASKS: dict[str, tuple[Task, tuple[str, ...]]] = {
    "answers": (answers, ("model", "prompts")),
    "head_to_head": (head_to_head, ("model", "opponent", "prompts")),
    "alpaca_eval": (alpaca_eval, ("model", "prompts")),
    "mt_bench": (mt_bench, ("model", "questions")),
    "mt_bench_grade": (mt_bench_grade, ("questions", "model_answer")),
    "judge": (judge, ("ranked",)),
}
"""Name of a task -> what does it, giving its files and its counts; the keys that it needs."""


def evaluate(config: EvaluateRunConfig, world: World) -> dict[str, Any]:
    """Do the task; started again it goes on where it was.

    Returns:
        What was recorded of it: counts, and the rates or means that it found.

    Raises:
        UserError: for bad input, most of it before any work starts.
        Interrupted: on a signal or before save_by.
    """
    library.use(config.kernels)
    task, needed = TASKS[config.task]
    for name in needed:
        if not getattr(config, name):
            raise UserError(f"task={config.task} needs {name}: {name}=PATH")
    existing_inputs(config)
    run, stopping = RunDir(config.run_dir), Stop(config.save_by)
    world.on_main(lambda: open_run(run, config))
    with stopping.listening(), run.at_work(world.is_main):
        record = world.on_main(lambda: run.phase(config.task))
        if record is not None:
            return record["counts"]
        started = time.perf_counter()
        evaluation = Evaluation(config, world, run, stopping)
        files, counts = task(evaluation)
        world.on_main(lambda: run.finish(config.task, files, time.perf_counter() - started, counts))
        evaluation.close()
        return counts
