"""The parts of the generation phases that need no engine; the phases themselves run in test_iterate.py."""

from dataclasses import asdict

from srlm_fast import eft
from srlm_fast.data import RankedPrompt
from srlm_fast.judge import Judgement
from srlm_fast.phases.generation import attempts_of


def judgements(*scores):
    return [asdict(Judgement(f"Score: {score}", score)) for score in scores]


def test_a_reply_too_long_to_be_judged_is_unparsable_in_every_attempt():
    prompt = RankedPrompt("p", "question", [("good", 0), ("too long", 1), ("bad", 2)])
    judged = [judgements(5.0, 4.0), [], judgements(5.0, 1.0)]
    attempts = list(attempts_of(judged))
    assert [[j.score for j in attempt] for attempt in attempts] == [[5.0, None, 5.0], [4.0, None, 1.0]]
    assert [e.score for e in eft.accept(prompt, attempts, scope="reply")] == [4.0, 1.0]
    assert eft.accept(prompt, attempts, scope="prompt") == []


def test_a_prompt_whose_replies_are_all_too_long_has_no_attempt():
    assert list(attempts_of([[], []])) == []
