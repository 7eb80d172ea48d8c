"""EFT targets: which judgements of the SFT baseline become training data, and how their scores are balanced.

Source: arXiv 2401.10020, section 3.1.1: the SFT baseline evaluates human-ranked replies; an evaluation is taken when
its scores agree with the human ranking; then some with the most common score are discarded. The number of attempts,
the unit of acceptance, the treatment of ties and the share aimed at are not given there and are arguments here.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from srlm_fast.data import Example, RankedPrompt
from srlm_fast.errors import UserError
from srlm_fast.judge import TEMPLATE, Judgement, judge_prompt


@dataclass(frozen=True)
class EftExample:
    """An accepted evaluation: judge prompt and target text, with the score it ends in and the human rank.

    attempt: which of the attempts, from 0, it is of.
    """

    example: Example
    score: float
    rank: int
    attempt: int = 0

    def origin(self) -> dict[str, Any]:
        """What is kept of it beside the example."""
        return {"score": self.score, "rank": self.rank, "attempt": self.attempt}


def accept(
    prompt: RankedPrompt,
    attempts: Iterable[Sequence[Judgement]],
    *,
    scope: str = "prompt",
    ties: str = "strict",
    template: str = TEMPLATE,
) -> list[EftExample]:
    """Evaluations of the first attempt that agrees with the human ranking; at most one per reply, often none.

    Args:
        prompt: replies with human ranks, 0 the best; equal ranks ask for no order.
        attempts: one judgement per reply in each, in the order of `prompt.replies`. Read only as far as needed.
        scope: "prompt" accepts an attempt when all its replies are scored and in order; "reply" accepts each reply
            that is scored and in order with all other scored ones, and leaves the rest to the next attempt.
        ties: "strict", equal scores of differently ranked replies are out of order; "allow", they are not, but a reply
            must still be set apart from at least one other.

    Judgements cut off at the token limit are never taken: the model would learn to leave out the end.
    """
    if scope not in ("prompt", "reply") or ties not in ("strict", "allow"):
        raise UserError(f'eft.scope is "{scope}", eft.ties "{ties}"; allowed are "prompt"/"reply" and "strict"/"allow"')
    ranks = [rank for _, rank in prompt.replies]
    taken: dict[int, tuple[int, Judgement]] = {}
    for attempt, judgements in enumerate(attempts):
        scores = [None if judgement.finish_reason == "length" else judgement.score for judgement in judgements]
        agreeing = [i for i in range(len(ranks)) if _agrees(i, scores, ranks, ties)]
        if scope == "reply" or len(agreeing) == len(ranks):
            for i in agreeing:
                taken.setdefault(i, (attempt, judgements[i]))
        if len(taken) == len(ranks):
            break
    return [
        EftExample(
            Example(f"{prompt.id}/{i}", judge_prompt(prompt.prompt, reply, template), taken[i][1].text.strip()),
            taken[i][1].score,
            rank,
            taken[i][0],
        )
        for i, (reply, rank) in enumerate(prompt.replies)
        if i in taken
    ]


def _agrees(i: int, scores: list[float | None], ranks: list[int], ties: str) -> bool:
    """Whether reply i is in the human order with every other scored reply, and set apart from at least one."""
    if scores[i] is None:
        return False
    apart = False
    for score, rank in zip(scores, ranks, strict=True):
        if score is None or rank == ranks[i]:
            continue
        if score == scores[i]:
            if ties == "strict":
                return False
        elif (score > scores[i]) != (rank < ranks[i]):
            return False
        else:
            apart = True
    return apart


def resample(
    examples: Sequence[EftExample], *, max_share: float = 0.4, max_examples: int = 1630, seed: int = 0
) -> tuple[list[EftExample], dict[str, int]]:
    """Thins out the most common score, then draws at most `max_examples`; the order of the rest is kept.

    Examples of the most common score are discarded at random until their share is at most `max_share`, but never below
    the count of the next common score.

    Returns:
        The examples kept, and {"thinned": discarded of the most common score, "capped": discarded beyond max_examples}.
    """
    before = histogram(examples)
    kept = list(range(len(examples)))
    if len(before) > 1 and max_share < 1:
        (top, count), (_, runner_up) = Counter(before).most_common(2)
        others = len(examples) - count
        allowed = max(runner_up, int(max_share * others / (1 - max_share) + 1e-9))
        common = [i for i in kept if examples[i].score == top]
        discarded = set(random.Random(f"{seed}/thin").sample(common, max(0, count - allowed)))
        kept = [i for i in kept if i not in discarded]
    removed = {"thinned": len(examples) - len(kept), "capped": max(0, len(kept) - max_examples)}
    if removed["capped"]:
        kept = sorted(random.Random(f"{seed}/cap").sample(kept, max_examples))
    return [examples[i] for i in kept], removed


def histogram(examples: Sequence[EftExample]) -> dict[float, int]:
    """{score: number of examples with it}, lowest score first."""
    return dict(sorted(Counter(example.score for example in examples).items()))
