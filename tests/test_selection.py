"""Which answers are paired: every rule against its definition."""

import random

import pytest

from srlm_fast.pairs import make_pairs
from srlm_fast.selection import RULES, pools, tiers


def answer(index: int, score: float, length: int = 2, **more) -> dict:
    return {
        "index": index,
        "text": more.pop("text", f"answer {index}"),
        "token_ids": [7] * length,
        "finish_reason": "stop",
        "score": score,
        **more,
    }


def pairs_of(candidates: list[dict], **options) -> tuple[list[tuple[int, int]], dict[str, int]]:
    record = {"prompt_id": "p", "prompt": "question", "prompt_ids": [1], "candidates": candidates}
    rows, counts = make_pairs([record], weights_id="w", **options)
    return [(row["chosen_index"], row["rejected_index"]) for row in rows], counts


def test_max_random_takes_any_worse_one():
    candidates = [answer(i, score) for i, score in enumerate((4.0, 1.0, 3.0, 4.0, 2.0))]
    found = {pair for seed in range(200) for pair in pairs_of(candidates, select="max_random", seed=seed)[0]}
    assert found == {(best, worse) for best in (0, 3) for worse in (1, 2, 4)}


@pytest.mark.parametrize(
    ("scores", "pair"), [((1.0, 3.0, 5.0), (2, 1)), ((1.0, 2.0, 4.0, 5.0), (3, 1)), ((5.0, 2.0), (0, 1))]
)
def test_max_median(scores, pair):
    candidates = [answer(i, score) for i, score in enumerate(scores)]
    assert pairs_of(candidates, select="max_median")[0] == [pair]


def test_top_bottom():
    candidates = [answer(i, score) for i, score in enumerate((2.0, 5.0, 1.0, 4.0, 3.0))]
    assert pairs_of(candidates, select="top_bottom", k=1)[0] == [(1, 2)]
    assert pairs_of(candidates, select="top_bottom", k=2)[0] == [(1, 2), (3, 0)]
    assert pairs_of(candidates, select="top_bottom", k=9)[0] == [(1, 2), (3, 0)], "no more pairs than halves"
    tied = [answer(i, score) for i, score in enumerate((5.0, 3.0, 3.0, 1.0))]
    assert pairs_of(tied, select="top_bottom", k=2)[0] == [(0, 3)], "equal scores make no pair"


def test_all_pairs_with_a_margin_against_a_plain_loop():
    rng = random.Random(0)
    for _ in range(50):
        scores = [rng.choice((1.0, 2.0, 2.5, 4.0)) for _ in range(5)]
        margin = rng.choice((0.0, 0.5, 1.5))
        expected = {
            (i, j) for i in range(5) for j in range(5) if scores[i] > scores[j] and scores[i] - scores[j] >= margin
        }
        found, counts = pairs_of([answer(i, s) for i, s in enumerate(scores)], select="all", margin=margin)
        assert set(found) == expected and len(found) == len(expected) == counts["pairs"]
        if not found:
            assert counts["equal"] + counts["close"] == 1 and counts["equal"] == (len(set(scores)) == 1)


def test_ids_of_several_pairs_differ():
    record = {
        "prompt_id": "p",
        "prompt": "q",
        "prompt_ids": [1],
        "candidates": [answer(i, float(i)) for i in range(3)],
    }
    rows, _ = make_pairs([record], weights_id="w", select="all")
    assert [row["id"] for row in rows] == ["p", "p/1", "p/2"] and {row["prompt_id"] for row in rows} == {"p"}
    assert [len(row["candidates"]) for row in rows] == [3, 2, 2], "all candidates are kept once"
    for row in rows:
        assert {row["chosen_index"], row["rejected_index"]} <= {c["index"] for c in row["candidates"]}


@pytest.mark.parametrize("select", ["max_min", "max_random", "max_median", "top_bottom", "all"])
def test_the_margin_holds_for_every_rule(select):
    candidates = [answer(0, 3.0), answer(1, 2.5)]
    assert pairs_of(candidates, select=select, margin=0.5)[0] == [(0, 1)]
    found, counts = pairs_of(candidates, select=select, margin=0.6)
    assert not found and counts["close"] == 1
    assert select in RULES


def test_length_control_against_its_definition():
    """Meta-Rewarding: the shortest of the upper share of the range against the longest of the lower."""
    rng = random.Random(1)
    for _ in range(200):
        scores = [rng.choice((0.0, 1.0, 2.0, 3.0, 4.0, 5.0)) for _ in range(7)]
        lengths = rng.sample(range(1, 50), 7)
        rho = rng.choice((0.1, 0.3, 0.4, 0.5))
        high, low = max(scores), min(scores)
        found, counts = pairs_of([answer(i, s, n) for i, (s, n) in enumerate(zip(scores, lengths))], length_control=rho)
        if high == low:
            assert not found and counts["equal"] == 1
            continue
        top = [i for i in range(7) if scores[i] >= (1 - rho) * high + rho * low]
        bottom = [i for i in range(7) if scores[i] <= (1 - rho) * low + rho * high]
        ((chosen, rejected),) = found
        if rho < 0.5:
            assert chosen == min(top, key=lambda i: lengths[i]) and rejected == max(bottom, key=lambda i: lengths[i])
        assert chosen in top and rejected in bottom and scores[chosen] > scores[rejected]


def test_rho_0_is_best_against_worst():
    candidates = [answer(i, s, n) for i, (s, n) in enumerate(((5.0, 9), (4.9, 1), (0.1, 30), (0.0, 3)))]
    assert tiers(candidates, candidates, 0) == ([candidates[0]], [candidates[3]])
    assert pairs_of(candidates)[0] == [(0, 3)]
    assert pairs_of(candidates, length_control=0.1)[0] == [(1, 2)]


@pytest.mark.parametrize(
    ("past", "future", "pair"),
    [
        ((2.0, 0.5), (), (1, 3)),  # the worst past answer is below all of M_t's
        ((1.0, 4.0), (), (1, 0)),  # it is not: M_t's own worst
        ((2.0, 0.5), (4.5, 5.0), (1, 3)),  # a future answer that is as good as M_t's best does not replace it
        ((2.0, 0.5), (3.0, 5.5), (5, 3)),
        ((6.0,), (), (1, 0)),  # past answers are never chosen
    ],
)
def test_past_and_future_answers(past, future, pair):
    candidates = [answer(0, 1.0), answer(1, 5.0)]
    candidates += [answer(2 + i, score, by="past") for i, score in enumerate(past)]
    candidates += [answer(2 + len(past) + i, score, by="future") for i, score in enumerate(future)]
    assert pairs_of(candidates)[0] == [pair]


def test_without_an_own_scored_answer_there_is_no_pair():
    candidates = [answer(0, 1.0, by="past"), answer(1, 5.0, by="future")]
    assert pools(candidates) == ([], []) and pairs_of(candidates)[0] == []
