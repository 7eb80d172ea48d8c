"""A judge's scores of ranked or scored replies, against these: the paper's five metrics (`srlm_fast.evaluate`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from srlm_fast.data import RankedPrompt, oasst, read_rows
from srlm_fast.errors import UserError
from srlm_fast.evaluate import Ranked, judge_metrics, ranks
from srlm_fast.evaluation.answers import question
from srlm_fast.evaluation.run import Evaluation, Idle
from srlm_fast.judge import Judgement
from srlm_fast.rollout import Reply, judge_each
from srlm_fast.rundir import write_json, write_jsonl
from srlm_fast.seeds import derive_seed


def read_ranked(path: str | Path) -> list[RankedPrompt]:
    """Prompts with two or more replies of known order.

    Read are data/eft_eval.jsonl of a run (`id`, `prompt`, `replies`: [[text, rank], ...]), rows of several replies with
    numbers, of which more is better (`prompt`, `responses`, and `scores` or `labels`), and files of Open Assistant,
    English prompts.

    Raises:
        UserError: naming the first row that is none of these, or when there is no such prompt.
    """
    where, first = next(read_rows(path), ("", None))
    if not isinstance(first, dict) or not ("responses" in first or isinstance(first.get("prompt"), str)):
        prompts, _ = oasst.read_prompts(path)
    else:
        prompts = [_prompt(where, raw, i) for i, (where, raw) in enumerate(read_rows(path))]
    kept = [prompt for prompt in prompts if len({rank for _, rank in prompt.replies}) > 1]
    if not kept:
        raise UserError(f"{path}: no prompt with two differently ranked replies in it")
    if len({prompt.id for prompt in kept}) < len(kept):
        raise UserError(f"{path}: an id is there twice")
    return kept


def _prompt(where: str, raw: dict[str, Any], number: int) -> RankedPrompt:
    try:
        if "responses" in raw:
            scores = [float(score) for score in raw.get("scores") or raw["labels"]]
            texts, orders = raw["responses"], ranks(scores)
            if not all(math.isfinite(score) for score in scores):
                raise ValueError
        else:
            texts, orders = zip(*raw["replies"])
        replies = [(text, rank) for text, rank in zip(texts, orders, strict=True)]
        if not all(isinstance(text, str) and isinstance(rank, int) for text, rank in replies):
            raise TypeError
        return RankedPrompt(str(raw.get("id", f"{number:05d}")), question(raw["prompt"]), replies)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{where}: is no row of ranked replies; it must have prompt and replies ([[text, rank], ...]), or prompt, "
            "responses and as many scores or labels"
        ) from None


def judge(run: Evaluation) -> tuple[list[Path], dict[str, Any]]:
    """task=judge: judgements.jsonl and judge_metrics.json."""
    config, prompts = run.config, read_ranked(run.config.ranked)
    scorer, speaker = run.scorer()
    seed = derive_seed(config.seed, "judge")

    def work(part: Sequence[RankedPrompt]) -> Iterator[dict[str, Any]]:
        replies = [(p.id, Reply(f"{p.id}/{i}", p.prompt, text)) for p in part for i, (text, _) in enumerate(p.replies)]
        owner = {reply.id: prompt for prompt, reply in replies}
        left = {prompt.id: len(prompt.replies) for prompt in part}
        judged: dict[str, list[dict[str, Any]]] = {}
        engine = Idle() if speaker is None else run.engine(speaker)
        for reply_id, judgements in judge_each(engine, scorer, [reply for _, reply in replies], seed):
            run.check_stop()
            judged[reply_id] = [asdict(judgement) for judgement in judgements]
            prompt = owner[reply_id]
            left[prompt] -= 1
            if not left[prompt]:
                yield {"id": prompt, "judgements": [judged[reply.id] for key, reply in replies if key == prompt]}

    rows = run.shards("judgements", prompts, work, speaker)
    ranked = []
    for prompt, row in zip(prompts, rows, strict=True):
        scores = [scorer.score([Judgement(**one) for one in of_reply]) for of_reply in row["judgements"]]
        ranked.append(Ranked(scores, [rank for _, rank in prompt.replies]))
        row["scores"] = scores
    metrics: dict[str, Any] = {"judge": run.judge_name}
    metrics |= judge_metrics(ranked, best_score=config.judge.max_score, bootstrap=config.bootstrap, seed=config.seed)
    every = [one["score"] for row in rows for of_reply in row["judgements"] for one in of_reply]
    metrics["unparsable_judgements"] = sum(score is None for score in every) / len(every) if every else None
    files = [run.run_dir / "judgements.jsonl", run.run_dir / "judge_metrics.json"]
    run.main(lambda: write_jsonl(files[0], rows))
    run.main(lambda: write_json(files[1], metrics))
    return files, metrics
