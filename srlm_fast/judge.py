"""LLM-as-a-Judge: the additive five-point prompt, reading the score out of a judgement, and the mean of several.

Source: arXiv 2401.10020, section 2 and figure 2: one response per prompt, points that add up over five ordered
criteria, a justification before the score, reward = mean of the sampled scores. The wording below is our own.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from srlm_fast.errors import UserError
from srlm_fast.templates import fill_template, read_template

TEMPLATE = """\
You will read a message from a user and a response to it. Rate the response on an additive five-point scale: start \
from zero, take the five criteria below in their order, and add one point for each criterion that is met.

- Relevance: add 1 point if the response has to do with the message and gives some information about it, even when \
that is incomplete or partly beside the matter.
- Coverage: add another point if it takes up a large part of what the user asked, although it does not settle the \
question fully or does not answer it head-on.
- Usefulness: award a third point if it answers the basic parts of the message so that the user can work with it, \
no matter whether it reads like an AI assistant or like a blog post or a search result.
- Clarity: grant a fourth point if it is plainly written from the perspective of an AI assistant, addresses the \
message directly and comprehensively, and is well organised and helpful, with at most a little room to be clearer, \
shorter or more focused.
- Expertise: bestow a fifth point if it fits this user's message without fault: nothing superfluous, the knowledge \
of an expert, and an answer that is engaging and insightful.

User: {instruction}

<response>{response}</response>

When you have examined both:
- First justify your total briefly, in up to 100 words.
- Then end with the score on a line of its own, in this form: "Score: <total points>"

Keep to the perspective of an AI assistant throughout, utilizing web search knowledge as necessary. Go through the \
criteria one after the other and let the points add up to the total.
"""

# "Score:" and a number after it, on one line; markdown emphasis and brackets around either are let through.
# The echo "Score: <total points>" holds no number and is no mention.
_MENTION = re.compile(r"\bscore[ \t*_]*:[ \t*_<\[(]*([-+]?[0-9][^\s/]*(?:[ \t]*(?:/|out of)[ \t]*[0-9]\S*)?)", re.I)
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_VALUE = re.compile(rf"{_NUMBER}(?:[ \t]*(?:/|out of)[ \t]*{_NUMBER})?[.,;:!*_>\])\"']*", re.I)


@dataclass(frozen=True)
class Judgement:
    """One sampled evaluation of one response."""

    text: str  # what the judge wrote, without the prompt
    score: float | None  # parse_score(text); None when it holds no readable score
    seed: int = 0  # seed of the request it was sampled with
    finish_reason: str = "stop"  # "stop" or "length"
    expected: float | None = None  # mean of the digit where the score stands, under its probabilities; None: not known


DECIDES = {"cot": "score", "expected": "expected"}
"""judge.mode -> the field of a judgement that scores the response."""


def load_template(path: str | Path | None = None) -> str:
    """Text of a judge prompt file, or the built-in `TEMPLATE` for None.

    Raises UserError when the file cannot be read or lacks {instruction} or {response}.
    """
    return TEMPLATE if path is None else read_template(path, ("instruction", "response"), "judge")


def judge_prompt(instruction: str, response: str, template: str = TEMPLATE) -> str:
    """The prompt that asks for one judgement. Braces in either text stay as they are."""
    return fill_template(template, {"instruction": instruction, "response": response})


def parse_score(text: str, *, decimals: bool = True, max_score: float = 5.0, which: str = "last") -> float | None:
    """Score of one judgement, or None when it cannot be read for certain.

    Pass the completion alone: the prompt holds "Score:" as well. Read are "Score: 4", "4.5", "4/5", "4 out of 5" (any
    case, markdown around it, anywhere in the text); refused are numbers outside [0, max_score], another denominator
    ("8/10"), ranges ("3-4") and other things that only begin like a number. With `decimals` False "4.5" is refused.
    Of several scores the "last" or the "first" one counts (`which`), and if that one is refused so is the text.
    """
    found = find_score(text, decimals=decimals, max_score=max_score, which=which)
    return None if found is None else found[0]


def find_score(
    text: str, *, decimals: bool = True, max_score: float = 5.0, which: str = "last"
) -> tuple[float, int] | None:
    """`parse_score` and the place of the score's first digit in the text."""
    if which not in ("last", "first"):
        raise UserError(f'judge.which is "{which}"; it must be "last" or "first"')
    mentions = list(_MENTION.finditer(text))
    if not mentions:
        return None
    mention = mentions[-1 if which == "last" else 0]
    value = _VALUE.fullmatch(mention[1])
    if value is None or (value[2] and float(value[2]) != max_score):
        return None
    score = float(value[1])
    if score > max_score or (not decimals and not score.is_integer()):
        return None
    return score, mention.start(1)


def expected_digit(logprobs: Iterable[float]) -> float | None:
    """Mean of the digits 0, 1, ... under their probabilities, renormalised; None when these are all 0."""
    weights = [math.exp(logprob) for logprob in logprobs]
    total = math.fsum(weights)
    return math.fsum(k * w for k, w in enumerate(weights)) / total if total > 0 else None


def aggregate(scores: Iterable[float | None], *, min_valid: int = 1) -> float | None:
    """Mean of the parsable scores of one response; None when fewer than `min_valid` (at least one) are parsable.

    The sum is exact, so the same scores in another order give the same float and ties stay ties.
    """
    valid = [score for score in scores if score is not None]
    return math.fsum(valid) / len(valid) if len(valid) >= max(1, min_valid) else None


def mean_score(judgements: Iterable[Judgement], mode: str, min_valid: int = 1) -> float | None:
    """`aggregate` of what `mode` (judge.mode) says decides."""
    return aggregate((getattr(judgement, DECIDES[mode]) for judgement in judgements), min_valid=min_valid)
