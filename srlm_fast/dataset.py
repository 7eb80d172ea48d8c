"""Rows of any source -> items to train on.

    chat = training_format("template", load_tokenizer("m0"))
    data = read_items("pairs.jsonl", chat, training_objective(config), max_length=1024, max_tokens=8192)
    Trainer(model, data.items, config, ...)

A source is a file (.jsonl, .json, gzipped or not, .parquet), a list of files, a `datasets.Dataset`, a pandas DataFrame,
or anything else that yields rows as dicts. The layouts of a row are those of `data/formats.py`.

Which rows an objective takes:

| loss of | rows | items |
| --- | --- | --- |
| pairs | preference | (chosen, rejected) |
| labelled responses | KTO; several replies with labels; preference | the reply; all; chosen 1 and rejected 0 |
| responses (SFT) | demonstrations; several replies | the reply; all |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

from srlm_fast.chat import ChatFormat, Message, chat_format
from srlm_fast.data import check_file, formats, read_rows
from srlm_fast.errors import UserError
from srlm_fast.losses import Objective
from srlm_fast.packing import Item
from srlm_fast.tokenizer import Tokenizer

COUNTS = {
    **formats.COUNTS,
    "bad_conversation": "conversations that the chat format cannot write, such as two user turns in a row",
    "too_long": "rows left out because they do not fit",
    "truncated": "rows that were cut",
}
TRUNCATION = ("keep_start", "keep_end", "drop")


@dataclass
class Data:
    """Items, and what became of the rows."""

    items: list[Item]
    counts: dict[str, int]
    """By the names of `COUNTS`; `kept` are the items."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Where the rows are that were left out, by reason."""

    def summary(self) -> str:
        """One line: how many rows are used, and how many are left out for what, with the first three of them."""
        parts = [f"{self.counts['kept']} of {self.counts['rows']} rows"]
        for reason, places in self.skipped.items():
            parts.append(f"{reason} {len(places)} ({', '.join(places[:3])}{', ...' * (len(places) > 3)})")
        if self.counts["truncated"]:
            parts.append(f"truncated {self.counts['truncated']}")
        return ", ".join(parts)


class TextFormat(ChatFormat):
    """No chat format: bos (where there is one and it is wanted), the prompt as it is, the reply as it is, eos.

    Prompt and reply are tokenised together; where that changes the end of the prompt, the response starts there.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: bool = True) -> None:
        super().__init__(tokenizer, glue="")
        self._start = [] if tokenizer.bos_id is None or not bos else [tokenizer.bos_id]

    def parts(self, messages: Sequence[Message]) -> list[str | int]:
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise UserError(f"{len(messages)} chat messages in the format text; choose a chat format")
        return [*self._start, messages[0]["content"]]

    def encode_replies(self, messages: Sequence[Message], replies: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt and of every reply."""
        parts = self.parts(messages)
        wholes = [[*self.tokenizer.encode_parts([*parts, reply]), self.end_id] for reply in replies]
        n = len(commonprefix([self.tokenizer.encode_parts(parts), *wholes]))
        return wholes[0][:n], [whole[n:] for whole in wholes]


