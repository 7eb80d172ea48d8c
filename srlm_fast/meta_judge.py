"""Meta-Rewarding: a model compares its own judgements, and the better ones become pairs to train on.

Source: Wu et al. 2024, Meta-Rewarding Language Models, arXiv 2407.19594, section 2.2. Of every prompt the answer whose
N judgements have the highest variance is taken. The meta-judge sees every two of them in both orders; with

    r_mn = 1, -1, 0     m, shown first, wins; n, shown second, wins; a tie or nothing readable
    w_1 = wins of the second place / all wins,   w_2 = wins of the first place / all wins

a place that wins too often counts less, and

    B_mn = w_1 [r_mn = 1] + w_2 [r_nm = -1]
    Elo  = argmax over e of  sum over m, n of  B_mn log sigmoid(e_m - e_n)

The judgement with the highest Elo score is chosen, that with the lowest rejected; a pair whose chosen judgement is too
long is dropped, since the meta-judge prefers long ones. The wording below is our own. Not known to us, hence choices:
the threshold of that length, what the wins are counted over (here: all comparisons of an iteration), and how a
judgement that wins all its battles gets a finite score (here: `PRIOR`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srlm_fast.chat import ChatFormat
from srlm_fast.config import JudgeConfig, MetaJudgeConfig
from srlm_fast.data import as_messages
from srlm_fast.engine.base import Completion, Request
from srlm_fast.errors import UserError
from srlm_fast.seeds import derive_seed
from srlm_fast.templates import fill_template, read_template

PRIOR = 0.01
"""Weight of e^2 / 2 in the fit of the Elo scores."""
TEMPLATE = """\
Two reviewers have judged the same response to a message from a user, on an additive five-point scale: one point each \
for relevance, coverage, usefulness, clarity from an AI assistant's perspective, and expertise, in this order. Decide \
which of the two judgements is the more accurate one.

User: {instruction}

<response>{response}</response>

Judgement 1:
{first}

Judgement 2:
{second}

