"""Evaluation during training, and when to stop early."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from srlm_fast.errors import UserError
from srlm_fast.packing import Item
from srlm_fast.parallel import World
from srlm_fast.rundir import write_json

History = Sequence[dict[str, float]]
"""The metrics of all evaluations so far, the newest last."""


@dataclass
class Evaluation:
    """What is evaluated during training, and what follows from it.

    Metrics have TRL's names with `eval_` before them. The loss and rewards are those of all items as one batch, dropout
    off.
    """

    items: Sequence[Item] = ()
    """Held-out items; the trainer's reference cache has to hold theirs too."""
    every: int = 200
    """Optimizer steps between evaluations; there is one more at the end."""
    measure: Callable[[int], dict[str, float]] | None = None
    """Called on all ranks with the number of steps done; what it gives is added, with `eval_` before the name."""
    offload: bool = False
    """Whether the optimizer's moments are in host memory while `measure` runs: for an engine that generates in it."""
    report: Callable[[dict[str, float]], None] = lambda metrics: None
    """Called on every rank with the metrics of an evaluation."""
    stop_when: Callable[[History], bool] | None = None
    """Asked after every evaluation. True ends training with the weights of the evaluation before."""


def worse_than_before(metric: str = "eval_rewards/accuracies", *, lower_is_better: bool = False) -> Callable:
    """Stop when the newest value of a metric is worse than that of the evaluation before it, or not a number.

    Raises:
        UserError: when asked, for a metric that the evaluation does not have.
    """

    def rule(history: History) -> bool:
        if metric not in history[-1]:
            raise UserError(f"no metric {metric!r} to stop on; there are {', '.join(history[-1])}")
        if len(history) < 2:
            return False
        before, now = history[-2][metric], history[-1][metric]
        return not (now <= before if lower_is_better else now >= before)

    return rule


def below(metric: str, least: float) -> Callable:
    """Stop when the newest value of a metric is below a limit."""
    return lambda history: metric in history[-1] and history[-1][metric] < least


class AgainstPrevious:
    """The early stopping of arXiv 2401.10020, section 3.1.2: answers against those of before.

        pairwise = AgainstPrevious(prompts, answer, judge, folder=run / "answers", every=200)
        Evaluation(every=200, measure=pairwise, stop_when=below("eval_win_rate", 0.5))

    Args:
        prompts: held-out prompts (253 in the paper).
        answer: answers of the model as it is now, one per prompt; called on every rank, the same result on each.
        prefer: prefer(prompt, new, old) -> 1 where the new answer is better, 0 where the old one is, 0.5 for a tie (in
            the paper Claude 2 with the prompt of AlpacaEval); called on rank 0.
        folder: where the answers are kept, so that a resumed run has those of before.
        every: as of the `Evaluation`.
        world: the ranks.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        answer: Callable[[Sequence[str]], Sequence[str]],
        prefer: Callable[[str, str, str], float],
        *,
        folder: Path,
        every: int,
        world: World | None = None,
    ) -> None:
        self.prompts, self.answer, self.prefer = prompts, answer, prefer
        self.folder, self.every, self.world = Path(folder), every, world or World()

    def __call__(self, step: int) -> dict[str, float]:
        """{"win_rate": mean preference for the new answers}; nothing at the first evaluation."""
        answers = list(self.answer(self.prompts))
        found = None
        if self.world.is_main:
            write_json(self._file(step), answers)
            previous = self._file((step - 1) // self.every * self.every)
            if previous.exists():
                old = json.loads(previous.read_text(encoding="utf-8"))
                wins = [self.prefer(*three) for three in zip(self.prompts, answers, old, strict=True)]
                found = sum(wins) / len(wins)
        found = self.world.broadcast(found)
        return {} if found is None else {"win_rate": found}

    def _file(self, step: int) -> Path:
        return self.folder / f"answers-{step}.json"
