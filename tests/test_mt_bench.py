"""MT-Bench: conversations and ratings in FastChat's files, on questions of the real one."""

import json

import pytest
from evaluation_case import TINY, configured, lines, run
from test_endpoint import completion, serving

from srlm_fast.chat import chat_format
from srlm_fast.data import read_rows
from srlm_fast.engine import Request, load_engine
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.evaluation.mt_bench import mean_ratings, parse_rating, rating_prompt
from srlm_fast.evaluation.run import Evaluation
from srlm_fast.rollout import derive_seed
from srlm_fast.tokenizer import load_tokenizer

ANSWER_FIELDS = ["question_id", "answer_id", "model_id", "choices", "tstamp"]
JUDGMENT_FIELDS = ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
"""The fields that FastChat writes, in its order."""
PICKED = (81, 82, 111, 112, 121)  # writing, math, coding


@pytest.fixture(scope="module")
def questions(shared_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("mt") / "question.jsonl"
    rows = [row for _, row in read_rows(shared_data("mt_bench/question.jsonl"))]
    assert len(rows) == 80 and len({row["category"] for row in rows}) == 8
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["question_id"] in PICKED))
    return path


@pytest.fixture(scope="module")
def answered(questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    counts = run(folder, "mt_bench", model=TINY, questions=questions, answers__max_new_tokens=12, answers__n=2)
    return folder / "model_answer/tiny.jsonl", counts


def test_every_turn_is_asked_with_the_turns_before_it(answered, questions):
    """Against the engine, asked by hand; math and coding are greedy, so both of their choices are the same."""
    found, counts = lines(answered[0]), answered[1]
    assert [list(row) for row in found] == [ANSWER_FIELDS] * len(PICKED)
    assert [row["question_id"] for row in found] == list(PICKED)
    assert {row["model_id"] for row in found} == {"tiny"} and len({row["answer_id"] for row in found}) == len(PICKED)
    engine, chat = load_engine("native"), chat_format("plain", load_tokenizer(TINY))
    engine.load(TINY)
    too_long = 0
    for question, row in zip(lines(questions), found):
        assert [(list(choice), choice["index"]) for choice in row["choices"]] == [
            (["index", "turns"], i) for i in (0, 1)
        ]
        for choice in row["choices"]:
            messages = []
            for turn, (asked, text) in enumerate(zip(question["turns"], choice["turns"], strict=True)):
                messages.append({"role": "user", "content": asked})
                ids = chat.encode_prompt(messages)
                if len(ids) >= 512:
                    too_long += 1
                    assert text == ""
                    continue
                request = Request(
                    prompt_ids=ids,
                    temperature=0.7 if question["category"] == "writing" else 0.0,
                    top_p=0.9,
                    max_new_tokens=min(12, 512 - len(ids)),
                    seed=derive_seed(0, "mt_bench", question["question_id"], choice["index"], turn),
                    stop_ids=chat.stop_ids,
                )
                (expected,) = engine.stream([request])
                assert text == chat.decode(expected.token_ids)
                messages.append({"role": "assistant", "content": text})
        same = row["choices"][0]["turns"] == row["choices"][1]["turns"]
        assert same or question["category"] == "writing"
    assert counts["questions"] == len(PICKED) and counts["turns"] == 10 and counts["too_long"] == too_long


def test_stopped_and_started_again_equals_undisturbed(tmp_path, questions, monkeypatch):
    keys = {"model": TINY, "questions": questions, "answers__max_new_tokens": 12}
    run(tmp_path / "a", "mt_bench", **keys)
    real, calls = Evaluation.check_stop, [0]

    def stopping(self):
        calls[0] += 1
        if calls[0] == 11:
            raise Interrupted("stopped")
        real(self)

    monkeypatch.setattr(Evaluation, "check_stop", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", "mt_bench", **keys)
    kept = [row for file in (tmp_path / "b/conversations").iterdir() for row in lines(file)]
    assert 0 < len(kept) < len(PICKED)
    run(tmp_path / "b", "mt_bench", **keys)
    first, second = (lines(tmp_path / name / "model_answer/tiny.jsonl") for name in "ab")
    assert [{**row, "tstamp": 0} for row in first] == [{**row, "tstamp": 0} for row in second]
    assert {row["tstamp"] for row in kept} <= {row["tstamp"] for row in second}


def rating(number, body):
    """A server that rates: coding not at all, and others by their turn."""
    asked = body["messages"][0]["content"]
    if "Python program" in asked:
        return completion("No idea.")
    return completion(f"[[3]]? No. Rating: [[{7.5 if 'turn 2]' in asked else 9}]]")


def test_grading_by_a_server(tmp_path, questions, answered):
    keys = {"questions": questions, "model_answer": answered[0], "judge__endpoint_model": "big", "shard_size": 1}
    with serving(rating) as (url, asked):
        run(tmp_path / "a", "mt_bench_grade", **keys, judge__endpoint=url)
        assert len(asked) == 10 and {body["temperature"] for body in asked} == {0.0}
    found = lines(tmp_path / "a/model_judgment/big_single.jsonl")
    assert [list(row) for row in found] == [JUDGMENT_FIELDS] * 10
    assert [(row["question_id"], row["turn"]) for row in found] == [(q, t) for q in PICKED for t in (1, 2)]
    assert {row["model"] for row in found} == {"tiny"} and found[0]["judge"] == ["big", "single-srlm-v1"]
    texts = {row["question_id"]: row["choices"][0]["turns"] for row in lines(answered[0])}
    for row, question in zip(found[::2], lines(questions)):
        assert question["turns"][0] in row["user_prompt"] and texts[row["question_id"]][0] in row["user_prompt"]
        assert question["turns"][1] not in row["user_prompt"]
    assert all(question["turns"][1] in row["user_prompt"] for row, question in zip(found[1::2], lines(questions)))
    means = json.loads((tmp_path / "a/mt_bench.json").read_text())
    coding = [row for row in found if row["question_id"] == 121]
    assert [row["score"] for row in coding] == [-1.0, -1.0] and means["unparsable"] == pytest.approx(0.2)
    assert means["turns"] == {"1": 9.0, "2": 7.5} and means["overall"] == 8.25
    assert means["categories"] == {"writing": 8.25, "math": 8.25, "coding": None}
    assert means["overall_interval"] == [8.25, 8.25]

    def failing(number, body):
        return (400, {"error": {"message": "no more"}}) if number >= 4 else rating(number, body)

    keys |= {"judge__endpoint_concurrency": 1}
    with serving(failing) as (url, asked), pytest.raises(UserError, match="no more"):
        run(tmp_path / "b", "mt_bench_grade", **keys, judge__endpoint=url)
    with serving(rating) as (url, asked):
        run(tmp_path / "b", "mt_bench_grade", **keys, judge__endpoint=url)
        assert len(asked) == 6
    again = lines(tmp_path / "b/model_judgment/big_single.jsonl")
    assert [{**row, "tstamp": 0} for row in again] == [{**row, "tstamp": 0} for row in found]


def test_grading_by_a_checkpoint(tmp_path, questions, answered):
    """The tiny model reads the short prompts and rates nothing; the others are too long for it."""
    template = tmp_path / "short.txt"
    template.write_text("{reference}{conversation} [[")
    counts = run(tmp_path / "a", "mt_bench_grade", questions=questions, model_answer=answered[0], judge__path=TINY,
                 judge__rating_template=template)  # fmt: skip
    found = lines(tmp_path / "a/model_judgment/tiny_single.jsonl")
    assert counts == {"overall": None, "ratings": 10, "unparsable": 1.0}
    assert any(row["judgment"] for row in found) and found[0]["judge"] == ["tiny", "short"]


def test_references_are_shown_where_there_are_some(tmp_path, questions, answered):
    reference = tmp_path / "gpt-4.jsonl"
    row = {"question_id": 111, "answer_id": "x", "model_id": "gpt-4", "tstamp": 0}
    reference.write_text(json.dumps(row | {"choices": [{"index": 0, "turns": ["area 3", "36 pi"]}]}) + "\n")
    keys = {"questions": questions, "model_answer": answered[0], "reference_answer": reference}
    with serving(rating) as (url, asked):
        run(tmp_path / "a", "mt_bench_grade", **keys, judge__endpoint_model="big", judge__endpoint=url)
    for row in lines(tmp_path / "a/model_judgment/big_single.jsonl"):
        shown = [text in row["user_prompt"] for text in ("area 3", "36 pi")]
        assert shown == [row["question_id"] == 111, (row["question_id"], row["turn"]) == (111, 2)]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[6]]", 6.0),
        ("[[2]], no: [[8.5]].", 8.5),
        ("[[ 10 ]]", 10.0),
        ("[[11]]", -1.0),
        ("[[0]]", -1.0),
        ("[[rating]] 5", -1.0),
        ("[5]", -1.0),
        ("", -1.0),
    ],
)
def test_ratings(text, score):
    assert parse_rating(text) == score


