"""Rows of TRL's data sets -> items, tokenised as TRL does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

from srlm_fast.chat import TemplateFormat
from srlm_fast.dataset import COUNTS, Data, TextFormat, are_paths, read_items
from srlm_fast.errors import UserError
from srlm_fast.losses import Objective
from srlm_fast.packing import Item
from srlm_fast.tokenizer import Tokenizer

_NO_LIMIT = 1 << 40


class Reader:
    """Reads the data sets of one trainer.

    Args:
        tokenizer: ours.
        bos: whether it begins texts with bos.
        objective: tells which rows are needed.
        max_length, truncation_mode: as TRL's.
    """

    def __init__(
        self, tokenizer: Tokenizer, bos: bool, objective: Objective, max_length: int | None, truncation_mode: str
    ) -> None:
        self.tokenizer, self.bos, self.objective = tokenizer, bos, objective
        self.max_length, self.truncation = max_length or _NO_LIMIT, truncation_mode
        self._eos = tokenizer.named_tokens.get("eos_token", "")

    def read(self, rows: Any, *, cut: bool = True) -> Data:
        """Prompts with their responses. Chat messages are written by the tokenizer's template, texts taken as they are.

        Args:
            rows: the data set.
            cut: whether to max_length.

        Raises:
            UserError: as `dataset.read_items`.
        """
        first = None
        if not _are_files(rows):
            rows = list(self._prepared(_single(rows)))
            first = rows[0] if rows else None
        texts = first is not None and not _conversational(first)
        return read_items(
            rows,
            TextFormat(self.tokenizer, bos=self.bos) if texts else TemplateFormat(self.tokenizer),
            self.objective,
            max_length=self.max_length if cut else _NO_LIMIT,
            max_tokens=_NO_LIMIT,
            truncation=self.truncation,
        )

    def _prepared(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows as ours: texts have a prompt of their own, and no eos at the end."""
        for row in rows:
            row = dict(row)
            if not _conversational(row):
                if "chosen" in row and "prompt" not in row:
                    row.update(_split(row["chosen"], row["rejected"]))
                for name in ("chosen", "rejected", "completion"):
                    if self._eos and isinstance(row.get(name), str):
                        row[name] = row[name].removesuffix(self._eos)
            yield row

    def read_demonstrations(self, rows: Any, text_field: str, completion_only: bool | None) -> Data:
        """For SFT: of rows with prompt and completion the completion is learned, of `messages` or a text everything.

        Args:
            rows: a data set whose rows are all alike.
            text_field: where a text is.
            completion_only: False: of prompt and completion everything is learned, too.

        Raises:
            UserError: for rows of another layout.
        """
        if _are_files(rows):
            return self.read(rows)
        rows = list(_single(rows))
        layouts = [("prompt", "completion"), *([] if completion_only else [("messages",), (text_field,)])]
        layout = next((names for names in layouts if rows and set(names) <= set(rows[0])), layouts[0])
        for index, row in enumerate(rows):
            if not set(layout) <= set(row):
                raise UserError(
                    f"rows[{index}]: SFTTrainer learns completions of prompts, messages or texts, one kind of them; "
                    f"the row has {sorted(row)} and not {' and '.join(layout)}"
                )
        if layout == layouts[0]:
            data = self.read(rows, cut=completion_only is not False)
            if completion_only is False:
                data.items = [self._whole((*item.prompt, *item.responses[0]), item.source) for item in data.items]
            return data
        write = self._text if layout == (text_field,) else TemplateFormat(self.tokenizer).encode_conversation
        data = Data([], dict.fromkeys(COUNTS, 0) | {"rows": len(rows)})
        for index, row in enumerate(rows):
            ids, source = write(row[layout[0]]), f"rows[{index}]"
            if len(ids) < 2:
                data.counts["empty_reply"] += 1
                data.skipped.setdefault("empty_reply", []).append(source)
                continue
            data.counts["kept"] += 1
            data.counts["truncated"] += len(ids) > self.max_length
            data.items.append(self._whole(ids, source))
        return data

    def _text(self, text: str) -> list[int]:
        start = [self.tokenizer.bos_id] * self.bos
        return [*self.tokenizer.encode_parts([*start, text.removesuffix(self._eos)]), self.tokenizer.required_id("eos")]

    def _whole(self, ids: Sequence[int], source: str) -> Item:
        """An item of which all tokens but the first, which nothing predicts, are learned."""
        cut = slice(-self.max_length, None) if self.truncation == "keep_end" else slice(self.max_length)
        first, *others = ids[cut]
        return Item((first,), (tuple(others),), source=source)


def _are_files(rows: Any) -> bool:
    return isinstance(rows, (str, Path)) or are_paths(rows)


def _single(rows: Any) -> Any:
    if isinstance(rows, Mapping):
        raise UserError(f"several data sets ({', '.join(map(str, rows))}) where one is needed; name one of them")
    return rows


def _conversational(row: dict[str, Any]) -> bool:
    """Whether a row is of chat messages, not of texts."""
    names = ("prompt", "chosen", "rejected", "completion", "messages")
    return any(isinstance(row.get(name), list) for name in names)


def _split(chosen: str, rejected: str) -> dict[str, str]:
    """The common beginning of two texts as prompt, its last space left to the replies, as TRL does it."""
    n = len(commonprefix([chosen, rejected]))
    n -= n > 0 and chosen[n - 1] == " "
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}
