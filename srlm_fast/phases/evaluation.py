"""Evaluation of one model: answers to held-out prompts, and its judgements of held-out ranked replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from srlm_fast import world
from srlm_fast.context import Context
from srlm_fast.errors import UserError
from srlm_fast.evaluate import Ranked, judge_metrics, ranks
from srlm_fast.judge import DECIDES, aggregate
from srlm_fast.phases import PhaseResult, mean
from srlm_fast.phases.generation import judge_ranked, shard_rows
from srlm_fast.rollout import answer_each
from srlm_fast.rundir import write_json
from srlm_fast.seeds import derive_seed

TRUTHS: dict[str, Callable[[str, str], int | None]] = {"world": world.true_score}
"""Exact scorers, by the name in evaluate.truth: (instruction, answer) -> score. Nothing is trained on them."""


def evaluate(run: Context, name: str) -> PhaseResult:
    """Writes NAME/metrics.json: quality of held-out answers and the paper's judge metrics.

    "judge" holds the metrics against the human ranks, "judge_truth" those against the exact scores.
    """
    files, metrics = [], {}
    if run.config.evaluate.prompts is not None:
        files, metrics = _answers(run, name)
    prompts = run.ranked("data/eft_eval.jsonl")
    files = [*files, *judge_ranked(run, f"{name}/judgements", run.weights(name), prompts, run.judge)]
    path = run.run_dir / f"{name}/metrics.json"
    metrics |= run.main(lambda: _judge(run, name))
    run.main(lambda: write_json(path, metrics))
    best_known = metrics.get("judge_truth", metrics["judge"])
    shown = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    return [*files, path], {**shown, "judge_pairwise": best_known["pairwise_accuracy"]}


def _answers(run: Context, name: str) -> tuple[list[Path], dict[str, Any]]:
    config = run.config
    engine = run.engine(run.weights(name))
    seed = derive_seed(config.seed, "evaluate/answers")

    def work(prompts: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
        n, limit = config.evaluate.n, config.model.max_seq_len
        return answer_each(engine, run.chat, config.candidates, prompts, seed, limit, n=n, on_step=run.check_stop)

    files = run.shards(f"{name}/answers", run.held_out, work)
    rows = shard_rows(run, f"{name}/answers")
    answers = [(row["prompt"], candidate) for row in rows for candidate in row["candidates"]]
    if not answers:
        raise UserError(
            f"evaluate.prompts={config.evaluate.prompts}: no prompt fits model.max_seq_len with room for an answer"
        )
    metrics = {
        "answer_tokens": mean([len(c["token_ids"]) for _, c in answers]),
        "answer_characters": mean([len(c["text"]) for _, c in answers]),
        "answers_truncated": mean([c["finish_reason"] == "length" for _, c in answers]),
    }
    if config.evaluate.truth is not None:
        metrics["true_quality"] = mean([_truth(run, prompt, c["text"]) for prompt, c in answers])
    return files, metrics


def _judge(run: Context, name: str) -> dict[str, Any]:
    options = run.config.evaluate
    judged = {row["id"]: row["judgements"] for row in shard_rows(run, f"{name}/judgements")}
    human, truth = [], []
    for prompt in run.ranked("data/eft_eval.jsonl"):
        min_valid, decides = run.config.judge.min_valid, DECIDES[run.config.judge.mode]
        scores = [aggregate((j[decides] for j in of_reply), min_valid=min_valid) for of_reply in judged[prompt.id]]
        human.append(Ranked(scores, [rank for _, rank in prompt.replies]))
        if options.truth is not None:
            truth.append(Ranked(scores, ranks([_truth(run, prompt.prompt, text) for text, _ in prompt.replies])))
    settings = {"best_score": options.best_score, "bootstrap": options.bootstrap, "seed": run.config.seed}
    every = [j["score"] for of_prompt in judged.values() for of_reply in of_prompt for j in of_reply]
    metrics = {
        "judge": judge_metrics(human, **settings),
        "unparsable_judgements": mean([score is None for score in every]),
    }
    if truth:
        metrics["judge_truth"] = judge_metrics(truth, **settings)
    return metrics


def _truth(run: Context, prompt: str, text: str) -> int:
    score = TRUTHS[run.config.evaluate.truth](prompt, text)
    if score is None:
        raise UserError(
            f"evaluate.truth={run.config.evaluate.truth} cannot score answers to {prompt!r}; leave it unset"
        )
    return score