def test_means_leave_out_what_was_not_read():
    asked = [{"question_id": i, "category": name} for i, name in enumerate(("math", "math", "stem"))]
    scores = [(0, 1, 4.0), (0, 2, 2.0), (1, 1, -1), (1, 2, 6.0), (2, 1, 10.0), (2, 2, 8.0)]
    found = mean_ratings([{"question_id": q, "turn": t, "score": s} for q, t, s in scores], asked)
    assert found["overall"] == 6.0 and found["turns"] == {"1": 7.0, "2": 16 / 3}
    assert found["categories"] == {"math": 4.0, "stem": 9.0} and found["unparsable"] == pytest.approx(1 / 6)
    low, high = found["overall_interval"]
    assert 3.0 <= low < 6.0 < high <= 9.0  # of draws of one question alone: 3, 6 and 9
    assert mean_ratings([], [])["overall"] is None


def test_rating_prompt_fills_in_one_pass():
    prompt = rating_prompt(["say {reference}", "and?"], ["{conversation}"], ["known"])
    assert "say {reference}" in prompt and "{conversation}" in prompt and "and?" not in prompt and "known" in prompt
    assert "Correct answer" not in rating_prompt(["x"], ["y"])


@pytest.mark.parametrize(
    ("task", "content", "says"),
    [
        ("mt_bench", '{"question_id": 1, "category": "x", "turns": "hello"}', "turns must be a list of texts, got 'he"),
        ("mt_bench", '{"question_id": 1, "turns": ["x"]}', "must have question_id and category"),
        ("mt_bench", '{"question_id": 1, "category": "x", "turns": ["x"]}\n' * 2, ":2: question_id 1 is there twice"),
        ("mt_bench", "", "no questions in it"),
        ("mt_bench_grade", '{"question_id": 81}', ":1: is no answer in FastChat's format"),
        ("mt_bench_grade", "{}[", ":1"),
        (
            "mt_bench_grade",
            '{"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["x"]}]}',
            "question 81 has 1 answers of 2",
        ),
    ],
)
def test_bad_input(tmp_path, questions, task, content, says):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    keys = {"questions": file} if task == "mt_bench" else {"questions": questions, "model_answer": file}
    with pytest.raises(UserError, match=says):
        run(tmp_path / "run", task, model=TINY, **keys)


def test_temperatures_of_categories(tmp_path, questions):
    """One key changes one of them; a word is refused."""
    keys = {"model": TINY, "questions": questions}
    config = configured(tmp_path, "mt_bench", **keys, temperatures="{math: 0.5, law: 1}")
    assert config.temperatures["math"] == 0.5 and config.temperatures["law"] == 1 and len(config.temperatures) == 9
    with pytest.raises(UserError, match="temperatures.math='hot': must be a number"):
        run(tmp_path / "run", "mt_bench", **keys, temperatures="{math: hot}")
