import random
from collections import Counter
from itertools import product

import pytest

from srlm_fast.data import Example, RankedPrompt
from srlm_fast.eft import EftExample, accept, histogram, resample
from srlm_fast.errors import UserError
from srlm_fast.judge import Judgement, judge_prompt

PROMPT = RankedPrompt("p", "question", [("good", 0), ("fair", 1), ("bad", 2)])


def attempt(*scores):
    return [Judgement(f" Because.\nScore: {score}\n", score) for score in scores]


def taken(prompt, *attempts, **options):
    """{index of the reply: score} of what is accepted."""
    return {
        int(example.example.id.split("/")[1]): example.score
        for example in accept(prompt, [attempt(*scores) for scores in attempts], **options)
    }


def test_an_accepted_attempt_becomes_examples():
    examples = accept(PROMPT, [attempt(5, 4, 1)], template="{instruction}|{response}")
    assert examples == [
        EftExample(Example("p/0", "question|good", "Because.\nScore: 5"), 5, 0),
        EftExample(Example("p/1", "question|fair", "Because.\nScore: 4"), 4, 1),
        EftExample(Example("p/2", "question|bad", "Because.\nScore: 1"), 1, 2),
    ]
    assert accept(PROMPT, [attempt(5, 4, 1)])[2].example.prompt == judge_prompt("question", "bad")


def test_the_first_attempt_that_agrees_is_taken():
    assert taken(PROMPT, (4, 5, 1), (4, 4, 1), (4, 3, None), (4, 3, 2), (5, 4, 3)) == {0: 4, 1: 3, 2: 2}
    assert taken(PROMPT, (1, 2, 3)) == {}
    assert taken(PROMPT) == {}


def test_ties():
    assert taken(PROMPT, (4, 4, 1), ties="allow") == {0: 4, 1: 4, 2: 1}
    assert taken(PROMPT, (4, 4, 4), ties="allow") == {}
    level = RankedPrompt("p", "q", [("a", 0), ("b", 0), ("c", 1)])  # equal human ranks ask for no order
    assert taken(level, (3, 5, 2)) == {0: 3, 1: 5, 2: 2}
    assert taken(RankedPrompt("p", "q", [("a", 0), ("b", 0)]), (3, 5)) == {}


def test_scope_reply_takes_what_is_in_order_and_goes_on():
    assert taken(PROMPT, (4, 5, 1), scope="reply") == {2: 1}
    assert taken(PROMPT, (4, 5, 1), (5, 4, 3), scope="reply") == {0: 5, 1: 4, 2: 1}
    assert taken(PROMPT, (4, None, 1), scope="reply") == {0: 4, 2: 1}
    assert taken(PROMPT, (4, None, None), scope="reply") == {}


def test_cut_off_judgements_are_never_taken():
    judgements = attempt(5, 4, 1)
    judgements[1] = Judgement("Score: 4 and so", 4.0, finish_reason="length")
    assert accept(PROMPT, [judgements]) == []
    assert [e.score for e in accept(PROMPT, [judgements], scope="reply")] == [5, 1]


def test_unknown_options():
    with pytest.raises(UserError, match="eft.scope"):
        accept(PROMPT, [], scope="pair")
    with pytest.raises(UserError, match="eft.ties"):
        accept(PROMPT, [], ties="both")


def test_attempts_are_read_only_as_far_as_needed():
    def attempts():
        yield attempt(5, 4, 3)
        raise AssertionError("asked for another attempt")

    assert len(accept(PROMPT, attempts())) == 3


def test_acceptance_of_all_score_triples_against_the_definition():
    for scores in product((None, 1, 2, 3), repeat=3):
        strict = None not in scores and scores[0] > scores[1] > scores[2]
        assert bool(taken(PROMPT, scores)) == strict
        loose = None not in scores and scores[0] >= scores[1] >= scores[2] and scores[0] > scores[2]
        assert bool(taken(PROMPT, scores, ties="allow")) == loose


def examples(histogram):
    rows = [EftExample(Example(f"{s}/{i}", "q", "t"), s, 0) for s, n in histogram.items() for i in range(n)]
    random.Random(0).shuffle(rows)
    return rows


@pytest.mark.parametrize(
    ("before", "share", "after"),
    [
        ({1: 10, 2: 10, 3: 10, 4: 70}, 0.4, {1: 10, 2: 10, 3: 10, 4: 20}),
        ({1: 10, 2: 10, 3: 10, 4: 70}, 1.0, {1: 10, 2: 10, 3: 10, 4: 70}),
        ({1: 10, 2: 10, 3: 10, 4: 10}, 0.4, {1: 10, 2: 10, 3: 10, 4: 10}),
        ({3: 30, 4: 70}, 0.4, {3: 30, 4: 30}),  # never below the runner-up
        ({4: 70}, 0.4, {4: 70}),
        ({3: 6, 4: 9}, 0.6, {3: 6, 4: 9}),  # exactly the share
        ({3: 6, 4: 10}, 0.6, {3: 6, 4: 9}),
        ({}, 0.4, {}),
    ],
)
def test_the_most_common_score_is_thinned_out(before, share, after):
    rows = examples(before)
    kept, report = resample(rows, max_share=share)
    assert histogram(rows) == before and histogram(kept) == after
    assert report == {"thinned": len(rows) - len(kept), "capped": 0}
    assert [row for row in rows if row in kept] == kept  # in order, nothing twice
    assert resample(rows, max_share=share)[0] == kept


def test_the_cap():
    rows = examples({1: 400, 2: 600, 4: 5000})
    kept, report = resample(rows)
    ids = {row.example.id for row in kept}
    assert len(kept) == len(ids) == 1630
    scores = Counter(row.score for row in kept)
    assert histogram(kept) == dict(sorted(scores.items())) and abs(scores[4] / 1630 - 0.4) < 0.05
    assert report["thinned"] > 0 and sum(report.values()) == len(rows) - 1630
    assert kept != resample(rows, seed=1)[0]
    assert [row for row in rows if row.example.id in ids] == kept
