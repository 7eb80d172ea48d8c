"""The parts of the generation phases that need no engine; the phases themselves run in test_iterate.py."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from srlm_fast import eft
from srlm_fast.config import Config
from srlm_fast.data import RankedPrompt
from srlm_fast.judge import Judgement
from srlm_fast.phases import generation
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


@pytest.mark.parametrize(
    "served, group_size, leads, overlap, judges",
    [
        (False, 1, True, True, True),
        (False, 2, False, True, True),
        (True, 1, True, True, True),
        (True, 2, True, False, True),
        (True, 2, False, False, False),
    ],
)
def test_ranks_of_a_group_begin_shards_at_the_same_step(
    tmp_path, monkeypatch, served, group_size, leads, overlap, judges
):
    """With a server as judge the ranks of a group know different things, so none may begin a shard early."""
    found, itself = {}, object()
    monkeypatch.setattr(generation, "answer_parts", lambda *arguments, **options: found.update(options) or ())
    run = SimpleNamespace(
        config=Config(),
        chat=None,
        judge=itself,
        candidate_judge=object() if served else itself,
        world=SimpleNamespace(group_size=group_size, leads_group=leads),
        run_dir=tmp_path,
        weights=str,
        engine=str,
        rows=lambda file: [],
        check_stop=None,
        overlapping_shards=lambda name, rows, work: list(work(iter(()))),
    )
    generation.candidates(run, 1)
    assert found["overlap"] is overlap
    assert found["judge"] is (run.candidate_judge if judges else None)