Look at both without regard to their order or their length: does the reasoning fit the response, are points given and \
withheld for reasons that hold, does the score follow from the reasoning? Explain your comparison briefly. Then end \
with the better judgement on a line of its own, in this form: "Winner: 1" or "Winner: 2"
"""
PLACES = ("instruction", "response", "first", "second")
_WINNER = re.compile(r"\bwinner[ \t*_]*:[ \t*_<\[(\"']*(?:judge?ment[ \t]+)?([12])\b", re.I)


def load_template(path: str | Path | None = None) -> str:
    """Text of a prompt file with the places {instruction}, {response}, {first} and {second}; None: `TEMPLATE`."""
    return TEMPLATE if path is None else read_template(path, PLACES, "meta-judge")


def meta_prompt(instruction: str, response: str, first: str, second: str, template: str = TEMPLATE) -> str:
    """The prompt that asks which of two judgements is better."""
    texts = (instruction, response, first, second)
    return fill_template(template, dict(zip(PLACES, texts, strict=True)))


def parse_winner(text: str) -> str | None:
    """ "first" or "second", from the last "Winner: 1" or "Winner: 2" of a text; None where there is none."""
    found = _WINNER.findall(text)
    return {"1": "first", "2": "second"}[found[-1]] if found else None


def most_uncertain(candidates: Sequence[Mapping[str, Any]], field: str) -> tuple[int, list[int]] | None:
    """The answer whose judgements vary most, and which of these are compared; None where no two differ.

    Args:
        candidates: of one prompt, with "judgements"; those cut off or without a score do not count.
        field: of a judgement, its score.

    Returns:
        The place of the candidate and those of its judgements. The first of several with equal variance.
    """
    best: tuple[float, int, list[int]] | None = None
    for place, candidate in enumerate(candidates):
        judgements = candidate["judgements"]
        usable = [i for i, j in enumerate(judgements) if j["score"] is not None and j["finish_reason"] == "stop"]
        scores = [judgements[i][field] for i in usable if judgements[i][field] is not None]
        variance = float(np.var(scores)) if len(scores) > 1 else 0.0
        if variance > (best[0] if best else 0.0):
            best = (variance, place, usable)
    return best and best[1:]


def position_weights(comparisons: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """(w_1, w_2) of comparisons with a "winner"; both 1/2 where nothing was won."""
    winners = [comparison["winner"] for comparison in comparisons]
    first, second = winners.count("first"), winners.count("second")
    return (second / (first + second), first / (first + second)) if first + second else (0.5, 0.5)


def battles(comparisons: Iterable[Mapping[str, Any]], n: int, weights: tuple[float, float]) -> np.ndarray:
    """B, float64 [n, n], of comparisons with "first" and "second" (places of judgements) and "winner"."""
    won = np.zeros((n, n))
    for comparison in comparisons:
        first, second = comparison["first"], comparison["second"]
        if comparison["winner"] == "first":
            won[first, second] += weights[0]
        elif comparison["winner"] == "second":
            won[second, first] += weights[1]
    return won


def elo_scores(won: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """argmax of sum B_mn log sigmoid(e_m - e_n) - prior / 2 sum e_m^2, float64 [n], by Newton's method.

    The prior makes the maximum finite and unique; a difference of ln 9 is odds of nine to one.
    """
    n = len(won)
    scores = np.zeros(n)
    both = won + won.T
    for _ in range(100):
        p = 1 / (1 + np.exp(scores[None, :] - scores[:, None]))  # of m against n
        gradient = won.sum(1) - (both * p).sum(1) - prior * scores
        curvature = both * p * (1 - p)
        hessian = np.diag(curvature.sum(1) + prior) - curvature
        step = np.linalg.solve(hessian, gradient)
        scores += step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < 1e-12:
            break
    return scores


class MetaJudge:
    """Builds the requests of comparisons and reads their completions.

    Raises:
        UserError: for a template without its places, or (mode "direct") a tokenizer in which the 1 and the 2 behind
            "Winner:" are not one token each.
    """

    def __init__(self, chat: ChatFormat, config: MetaJudgeConfig, judge: JudgeConfig, max_seq_len: int) -> None:
        self.chat, self.config, self.judge, self.max_seq_len = chat, config, judge, max_seq_len
        self.template = load_template(config.template)
        coded = [chat.encode_text(f"Winner: {number}") for number in (1, 2)]
        self._prefix, self._numbers = coded[0][:-1], tuple(ids[-1] for ids in coded)
        if config.mode == "direct" and (coded[1][:-1] != self._prefix or len(set(self._numbers)) < 2):
            raise UserError(
                "meta_judge.mode=direct needs digits of one token each, which this tokenizer has not; use cot"
            )

    def request(self, subject: Mapping[str, Any], order: tuple[int, int], seed: int) -> Request | None:
        """The comparison of two judgements, shown in this order; None when it does not fit max_seq_len.

        Args:
            subject: "id" and "prompt" of a prompt, and the "candidate".
            order: places of the judgements.
            seed: of all comparisons.
        """
        candidate = subject["candidate"]
        texts = (candidate["judgements"][place]["text"] for place in order)
        prompt = meta_prompt(subject["prompt"], candidate["text"], *texts, template=self.template)
        ids, metadata = self.chat.encode_prompt(as_messages(prompt)), (subject["id"], order)
        if self.config.mode == "direct":
            ids = [*ids, *self._prefix]
            if len(ids) >= self.max_seq_len:
                return None
            numbers = self._numbers
            return Request(
                prompt_ids=ids, max_new_tokens=1, temperature=0.0, logprob_token_ids=numbers, metadata=metadata
            )
        if len(ids) + self.config.max_new_tokens > self.max_seq_len:
            return None
        return Request(
            prompt_ids=ids,
            temperature=self.judge.temperature,
            top_p=self.judge.top_p,
            max_new_tokens=self.config.max_new_tokens,
            seed=derive_seed(seed, subject["id"], *order),
            stop_ids=self.chat.stop_ids,
            metadata=metadata,
        )

    def read(self, completion: Completion) -> tuple[str | None, str, int, str]:
        """(winner, text, seed, finish reason)."""
        seed = completion.request.seed
        if self.config.mode == "direct":
            one, two = completion.extra_logprobs[0]
            return (None if one == two else "first" if one > two else "second"), "", seed, "stop"
        text = self.chat.decode(completion.token_ids)
        return parse_winner(text), text, seed, completion.finish_reason
