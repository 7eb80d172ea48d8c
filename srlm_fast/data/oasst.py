"""Open Assistant conversations -> IFT examples and ranked EFT prompts.

Source: arXiv 2401.10020, section 3.1.1: English first turns; IFT takes the rank-0 reply of 3,200 prompts, EFT the
ranked replies of other prompts, split into a train and an evaluation set. The paper gives neither the choice among the
rank-0 replies nor the way the prompts are shared out; both are arguments here.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_fast.data import Example, RankedPrompt, read_rows
from srlm_fast.errors import UserError

DEFECTS = {
    "null": "rows that are null, or without text or role",
    "duplicate": "messages whose id was read before",
    "empty": "messages of white space",
    "deleted": "messages marked deleted",
    "unranked": "assistant messages without a rank",
    "other_language": "messages in another language",
    "orphaned": "messages whose parent is in no file",
    "later_turns": "messages beyond the first turn",
    "of_skipped_prompt": "first replies to a prompt that was skipped",
    "repeated_prompts": "prompts with the text of an earlier prompt",
    "of_repeated_prompt": "first replies to such a prompt",
    "unanswered": "prompts left without a ranked reply",
}
"""Rules that remove messages, in their order; a message counts for the first that removes it."""

COUNTS = {
    "messages": "messages read, a nested tree counted message by message",
    **DEFECTS,
    "prompts": "prompts with at least one ranked reply",
    "replies": "their replies",
    "null_labels": "messages without defects, and without labels (kept; they come after those with a quality label)",
}
"""messages = what each of `DEFECTS` removed + prompts + replies."""


@dataclass(frozen=True)
class Split:
    """Who gets which prompts; no prompt is in two of the three, and the rest is counted."""

    ift: list[Example]
    eft_train: list[RankedPrompt]
    eft_eval: list[RankedPrompt]
    without_best: int
    """Prompts not drawn for EFT whose rank-0 reply is missing."""
    beyond_ift: int
    """Prompts that IFT had no room for."""


@dataclass(slots=True)
class _Message:
    """What is kept of a message without defects."""

    id: str
    parent: str | None
    role: str
    text: str
    rank: int | None
    quality: float | None


def read_prompts(
    paths: str | Path | Iterable[str | Path], *, lang: str = "en"
) -> tuple[list[RankedPrompt], dict[str, int]]:
    """First-turn prompts with their ranked replies, in file order, and the counts of `COUNTS`.

    Reads flat messages (one per row) and nested trees ({"prompt": {..., "replies": [...]}}), .jsonl and .jsonl.gz, in
    any order of rows. Raises UserError for rows that are neither, and when no prompt is left.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    counts = dict.fromkeys(COUNTS, 0)
    parents: dict[str, str | None] = {}  # of every message, sound or not: it tells the orphans
    sound: list[_Message] = []
    for where, row in _rows(paths):
        counts["messages"] += 1
        if row is None:
            counts["null"] += 1
        elif row["message_id"] in parents:
            counts["duplicate"] += 1
        else:
            parents[row["message_id"]] = row.get("parent_id")
            if defect := _defect(row, lang):
                counts[defect] += 1
            else:
                counts["null_labels"] += not row.get("labels")
                sound.append(_message(where, row))
    prompts = _assemble(sound, parents, counts)
    if not prompts:
        files = ", ".join(map(str, paths))
        raise UserError(f'{files}: no prompt with a ranked reply in language "{lang}"; counts: {counts}')
    return prompts, counts


