"""Rows of every source become items; bad rows are counted or refused with their place; lengths are held."""

import json
import random

import pytest

from srlm_fast.chat import chat_format
from srlm_fast.data import formats
from srlm_fast.dataset import COUNTS, _level, read_items, training_format
from srlm_fast.errors import UserError
from srlm_fast.losses import get_objective
from srlm_fast.packing import Item
from srlm_fast.tokenizer import load_tokenizer

PAIR = {"prompt": "Is it red?", "chosen": "Yes, it is.", "rejected": "No."}
KTO = {"prompt": "Is it red?", "completion": "Yes.", "label": True}


@pytest.fixture(scope="module")
def plain(spm_folder):
    return chat_format("plain", load_tokenizer(spm_folder))


def read(source, chat, loss="dpo", **options):
    return read_items(source, chat, get_objective(loss), **{"max_length": 200, "max_tokens": 400, **options})


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_source_gives_the_same_items(tmp_path, plain):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{**PAIR, "prompt": f"Is it {colour}?"} for colour in ("red", "blue", "green")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    lines = write(tmp_path / "x.jsonl", *rows)

    class Columns:
        """As much of a datasets.Dataset as is asked for."""

        column_names = list(PAIR)

        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    class Frame:
        """As much of a pandas.DataFrame."""

        columns = list(PAIR)

        def to_dict(self, orient):
            return {"records": rows}[orient]

    expected = [
        Item(
            tuple(plain.encode_prompt([{"role": "user", "content": row["prompt"]}])),
            (tuple(plain.encode_response(row["chosen"])), tuple(plain.encode_response(row["rejected"]))),
        )
        for row in rows
    ]
    sources = [rows, iter(rows), Columns(), Frame(), lines, str(tmp_path / "x.json"), tmp_path / "x.parquet"]
    for source in sources:
        assert read(source, plain).items == expected, source
    assert read([lines, tmp_path / "x.json"], plain).items == expected * 2
    places = [read(source, plain).items[1].source for source in (rows, lines, tmp_path / "x.parquet")]
    assert places == ["rows[1]", "x.jsonl:2", "x.parquet[1]"]


def test_datasets(plain):
    datasets = pytest.importorskip("datasets")
    rows = [PAIR, {**PAIR, "prompt": "Is it blue?"}]
    whole = datasets.Dataset.from_list(rows)
    assert read(whole, plain).items == read(rows, plain).items
    assert read(whole.to_iterable_dataset(), plain).items == read(rows, plain).items
    assert read(whole.to_pandas(), plain).items == read(rows, plain).items
    with pytest.raises(UserError, match=r"several data sets \(train, test\)"):
        read(datasets.DatasetDict({"train": whole, "test": whole}), plain)


def test_sources_that_are_none(tmp_path, plain):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "absent.jsonl", plain)
    with pytest.raises(UserError, match=f"{tmp_path}: a folder; name the files in it"):
        read(tmp_path, plain)
    with pytest.raises(UserError, match="x.csv: rows are read from .jsonl, .json"):
        read(tmp_path / "x.csv", plain)
    with pytest.raises(UserError, match="files or rows, got int"):
        read(3, plain)
    with pytest.raises(UserError, match=r"several data sets \(train\)"):
        read({"train": [PAIR]}, plain)
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="x.parquet: cannot be read as parquet"):
        read(tmp_path / "x.parquet", plain)


def test_what_becomes_of_a_row(plain):
    """Which rows each kind of loss takes, and with which labels."""

    def responses(row, loss):
        (item,) = read([row], plain, loss).items
        return [plain.decode(response[:-1]) for response in item.responses], item.labels

    assert responses(PAIR, "dpo") == (["Yes, it is.", "No."], ())
    assert responses({**PAIR, "label": 0.75}, "cream") == (["Yes, it is.", "No."], (0.75, 0.25))
    assert responses({**PAIR, "chosen_score": 3, "rejected_score": 3}, "sppo") == (["Yes, it is.", "No."], (0.5, 0.5))
    assert responses(KTO, "kto") == (["Yes."], (1.0,))
    assert responses({**KTO, "label": False}, "bco") == (["Yes."], (0.0,))
    assert responses(PAIR, "kto") == (["Yes, it is.", "No."], (1.0, 0.0))
    several = {"prompt": "q?", "responses": ["a", "b", "c"], "labels": [1, 0, 0]}
    assert responses(several, "apo_zero_unpaired") == (["a", "b", "c"], (1.0, 0.0, 0.0))
    assert responses(several, "sft") == (["a", "b", "c"], ())
    assert responses({"prompt": "q?", "completion": "a"}, "sft") == (["a"], ())


