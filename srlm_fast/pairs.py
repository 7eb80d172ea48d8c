"""Scored candidates -> preference pairs with full provenance.

Source: arXiv 2401.10020, section 2.2: the candidate with the highest mean score against the one with the lowest, no
pair where both are equal. Which of several tied candidates is taken is not given there.
"""

import random
from collections.abc import Iterable
from typing import Any

from srlm_fast.errors import UserError

FORMAT = 2  # of the rows below; raised when a field changes its meaning
COUNTS = {
    "prompts": "prompts read",
    "candidates": "candidates read",
    "unscored": "candidates left out because no judgement of them was parsable",
    "truncated": "candidates that ended at the token limit (left out unless keep_truncated)",
    "too_few": "prompts with fewer than two candidates left",
    "equal": "prompts whose highest and lowest scores are equal",
    "identical": "prompts whose best and worst candidates have the same text",
    "tied": "pairs for which several candidates were tied at an end",
    "pairs": "pairs made",
}
_TIES = ("random", "first", "length")


def make_pairs(
    records: Iterable[dict[str, Any]],
    *,
    weights_id: str,
    ties: str = "random",
    keep_truncated: bool = True,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """At most one pair per prompt, in the order of the records, and the counts of `COUNTS`.

    Args:
        records: one per prompt: "prompt_id", "prompt" (text or messages), "prompt_ids" (token ids) and "candidates",
            each with "index", "text", "token_ids", "finish_reason", "score" (mean, or None) and whatever else is to be
            kept with the pair: "judgements", "seed", ...
        weights_id: of the model that wrote and judged the candidates.
        ties: which of several candidates tied at the highest or at the lowest score are taken, among those with
            different texts: "random" draws by (seed, prompt id), "first" takes the lowest indices, "length" the
            shortest chosen and then the longest rejected (in tokens).
        keep_truncated: whether candidates that ended at the token limit may enter a pair.

    Returns:
        Rows that TRL reads ("prompt", "chosen", "rejected"; chat messages where the prompt is) and, beside them,
        "format", "id", "weights_id", "pair_seed", "prompt_ids", "chosen_ids", "rejected_ids", "chosen_score",
        "rejected_score", "chosen_index", "rejected_index" and "candidates" as they came.
    """
    if ties not in _TIES:
        raise UserError(f'pairs.ties is "{ties}"; it must be one of {", ".join(_TIES)}')
    counts = dict.fromkeys(COUNTS, 0)
    rows = []
    for record in records:
        counts["prompts"] += 1
        candidates = _usable(record["candidates"], keep_truncated, counts)
        pair = _choose(candidates, ties, random.Random(f"{seed}/{record['prompt_id']}"), counts)
        if pair:
            counts["pairs"] += 1
            rows.append(_row(record, *pair, weights_id, seed))
    return rows, counts


def _usable(candidates: list[dict[str, Any]], keep_truncated: bool, counts: dict[str, int]) -> list[dict[str, Any]]:
    usable = []
    for candidate in sorted(candidates, key=lambda candidate: candidate["index"]):
        truncated = candidate["finish_reason"] == "length"
        counts["candidates"] += 1
        counts["truncated"] += truncated
        counts["unscored"] += candidate["score"] is None
        if candidate["score"] is not None and (keep_truncated or not truncated):
            usable.append(candidate)
    return usable


def _choose(
    candidates: list[dict[str, Any]], ties: str, rng: random.Random, counts: dict[str, int]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(chosen, rejected), or None with the reason counted."""
    if len(candidates) < 2:
        counts["too_few"] += 1
        return None
    scores = [candidate["score"] for candidate in candidates]
    if max(scores) == min(scores):
        counts["equal"] += 1
        return None
    best = [candidate for candidate in candidates if candidate["score"] == max(scores)]
    worst = [candidate for candidate in candidates if candidate["score"] == min(scores)]
    pairs = [(b, w) for b in best for w in worst if b["text"].strip() != w["text"].strip()]
    if not pairs:
        counts["identical"] += 1
        return None
    counts["tied"] += len(best) > 1 or len(worst) > 1
    if ties == "random":
        return rng.choice(pairs)
    if ties == "first":
        return pairs[0]
    return min(pairs, key=lambda pair: (len(pair[0]["token_ids"]), -len(pair[1]["token_ids"])))


def _row(
    record: dict[str, Any], chosen: dict[str, Any], rejected: dict[str, Any], weights_id: str, seed: int
) -> dict[str, Any]:
    def shown(candidate: dict[str, Any]) -> str | list[dict[str, str]]:
        text = candidate["text"]
        return text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]

    return {
        "format": FORMAT,
        "id": record["prompt_id"],
        "prompt": record["prompt"],
        "chosen": shown(chosen),
        "rejected": shown(rejected),
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
        "chosen_index": chosen["index"],
        "rejected_index": rejected["index"],
        "prompt_ids": record["prompt_ids"],
        "chosen_ids": chosen["token_ids"],
        "rejected_ids": rejected["token_ids"],
        "weights_id": weights_id,
        "pair_seed": seed,
        "candidates": record["candidates"],
    }