def _rows(paths: list[str | Path]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yields (where, message) of every message; those of a tree get their parent from the nesting."""
    for path in paths:
        for where, row in read_rows(path):
            if row is None or (_is_message(row) and "replies" not in row):
                yield where, row
                continue
            root = row.get("prompt", row) if isinstance(row, dict) else row
            stack = [(None, root)]
            while stack:
                parent, message = stack.pop()
                if not _is_message(message):
                    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
                    raise UserError(f"{where}: neither an Open Assistant message nor a tree of them; its keys: {keys}")
                yield where, {**message, "parent_id": parent}
                stack += [(message["message_id"], reply) for reply in reversed(message.get("replies") or [])]


def _is_message(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("message_id"), str)


def _defect(row: dict[str, Any], lang: str) -> str | None:
    """The first of `DEFECTS` that a message has by itself."""
    text, role = row.get("text"), row.get("role")
    found = {
        "null": text is None or role is None,
        "empty": isinstance(text, str) and not text.strip(),
        "deleted": bool(row.get("deleted")),
        "unranked": role == "assistant" and row.get("rank") is None,
        "other_language": row.get("lang", lang) != lang,
    }
    return next((defect for defect, present in found.items() if present), None)


def _message(where: str, row: dict[str, Any]) -> _Message:
    try:
        rank = None if row.get("rank") is None else int(row["rank"])
        if not isinstance(row["text"], str):
            raise TypeError(f"text is a {type(row['text']).__name__}")
        return _Message(row["message_id"], row.get("parent_id"), row["role"], row["text"], rank, _quality(row))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not an Open Assistant message ({error})") from None


def _quality(row: dict[str, Any]) -> float | None:
    """The quality label in [0, 1]: flat {"name": [...], "value": [...]} or nested {"quality": {"value": ...}}."""
    labels = row.get("labels") or {}
    if isinstance(labels.get("name"), list):
        labels = {name: {"value": value} for name, value in zip(labels["name"], labels["value"], strict=True)}
    value = (labels.get("quality") or {}).get("value")
    return None if value is None else float(value)


def _assemble(sound: list[_Message], parents: dict[str, str | None], counts: dict[str, int]) -> list[RankedPrompt]:
    roots = {message.id: message for message in sound if message.role == "prompter" and message.parent is None}
    replies: dict[str, list[_Message]] = {root: [] for root in roots}
    for message in sound:
        if message.id in roots:
            continue
        if message.parent not in parents:
            counts["orphaned"] += 1
        elif message.role != "assistant" or parents[message.parent] is not None:
            counts["later_turns"] += 1
        elif message.parent in replies:
            replies[message.parent].append(message)
        else:
            counts["of_skipped_prompt"] += 1
    prompts, texts = [], set()
    for root in roots.values():
        ranked = sorted(replies[root.id], key=lambda reply: reply.rank)
        text = " ".join(root.text.lower().split())
        if not ranked:
            counts["unanswered"] += 1
        elif text in texts:
            counts["repeated_prompts"] += 1
            counts["of_repeated_prompt"] += len(ranked)
        else:
            texts.add(text)
            qualities = (root.quality, ranked[0].quality)
            quality = None if None in qualities else sum(qualities)
            prompts.append(RankedPrompt(root.id, root.text, [(r.text, r.rank) for r in ranked], quality))
    counts["prompts"], counts["replies"] = len(prompts), sum(len(prompt.replies) for prompt in prompts)
    return prompts


def split_prompts(
    prompts: list[RankedPrompt],
    *,
    ift_examples: int = 3200,
    eft_share: float = 0.19,
    eft_eval_share: float = 0.25,
    min_replies: int = 2,
    seed: int = 0,
) -> Split:
    """Shares the prompts between IFT and EFT.

    EFT first: a draw by `seed` sets aside `eft_share` of all prompts among those with `min_replies` ranked replies, and
    `eft_eval_share` of these are kept for evaluation. The default is derived from the paper's counts: (1,630 + 541) /
    2.85 replies per prompt = 762 prompts beside 3,200. Of the others with a rank-0 reply IFT takes `ift_examples`, the
    best quality labels first, then those without a label in file order. Raises UserError when a part comes out empty.
    """
    drawn = [prompt for prompt in prompts if len(prompt.replies) >= min_replies]
    random.Random(f"{seed}/eft").shuffle(drawn)
    drawn = drawn[: round(eft_share * len(prompts))]
    held_out = round(eft_eval_share * len(drawn))
    taken = {prompt.id for prompt in drawn}
    others = [prompt for prompt in prompts if prompt.id not in taken]
    rest = [prompt for prompt in others if prompt.replies[0][1] == 0]
    rest.sort(key=lambda prompt: -1.0 if prompt.quality is None else prompt.quality, reverse=True)  # stable: file order
    ift = [Example(prompt.id, prompt.prompt, prompt.replies[0][0]) for prompt in rest[:ift_examples]]
    split = Split(ift, drawn[held_out:], drawn[:held_out], len(others) - len(rest), len(rest) - len(ift))
    wanted = {"ift": ift_examples > 0, "eft_train": eft_share > 0, "eft_eval": eft_share * eft_eval_share > 0}
    for part, is_wanted in wanted.items():
        if is_wanted and not getattr(split, part):
            raise UserError(
                f"no prompt is left for {part}: {len(prompts)} prompts, eft_share {eft_share}, "
                f"eft_eval_share {eft_eval_share}, min_replies {min_replies}; change a share or add data"
            )
    return split