@pytest.mark.parametrize(
    ("row", "loss", "message"),
    [
        (KTO, "dpo", "compares pairs.*`chosen` and `rejected`; kto, bco"),
        ({"prompt": "q"}, "dpo", "nothing can be learned"),
        (PAIR, "cream", "needs `label`, or `chosen_score`"),
        ({"prompt": "q", "completion": "a"}, "kto", "needs `label`, or `responses` with `labels`; sft takes it"),
        (PAIR, "sft", "learns replies.*preference.*nll"),
        (KTO, "sft", "learns replies.*leave out `label`"),
        ({"prompt": "q", "chosen": "a"}, "dpo", "'rejected' is missing"),
    ],
)
def test_rows_that_a_loss_cannot_use_are_refused_by_line(tmp_path, plain, row, loss, message):
    good = {"sft": {"prompt": "q", "completion": "a"}, "kto": KTO, "cream": {**PAIR, "label": 1}}.get(loss, PAIR)
    with pytest.raises(UserError, match=f"x.jsonl:2: .*{message}"):
        read(write(tmp_path / "x.jsonl", good, row), plain, loss)


BAD = {
    "empty_reply": {**PAIR, "rejected": " "},
    "identical": {**PAIR, "rejected": PAIR["chosen"]},
    "empty_prompt": {**PAIR, "prompt": ""},
    "bad_conversation": {**PAIR, "prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
    "too_long": {**PAIR, "prompt": "long " * 300},
    "different_prompts": {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
    },
    "prompt_mismatch": {
        "prompt": "other",
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "d"}],
    },
}


def test_bad_rows_are_counted_with_their_places_or_stopped_at(tmp_path, plain):
    assert BAD.keys() == COUNTS.keys() - {"rows", "kept", "truncated"}
    path = write(tmp_path / "x.jsonl", PAIR, *BAD.values(), PAIR)
    data = read(path, plain)
    assert [item.source for item in data.items] == ["x.jsonl:1", f"x.jsonl:{len(BAD) + 2}"]
    assert data.skipped == {reason: [f"x.jsonl:{n}"] for n, reason in enumerate(BAD, 2)}
    assert data.counts == dict.fromkeys(BAD, 1) | {"rows": len(BAD) + 2, "kept": 2, "truncated": 0}
    assert data.summary().startswith("2 of 9 rows, ") and "too_long 1 (x.jsonl:6)" in data.summary()
    for reason, row in BAD.items():
        for rows in ([PAIR, row, PAIR], [PAIR, row]):
            with pytest.raises(UserError, match=f"x.jsonl:2: {reason} .*mend the row"):
                read(write(tmp_path / "x.jsonl", *rows), plain, on_bad_row="stop")
    with pytest.raises(
        UserError, match=r"no row of .*x.jsonl can be trained on: 0 of 1 .* empty_reply 1 \(x.jsonl:1\);"
    ):
        read(write(tmp_path / "x.jsonl", BAD["empty_reply"]), plain)
    with pytest.raises(UserError, match="on_bad_row='ignore': must be one of drop, stop"):
        read([PAIR], plain, on_bad_row="ignore")


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
def test_lengths_are_held_by_every_policy(plain, truncation):
    rng = random.Random(0)
    rows = [
        {name: " ".join(rng.choices(["red", "blue", "green"], k=rng.randint(1, 40))) for name in PAIR}
        for _ in range(60)
    ]
    whole = read(rows, plain, max_length=10_000, max_tokens=10_000)
    by_place = {item.source: item for item in whole.items}
    data = read(rows, plain, truncation=truncation, max_length=130, max_tokens=170)
    changed = 0
    for item in data.items:
        prompt, responses = by_place[item.source].prompt, by_place[item.source].responses
        assert len(item.prompt) + max(map(len, item.responses)) <= 130 and item.n_tokens <= 170
        changed += (item.prompt, item.responses) != (prompt, responses)
        if truncation == "keep_start":
            assert item.prompt == prompt
            assert all(ours == full[: len(ours)] for ours, full in zip(item.responses, responses))
        else:
            assert item.responses == responses and item.prompt == prompt[len(prompt) - len(item.prompt) :]
    assert changed == data.counts["truncated"] and (changed > 0) == (truncation != "drop")
    assert data.counts["too_long"] + len(data.items) + data.counts["identical"] == len(whole.items)
    assert data.counts["too_long"] > 0
    with pytest.raises(UserError, match="truncation='middle': must be one of keep_start, keep_end, drop"):
        read(rows, plain, truncation="middle")


