"""Two models compared answer by answer: from what a judge says to a verdict, from verdicts to rates with intervals.

Source: arXiv 2401.10020, section 3.1.3: a judge sees both answers in both orders, and orders that disagree are a tie.
The wording of the prompt below is our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from srlm_fast.errors import UserError
from srlm_fast.templates import fill_template, read_template

TEMPLATE = """\
A person wrote the message below to two assistants, and each of them gave an output. Decide which output that person \
would rather have received.

Look at what was asked for and at whether it was done: correct, complete, to the point, clear, and pleasant to read. \
Being longer is no merit in itself, and neither is being shown first.

[Message]
{instruction}
[End of message]

[Output A]
{a}
[End of output A]

[Output B]
{b}
[End of output B]

Compare the two in a few sentences. Then end with your verdict on a line of its own: [[A]] if output A is the one to \
prefer, [[B]] if it is output B, [[tie]] if neither is better.
"""

Result = Literal["win", "tie", "loss"]
_CHOICE = re.compile(r"\[\[\s*(a|b|c|tie)\s*\]\]", re.I)


@dataclass(frozen=True)
class Verdict:
    """What came of one comparison, as the first model sees it."""

    group: str  # comparisons with one group are drawn together by the bootstrap: those of a prompt
    result: Result
    unparsable: bool = False  # no judgement, or not all that were needed, could be read; the result is then a tie
    disagree: bool = False  # the two orders were read and gave different results; the result is then a tie


def load_template(path: str | Path | None = None) -> str:
    """Text of a pairwise prompt file, or the built-in `TEMPLATE` for None.

    Raises UserError when the file cannot be read or lacks {instruction}, {a} or {b}.
    """
    return TEMPLATE if path is None else read_template(path, ("instruction", "a", "b"), "pairwise")


def pairwise_prompt(instruction: str, a: str, b: str, template: str = TEMPLATE) -> str:
    """The prompt that asks which of two outputs is better. Braces in the texts stay as they are."""
    texts = {"instruction": instruction, "a": a, "b": b}
    return fill_template(template, texts)


def parse_choice(text: str) -> Literal["a", "b", "tie"] | None:
    """What the last [[A]], [[B]] or [[tie]] (also [[C]]) of a judgement says; None where there is none."""
    found = _CHOICE.findall(text)
    if not found:
        return None
    choice = found[-1].lower()
    return "tie" if choice == "c" else choice


def by_orders(group: str, first: str | None, second: str | None) -> Verdict:
    """The verdict of two judgements.

    Args:
        group: see `Verdict`.
        first: the judge's choice with the first model's answer as A; None where it was not readable.
        second: its choice with the first model's answer as B.
    """
    if first is None or second is None:
        return Verdict(group, "tie", unparsable=True)
    results = ({"a": "win", "b": "loss", "tie": "tie"}[first], {"a": "loss", "b": "win", "tie": "tie"}[second])
    if results[0] != results[1]:
        return Verdict(group, "tie", disagree=True)
    return Verdict(group, results[0])


def by_scores(group: str, first: float | None, second: float | None) -> Verdict:
    """The verdict of the scores of both answers: the higher one wins, equal ones tie, and so does a missing one."""
    if first is None or second is None:
        return Verdict(group, "tie", unparsable=True)
    return Verdict(group, "win" if first > second else "loss" if first < second else "tie")


def rates(verdicts: Iterable[Verdict], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Shares of wins, ties and losses of the first model, with 95 % intervals.

    Returns:
        win, tie, loss: shares of the verdicts. win_rate: win + tie / 2. net: win - loss. Each of them has
        NAME_interval, [low, high]: the percentile interval over `bootstrap` draws of groups with replacement; not there
        with bootstrap=0. verdicts, groups: how many. unparsable, disagree: shares, all of them ties. The shares are
        None without verdicts.
    """
    listed = list(verdicts)
    groups = {name: i for i, name in enumerate(dict.fromkeys(verdict.group for verdict in listed))}
    table = np.zeros((len(groups), 3))
    for verdict in listed:
        table[groups[verdict.group], ("win", "tie", "loss").index(verdict.result)] += 1
    counts: dict[str, Any] = {"verdicts": len(listed), "groups": len(groups)}
    if not listed:
        return dict.fromkeys((*_shares(np.ones((1, 3))), "unparsable", "disagree"), None) | counts
    found: dict[str, Any] = {name: float(share[0]) for name, share in _shares(table.sum(axis=0)[None]).items()}
    if bootstrap:
        chances = np.full(len(groups), 1 / len(groups))
        draws = np.random.default_rng(seed).multinomial(len(groups), chances, size=bootstrap)
        for name, drawn in _shares(draws @ table).items():
            found[f"{name}_interval"] = np.percentile(drawn, [2.5, 97.5]).tolist()
    for name in ("unparsable", "disagree"):
        found[name] = sum(getattr(verdict, name) for verdict in listed) / len(listed)
    return found | counts


def _shares(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Of rows of counts of wins, ties and losses [n, 3], the shares [n]."""
    win, tie, loss = (counts / counts.sum(axis=1, keepdims=True)).T
    return {"win": win, "tie": tie, "loss": loss, "win_rate": win + tie / 2, "net": win - loss}


def compare_rows(
    first: Sequence[dict[str, Any]],
    second: Sequence[dict[str, Any]],
    score: Callable[[str, dict[str, Any]], float | None],
) -> list[Verdict]:
    """Verdicts by scores: answer i of one model against answer i of the other, to the same prompts.

    Args:
        first, second: rows of `srlm_fast.rollout.answer`, of both models.
        score: (prompt, candidate) -> its score; None counts as unparsable, and so does an answer that is not there.

    Raises:
        UserError: when the rows are not of the same prompts in the same order.
    """
    if [row["prompt"] for row in first] != [row["prompt"] for row in second]:
        raise UserError("the answers of the two models are not to the same prompts in the same order")
    verdicts = []
    for a, b in zip(first, second):
        for pair in zip_longest(a["candidates"], b["candidates"]):
            scores = [None if candidate is None else score(a["prompt"], candidate) for candidate in pair]
            verdicts.append(by_scores(a["prompt_id"], *scores))
    return verdicts