def training_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of that name, or `text` for rows of plain texts that no format is put around."""
    return TextFormat(tokenizer) if name == "text" else chat_format(name, tokenizer)


def read_items(
    source: Any,
    chat: ChatFormat,
    objective: Objective,
    *,
    max_length: int,
    max_tokens: int,
    truncation: str = "keep_start",
    on_bad_row: str = "drop",
    group_prompts: bool = False,
) -> Data:
    """The items of a source for an objective, in the order of its rows.

    Args:
        source: see above.
        chat: writes conversations as token ids.
        objective: tells which rows are needed.
        max_length: most tokens of a prompt with one response.
        max_tokens: most tokens of a prompt with all responses (tokens_per_microbatch).
        truncation: what becomes of longer ones. keep_start: responses are cut at their end, the longest first;
            keep_end: the prompt is cut at its start, the same for all responses; drop: left out. A row is left out as
            well when nothing would remain of a response (keep_start) or of the prompt (keep_end).
        on_bad_row: drop (and count) rows that are of a known layout but unusable, or stop at the first.
        group_prompts: rows of one prompt become one item while it fits max_tokens, so that the prompt runs through the
            network once; a batch then counts prompts, not rows.

    Raises:
        UserError: for a source that cannot be read, a row of no known layout, a row that the loss cannot use, a bad row
            with on_bad_row="stop", or no usable row; with file and line.
    """
    for name, value, known in (("truncation", truncation, TRUNCATION), ("on_bad_row", on_bad_row, ("drop", "stop"))):
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    data = Data([], dict.fromkeys(COUNTS, 0))
    for row in formats.parse(_stopping(_rows(source), data, on_bad_row), data.counts, data.skipped):
        try:
            item = _item(row, chat, objective)
            if not _fits(item, max_length, max_tokens):
                item = _cut(item, max_length, max_tokens, truncation)
                data.counts["truncated"] += 1
            if objective.paired and item.responses[0] == item.responses[1]:
                raise _Bad("identical")
        except _Bad as bad:
            data.counts["kept"] -= 1
            data.counts[str(bad)] += 1
            data.skipped.setdefault(str(bad), []).append(row.id)
        else:
            data.items.append(item)
    _stop_if(data, on_bad_row)
    if not data.items:
        files = source if are_paths(source) else [source] if isinstance(source, (str, Path)) else ["the data"]
        raise UserError(
            f"no row of {', '.join(map(str, files))} can be trained on: {data.summary()}; an item has at most "
            f"{max_length} tokens of a prompt with one response, and {max_tokens} in all"
        )
    if group_prompts:
        data.items = _grouped(data.items, max_tokens)
    return data


class _Bad(Exception):
    """The row is left out; the argument is a name of COUNTS."""


def _stopping(rows: Iterable[Any], data: Data, on_bad_row: str) -> Iterator[Any]:
    """The rows, until one of them was left out and that is to be refused."""
    for row in rows:
        yield row
        _stop_if(data, on_bad_row)


def _stop_if(data: Data, on_bad_row: str) -> None:
    if data.skipped and on_bad_row == "stop":
        reason, (place, *_) = next(iter(data.skipped.items()))
        raise UserError(f"{place}: {reason} ({COUNTS[reason]}); mend the row, or leave such out with on_bad_row=drop")


# ------------------------------------------------------------------------------------------------------------- sources

_OTHER_FILES = (".csv", ".tsv", ".arrow", ".feather", ".xlsx")


def _rows(source: Any) -> Iterator[tuple[str, Any]]:
    """(where it is, row) of every row."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix in _OTHER_FILES:
            raise UserError(f"{path}: rows are read from .jsonl, .json (gzipped or not) and .parquet; convert it")
        yield from (_parquet(path) if path.suffix == ".parquet" else read_rows(path))
    elif isinstance(source, Mapping):
        raise UserError(f"several data sets ({', '.join(map(str, source))}) where one is needed; name one of them")
    elif are_paths(source):
        for part in source:
            yield from _rows(part)
    elif hasattr(source, "columns") and hasattr(source, "to_dict"):  # pandas
        for index, row in enumerate(source.to_dict("records")):
            yield f"rows[{index}]", row
    else:
        try:
            rows = iter(source)
        except TypeError:
            raise UserError(f"a data set is files or rows, got {type(source).__name__}") from None
        for index, row in enumerate(rows):
            yield f"rows[{index}]", row


def are_paths(source: Any) -> bool:
    """Whether a data set is a list of files."""
    return isinstance(source, (list, tuple)) and bool(source) and all(isinstance(part, (str, Path)) for part in source)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs the pyarrow package: pip install pyarrow") from error
    check_file(path)
    try:
        index = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", row
                    index += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from None


# --------------------------------------------------------------------------------------------------------------- items


def _item(row: formats.Row, chat: ChatFormat, objective: Objective) -> Item:
    """The token ids of a row."""
    replies, labels = _replies(row, objective)
    try:
        if isinstance(chat, TextFormat):
            prompt, responses = chat.encode_replies(row.prompt, replies)
        else:
            prompt, responses = chat.encode_prompt(row.prompt), [chat.encode_response(reply) for reply in replies]
    except UserError as error:
        if isinstance(chat, TextFormat):
            raise UserError(f"{row.id}: {error}") from None
        raise _Bad("bad_conversation") from error
    if not prompt:
        raise _Bad("empty_prompt")
    return Item(tuple(prompt), tuple(map(tuple, responses)), labels if objective.needs_labels else (), row.id)