def test_the_longest_responses_are_cut_first():
    for lengths, room in (([5, 9], 20), ([5, 9], 9), ([5, 9], 3), ([3, 3, 8], 8), ([4], 2), ([1, 1], 0)):
        best = max(
            level for level in range(max(lengths) + 1) if sum(min(n, level) for n in lengths) <= room + len(lengths)
        )
        assert _level(lengths, room) == best


def test_rows_of_one_prompt_become_one_item(plain):
    rows = [
        {"prompt": f"Is it {c}?", "completion": r, "label": r == "yes"} for c, r in zip("abaaba", ["yes", "no"] * 3)
    ]
    alone = read(rows, plain, "kto").items
    grouped = read(rows, plain, "kto", group_prompts=True).items
    assert [item.source for item in grouped] == ["rows[0], rows[2], rows[3], rows[5]", "rows[1], rows[4]"]
    assert grouped[0].responses == tuple(alone[i].responses[0] for i in (0, 2, 3, 5))
    assert grouped[0].labels == (1.0, 1.0, 0.0, 0.0) and grouped[1].labels == (0.0, 1.0)
    tight = read(rows, plain, "kto", group_prompts=True, max_tokens=grouped[0].n_tokens - 1).items
    assert [len(item.responses) for item in tight] == [3, 2, 1] and tight[2].prompt == tight[0].prompt
    pairs = read([PAIR, {**PAIR, "rejected": "Maybe."}], plain, group_prompts=True).items
    assert [plain.decode(r[:-1]) for r in pairs[0].responses] == ["Yes, it is.", "No.", "Yes, it is.", "Maybe."]
    assert len(pairs) == 1


def test_text_rows_are_tokenised_as_one_text(spm_folder):
    """Without a chat format prompt and reply make one text; the response starts where the prompt's tokens end."""
    tokenizer = load_tokenizer(spm_folder)
    text = training_format("text", tokenizer)
    (item,) = read([{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}], text).items
    for response, reply in zip(item.responses, (" blue.", " green.")):
        assert [*item.prompt, *response] == [*tokenizer.encode(f"The sky is{reply}", bos=True), tokenizer.eos_id]
    assert list(item.prompt) == tokenizer.encode("The sky is", bos=True)
    (merged,) = read([{"prompt": "The sk", "chosen": "y is", "rejected": "ies are"}], text).items
    assert [*merged.prompt, *merged.responses[0]] == [*tokenizer.encode("The sky is", bos=True), tokenizer.eos_id]
    with pytest.raises(UserError, match=r"rows\[0\]: 3 chat messages in the format text; choose a chat format"):
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        read([{**PAIR, "prompt": turns}], text)
    assert type(training_format("plain", tokenizer)) is type(chat_format("plain", tokenizer))


def test_counts_are_those_of_the_formats_and_ours():
    assert COUNTS.keys() - formats.COUNTS.keys() == {"bad_conversation", "too_long", "truncated"}


@pytest.mark.parametrize(
    ("name", "loss", "kept"),
    [
        ("hh_rlhf/harmless-base-test.jsonl.gz", "dpo", 2303),
        ("preference_formats/dpo_en_demo.json", "simpo", 300),
        ("preference_formats/kto_en_demo.json", "kto", 300),
    ],
)
def test_real_files_become_items(shared_data, spm_folder, name, loss, kept):
    chat = chat_format("llama2", load_tokenizer(spm_folder))
    data = read(shared_data(name), chat, loss, max_length=100_000, max_tokens=200_000)
    assert len(data.items) == kept - data.counts["bad_conversation"] and data.counts["bad_conversation"] < 5
    assert data.counts["truncated"] == data.counts["too_long"] == 0
    assert all(response[-1] == chat.end_id for item in data.items for response in item.responses)
