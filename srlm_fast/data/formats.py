"""Preference, labelled, demonstration and prompt-only rows of the common layouts, made into one shape.

    TRL preference   {"prompt", "chosen", "rejected"}, plain texts or chat messages; the replies alone, or with the
                     conversation before them
    implicit prompt  {"chosen", "rejected"} whose common beginning is the prompt: chat messages, HH-RLHF dialogues
                     ("\\n\\nHuman: ... \\n\\nAssistant: ...") or plain texts
    ShareGPT         {"conversations": [{"from", "value"}], "chosen": {"from", "value"}, "rejected": {...}}
    KTO              {"prompt", "completion", "label"} or {"messages", "label"}
    demonstration    the same without "label"; "conversations" may stand for "messages"
    several replies  {"prompt", "responses": [...]}, with "labels": [...] or without
    prompt only      {"prompt"}, a JSON string, or MT-Bench {"turns": [...]}

All of them in .jsonl, .jsonl.gz (one row a line) or .json (an array). Other keys of a row are passed over, but for what
labels a pair: "label", the probability that chosen is the better reply, or the scores of both ("chosen_score" and
"rejected_score", or "score_chosen" and "score_rejected"), whose difference d gives 1 / (1 + exp(-d)) (Bradley-Terry).
"""

import math
import re
from collections.abc import Iterable, Iterator
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
    "prompt_mismatch": "rows whose prompt is not in the conversation that their replies bring along",
    "empty_prompt": "rows without a prompt",
    "empty_reply": "rows with a reply of white space or null",
    "identical": "pairs whose two replies are the same",
}

