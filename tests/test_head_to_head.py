"""Verdicts and their rates: against values worked out by hand and an independent interval."""

import random

import numpy as np
import pytest
from scipy import stats

from srlm_fast.errors import UserError
from srlm_fast.head_to_head import (
    TEMPLATE,
    Verdict,
    by_orders,
    by_scores,
    compare_rows,
    load_template,
    pairwise_prompt,
    parse_choice,
    rates,
)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Both are fine, but [[A]] is shorter.\n[[B]]", "b"),
        ("[[a]]", "a"),
        ("... [[ Tie ]].", "tie"),
        ("[[C]]", "tie"),
        ("Output A", None),
        ("[A]", None),
        ("[[AB]] [[5]]", None),
        ("", None),
    ],
)
def test_choices(text, choice):
    assert parse_choice(text) == choice


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a", "b", Verdict("g", "win")),
        ("b", "a", Verdict("g", "loss")),
        ("tie", "tie", Verdict("g", "tie")),
        ("a", "a", Verdict("g", "tie", disagree=True)),
        ("b", "b", Verdict("g", "tie", disagree=True)),
        ("a", "tie", Verdict("g", "tie", disagree=True)),
        ("a", None, Verdict("g", "tie", unparsable=True)),
        (None, None, Verdict("g", "tie", unparsable=True)),
    ],
)
def test_verdict_of_both_orders(first, second, expected):
    assert by_orders("g", first, second) == expected


def test_verdict_of_scores():
    cases = [(3.5, 3.0, "win"), (3.0, 3.0, "tie"), (0.0, 5.0, "loss"), (None, 1.0, "tie")]
    verdicts = [by_scores("g", a, b) for a, b, _ in cases]
    assert [verdict.result for verdict in verdicts] == [result for _, _, result in cases]
    assert [verdict.unparsable for verdict in verdicts] == [False, False, False, True]


def test_rates_by_hand():
    verdicts = [Verdict(str(i), "win") for i in range(5)] + [Verdict(str(i), "loss") for i in range(5, 7)]
    verdicts += [Verdict("7", "tie", disagree=True), Verdict("8", "tie", unparsable=True), Verdict("9", "tie")]
    found = rates(verdicts, bootstrap=0)
    assert (found["win"], found["tie"], found["loss"]) == (0.5, 0.3, 0.2)
    assert found["win_rate"] == pytest.approx(0.65) and found["net"] == pytest.approx(0.3)
    assert (found["unparsable"], found["disagree"], found["verdicts"], found["groups"]) == (0.1, 0.1, 10, 10)
    assert not any(name.endswith("_interval") for name in found)
    nothing = rates([])
    assert nothing["win"] is None and nothing["verdicts"] == 0 and nothing.keys() == found.keys()


def test_interval_is_that_of_another_bootstrap():
    """Against scipy's percentile bootstrap of the mean of one value per verdict."""
    rng = random.Random(0)
    results = rng.choices(("win", "tie", "loss"), (5, 3, 2), k=80)
    found = rates([Verdict(str(i), result) for i, result in enumerate(results)], bootstrap=4000)
    values = np.array([{"win": 1.0, "tie": 0.5, "loss": 0.0}[result] for result in results])
    interval = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert found["win_rate_interval"] == pytest.approx([interval.low, interval.high], abs=0.015)


def test_verdicts_of_a_prompt_are_drawn_together():
    """Ten equal verdicts for each prompt tell no more than one: the interval stays that of the prompts."""
    results = ["win", "loss"] * 20
    single = rates([Verdict(str(i), result) for i, result in enumerate(results)])
    repeated = rates([Verdict(str(i), result) for i, result in enumerate(results) for _ in range(10)])
    assert repeated["win_interval"] == pytest.approx(single["win_interval"])
    assert (repeated["verdicts"], repeated["groups"]) == (400, 40)


def rows(*lengths):
    return [
        {"prompt_id": f"p{i}", "prompt": f"question {i}", "candidates": [{"text": "x" * n} for n in some]}
        for i, some in enumerate(lengths)
    ]


def test_rows_are_compared_answer_by_answer():
    verdicts = compare_rows(rows([1, 2], [3], []), rows([2, 1], [3, 4], []), lambda prompt, c: len(c["text"]))
    assert verdicts == [
        Verdict("p0", "loss"),
        Verdict("p0", "win"),
        Verdict("p1", "tie"),
        Verdict("p1", "tie", unparsable=True),
    ]
    with pytest.raises(UserError, match="not to the same prompts"):
        compare_rows(rows([1]), rows([1], [2]), lambda prompt, c: 0.0)


def test_templates(tmp_path):
    prompt = pairwise_prompt("say {a}", "first {b}", "second", TEMPLATE)
    assert "say {a}" in prompt and "first {b}" in prompt and prompt.count("second") == 1
    path = tmp_path / "t.txt"
    path.write_text("{instruction} {a} [[A]]")
    with pytest.raises(UserError, match=r"has no place \{b\}"):
        load_template(path)
    with pytest.raises(UserError, match="cannot read"):
        load_template(tmp_path / "none")
    path.write_text("{instruction} {a} or {b}")
    assert pairwise_prompt("q", "x", "y", load_template(path)) == "q x or y"
