import math
import random
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from srlm_fast.data.oasst import read_prompts
from srlm_fast.evaluate import Ranked, judge_metrics, ranks


def test_known_values():
    items = [
        Ranked([5, 3, 1], [0, 1, 2]),  # the human order
        Ranked([1, 3, 5], [0, 1, 2]),  # its reverse
        Ranked([5, 5, 2], [0, 1, 2]),  # a tie at the top
        Ranked([4, None], [0, 1]),  # one unparsable
    ]
    metrics = judge_metrics(items, bootstrap=0)
    tau = 2 / math.sqrt(6)  # tau-b of 5, 5, 2: (2 - 0) / sqrt((3 - 1) * 3)
    assert metrics == {
        "pairwise_accuracy": 5 / 10,
        "pairwise_accuracy_decided": 5 / 8,
        "exact_match": 1 / 4,
        "exact_match_ties_allowed": 2 / 4,
        "five_best": 2 / 4,
        "spearman": pytest.approx((1 - 1 + math.sqrt(3) / 2 + 0) / 4),
        "kendall": pytest.approx((1 - 1 + tau + 0) / 4),
        "tie_rate": 1 / 9,
        "unparsable": 1 / 11,
        "spearman_pooled": pytest.approx(
            stats.spearmanr([5, 3, 1, 1, 3, 5, 5, 5, 2, 4], [0, -1, -2, 0, -1, -2, 0, -1, -2, 0]).statistic
        ),
        "kendall_pooled": pytest.approx(
            stats.kendalltau([5, 3, 1, 1, 3, 5, 5, 5, 2, 4], [0, -1, -2, 0, -1, -2, 0, -1, -2, 0]).statistic
        ),
        "instructions": 4,
        "replies": 11,
    }


def test_against_plain_loops_and_scipy():
    """Ragged instructions with ties on both sides and missing scores, against the definitions written out."""
    rng = random.Random(0)
    items = []
    for _ in range(120):
        n = rng.randrange(6)
        scores = [rng.choice([None, 0, 1.5, 3, 4, 5]) for _ in range(n)]
        items.append(Ranked(scores, [rng.randrange(4) for _ in range(n)]))
    metrics = judge_metrics(items, bootstrap=0)
    right = wrong = tied = missing = 0
    exact, spearman, kendall = [], [], []
    for item in items:
        replies = list(zip(item.scores, item.ranks))
        if len(set(item.ranks)) < 2:
            continue
        good = True
        for (s, r), (t, q) in combinations(replies, 2):
            if r == q:
                continue
            if s is None or t is None:
                missing, good = missing + 1, False
            elif s == t:
                tied, good = tied + 1, False
            elif (s > t) == (r < q):
                right += 1
            else:
                wrong, good = wrong + 1, False
        exact.append(good)
        known = np.array([(s, -r) for s, r in replies if s is not None]).reshape(-1, 2)
        defined = len(known) > 1 and all(len(set(column)) > 1 for column in known.T)
        # Spearman is Pearson's r of average ranks; tau-b from its definition.
        spearman.append(np.corrcoef(*(stats.rankdata(c) for c in known.T))[0, 1] if defined else 0.0)
        signs = [[np.sign(a[k] - b[k]) for a, b in combinations(known, 2)] for k in (0, 1)]
        both = math.sqrt(sum(np.abs(signs[0])) * sum(np.abs(signs[1]))) if defined else 1.0
        kendall.append(float(np.dot(*signs)) / both if defined else 0.0)
    assert min(right, wrong, tied, missing) > 20
    assert metrics["pairwise_accuracy"] == right / (right + wrong + tied + missing)
    assert metrics["pairwise_accuracy_decided"] == right / (right + wrong)
    assert metrics["tie_rate"] == tied / (right + wrong + tied)
    assert metrics["exact_match"] == sum(exact) / len(exact)
    assert metrics["spearman"] == pytest.approx(np.mean(spearman))
    assert metrics["kendall"] == pytest.approx(np.mean(kendall))
    assert metrics["instructions"] == len(exact)
    assert metrics["replies"] == sum(len(item.ranks) for item in items)
    assert metrics["unparsable"] == sum(s is None for i in items for s in i.scores) / metrics["replies"]


def test_five_best_counts_replies_with_the_best_score():
    items = [Ranked([5, 5, 1], [1, 0, 2]), Ranked([4.5, 1], [0, 1]), Ranked([5, 5], [0, 0])]
    assert judge_metrics(items, bootstrap=0)["five_best"] == 3 / 4
    assert judge_metrics(items, best_score=4.5, bootstrap=0)["five_best"] == 4 / 5
    assert judge_metrics(items[1:2], bootstrap=0)["five_best"] is None


