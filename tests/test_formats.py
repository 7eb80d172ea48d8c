import gzip
import json
import math
from collections import Counter

import pytest

from srlm_fast.data.formats import COUNTS, Row, load
from srlm_fast.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parse(tmp_path, *rows):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(path)


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\nplease\n\nAssistant: "
TURNS = [user("hi"), assistant("hello"), user("more\nplease")]


@pytest.mark.parametrize(
    ("raw", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score": 1}, [user("q")], "a", "b"),
        ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, [user("q")], "a", "b"),
        ({"prompt": "hi ", "chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]}, TURNS, "a", "b"),
        (
            {"prompt": TURNS[:1], "chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]},
            TURNS,
            "a",
            "b",
        ),
        ({"chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]}, TURNS, "a", "b"),
        ({"chosen": f"{HH}a", "rejected": f"{HH}b"}, TURNS, "a", "b"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is blank."}, [user("The sky is ")], "blue.", "blank."),
        (
            {
                "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            [{"role": "system", "content": "s"}, user("q")],
            "a",
            "b",
        ),
        ({"prompt": "q", "completion": "a", "label": True}, [user("q")], "a", None),
        ({"prompt": [user("q")], "completion": [assistant("a")], "label": False}, [user("q")], None, "a"),
        ({"messages": [*TURNS, assistant("a")], "label": 0}, TURNS, None, "a"),
        ({"prompt": "q"}, [user("q")], None, None),
        ({"prompt": TURNS}, TURNS, None, None),
        ("q", [user("q")], None, None),
    ],
)
def test_layouts(tmp_path, raw, prompt, chosen, rejected):
    (row,), counts = parse(tmp_path, raw)
    assert row == Row("x.jsonl:1", prompt, chosen, rejected)
    assert counts == dict.fromkeys(COUNTS, 0) | {"rows": 1, "kept": 1}


def test_mt_bench_keeps_its_later_turns(tmp_path):
    (row,), _ = parse(tmp_path, {"question_id": 81, "turns": ["first", "second"]})
    assert row == Row("x.jsonl:1", [user("first")], later_turns=["second"])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty_reply"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "empty_reply"),
        ({"prompt": "q", "chosen": "a\n", "rejected": "a"}, "identical"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": [{"role": "system", "content": "s"}]}, "empty_prompt"),
        ({"chosen": "no common", "rejected": "beginning"}, "empty_prompt"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]}, "different_prompts"),
        ({"prompt": "q", "chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]}, "prompt_mismatch"),
        (
            {"prompt": [user("q")], "chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]},
            "prompt_mismatch",
        ),
        ({"chosen": f"{HH}a", "rejected": f"{HH}"}, "empty_reply"),
        ({"prompt": "q", "completion": " "}, "empty_reply"),
        ({"prompt": "q", "responses": ["a", ""]}, "empty_reply"),
        ({"messages": [assistant("a")]}, "empty_prompt"),
        ({"prompt": "q", "completion": None, "label": True}, "empty_reply"),
        (" ", "empty_prompt"),
    ],
)
def test_unusable_rows_are_counted(tmp_path, raw, reason):
    rows, counts = parse(tmp_path, raw, "good")
    assert [row.id for row in rows] == ["x.jsonl:2"]
    assert counts == dict.fromkeys(COUNTS, 0) | {"rows": 2, "kept": 1, reason: 1}


@pytest.mark.parametrize(
    "raw",
    [
        {"instruction": "i", "output": "o"},
        {"prompt": 3},
        {"prompt": "q", "chosen": "a"},
        {"prompt": "q", "chosen": "a", "rejected": 5},
        {"prompt": "q", "completion": "a", "label": "good"},
        {"prompt": [{"role": "tool", "content": "x"}]},
        {"prompt": "q", "chosen": [user("a")], "rejected": [assistant("b")]},
        {"chosen": TURNS, "rejected": TURNS},
        {"chosen": f"{HH}a\n\nHuman: and", "rejected": f"{HH}b"},
        {"messages": [user("a")]},
        {"prompt": "q", "label": True},
        {"prompt": "q", "responses": []},
        {"prompt": "q", "responses": ["a", "b"], "labels": [1]},
        {"prompt": "q", "responses": ["a"], "labels": [2]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "label": 1.5},
        {"turns": []},
        ["q"],
        3,
        None,
    ],
)
def test_other_rows_are_refused_by_line_and_keys(tmp_path, raw):
    with pytest.raises(UserError, match=r"x.jsonl:2: a row of no known layout; its keys") as error:
        parse(tmp_path, "good", raw)
    assert all(repr(key) in str(error.value) for key in (raw if isinstance(raw, dict) else ()))


@pytest.mark.parametrize(
    ("raw", "prompt", "replies", "labels"),
    [
        ({"prompt": "q", "completion": "a"}, [user("q")], ("a",), ()),
        ({"messages": [*TURNS, assistant("a")]}, TURNS, ("a",), ()),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [user("q")], ("a",), ()),
        ({"prompt": "q", "responses": ["a", "b", "a"]}, [user("q")], ("a", "b", "a"), ()),
        ({"prompt": "q", "responses": ["a", "b"], "labels": [True, 0.25]}, [user("q")], ("a", "b"), (1.0, 0.25)),
    ],
)
def test_demonstrations_and_several_replies(tmp_path, raw, prompt, replies, labels):
    (row,), _ = parse(tmp_path, raw)
    assert row == Row("x.jsonl:1", prompt, replies=replies, labels=labels) and row.kind == "responses"


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"label": 0.7}, 0.7),
        ({"chosen_score": 4.0, "rejected_score": 2.0}, 0.8807970779778823),
        ({"score_chosen": 1, "score_rejected": 1}, 0.5),
        ({"chosen_score": -2000.0, "rejected_score": 2000.0}, 0.0),
        ({"chosen_score": math.nan, "rejected_score": 2.0}, None),
        ({"chosen_score": 2.0, "rejected_score": None, "label": math.nan}, None),
    ],
)
def test_labels_of_pairs(tmp_path, columns, label):
    (row,), _ = parse(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b", **columns})
    assert row.labels == (() if label is None else pytest.approx((label, 1 - label)))


def test_what_a_row_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x.jsonl:1: .*keys: \['chosen', 'prompt'\]; 'rejected' is missing"):
        parse(tmp_path, {"prompt": "q", "chosen": "a"})
    with pytest.raises(UserError, match="'prompt' is missing"):
        parse(tmp_path, {"completion": "a", "label": True})
    with pytest.raises(UserError, match="label is 'good', not true, false, 1 or 0"):
        parse(tmp_path, {"prompt": "q", "completion": "a", "label": "good"})
    with pytest.raises(UserError, match="the role 'tool' is none of human, user"):
        parse(tmp_path, {"prompt": [{"role": "tool", "content": "x"}]})
    with pytest.raises(UserError, match="a message or reply is a text, not list"):
        parse(tmp_path, {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]})


def test_kinds(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "q", "completion": "a", "label": true}\n"q"\n')
    assert [row.kind for row in load(path)[0]] == ["unpaired", "prompt"]
    with pytest.raises(UserError, match="x.jsonl:2 is a prompt row where unpaired rows are needed"):
        load(path, kind="unpaired")
    path.write_text('" "\n')
    with pytest.raises(UserError, match="no usable row; counts"):
        load(path)


@pytest.mark.parametrize(
    ("name", "kind", "kept", "skipped"),
    [
        ("hh_rlhf/harmless-base-test.jsonl.gz", "preference", 2303, {"different_prompts": 5, "empty_reply": 4}),
        ("preference_formats/dpo_en_demo.json", "preference", 300, {}),
        ("preference_formats/kto_en_demo.json", "unpaired", 300, {}),
        ("mt_bench/question.jsonl", "prompt", 80, {}),
        ("oasst1/prompt_lottery_en_250_text.jsonl", "prompt", 250, {}),
    ],
)
def test_real_files(shared_data, name, kind, kept, skipped):
    rows, counts = load(shared_data(name), kind=kind)
    assert len(rows) == kept
    assert counts == dict.fromkeys(COUNTS, 0) | {"rows": kept + sum(skipped.values()), "kept": kept} | skipped
    for row in rows:
        assert row.prompt[-1]["role"] == "user"
        assert {message["role"] for message in row.prompt} <= {"system", "user", "assistant"}


def test_hh_dialogues_are_complete(shared_data):
    """Written out again, every kept dialogue is the file's, but for the spaces around a turn."""
    path = shared_data("hh_rlhf/harmless-base-test.jsonl.gz")
    raw = [json.loads(line) for line in gzip.open(path)]
    names = {"user": "Human", "assistant": "Assistant"}
    for row in load(path)[0]:
        source = raw[int(row.id.rpartition(":")[2]) - 1]
        for reply, name in ((row.chosen, "chosen"), (row.rejected, "rejected")):
            turns = [*row.prompt, assistant(reply)]
            written = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
            assert written.split() == source[name].split()


def test_kto_labels(shared_data):
    rows, _ = load(shared_data("preference_formats/kto_en_demo.json"))
    assert Counter(row.rejected is None for row in rows) == {True: 150, False: 150}


def test_rows_of_pairs_py_are_read_back(tmp_path):
    from srlm_fast.pairs import make_pairs

    candidates = [
        {"index": i, "text": f"a{i}", "token_ids": [i], "finish_reason": "stop", "score": float(i)} for i in (0, 1)
    ]
    record = {"prompt_id": "p", "prompt": "q", "prompt_ids": [5], "candidates": candidates}
    pairs, _ = make_pairs([record], weights_id="w")
    (row,), _ = parse(tmp_path, *pairs)
    assert (row.prompt, row.chosen, row.rejected) == ([user("q")], "a1", "a0")