def _replies(row: formats.Row, objective: Objective) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The replies that an objective is trained on, with their labels.

    Raises:
        UserError: when the row does not have what the loss needs.
    """
    names = " + ".join(term.name for term in objective.terms)
    if objective.paired:
        if row.kind != "preference":
            raise UserError(
                f"{row.id}: loss {names} compares pairs, the row has no `chosen` and `rejected`{_hint(row)}"
            )
        if objective.needs_labels and not row.labels:
            raise UserError(
                f"{row.id}: loss {names} needs `label`, or `chosen_score` and `rejected_score`, in every row"
            )
        return (row.chosen, row.rejected), row.labels
    if objective.needs_labels:
        if row.kind == "preference":
            return (row.chosen, row.rejected), (1.0, 0.0)
        if row.kind == "unpaired":
            return (row.rejected,) if row.chosen is None else (row.chosen,), (float(row.chosen is not None),)
        if not row.labels:
            raise UserError(f"{row.id}: loss {names} needs `label`, or `responses` with `labels`{_hint(row)}")
        return row.replies, row.labels
    if row.kind != "responses":
        raise UserError(f"{row.id}: loss {names} learns replies, the row is of kind {row.kind}{_hint(row)}")
    return row.replies, ()


def _hint(row: formats.Row) -> str:
    """Which losses take the row."""
    for_kind = {
        "preference": "dpo and others take it; sft of its chosen replies is the loss nll",
        "unpaired": "kto, bco and apo_zero_unpaired take it; leave out `label` for sft",
        "responses": "sft takes it",
        "prompt": "nothing can be learned from a prompt alone",
    }
    return f"; {for_kind[row.kind]}"


# -------------------------------------------------------------------------------------------------------------- length


def _fits(item: Item, max_length: int, max_tokens: int) -> bool:
    return len(item.prompt) + max(map(len, item.responses)) <= max_length and item.n_tokens <= max_tokens


def _cut(item: Item, max_length: int, max_tokens: int, truncation: str) -> Item:
    """An item made to fit; _Bad where nothing would remain, or for "drop"."""
    prompt, responses, most = item.prompt, item.responses, 0
    if truncation == "keep_start":
        most = min(
            max_length - len(prompt), _level([len(response) for response in responses], max_tokens - len(prompt))
        )
        responses = tuple(response[: max(0, most)] for response in responses)
    elif truncation == "keep_end":
        most = min(max_length - max(map(len, responses)), max_tokens - sum(len(r) - 1 for r in responses))
        prompt = prompt[-most:]
    if most < 1:
        raise _Bad("too_long")
    return Item(prompt, responses, item.labels, item.source)


def _grouped(items: Sequence[Item], max_tokens: int) -> list[Item]:
    """Items of the same prompt joined, where the first of them stands, as long as they fit."""
    groups: list[list[Item]] = []
    newest: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt -> its last group, and the tokens of that
    for item in items:
        number, tokens = newest.get(item.prompt, (0, max_tokens + 1))
        more = item.n_tokens - len(item.prompt)
        if tokens + more <= max_tokens:
            groups[number].append(item)
        else:
            groups.append([item])
            number, tokens = len(groups) - 1, len(item.prompt)
        newest[item.prompt] = number, tokens + more
    return [_joined(group) for group in groups]


def _joined(group: Sequence[Item]) -> Item:
    responses = tuple(response for item in group for response in item.responses)
    labels = tuple(label for item in group for label in item.labels)
    return Item(group[0].prompt, responses, labels, ", ".join(item.source for item in group))


def _level(lengths: list[int], room: int) -> int:
    """The largest L for which responses cut to L tokens have `room`; the last token of a response needs none."""
    room, left = room + len(lengths), len(lengths)
    for length in sorted(lengths):
        if length * left > room:
            return room // left
        room -= length
        left -= 1
    return max(lengths)
