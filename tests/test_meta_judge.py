"""Meta-Rewarding's comparisons: prompts, winners, position weights, battles and Elo scores."""

import math
import random
from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import minimize

from srlm_fast.chat import chat_format
from srlm_fast.config import Config
from srlm_fast.engine.base import Completion
from srlm_fast.errors import UserError
from srlm_fast.meta_judge import (
    PRIOR,
    MetaJudge,
    battles,
    elo_scores,
    load_template,
    meta_prompt,
    most_uncertain,
    parse_winner,
    position_weights,
)
from srlm_fast.tokenizer import load_tokenizer


def comparison(first: int, second: int, winner: str | None) -> dict:
    return {"first": first, "second": second, "winner": winner}


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("The first is stricter.\nWinner: 1", "first"),
        ("winner: **2**", "second"),
        ("Winner: 1? No.\nWinner: Judgement 2.", "second"),
        ('in the form "Winner: 1" or "Winner: 2"', "second"),
        ("Winner: 12", None),
        ("Winner: neither", None),
        ("", None),
    ],
)
def test_winner(text, winner):
    assert parse_winner(text) == winner


def test_prompt_holds_the_texts_literally():
    prompt = meta_prompt("say {first}", "{second}", "one {response}", "two")
    assert "User: say {first}\n" in prompt and "<response>{second}</response>" in prompt
    assert prompt.index("one {response}") < prompt.index("\ntwo\n")


def test_template_without_a_place_is_refused(tmp_path):
    (tmp_path / "meta.txt").write_text("{instruction} {response} {first}")
    with pytest.raises(UserError, match="meta-judge template has no place {second}"):
        load_template(tmp_path / "meta.txt")


def test_the_answer_with_the_highest_variance():
    def candidate(*scores, finish="stop"):
        return {"judgements": [{"score": s, "expected": s, "finish_reason": finish} for s in scores]}

    candidates = [candidate(3, 3, 3), candidate(1, 5, None), candidate(2, 4), candidate(0, 5, finish="length")]
    assert most_uncertain(candidates, "score") == (1, [0, 1])
    assert most_uncertain([candidate(3, 3), candidate(2, None)], "score") is None
    assert most_uncertain([], "score") is None


def test_a_place_that_wins_often_counts_less():
    won = [comparison(0, 1, "first")] * 3 + [comparison(1, 0, "second"), comparison(1, 2, None)]
    assert position_weights(won) == (0.25, 0.75)
    assert position_weights([]) == (0.5, 0.5)


def test_battles_by_their_definition():
    """B_mn = w_1 [r_mn = 1] + w_2 [r_nm = -1]"""
    rng = random.Random(0)
    found = [comparison(m, n, rng.choice(("first", "second", None))) for m, n in permutations(range(4), 2)]
    r = {(c["first"], c["second"]): {"first": 1, "second": -1, None: 0}[c["winner"]] for c in found}
    weights = (0.3, 0.7)
    expected = np.zeros((4, 4))
    for m, n in permutations(range(4), 2):
        expected[m, n] = weights[0] * (r[m, n] == 1) + weights[1] * (r[n, m] == -1)
    assert np.array_equal(battles(found, 4, weights), expected)


def test_pure_position_bias_decides_nothing():
    found = [comparison(m, n, "first") for m, n in permutations(range(3), 2)] + [comparison(0, 1, "second")]
    scores = elo_scores(battles(found[:-1], 3, position_weights(found)))
    assert np.abs(scores).max() < 1e-12


def test_elo_scores_maximise_the_likelihood():
    rng = np.random.default_rng(0)
    for n in (2, 5, 11):
        won = rng.random((n, n)) * rng.integers(0, 2, (n, n)) * (1 - np.eye(n))

        def loss(e, won=won):
            difference = e[:, None] - e[None, :]
            return (won * np.logaddexp(0, -difference)).sum() + PRIOR / 2 * (e**2).sum()

        best = minimize(loss, np.zeros(n), method="BFGS", options={"gtol": 1e-9})
        assert elo_scores(won) == pytest.approx(best.x, abs=1e-5)


def test_elo_scores_of_two_are_the_log_odds():
    scores = elo_scores(np.array([[0.0, 3.0], [1.0, 0.0]]), prior=1e-9)
    assert scores[0] - scores[1] == pytest.approx(math.log(3), abs=1e-6)
    shut_out = elo_scores(np.array([[0.0, 20.0], [0.0, 0.0]]))
    assert np.isfinite(shut_out).all() and shut_out[0] > shut_out[1]


@pytest.fixture(scope="module")
def subject() -> dict:
    judgements = [{"text": "3 yes.\nScore: 5"}, {"text": "3 no.\nScore: 4"}]
    return {"id": "m1-000000", "prompt": "List 3 birds.", "candidate": {"text": "owl", "judgements": judgements}}


@pytest.mark.parametrize("mode", ["cot", "direct"])
def test_requests_and_their_completions(subject, mode):
    config, chat = Config(), chat_format("plain", load_tokenizer("configs/tiny"))
    config.meta_judge.mode, config.meta_judge.max_new_tokens = mode, 20
    judge = MetaJudge(chat, config.meta_judge, config.judge, 4096)
    one, other = (judge.request(subject, order, seed=1) for order in ((0, 1), (1, 0)))
    text = chat.decode(one.prompt_ids)
    assert text.index("5") > 0 and one.prompt_ids != other.prompt_ids and one.metadata == ("m1-000000", (0, 1))
    if mode == "direct":
        assert one.max_new_tokens == 1 and text.rstrip().endswith("Winner:")
        done = Completion(one, 0, [1], [0.0], "length", [[-2.0, -1.0]])
        assert judge.read(done)[0] == "second"
    else:
        assert one.seed != other.seed and one.top_p == config.judge.top_p
        ids = chat.encode_response("better.\nWinner: 1")
        assert judge.read(Completion(one, 0, ids, [0.0] * len(ids), "stop"))[0] == "first"
    assert MetaJudge(chat, config.meta_judge, config.judge, 60).request(subject, (0, 1), seed=1) is None
