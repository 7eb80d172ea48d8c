"""Generation phases: EFT targets by the SFT baseline; new prompts and judged candidates by M_t."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from srlm_fast import eft
from srlm_fast.checkpoint import weights_id
from srlm_fast.context import Context
from srlm_fast.data import RankedPrompt, read_rows
from srlm_fast.data.prompts import PromptPool
from srlm_fast.engine.base import Request
from srlm_fast.errors import UserError
from srlm_fast.judge import DECIDES, Judgement
from srlm_fast.phases import PhaseResult, mean
from srlm_fast.progress import progress
from srlm_fast.rollout import Judge, Reply, answer_parts, judge_each
from srlm_fast.rundir import write_jsonl
from srlm_fast.seeds import derive_seed


def judge_ranked(run: Context, name: str, weights: Path, prompts: Sequence[RankedPrompt], judge: Judge) -> list[Path]:
    """Judgements of every ranked reply by one model; NAME/shard-*.jsonl with {"id", "judgements": [reply][sample]}.

    Every prompt has a reply.
    """
    engine = run.engine(weights)
    seed = derive_seed(run.config.seed, name)

    def work(part: Sequence[RankedPrompt]) -> Iterator[dict[str, Any]]:
        replies = {p.id: [Reply(f"{p.id}/{i}", p.prompt, text) for i, (text, _) in enumerate(p.replies)] for p in part}
        owner = {reply.id: prompt_id for prompt_id, group in replies.items() for reply in group}
        judged: dict[str, list[dict[str, Any]]] = {}
        left = {prompt_id: len(group) for prompt_id, group in replies.items()}
        flat = [reply for group in replies.values() for reply in group]
        for reply_id, judgements in judge_each(engine, judge, flat, seed):
            run.check_stop()
            judged[reply_id] = [asdict(j) for j in judgements]
            prompt_id = owner[reply_id]
            left[prompt_id] -= 1
            if not left[prompt_id]:
                yield {"id": prompt_id, "judgements": [judged[r.id] for r in replies[prompt_id]]}

    return run.shards(name, prompts, work)


def judge_eft(run: Context) -> PhaseResult:
    """The SFT baseline writes eft.attempts judgements of every ranked reply; eft/judge/shard-*.jsonl."""
    config = run.config
    judge = Judge(run.chat, replace(config.judge, mode="cot"), config.model.max_seq_len, n=config.eft.attempts)
    prompts = run.ranked("data/eft_train.jsonl")
    files = judge_ranked(run, "eft/judge", run.weights("sft"), prompts, judge)
    counts = {"prompts": len(prompts), "replies": sum(len(p.replies) for p in prompts)}
    return files, {**counts, "weights_id": run.main(lambda: weights_id(run.weights("sft")))[:16]}


def attempts_of(replies: Sequence[Sequence[dict[str, Any]]]) -> Iterator[tuple[Judgement, ...]]:
    """Judgements by reply -> attempts, each with one judgement per reply.

    A reply without judgements, being too long for them, is unparsable in every attempt.
    """
    read = ([Judgement(**judgement) for judgement in of_reply] for of_reply in replies)
    return zip_longest(*read, fillvalue=Judgement("", None))


def select_eft(run: Context) -> PhaseResult:
    """Judgements that agree with the human ranking, thinned of the most common score; eft/train.jsonl."""
    options = run.config.eft
    path = run.run_dir / "eft/train.jsonl"

    def select() -> dict[str, Any]:
        judged = {row["id"]: row["judgements"] for row in shard_rows(run, "eft/judge")}
        accepted = []
        for prompt in run.ranked("data/eft_train.jsonl"):
            accepted += eft.accept(
                prompt,
                attempts_of(judged[prompt.id]),
                scope=options.scope,
                ties=options.ties,
                template=run.judge.template,
            )
        seed = derive_seed(run.config.seed, "eft/select")
        kept, removed = eft.resample(
            accepted, max_share=options.max_share, max_examples=options.max_examples, seed=seed
        )
        if not kept:
            print(
                "eft/select: no judgement of the SFT baseline agrees with the humans; M1 learns from IFT alone",
                flush=True,
            )
        write_jsonl(path, ({**asdict(row.example), **row.origin()} for row in kept))
        return {"accepted": len(accepted), **removed, "kept": len(kept), "scores": eft.histogram(kept)}

    return [path], run.main(select)


def new_prompts(run: Context, t: int) -> PhaseResult:
    """Self-Instruct prompts that resemble neither IFT, nor held-out, nor earlier ones; mT/prompts.jsonl.

    Completions are kept round by round (mT/prompts/round-*.jsonl); a restart replays the rounds it finds.
    """
    options, name = run.config.prompts, f"m{t}/prompts"
    engine = run.engine(run.generator(t))
    pool = _pool(run, t)
    asked = rounds = 0
    origins: list[dict[str, Any]] = []  # of the accepted prompts
    with progress(name, options.count, unit="prompts", enabled=run.world.is_main) as advance:
        while len(pool.accepted) < options.count and asked < options.max_requests * options.count:
            indices = range(asked, asked + options.requests_per_round)
            for row in _round(run, engine, pool, indices, t, run.run_dir / f"{name}/round-{rounds:04d}.jsonl"):
                accepted = pool.add(row["text"], row["finish_reason"])
                origins += [{"request": row["request"], "shots": row["shots"]}] * len(accepted)
                advance(len(accepted))
            asked, rounds = indices.stop, rounds + 1
    kept = min(len(pool.accepted), options.count)
    counts = {"requests": asked, **{rule: n for rule, n in pool.counts.items() if n}, "kept": kept}
    if len(pool.accepted) < options.count:
        raise UserError(
            f"{name}: only {len(pool.accepted)} of {options.count} prompts were made ({counts}); if few requests were "
            "completed their demonstrations are too long (prompts.ift_shots, model.max_seq_len), if few prompts were "
            "accepted look at the filters (prompts.rouge_threshold) or take another prompts.generator"
        )
    rows = [{"id": _prompt_id(t, i), "prompt": pool.accepted[i], **origins[i]} for i in range(kept)]
    path = run.run_dir / f"{name}.jsonl"
    run.main(lambda: write_jsonl(path, rows))
    return [path], counts


def _prompt_id(t: int, place: int) -> str:
    return f"m{t}-{place:06d}"


def _pool(run: Context, t: int) -> PromptPool:
    options = run.config.prompts
    keys = (
        "ift_shots",
        "generated_shots",
        "min_words",
        "max_words",
        "blacklist",
        "forbidden_starts",
        "rouge_threshold",
    )
    seeds = [example.prompt for example in run.examples("data/ift.jsonl")]
    known = [row["prompt"] for earlier in range(1, t) for row in run.rows(f"m{earlier}/prompts.jsonl")]
    known += [row["prompt"] for row in run.held_out]
    return PromptPool(
        seeds,
        known=known,
        template=run.tasks_template,
        seed=derive_seed(run.config.seed, f"m{t}/prompts"),
        **{key: getattr(options, key) for key in keys},
    )


def _round(run: Context, engine: Any, pool: PromptPool, indices: range, t: int, file: Path) -> list[dict[str, Any]]:
    """The completions of one round, from its file or shared out among the ranks, as the file's rows.

    A request whose demonstrations are too long for model.max_seq_len is left out.
    """
    if run.main(file.exists):
        return [row for _, row in read_rows(file)]
    options = run.config.prompts
    last_item = re.compile(
        rf"\n\s*{options.ift_shots + options.generated_shots + options.prompts_per_request + 1}[.):]"
    )
    bos = run.tokenizer.bos_id is not None
    coded = {i: run.tokenizer.encode(pool.request(i), bos=bos) for i in indices[run.world.group :: run.world.n_groups]}
    requests = [
        Request(
            prompt_ids=ids,
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
            seed=derive_seed(pool.seed, i),
            stop_ids=run.chat.stop_ids,
            metadata=i,
        )
        for i, ids in coded.items()
        if len(ids) + options.max_new_tokens <= run.config.model.max_seq_len
    ]
    done = {}
    for completion in engine.stream(requests):
        run.check_stop()
        text, *rest = last_item.split(run.chat.decode(completion.token_ids), maxsplit=1)
        whole = rest or not options.drop_cut_off
        done[completion.request.metadata] = (text, "stop" if whole else completion.finish_reason)
    everything = {i: result for part in run.world.gather(done) for i, result in part.items()}
    seeds = [example.id for example in run.examples("data/ift.jsonl")]
    rows = []
    for i in (i for i in indices if i in everything):
        shots = [seeds[place] if kind == "seeds" else _prompt_id(t, place) for kind, place in pool.shots(i)]
        rows.append({"request": i, "shots": shots, "text": everything[i][0], "finish_reason": everything[i][1]})
    run.main(lambda: write_jsonl(file, rows))
    return rows


def candidates(run: Context, t: int) -> PhaseResult:
    """M_t answers the new prompts and it, or judge.endpoint, judges the answers; mT/candidates/shard-*.jsonl."""
    config, name = run.config, f"m{t}/candidates"
    engine = run.engine(run.weights(f"m{t}"))
    seed = derive_seed(config.seed, name)
    # A server is asked by the rank that writes the records alone.
    itself = run.candidate_judge is run.judge
    options = {
        "judge": run.candidate_judge if itself or run.world.leads_group else None,
        # Ranks of a group begin a shard at the same step; what a server has judged only one of them knows.
        "overlap": itself or run.world.group_size == 1,
        "on_step": run.check_stop,
    }

    def work(parts: Iterator[Sequence[dict[str, str]]]) -> Iterator[dict[str, Any]]:
        return answer_parts(engine, run.chat, config.candidates, parts, seed, config.model.max_seq_len, **options)

    files = run.overlapping_shards(name, run.rows(f"m{t}/prompts.jsonl"), work)
    rows = shard_rows(run, name)
    answers = [candidate for row in rows for candidate in row["candidates"]]
    judgements = [j for candidate in answers for j in candidate["judgements"]]
    decides = DECIDES[config.judge.mode]
    return files, {
        "candidates": len(answers),
        "too_long": sum(not row["candidates"] for row in rows),
        "mean_score": mean([c["score"] for c in answers if c["score"] is not None]),
        "mean_expected": mean([j["expected"] for j in judgements if j["expected"] is not None]),
        "unparsable": mean([j["score"] is None for j in judgements]),
        "truncated": mean([c["finish_reason"] == "length" for c in answers]),
        "mean_tokens": mean([len(c["token_ids"]) for c in answers]),
        "scores": dict(sorted(Counter(round(j[decides]) for j in judgements if j[decides] is not None).items())),
    }


def shard_rows(run: Context, name: str) -> list[dict[str, Any]]:
    """The rows of all shards of a phase, in order."""
    files = sorted((run.run_dir / name).glob("shard-*.jsonl"))
    return [row for file in files for _, row in read_rows(file)]
