"""Meta-Rewarding in the loop: comparisons of judgements by M_t, and the pairs of judgements made of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

from srlm_fast import meta_judge, pairs
from srlm_fast.context import Context
from srlm_fast.data import as_messages
from srlm_fast.judge import DECIDES
from srlm_fast.phases import PhaseResult, mean
from srlm_fast.phases.generation import shard_rows
from srlm_fast.rollout import Reply
from srlm_fast.seeds import derive_seed

COUNTS = {
    "judge_pairs": "pairs of judgements made",
    "judge_equal": "answers whose compared judgements have equal Elo scores",
    "judge_identical": "answers whose best and worst judgement have the same text",
    "judge_long": "pairs dropped because the chosen judgement, or the pair, is too long",
    "judge_left_out": "pairs left out by meta_judge.max_share",
}


def compare(run: Context, t: int) -> PhaseResult:
    """M_t compares the judgements of the answer of every prompt that they vary most on; mT/comparisons/shard-*.jsonl.

    A row has "id", the "index" of the candidate, and "comparisons": for every two judgements in both orders "first" and
    "second" (their places), "winner" ("first", "second" or null), "text", "seed" and "finish_reason".
    """
    config, name = run.config, f"m{t}/comparisons"
    field = DECIDES[config.judge.mode]
    subjects = [
        {"id": row["prompt_id"], "prompt": row["prompt"], "candidate": row["candidates"][found[0]], "places": found[1]}
        for row in shard_rows(run, f"m{t}/candidates")
        if (found := meta_judge.most_uncertain(row["candidates"], field))
    ]
    engine = run.engine(run.weights(f"m{t}"))
    seed = derive_seed(config.seed, name)

    def work(part: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        made = {subject["id"]: _Row(subject) for subject in part}
        requests = []
        for row in made.values():
            for order in permutations(row.subject["places"], 2):
                request = run.meta_judge.request(row.subject, order, seed)
                if request is None:
                    row.take(order, None, "", 0, "too_long")
                else:
                    requests.append(request)
            if row.whole:
                yield row.content
        for completion in engine.stream(requests):
            run.check_stop()
            key, order = completion.request.metadata
            made[key].take(order, *run.meta_judge.read(completion))
            if made[key].whole:
                yield made[key].content

    files = run.shards(name, subjects, work)
    everything = [c for row in shard_rows(run, name) for c in row["comparisons"]]
    decided = [c["winner"] for c in everything if c["winner"] is not None]
    return files, {
        "compared": len(subjects),
        "comparisons": len(everything),
        "undecided": mean([c["winner"] is None for c in everything]),
        "first_wins": mean([winner == "first" for winner in decided]),
    }


class _Row:
    """The comparisons of one answer's judgements, as they come."""

    def __init__(self, subject: dict[str, Any]) -> None:
        self.subject = subject
        self._orders = list(permutations(subject["places"], 2))
        self._found: dict[tuple[int, int], dict[str, Any]] = {}

    def take(self, order: tuple[int, int], winner: str | None, text: str, seed: int, finish_reason: str) -> None:
        found = {"first": order[0], "second": order[1], "winner": winner, "text": text, "seed": seed}
        self._found[order] = {**found, "finish_reason": finish_reason}

    @property
    def whole(self) -> bool:
        return len(self._found) == len(self._orders)

    @property
    def content(self) -> dict[str, Any]:
        comparisons = [self._found[order] for order in self._orders]
        return {"id": self.subject["id"], "index": self.subject["candidate"]["index"], "comparisons": comparisons}


def judge_pairs(run: Context, t: int, weights_id: str, n_answers: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pairs of judgements of iteration t, beside `n_answers` pairs of answers, and the counts of `COUNTS`."""
    config, counts = run.config, dict.fromkeys(COUNTS, 0)
    compared = {row["id"]: row for row in shard_rows(run, f"m{t}/comparisons")}
    weights = meta_judge.position_weights(c for row in compared.values() for c in row["comparisons"])
    rows = []
    for record in shard_rows(run, f"m{t}/candidates"):
        if record["prompt_id"] not in compared:
            continue
        row = compared[record["prompt_id"]]
        candidate = next(c for c in record["candidates"] if c["index"] == row["index"])
        pair = _pair(run, record, candidate, row["comparisons"], weights, counts)
        if pair:
            rows.append({**pair, "weights_id": weights_id})
    share = config.meta_judge.max_share
    most = len(rows) if share == 1 else int(share / (1 - share) * n_answers)
    if len(rows) > most:
        drawn = random.Random(derive_seed(config.seed, f"m{t}/judge_pairs")).sample(range(len(rows)), most)
        counts["judge_left_out"] = len(rows) - most
        rows = [rows[i] for i in sorted(drawn)]
    counts["judge_pairs"] = len(rows)
    return rows, {**counts, "first_place_weight": round(weights[0], 4)}


def _pair(
    run: Context,
    record: dict[str, Any],
    candidate: dict[str, Any],
    comparisons: list[dict[str, Any]],
    weights: tuple[float, float],
    counts: dict[str, int],
) -> dict[str, Any] | None:
    """The best judgement of an answer against its worst; None with the reason counted."""
    config, judgements = run.config, candidate["judgements"]
    places = sorted({c["first"] for c in comparisons})
    won = meta_judge.battles(comparisons, len(judgements), weights)
    scores = dict(zip(places, meta_judge.elo_scores(won[places][:, places]).tolist(), strict=True))
    best, worst = max(places, key=lambda p: scores[p]), min(places, key=lambda p: scores[p])
    chosen, rejected = judgements[best]["text"], judgements[worst]["text"]
    if scores[best] - scores[worst] < 1e-9:
        counts["judge_equal"] += 1
        return None
    if chosen.strip() == rejected.strip():
        counts["judge_identical"] += 1
        return None
    key = f"{record['prompt_id']}/{candidate['index']}"
    prompt = run.judge.prompt(Reply(key, record["prompt"], candidate["text"]))
    prompt_ids = run.chat.encode_prompt(as_messages(prompt))
    chosen_ids, rejected_ids = (run.chat.encode_response(text) for text in (chosen, rejected))
    longest = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
    together = len(prompt_ids) + len(chosen_ids) + len(rejected_ids) - 2
    over = len(chosen_ids) > (config.meta_judge.max_chosen_tokens or len(chosen_ids))
    if over or longest > config.model.max_seq_len or together > config.dpo.tokens_per_microbatch:
        counts["judge_long"] += 1
        return None
    return {
        "format": pairs.FORMAT,
        "kind": "judgements",
        "id": f"{key}/judge",
        "prompt_id": record["prompt_id"],
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_score": round(scores[best], 6),
        "rejected_score": round(scores[worst], 6),
        "chosen_index": best,
        "rejected_index": worst,
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "pair_seed": 0,
        "candidates": [candidate],
    }
