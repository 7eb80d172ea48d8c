"""Preference, unpaired and prompt-only rows of the common layouts, made into one shape.

    TRL preference   {"prompt", "chosen", "rejected"}, plain texts or chat messages; the replies alone, or with the
                     conversation before them
    implicit prompt  {"chosen", "rejected"} whose common beginning is the prompt: chat messages, HH-RLHF dialogues
                     ("\\n\\nHuman: ... \\n\\nAssistant: ...") or plain texts
    ShareGPT         {"conversations": [{"from", "value"}], "chosen": {"from", "value"}, "rejected": {...}}
    KTO              {"prompt", "completion", "label"} or {"messages", "label"}
    prompt only      {"prompt"}, a JSON string, or MT-Bench {"turns": [...]}

All of them in .jsonl, .jsonl.gz (one row a line) or .json (an array). Other keys of a row are passed over.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

from srlm_fast.data import Message, as_messages, read_rows
from srlm_fast.errors import UserError

COUNTS = {
    "rows": "rows read",
    "kept": "rows that are usable",
    "different_prompts": "pairs whose conversations differ before the last reply",
    "empty_prompt": "rows without a prompt",
    "empty_reply": "rows with a reply of white space or null",
    "identical": "pairs whose two replies are the same",
}
KINDS = ("preference", "unpaired", "prompt")

_ROLES = {
    **{"human": "user", "user": "user", "prompter": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "system": "system"},
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Row:
    """A prompt with its good and its bad reply, one of them, or none."""

    id: str  # "file:line" or "file[index]", without the folder
    prompt: list[Message]
    chosen: str | None = None
    rejected: str | None = None
    later_turns: list[str] = field(default_factory=list)  # user turns to put after the reply (MT-Bench)

    @property
    def kind(self) -> str:
        """preference (both replies), unpaired (one, good or bad), or prompt (none)."""
        return KINDS[(self.chosen is None) + (self.rejected is None)]


class _Skip(Exception):
    """The row is of a known layout but unusable; the argument is a name of COUNTS."""


def load(path: str | Path, *, kind: str | None = None) -> tuple[list[Row], dict[str, int]]:
    """The usable rows of a file, in order, and the counts of `COUNTS`.

    Raises UserError for a row of no known layout (with its line and keys), for a row of another kind than asked for,
    and when no row is usable.
    """
    counts = dict.fromkeys(COUNTS, 0)
    rows = list(read(path, counts))
    other = next((row for row in rows if kind and row.kind != kind), None)
    if other:
        raise UserError(f"{path}: row {other.id} is a {other.kind} row where {kind} rows are needed")
    if not rows:
        raise UserError(f"{path}: no usable row; counts: {counts}")
    return rows, counts


def read(path: str | Path, counts: dict[str, int]) -> Iterator[Row]:
    """Streams the usable rows of a file and adds to `counts`."""
    for where, raw in read_rows(path):
        counts["rows"] += 1
        try:
            row = _check(_parse(raw, Path(where).name))
        except _Skip as reason:
            counts[str(reason)] += 1
        except (KeyError, TypeError, ValueError, AttributeError):
            keys = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
            raise UserError(f"{where}: a row of no known layout; its keys: {keys}") from None
        else:
            counts["kept"] += 1
            yield row


def _parse(raw: Any, name: str) -> Row:
    """The row in our shape; KeyError, TypeError, ValueError or AttributeError where it is of no layout."""
    if isinstance(raw, str):
        return Row(name, as_messages(raw))
    if "turns" in raw:
        first, *later = (_text(turn) for turn in raw["turns"])
        return Row(name, as_messages(first), later_turns=later)
    if "chosen" in raw or "rejected" in raw:
        return Row(name, *_pair(raw))
    if "label" in raw:
        prompt, reply = _unpaired(raw)
        if not isinstance(raw["label"], bool) and raw["label"] not in (0, 1):
            raise ValueError("label")
        return Row(name, prompt, chosen=reply) if raw["label"] else Row(name, prompt, rejected=reply)
    return Row(name, _prompt(raw["prompt"]))


def _check(row: Row) -> Row:
    replies = [reply for reply in (row.chosen, row.rejected) if reply is not None]
    if not any(message["content"].strip() for message in row.prompt if message["role"] != "system"):
        raise _Skip("empty_prompt")
    if not all(reply.strip() for reply in replies):
        raise _Skip("empty_reply")
    if len(replies) == 2 and replies[0].strip() == replies[1].strip():
        raise _Skip("identical")
    return row


def _pair(raw: dict[str, Any]) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected)."""
    chosen, rejected = raw["chosen"], raw["rejected"]
    if chosen is None or rejected is None:
        raise _Skip("empty_reply")
    whole = isinstance(chosen, list) and len(chosen) > 1
    if not whole and ("conversations" in raw or "prompt" in raw):
        prompt = _prompt(raw["conversations"] if "conversations" in raw else raw["prompt"])
        return prompt, _reply(chosen), _reply(rejected)
    if isinstance(chosen, str) and not _HH_TURN.match(chosen):
        return _split_texts(chosen, _text(rejected))
    (before, chosen), (other, rejected) = (_last_turn(side) for side in (chosen, rejected))
    if before != other:
        raise _Skip("different_prompts")
    return before, chosen, rejected


def _split_texts(chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    """Splits two texts behind the last white space of their common beginning."""
    prompt = re.sub(r"\S*\Z", "", commonprefix([chosen, rejected]))
    return as_messages(prompt), chosen[len(prompt) :], rejected[len(prompt) :]


def _last_turn(side: str | list[Any]) -> tuple[list[Message], str]:
    """(messages before the last reply, last reply) of a conversation."""
    messages = _dialogue(side) if isinstance(side, str) else [_message(message) for message in side]
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the conversation does not end with the assistant")
    return messages[:-1], messages[-1]["content"]


def _dialogue(text: str) -> list[Message]:
    """Messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."; the text of a turn is stripped."""
    before, *turns = _HH_TURN.split(text)
    if before.strip():
        raise ValueError("text before the first turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _unpaired(raw: dict[str, Any]) -> tuple[list[Message], str]:
    if "completion" in raw:
        return _prompt(raw["prompt"]), _reply(raw["completion"])
    return _last_turn(raw["messages"])


def _prompt(value: str | list[Any] | None) -> list[Message]:
    if value is None:
        raise _Skip("empty_prompt")
    return as_messages(value) if isinstance(value, str) else [_message(message) for message in value]


def _reply(value: Any) -> str:
    """A reply that is a text, one message, or a list of one message."""
    if value is None:
        raise _Skip("empty_reply")
    if isinstance(value, str):
        return value
    message = _message(value[0] if isinstance(value, list) and len(value) == 1 else value)
    if message["role"] != "assistant":
        raise ValueError("a reply by another role")
    return message["content"]


def _message(raw: dict[str, Any]) -> Message:
    role, content = (raw["from"], raw["value"]) if "from" in raw else (raw["role"], raw["content"])
    return {"role": _ROLES[role], "content": _text(content or "")}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
