"""CREAM's labels: Kendall's tau against SciPy and its definition, halves of judgements, scopes."""

import math
import random

import pytest
from scipy import stats

from srlm_fast.consistency import consistency, from_scores, halves, kendall_tau, labels


def test_tau_is_scipys_where_nothing_is_tied():
    rng = random.Random(0)
    for n in (2, 3, 5, 9):
        one, other = rng.sample(range(100), n), rng.sample(range(100), n)
        assert kendall_tau(one, other) == pytest.approx(stats.kendalltau(one, other).statistic, abs=1e-12)


def test_tied_answers_are_neither_in_order_nor_in_reverse():
    assert kendall_tau([1, 1, 2], [3, 4, 5]) == pytest.approx(2 / 3)
    assert kendall_tau([1, 1], [1, 2]) == 0
    assert kendall_tau([1], [1]) is None


def test_consistency_is_tau_scaled_to_0_and_1():
    assert consistency([1, 2, 3], [2, 4, 9]) == 1
    assert consistency([1, 2, 3], [9, 4, 2]) == 0
    assert consistency([1, 2, 3, 4], [1, None, 3, 2]) == pytest.approx((1 / 3 + 1) / 2), "of 1, 3, 4 two pairs agree"
    assert consistency([1, None], [1, 2]) is None


def test_halves_of_the_judgements():
    judgements = [{"score": score, "expected": None} for score in (5.0, 1.0, 3.0, None, None)]
    assert halves(judgements, "cot") == (4.0, 1.0)
    assert halves(judgements, "expected") == (None, None)


def test_scope():
    found = {"a": 1.0, "b": 0.5, "c": None}
    assert labels(found, "mean") == ({"a": 0.75, "b": 0.75, "c": 0.75}, 0.75)
    assert labels(found, "prompt") == ({"a": 1.0, "b": 0.5, "c": 0.75}, 0.75)
    assert labels({"a": None}, "mean") == ({"a": 1.0}, None)


def test_labels_from_scores():
    rows = [{"chosen_score": 4.0, "rejected_score": 2.5}]
    from_scores(rows)
    assert rows[0]["label"] == pytest.approx(1 / (1 + math.exp(-1.5)))
