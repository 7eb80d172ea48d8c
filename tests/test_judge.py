import math
import random
import re

import pytest

from srlm_fast.errors import UserError
from srlm_fast.judge import TEMPLATE, aggregate, judge_prompt, load_template, parse_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It is fine.\nScore: 4", 4.0),  # at the end of the text, no newline
        ("It is fine.\n\nScore: 4\n", 4.0),
        ("Score: 0", 0.0),
        ("Score: 4.5", 4.5),
        ("Score: 4.5.", 4.5),
        ("Score: 4.", 4.0),
        ("Score: 5/5", 5.0),
        ("Score: 4.5 / 5", 4.5),
        ("score : 3 out of 5.", 3.0),
        ("**Score:** 4", 4.0),
        ("**Score: 4**", 4.0),
        ("Score: <2>", 2.0),
        ("Score: 3 points", 3.0),
        ("Score:3 because it helps", 3.0),
        ('"Score: 1"', 1.0),
        ("Score: 2\nOn reflection it covers more.\nScore: 3", 3.0),
        ("Score: 4\n\nScore: <total points>", 4.0),  # the echo is no score
        ("Score: <total points>", None),
        ("", None),
        ("I would give it a 4.", None),
        ("Score: four", None),
        ("Score: 6", None),
        ("Score: 50", None),
        ("Score: -1", None),
        ("Score: 5.5", None),
        ("Score: 8/10", None),
        ("Score: 4/50", None),
        ("Score: 3-4", None),
        ("Score: 4,5", None),
        ("Score: 4th", None),
        ("Score: 80%", None),
        ("Score: 1e0", None),
        ("Score: ٤", None),  # a digit, but not one the prompt asks for
        ("Score: 4\nScore: 9", None),  # the last one counts and is out of range
        ("Score:\n4", None),
        ("Underscore: 4", None),
    ],
)
def test_parse_score(text, score):
    assert parse_score(text) == score


def test_parse_score_options():
    several = "Score: 2\nScore: 3"
    assert parse_score(several, which="first") == 2.0
    assert parse_score("Score: 9\nScore: 3", which="first") is None
    assert parse_score("Score: 4.5", decimals=False) is None
    assert parse_score("Score: 4.0", decimals=False) == 4.0
    assert parse_score("Score: 8/10", max_score=10.0) == 8.0
    assert parse_score("Score: 4/5", max_score=10.0) is None
    with pytest.raises(UserError, match="judge.which"):
        parse_score("Score: 1", which="best")


def test_parse_score_finds_every_score_in_any_surroundings():
    """Any score of the scale is read back, whatever text without another score stands around it."""
    rng = random.Random(0)
    pieces = ["score", "Score ", ":", "4", "5/5", " ", "\n", "<total points>", "points", "%", "é", "</response>"]
    for _ in range(500):
        before, after = ("".join(rng.choices(pieces, k=rng.randrange(8))) for _ in range(2))
        value = rng.choice([0, 1, 2, 3, 4, 5, 0.5, 3.25])
        if parse_score(after) is None and not re.search(r"score\s*:", after, re.I):
            assert parse_score(f"{before}\nScore: {value}\n{after}") == value, (before, after)


def test_aggregate_is_the_mean_of_the_parsable():
    assert aggregate([4.0, None, 5.0]) == 4.5
    assert aggregate([None, None]) is None
    assert aggregate([]) is None
    assert aggregate([], min_valid=0) is None
    assert aggregate([4.0, None, None], min_valid=2) is None
    assert aggregate([4.0, 2.0, None], min_valid=2) == 3.0


def test_equal_scores_stay_equal_in_any_order():
    rng = random.Random(1)
    for _ in range(200):
        scores = [rng.choice([0.1, 0.7, 1.3, 2.9, 3.3, 4.7]) for _ in range(7)]
        assert aggregate(scores) == aggregate(rng.sample(scores, 7))
    assert math.isclose(aggregate([0.1] * 10), 0.1, rel_tol=1e-16)


def test_the_prompt_has_the_marks_of_the_paper():
    prompt = judge_prompt("Why is the sky blue?", "It scatters.")
    criteria = [prompt.index(name) for name in ("Relevance", "Coverage", "Usefulness", "Clarity", "Expertise")]
    assert criteria == sorted(criteria)
    assert "\nUser: Why is the sky blue?\n" in prompt
    assert "<response>It scatters.</response>" in prompt
    assert '"Score: <total points>"' in prompt
    assert "100 words" in prompt
    assert "utilizing web search knowledge as necessary" in prompt
    assert prompt.index("</response>") < prompt.index("100 words") < prompt.index("Score:")
    # All judge requests of a run share the criteria as a prefix, so an engine can keep them.
    assert judge_prompt("another", "text").startswith(prompt[: prompt.index("User: ")])
    assert parse_score(prompt) is None


def test_texts_are_put_in_literally():
    instruction, response = r"Format {response} and {x} with \1 in {}", "{instruction} {{0}}"
    prompt = judge_prompt(instruction, response, "I:{instruction} R:{response} I:{instruction}")
    assert prompt == f"I:{instruction} R:{response} I:{instruction}"


def test_template_files(tmp_path):
    path = tmp_path / "judge.txt"
    path.write_text("Q {instruction} A {response} Score:")
    assert judge_prompt("x", "y", load_template(path)) == "Q x A y Score:"
    assert load_template(None) == TEMPLATE
    path.write_text("Q {instruction}")
    with pytest.raises(UserError, match=r"judge.txt: .*\{response\}"):
        load_template(path)
    with pytest.raises(UserError, match="cannot read"):
        load_template(tmp_path / "absent.txt")
