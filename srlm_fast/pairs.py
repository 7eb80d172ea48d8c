"""Scored candidates -> preference pairs with full provenance.

Source: arXiv 2401.10020, section 2.2: the candidate with the highest mean score against the one with the lowest, no
pair where both are equal. Which of several tied candidates is taken is not given there. `srlm_fast.selection` has this
rule and others.
"""

import random
from collections.abc import Iterable
from typing import Any

from srlm_fast.errors import UserError
from srlm_fast.selection import RULES, Candidate, Slot

FORMAT = 2  # of the rows below; raised when a field changes its meaning
COUNTS = {
    "prompts": "prompts read",
    "candidates": "candidates read",
    "unscored": "candidates left out because no judgement of them was parsable",
    "truncated": "candidates that ended at the token limit (left out unless keep_truncated)",
    "too_few": "prompts with fewer than two candidates left",
    "equal": "prompts whose highest and lowest scores are equal",
    "close": "prompts whose scores differ by less than pairs.margin",
    "identical": "prompts whose answers to be paired have the same text",
    "tied": "pairs for which several candidates were tied at an end, or stood in its share of pairs.length_control",
    "pairs": "pairs made",
}
_TIES = ("random", "first", "length")


def make_pairs(
    records: Iterable[dict[str, Any]],
    *,
    weights_id: str,
    select: str = "max_min",
    k: int = 1,
    margin: float = 0.0,
    length_control: float = 0.0,
    ties: str = "random",
    keep_truncated: bool = True,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The pairs of every prompt, in the order of the records, and the counts of `COUNTS`.

    Args:
        records: one per prompt: "prompt_id", "prompt" (text or messages), "prompt_ids" (token ids) and "candidates",
            each with "index", "text", "token_ids", "finish_reason", "score" (mean, or None) and whatever else is to be
            kept with the pair: "judgements", "seed", ... Answers of other models than the judging one have "by",
            "past" or "future" (`selection.pools`).
        weights_id: of the model that judged the candidates, and wrote those without "by".
        select, k: which answers are paired, a name of `selection.RULES`.
        margin: least difference of the two scores; it is above 0 in any case.
        length_control: rho of `selection.tiers`, of max_min; above 0 it decides instead of `ties`.
        ties: which of several candidates tied at the highest or at the lowest score are taken, among those with
            different texts: "random" draws by (seed, prompt id), "first" takes the lowest indices, "length" the
            shortest chosen and then the longest rejected (in tokens).
        keep_truncated: whether candidates that ended at the token limit may enter a pair.

    Returns:
        Rows that TRL reads ("prompt", "chosen", "rejected"; chat messages where the prompt is) and, beside them,
        "format", "kind", "id", "prompt_id", "weights_id", "pair_seed", "prompt_ids", "chosen_ids", "rejected_ids",
        "chosen_score", "rejected_score", "chosen_index", "rejected_index" and "candidates" as they came; in a prompt's
        second, third, ... row only the two of the pair.
    """
    if ties not in _TIES:
        raise UserError(f'pairs.ties is "{ties}"; it must be one of {", ".join(_TIES)}')
    counts = dict.fromkeys(COUNTS, 0)
    rows = []
    for record in records:
        counts["prompts"] += 1
        candidates = _usable(record["candidates"], keep_truncated, counts)
        rng = random.Random(f"{seed}/{record['prompt_id']}")
        if len(candidates) < 2:
            counts["too_few"] += 1
            continue
        slots = RULES[select](candidates, k, length_control, rng)
        found = _choose(slots, margin, "length" if length_control else ties, rng, counts)
        counts["pairs"] += len(found)
        rows += [_row(record, number, *pair, weights_id, seed) for number, pair in enumerate(found)]
    return rows, counts


def _usable(candidates: list[Candidate], keep_truncated: bool, counts: dict[str, int]) -> list[Candidate]:
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
    slots: list[Slot], margin: float, ties: str, rng: random.Random, counts: dict[str, int]
) -> list[tuple[Candidate, Candidate]]:
    """(chosen, rejected) of every slot that has such a pair; where none has one the reason is counted."""
    found, reasons = [], set()
    for best, worst in slots:
        apart = [(b, w) for b in best for w in worst if b["score"] > w["score"]]
        wide = [(b, w) for b, w in apart if b["score"] - w["score"] >= margin]
        pairs = [(b, w) for b, w in wide if b["text"].strip() != w["text"].strip()]
        if not pairs:
            reasons.add("identical" if wide else "close" if apart else "equal")
            continue
        counts["tied"] += len(best) > 1 or len(worst) > 1
        if ties == "random":
            found.append(rng.choice(pairs))
        elif ties == "first":
            found.append(pairs[0])
        else:
            found.append(min(pairs, key=lambda pair: (len(pair[0]["token_ids"]), -len(pair[1]["token_ids"]))))
    if not found:
        counts[next((reason for reason in ("identical", "close") if reason in reasons), "equal")] += 1
    return found


def _row(
    record: dict[str, Any], number: int, chosen: Candidate, rejected: Candidate, weights_id: str, seed: int
) -> dict[str, Any]:
    def shown(candidate: Candidate) -> str | list[dict[str, str]]:
        text = candidate["text"]
        return text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]

    return {
        "format": FORMAT,
        "kind": "answers",
        "id": f"{record['prompt_id']}/{number}" if number else record["prompt_id"],
        "prompt_id": record["prompt_id"],
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
        "candidates": [chosen, rejected] if number else record["candidates"],
    }
