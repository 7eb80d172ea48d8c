import gzip
import json
import random
from collections import Counter

import pytest

from srlm_fast.data import RankedPrompt, read_rows
from srlm_fast.data.oasst import COUNTS, DEFECTS, read_prompts, split_prompts
from srlm_fast.errors import UserError
from srlm_fast.rundir import write_jsonl

REAL = "oasst1/oasst1-en-validation.jsonl"


def message(identity, parent=None, *, text=None, rank=None, quality=None, **other):
    labels = {"name": ["spam", "quality"], "value": [0.0, quality]}
    role = "prompter" if parent is None else "assistant"
    row = {"message_id": identity, "parent_id": parent, "text": text or f"text of {identity}", "role": role}
    return {**row, "rank": rank, "lang": "en", "deleted": False, "labels": labels, **other}


def write(path, rows):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w", encoding="utf-8")
    with opened as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def nest(rows):
    """Flat messages -> trees in the layout of the released *.trees.jsonl.gz files."""
    nodes = {}
    for row in rows:
        labels = row["labels"] and {
            name: {"value": value, "count": 3} for name, value in zip(row["labels"]["name"], row["labels"]["value"])
        }
        nodes[row["message_id"]] = {**row, "labels": labels, "replies": []}
    for node in nodes.values():
        if node["parent_id"] in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
    roots = [node for node in nodes.values() if node["parent_id"] not in nodes]
    return [{"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root} for root in roots]


def test_the_real_file(shared_data):
    prompts, counts = read_prompts(shared_data(REAL))
    figures = {"messages": 2022, "deleted": 40, "unranked": 85, "orphaned": 1, "later_turns": 1166, "prompts": 187}
    assert {name: counts[name] for name in figures} == figures
    assert set(counts) == set(COUNTS)
    assert counts["messages"] == sum(counts[name] for name in (*DEFECTS, "prompts", "replies"))
    # An independent count straight from the file.
    rows = [json.loads(line) for line in shared_data(REAL).read_text().splitlines()]
    roots = {row["message_id"]: row for row in rows if row["parent_id"] is None and not row["deleted"]}
    ranked = Counter(
        row["parent_id"] for row in rows if row["parent_id"] in roots and row["rank"] is not None and not row["deleted"]
    )
    assert {prompt.id: len(prompt.replies) for prompt in prompts} == dict(ranked)
    for prompt in prompts:
        assert prompt.prompt == roots[prompt.id]["text"]
        ranks = [rank for _, rank in prompt.replies]
        assert ranks == sorted(set(ranks))


def test_nested_trees_and_flat_messages_give_the_same(shared_data, tmp_path):
    rows = [row for _, row in read_rows(shared_data(REAL))]
    ids = {row["message_id"] for row in rows}
    rows = [row for row in rows if row["parent_id"] is None or row["parent_id"] in ids]  # a tree holds no orphans
    flat, counts = read_prompts(write(tmp_path / "flat.jsonl.gz", rows))
    nested, nested_counts = read_prompts(write(tmp_path / "trees.jsonl.gz", nest(rows)))
    assert nested == flat
    assert nested_counts == counts
    # Rows in another order, over two files: the same prompts.
    random.Random(0).shuffle(rows)
    paths = [write(tmp_path / "a.jsonl", rows[:700]), write(tmp_path / "b.jsonl.gz", rows[700:])]
    shuffled, shuffled_counts = read_prompts(paths)
    assert sorted(shuffled, key=lambda p: p.id) == sorted(flat, key=lambda p: p.id)
    assert shuffled_counts == counts


def test_every_defect_is_counted_and_skipped(tmp_path):
    rows = [
        message("good"),
        message("good-1", "good", rank=1),
        message("good-0", "good", rank=0),
        message("good-0", "good", rank=0),  # duplicate
        message("good-2", "good", rank=2, text=" \n"),  # empty
        message("good-3", "good", rank=3, deleted=True),
        message("good-4", "good"),  # unranked
        message("good-5", "good", rank=5, lang="es"),
        message("good-6", "good", rank=6) | {"text": None},  # null
        message("good-7", "good", rank=7, labels=None),  # kept
        None,
        message("turn-2", "good-0", role="prompter"),
        message("turn-3", "turn-2", rank=0),
        message("lost", "nowhere", rank=0),
        message("gone", deleted=True),
        message("gone-0", "gone", rank=0),
        message("alone"),
        message("again", text="Text  of GOOD"),
        message("again-0", "again", rank=0),
    ]
    prompts, counts = read_prompts(write(tmp_path / "x.jsonl", rows))
    replies = [("text of good-0", 0), ("text of good-1", 1), ("text of good-7", 7)]
    assert prompts == [RankedPrompt("good", "text of good", replies, None)]
    assert counts == {
        "messages": 19,
        "null": 2,
        "duplicate": 1,
        "empty": 1,
        "deleted": 2,
        "orphaned": 1,
        "unranked": 1,
        "other_language": 1,
        "null_labels": 1,
        "later_turns": 2,
        "of_skipped_prompt": 1,
        "repeated_prompts": 1,
        "of_repeated_prompt": 1,
        "unanswered": 1,
        "prompts": 1,
        "replies": 3,
    }
    assert counts["messages"] == sum(counts[name] for name in (*DEFECTS, "prompts", "replies"))


def test_a_message_counts_for_the_first_rule_that_removes_it(tmp_path):
    rows = [message("p"), message("a", "p", rank=0), message("b", "p", text=" ", deleted=True, lang="es", labels=None)]
    _, counts = read_prompts(write(tmp_path / "x.jsonl", rows))
    assert {name: counts[name] for name in DEFECTS if counts[name]} == {"empty": 1} and counts["null_labels"] == 0


def many(n, replies=3):
    return [RankedPrompt(f"p{i}", f"prompt {i}", [(f"reply {i}/{r}", r) for r in range(replies)]) for i in range(n)]


def test_the_split_is_disjoint_and_follows_the_shares():
    prompts = many(400)
    split = split_prompts(prompts, ift_examples=100, eft_share=0.2, eft_eval_share=0.25, seed=3)
    assert (len(split.ift), len(split.eft_train), len(split.eft_eval)) == (100, 60, 20)
    ids = [row.id for part in (split.ift, split.eft_train, split.eft_eval) for row in part]
    assert len(ids) == len(set(ids))
    assert (split.without_best, split.beyond_ift) == (0, 400 - 180)
    assert split == split_prompts(prompts, ift_examples=100, eft_share=0.2, eft_eval_share=0.25, seed=3)
    assert split.eft_eval != split_prompts(prompts, ift_examples=100, eft_share=0.2, seed=4).eft_eval


def test_every_row_of_the_real_file_leads_back_to_its_message_and_no_prompt_is_in_two_parts(shared_data):
    rows = {row["message_id"]: row for _, row in read_rows(shared_data(REAL))}
    replies = {(row["parent_id"], row["rank"]): row["text"] for row in rows.values() if not row["deleted"]}
    split = split_prompts(read_prompts(shared_data(REAL))[0], ift_examples=60, eft_share=0.4)
    parts = split.ift, split.eft_train, split.eft_eval
    for example in split.ift:
        assert example.prompt == rows[example.id]["text"] and example.response == replies[example.id, 0]
        assert rows[example.id]["parent_id"] is None
    for prompt in split.eft_train + split.eft_eval:
        assert prompt.prompt == rows[prompt.id]["text"]
        assert all(text == replies[prompt.id, rank] for text, rank in prompt.replies)
    texts = [{" ".join(row.prompt.lower().split()) for row in part} for part in parts]
    assert [len(of_part) for of_part in texts] == [len(part) for part in parts] and min(map(len, texts)) > 10
    assert len(set.union(*texts)) == sum(map(len, texts))


def test_the_defaults_give_the_papers_numbers():
    """3,962 prompts: 3,200 for IFT and some 2,171 ranked replies (2.85 a prompt) for EFT, a quarter held out."""
    split = split_prompts(many(3962))
    assert len(split.ift) == 3200
    assert abs(2.85 * len(split.eft_train) - 1630) < 40
    assert abs(2.85 * len(split.eft_eval) - 541) < 15


def test_ift_takes_the_best_quality_first_then_file_order():
    qualities = [None, 0.5, 1.5, None, 1.5, 1.0]
    prompts = [RankedPrompt(str(i), f"p{i}", [(f"r{i}", 0)], quality) for i, quality in enumerate(qualities)]
    prompts.append(RankedPrompt("no rank 0", "x", [("y", 1)], 2.0))
    split = split_prompts(prompts, ift_examples=5, eft_share=0.0)
    assert [example.id for example in split.ift] == ["2", "4", "5", "1", "0"]
    assert split.ift[0].response == "r2"


def test_eft_prompts_have_enough_replies():
    prompts = many(20, replies=1) + [RankedPrompt(f"q{i}", f"q{i}", [("a", 0), ("b", 1)]) for i in range(5)]
    split = split_prompts(prompts, eft_share=0.9, eft_eval_share=0.4)
    assert sorted(p.id for p in split.eft_train + split.eft_eval) == [f"q{i}" for i in range(5)]
    assert len(split.ift) == 20
    with pytest.raises(UserError, match="eft_train"):
        split_prompts(prompts, min_replies=3)
    with pytest.raises(UserError, match="ift"):
        split_prompts(many(5), eft_share=1.0)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"message_id": "a"', "x.jsonl:1: broken JSON"),
        ("\n[1, 2]\n", "x.jsonl:2: neither an Open Assistant message"),
        ('{"prompt": "p", "chosen": "c"}', "its keys: ['chosen', 'prompt']"),
        ('{"message_id": "a", "text": 3, "role": "prompter"}', "x.jsonl:1: not an Open Assistant message"),
        ('{"message_id": "a", "text": "t", "role": "prompter", "labels": {"name": []}}', "x.jsonl:1: not an Open"),
        ('{"message_id": "a", "text": "t", "role": "assistant", "rank": "best"}', "x.jsonl:1"),
        ('{"message_id": "a", "text": "t", "role": "prompter"}', "no prompt with a ranked reply"),
        ("", "no prompt with a ranked reply"),
    ],
)
def test_bad_files_name_the_line(tmp_path, content, named):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_read_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"a": "\u2028"}\r\n\n"b"\n'.encode())  # BOM, line separator in a text, blank line
    assert list(read_rows(path)) == [(f"{path}:1", {"a": "\u2028"}), (f"{path}:3", "b")]
    packed = tmp_path / "misnamed.jsonl"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in read_rows(packed)] == [{"a": "\u2028"}, "b"]
    array = tmp_path / "x.json"
    array.write_text('[1,\n {"a": 2}]')
    assert list(read_rows(array)) == [(f"{array}[0]", 1), (f"{array}[1]", {"a": 2})]


def test_rows_can_be_written_again(tmp_path):
    """Also a text that was cut in the middle of an emoji."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"whole": "\U0001f600", "cut": ["a\ud83d", "\ude00"], "text": "\\ud83d"}) + "\n")
    rows = [row for _, row in read_rows(path)]
    assert rows == [{"whole": "\U0001f600", "cut": ["a\ufffd", "\ufffd"], "text": "\\ud83d"}]
    write_jsonl(path, rows)
    assert [row for _, row in read_rows(path)] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n\xff\n', "x.jsonl:2: not UTF-8"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:-20], "cannot be read to its end"),
        ("x.json", b'{"a": 1}', "not an array"),
        ("x.json", b"[1,\n2", "x.json: broken JSON .*line 2"),
        ("x.json", b'{"a": 1}\n{"a": 2}\n', "x.json: broken JSON"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(tmp_path / "absent"))
