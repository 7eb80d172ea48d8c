"""task=judge: the five metrics of a judge, on ranked replies of Open Assistant's layout and on scored rows."""

import json

import pytest
from evaluation_case import TINY, lines, run
from test_endpoint import completion, serving

from srlm_fast.data import oasst
from srlm_fast.errors import UserError
from srlm_fast.evaluate import Ranked, judge_metrics
from srlm_fast.evaluation.judging import read_ranked

ROWS = [
    {"prompt": "p one", "responses": ["aaa", "bb", "c"], "scores": [9.5, 4, 4]},
    {"prompt": [{"role": "user", "content": "p two"}], "responses": ["a", "bbb"], "labels": [0.2, 0.9]},
    {"prompt": "all the same", "responses": ["a", "bbb"], "labels": [1, 1]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scored_rows_become_ranks(tmp_path):
    first, second = read_ranked(write(tmp_path / "rows.jsonl", ROWS))
    assert (first.prompt, first.replies) == ("p one", [("aaa", 0), ("bb", 1), ("c", 1)])
    assert (second.prompt, second.replies) == ("p two", [("a", 1), ("bbb", 0)])


def test_a_server_as_judge(tmp_path):
    """It scores a reply by its length, so all metrics are known."""

    def length(number, body):
        reply = body["messages"][0]["content"].split("<response> ")[1].split(" </response>")[0]
        return completion(f"Score: {len(reply) + 2}")

    with serving(length) as (url, asked):
        found = run(tmp_path / "run", "judge", ranked=write(tmp_path / "rows.jsonl", ROWS), judge__n=1,
                    judge__endpoint=url, judge__endpoint_model="big")  # fmt: skip
        assert len(asked) == 5
    assert found["pairwise_accuracy"] == found["exact_match"] == found["five_best"] == 1.0
    assert found["judge"] == "big" and found["unparsable_judgements"] == 0 and found["instructions"] == 2
    assert [row["scores"] for row in lines(tmp_path / "run/judgements.jsonl")] == [[5.0, 4.0, 3.0], [3.0, 5.0]]
    assert json.loads((tmp_path / "run/judge_metrics.json").read_text()) == found


def test_a_checkpoint_as_judge(tmp_path):
    """The tiny model on some of its own ranked prompts, as the loop writes them and in Open Assistant's file."""
    prompts, _ = oasst.read_prompts(TINY / "oasst.jsonl.gz")
    assert len(read_ranked(TINY / "oasst.jsonl.gz")) > 100
    rows = [{"id": p.id, "prompt": p.prompt, "replies": p.replies} for p in prompts if len(p.replies) > 2][:6]
    found = run(tmp_path / "run", "judge", model=TINY, ranked=write(tmp_path / "r.jsonl", rows), judge__n=2,
                judge__max_new_tokens=64)  # fmt: skip
    judged = lines(tmp_path / "run/judgements.jsonl")
    assert [row["id"] for row in judged] == [row["id"] for row in rows]
    ranked = []
    for row, of_row in zip(rows, judged):
        read = [[j["score"] for j in of_reply if j["score"] is not None] for of_reply in of_row["judgements"]]
        scores = [sum(values) / len(values) if values else None for values in read]
        ranked.append(Ranked(scores, [rank for _, rank in row["replies"]]))
    expected = judge_metrics(ranked)
    assert found["judge"] == "tiny" and {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "x", "responses": ["a", "b"], "scores": [1]}], ":1: is no row of ranked replies"),
        ([{"prompt": "x", "responses": ["a", "b"]}], ":1: is no row of ranked replies"),
        ([ROWS[0], {"prompt": "x", "replies": [["a", "best"]]}], ":2: is no row of ranked replies"),
        ([ROWS[2]], "no prompt with two differently ranked replies"),
        ([{"id": "1", **ROWS[0]}, {"id": "1", **ROWS[1]}], "an id is there twice"),
        ([ROWS[0]], "there is no model to judge: name one, judge.path=FOLDER"),
    ],
)
def test_bad_input(tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        run(tmp_path / "run", "judge", ranked=write(tmp_path / "rows.jsonl", rows))
