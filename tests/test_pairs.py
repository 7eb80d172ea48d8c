import json
import random
from collections import Counter

import pytest

from srlm_fast.errors import UserError
from srlm_fast.pairs import COUNTS, FORMAT, make_pairs


def candidate(index, score, text=None, *, finish_reason="stop", length=3):
    return {
        "index": index,
        "text": text or f"answer {index}",
        "token_ids": list(range(index, index + length)),
        "finish_reason": finish_reason,
        "seed": 7,
        "score": score,
        "judgements": [{"text": f"Score: {score}", "score": score, "seed": 9, "finish_reason": "stop"}],
    }


def record(candidates, prompt_id="p", prompt="question"):
    return {"prompt_id": prompt_id, "prompt": prompt, "prompt_ids": [1, 2], "candidates": candidates}


def one(candidates, **options):
    rows, counts = make_pairs([record(candidates)], weights_id="w", **options)
    return rows[0] if rows else None, counts


def test_the_best_is_paired_with_the_worst_and_everything_is_kept():
    candidates = [candidate(0, 3.0), candidate(1, 4.5), candidate(2, 1.0), candidate(3, None)]
    row, counts = one(candidates, seed=5)
    assert row == {
        "format": FORMAT,
        "kind": "answers",
        "id": "p",
        "prompt_id": "p",
        "prompt": "question",
        "chosen": "answer 1",
        "rejected": "answer 2",
        "chosen_score": 4.5,
        "rejected_score": 1.0,
        "chosen_index": 1,
        "rejected_index": 2,
        "prompt_ids": [1, 2],
        "chosen_ids": [1, 2, 3],
        "rejected_ids": [2, 3, 4],
        "weights_id": "w",
        "pair_seed": 5,
        "candidates": candidates,
    }
    assert json.loads(json.dumps(row)) == row
    assert {name: count for name, count in counts.items() if count} == {
        "prompts": 1,
        "candidates": 4,
        "unscored": 1,
        "pairs": 1,
    }


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ([candidate(0, 3.0), candidate(1, 3.0)], "equal"),
        ([candidate(0, 3.0), candidate(1, None)], "too_few"),
        ([], "too_few"),
        ([candidate(0, 3.0, "same"), candidate(1, 2.0, "same\n")], "identical"),
    ],
)
def test_prompts_without_a_pair(candidates, reason):
    row, counts = one(candidates)
    assert row is None
    assert counts[reason] == 1 and counts["pairs"] == 0


def test_messages_give_messages():
    prompt = [{"role": "user", "content": "question"}]
    (row,), _ = make_pairs([record([candidate(0, 1.0), candidate(1, 2.0)], prompt=prompt)], weights_id="w")
    assert row["prompt"] == prompt
    assert row["chosen"] == [{"role": "assistant", "content": "answer 1"}]
    assert row["rejected"] == [{"role": "assistant", "content": "answer 0"}]


def test_ties_are_resolved_by_the_rule():
    lengths = [4, 2, 3, 9, 5]
    scores = [5.0, 5.0, 3.0, 1.0, 1.0]
    candidates = [candidate(i, score, length=length) for i, (score, length) in enumerate(zip(scores, lengths))]
    chosen_and_rejected = {
        rule: (row["chosen_index"], row["rejected_index"])
        for rule in ("first", "length")
        for row, _ in [one(candidates, ties=rule)]
    }
    assert chosen_and_rejected == {"first": (0, 3), "length": (1, 3)}
    # Random: every tied candidate has its turn, the same for the same seed and prompt whatever stands around it.
    records = [record(candidates, prompt_id=f"p{i}") for i in range(400)]
    rows, counts = make_pairs(records, weights_id="w", seed=1)
    drawn = Counter((row["chosen_index"], row["rejected_index"]) for row in rows)
    assert set(drawn) == {(0, 3), (0, 4), (1, 3), (1, 4)} and min(drawn.values()) > 60
    assert counts["tied"] == 400
    assert make_pairs(records[::-1], weights_id="w", seed=1)[0] == rows[::-1]
    assert make_pairs(records, weights_id="w", seed=2)[0] != rows
    with pytest.raises(UserError, match="pairs.ties"):
        one(candidates, ties="longest")


def test_a_tied_candidate_with_another_text_saves_the_pair():
    candidates = [candidate(0, 4.0, "same"), candidate(1, 2.0, "same"), candidate(2, 2.0, "other")]
    for seed in range(20):
        row, _ = one(candidates, seed=seed)
        assert (row["chosen_index"], row["rejected_index"]) == (0, 2)


def test_truncated_candidates():
    candidates = [candidate(0, 5.0, finish_reason="length"), candidate(1, 4.0), candidate(2, 1.0)]
    row, counts = one(candidates)
    assert row["chosen_index"] == 0 and counts["truncated"] == 1
    row, counts = one(candidates, keep_truncated=False)
    assert row["chosen_index"] == 1 and counts["truncated"] == 1


def test_every_prompt_is_accounted_for():
    rng = random.Random(0)
    records = []
    for i in range(500):
        n = rng.randrange(5)
        candidates = [candidate(k, rng.choice([None, 1.0, 2.0, 3.0]), rng.choice("ab")) for k in range(n)]
        records.append(record(rng.sample(candidates, n), prompt_id=str(i)))
    rows, counts = make_pairs(records, weights_id="w")
    assert set(counts) == set(COUNTS)
    assert sum(counts[name] for name in ("pairs", "too_few", "equal", "identical")) == counts["prompts"] == 500
    assert min(counts[name] for name in ("pairs", "too_few", "equal", "identical", "tied")) > 10
    for row in rows:
        scores = [c["score"] for c in row["candidates"] if c["score"] is not None]
        assert (row["chosen_score"], row["rejected_score"]) == (max(scores), min(scores))
        assert row["chosen"] != row["rejected"]
        by_index = {c["index"]: c for c in row["candidates"]}
        assert row["chosen_ids"] == by_index[row["chosen_index"]]["token_ids"]
        assert row["rejected_ids"] == by_index[row["rejected_index"]]["token_ids"]