def test_a_judge_of_known_accuracy_on_open_assistants_ranks(shared_data):
    """Scores that follow the human ranks, but every third prompt has its best two swapped, the next one score for all
    and the last reply of the next without a score: each metric is then a count of pairs and prompts."""
    prompts, _ = read_prompts(shared_data("oasst1/oasst1-en-validation.jsonl"))
    ranked = [[rank for _, rank in prompt.replies] for prompt in prompts if len(prompt.replies) > 1]
    swapped, one_score, unscored = ([order for order in ranked[i::3]] for i in range(3))
    items = [Ranked([5 - r for r in (order[1], order[0], *order[2:])], order) for order in swapped]
    items += [Ranked([3] * len(order), order) for order in one_score]
    items += [Ranked([*(5 - r for r in order[:-1]), None], order) for order in unscored]
    metrics = judge_metrics(items, bootstrap=50)

    def pairs(orders: list[list[int]]) -> int:
        return sum(math.comb(len(order), 2) for order in orders)

    missing = sum(len(order) - 1 for order in unscored)
    right = pairs(swapped) - len(swapped) + pairs(unscored) - missing
    assert min(len(swapped), pairs(swapped), right, missing) > 50 and metrics["instructions"] == len(ranked)
    assert metrics["pairwise_accuracy"] == pytest.approx(right / pairs(ranked))
    assert metrics["pairwise_accuracy_decided"] == pytest.approx(right / (right + len(swapped)))
    assert metrics["tie_rate"] == pytest.approx(pairs(one_score) / (pairs(ranked) - missing))
    assert metrics["exact_match"] == 0.0
    assert metrics["exact_match_ties_allowed"] == pytest.approx(len(one_score) / len(ranked))
    assert metrics["five_best"] == pytest.approx(len(unscored) / (len(swapped) + len(unscored)))
    assert metrics["unparsable"] == pytest.approx(len(unscored) / sum(map(len, ranked)))
    low, high = metrics["pairwise_accuracy_interval"]
    assert low < metrics["pairwise_accuracy"] < high


def test_a_perfect_and_a_reversed_judge():
    rng = random.Random(1)
    orders = [rng.sample(range(n), n) for n in (2, 3, 4, 5) for _ in range(5)]
    perfect = judge_metrics([Ranked([-r for r in order], order) for order in orders], bootstrap=100)
    reversed_ = judge_metrics([Ranked(order, order) for order in orders], bootstrap=100)
    for name in ("pairwise_accuracy", "pairwise_accuracy_decided", "exact_match", "exact_match_ties_allowed"):
        assert (perfect[name], reversed_[name]) == (1.0, 0.0)
        assert perfect[f"{name}_interval"] == [1.0, 1.0]
    for name in ("spearman", "kendall"):
        assert perfect[name] == pytest.approx(1.0) and reversed_[name] == pytest.approx(-1.0)


def test_intervals_cover_the_truth_and_are_seeded():
    """Judges that are right with probability 0.8 per instruction: about 95 % of the intervals hold 0.8."""
    rng = random.Random(2)
    covered = 0
    for _ in range(40):
        items = [Ranked([2, 1] if rng.random() < 0.8 else [1, 2], [0, 1]) for _ in range(80)]
        low, high = judge_metrics(items, bootstrap=200)["pairwise_accuracy_interval"]
        covered += low <= 0.8 <= high
        assert 0.1 < high - low < 0.25
    assert covered >= 34
    assert judge_metrics(items) == judge_metrics(items)
    assert judge_metrics(items, seed=1) != judge_metrics(items)


def test_nothing_to_evaluate():
    metrics = judge_metrics([])
    assert metrics.pop("instructions") == metrics.pop("replies") == 0
    assert set(metrics.values()) == {None}
    alone = judge_metrics([Ranked([3], [0]), Ranked([None, None], [0, 0])])
    assert alone["pairwise_accuracy"] is None and alone["pairwise_accuracy_interval"] is None
    assert alone["unparsable"] == 2 / 3
    unscored = judge_metrics([Ranked([None, None], [0, 1])])
    assert unscored["pairwise_accuracy"] == 0.0 and unscored["tie_rate"] is None and unscored["spearman"] == 0.0


def test_ranks_of_known_qualities():
    assert ranks([3, 5, 5, 1]) == [1, 0, 0, 2]
    assert ranks([]) == []
    metrics = judge_metrics([Ranked([3, 5, 5, 1], ranks([3, 5, 5, 1]))], bootstrap=0)
    assert metrics["exact_match"] == 1.0 and metrics["kendall"] == pytest.approx(1.0)