_ROLES = {
    **{"human": "user", "user": "user", "prompter": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "system": "system"},
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Row:
    """A prompt with its good and its bad reply, one of them, replies that are neither, or none."""

    id: str  # "file:line" or "file[index]", without the folder
    prompt: list[Message]
    chosen: str | None = None
    rejected: str | None = None
    later_turns: list[str] = field(default_factory=list)  # user turns to put after the reply (MT-Bench)
    replies: tuple[str, ...] = ()  # of demonstrations, and of rows with several replies
    labels: tuple[float, ...] = ()  # from 0 to 1: of both replies of a pair, or of each of `replies`

    @property
    def kind(self) -> str:
        """preference (both replies), unpaired (one, good or bad), responses (neither), or prompt (none)."""
        if self.replies:
            return "responses"
        return ("preference", "unpaired", "prompt")[(self.chosen is None) + (self.rejected is None)]


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
    return parse(read_rows(path), counts)


def parse(
    rows: Iterable[tuple[str, Any]], counts: dict[str, int], skipped: dict[str, list[str]] | None = None
) -> Iterator[Row]:
    """Yields the usable ones of rows and adds to `counts`.

    Args:
        rows: (where it is from, row), as `data.read_rows` gives them.
        counts: by the names of `COUNTS`.
        skipped: where the unusable rows are, by the same names.

    Raises:
        UserError: for a row of no known layout, with what it lacks.
    """
    for where, raw in rows:
        counts["rows"] += 1
        name = Path(where).name
        try:
            row = _check(_parse(raw, name))
        except _Skip as reason:
            counts[str(reason)] += 1
            if skipped is not None:
                skipped.setdefault(str(reason), []).append(name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            keys = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
            why = f"; {error}{' is missing' * isinstance(error, KeyError)}" if isinstance(raw, dict) else ""
            raise UserError(f"{where}: a row of no known layout; its keys: {keys}{why}") from None
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
        return Row(name, *_pair(raw), labels=_pair_labels(raw))
    if "responses" in raw:
        return _several(raw, name)
    if not raw.keys() & {"completion", "messages", "conversations", "label"}:
        return Row(name, _prompt(raw["prompt"]))
    prompt, reply = _single(raw)
    if "label" not in raw:
        return Row(name, prompt, replies=(reply,))
    if not isinstance(raw["label"], bool) and raw["label"] not in (0, 1):
        raise ValueError(f"label is {raw['label']!r}, not true, false, 1 or 0")
    return Row(name, prompt, chosen=reply) if raw["label"] else Row(name, prompt, rejected=reply)


def _check(row: Row) -> Row:
    replies = [*row.replies, *(reply for reply in (row.chosen, row.rejected) if reply is not None)]
    if not any(message["content"].strip() for message in row.prompt if message["role"] != "system"):
        raise _Skip("empty_prompt")
    if not all(reply.strip() for reply in replies):
        raise _Skip("empty_reply")
    if row.kind == "preference" and replies[0].strip() == replies[1].strip():
        raise _Skip("identical")
    return row


def _pair(raw: dict[str, Any]) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected)."""
    chosen, rejected = raw["chosen"], raw["rejected"]
    if chosen is None or rejected is None:
        raise _Skip("empty_reply")
    whole = isinstance(chosen, list) and len(chosen) > 1
    given = raw["conversations"] if "conversations" in raw else raw.get("prompt")
    if not whole and ("conversations" in raw or "prompt" in raw):
        return _prompt(given), _reply(chosen), _reply(rejected)
    if isinstance(chosen, str) and not _HH_TURN.match(chosen):
        return _split_texts(chosen, _text(rejected))
    (before, chosen), (other, rejected) = (_last_turn(side) for side in (chosen, rejected))
    if before != other:
        raise _Skip("different_prompts")
    if given and not _begins(before, given):
        raise _Skip("prompt_mismatch")
    return before, chosen, rejected


def _begins(conversation: list[Message], prompt: str | list[Any]) -> bool:
    """Whether a conversation begins with a prompt of messages, or asks what a prompt of text does."""
    if isinstance(prompt, str):
        asked = [message["content"].strip() for message in conversation if message["role"] == "user"]
        return prompt.strip() in asked
    messages = [_message(message) for message in prompt]
    return conversation[: len(messages)] == messages


_SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))


def _pair_labels(raw: dict[str, Any]) -> tuple[float, ...]:
    """The probabilities that each reply is the better one, where the row tells; an unknown score tells nothing."""
    if _is_known(raw.get("label")):
        return _label(raw["label"]), 1.0 - _label(raw["label"])
    for names in _SCORES:
        scores = [raw.get(name) for name in names]
        if all(map(_is_known, scores)):
            better = 1 / (1 + math.exp(min(700.0, scores[1] - scores[0])))
            return better, 1.0 - better
    return ()


def _is_known(value: Any) -> bool:
    """Whether it is a number; in tables NaN stands for none."""
    return isinstance(value, (int, float)) and not math.isnan(value)


def _label(value: Any) -> float:
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise ValueError(f"label {value!r} is no number from 0 to 1")
    return float(value)


def _several(raw: dict[str, Any], name: str) -> Row:
    """A row of several replies to one prompt."""
    replies = tuple(_reply(reply) for reply in raw["responses"])
    labels = tuple(_label(label) for label in raw.get("labels") or ())
    if not replies or (labels and len(labels) != len(replies)):
        raise ValueError(f"{len(replies)} responses, {len(labels)} labels")
    return Row(name, _prompt(raw["prompt"]), replies=replies, labels=labels)


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


def _single(raw: dict[str, Any]) -> tuple[list[Message], str]:
    """(prompt, reply) of a row with one reply."""
    if "completion" in raw:
        return _prompt(raw["prompt"]), _reply(raw["completion"])
    return _last_turn(raw["conversations"] if "conversations" in raw else raw["messages"])


def _prompt(value: str | list[Any] | None) -> list[Message]:
    if value is None:
        raise _Skip("empty_prompt")
    if not isinstance(value, (str, list)):
        raise TypeError(f"a prompt is a text or a list of messages, not {type(value).__name__}")
    return as_messages(value) if isinstance(value, str) else [_message(message) for message in value]


def _reply(value: Any) -> str:
    """A reply that is a text, one message, or a list of one message."""
    if value is None:
        raise _Skip("empty_reply")
    if isinstance(value, str):
        return value
    message = _message(value[0] if isinstance(value, list) and len(value) == 1 else value)
    if message["role"] != "assistant":
        raise ValueError(f"a reply by the role {message['role']!r}")
    return message["content"]


def _message(raw: Any) -> Message:
    if not isinstance(raw, dict):
        raise TypeError(f"a message is a mapping of role and content, not {type(raw).__name__}")
    role, content = (raw["from"], raw["value"]) if "from" in raw else (raw["role"], raw["content"])
    if role not in _ROLES:
        raise ValueError(f"the role {role!r} is none of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _text(content or "")}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a message or reply is a text, not {type(value).__name__}")
    return value
