"""From judged candidates to pairs: what other models add to the candidates of M_t, and the choice of the pairs.

mT/past, mT/past_judged        Temporal Self-Rewarding: answers of the past model, judged by M_t
mT/draft_pairs                 ... pairs for its future model
mT/future, mT/future_judged    ... answers of the future model, judged by M_t
mT/previous                    CREAM: the candidates of M_t, judged by the model before
mT/comparisons                 Meta-Rewarding: judgements compared (srlm_fast.phases.meta_judging)
mT/pairs                       the pairs that M_(t+1) learns from
mT/positives                   the answers with the best score, with learn_from=positives
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from srlm_fast import checkpoint, consistency, pairs
from srlm_fast.context import Context
from srlm_fast.data import Example, RankedPrompt
from srlm_fast.errors import UserError
from srlm_fast.judge import Judgement
from srlm_fast.phases import PhaseResult, mean
from srlm_fast.phases.generation import judge_ranked, shard_rows
from srlm_fast.phases.meta_judging import judge_pairs
from srlm_fast.rollout import answer_each
from srlm_fast.rundir import write_jsonl
from srlm_fast.seeds import derive_seed


def other_answers(run: Context, t: int, kind: str) -> PhaseResult:
    """The past or the future model answers the prompts of iteration t, as often as M_t; mT/KIND/shard-*.jsonl."""
    config, name = run.config, f"m{t}/{kind}"
    engine = run.engine(run.weights(config.temporal.anchor if kind == "past" else f"m{t}f"))
    seed = derive_seed(config.seed, name)

    def work(prompts: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
        limit = config.model.max_seq_len
        return answer_each(engine, run.chat, config.candidates, prompts, seed, limit, on_step=run.check_stop)

    files = run.shards(name, run.rows(f"m{t}/prompts.jsonl"), work)
    answers = [candidate for row in shard_rows(run, name) for candidate in row["candidates"]]
    return files, {"candidates": len(answers), "mean_tokens": mean([len(c["token_ids"]) for c in answers])}


def judge_others(run: Context, t: int, kind: str) -> PhaseResult:
    """M_t judges the answers of the past or of the future model; mT/KIND_judged/shard-*.jsonl."""
    return _judge(run, f"m{t}/{kind}", f"m{t}", f"m{t}/{kind}_judged")


def judge_previous(run: Context, t: int) -> PhaseResult:
    """The model before M_t, of M1 the SFT baseline, judges the candidates of M_t; mT/previous/shard-*.jsonl."""
    return _judge(run, f"m{t}/candidates", f"m{t - 1}" if t > 1 else "sft", f"m{t}/previous")


def _judge(run: Context, answers: str, model: str, name: str) -> PhaseResult:
    """Judgements by `model` of the answers of a phase."""
    rows = [row for row in shard_rows(run, answers) if row["candidates"]]
    prompts = [RankedPrompt(r["prompt_id"], r["prompt"], [(c["text"], 0) for c in r["candidates"]]) for r in rows]
    files = judge_ranked(run, name, run.weights(model), prompts, run.judge)
    judged = [j for row in shard_rows(run, name) for of_answer in row["judgements"] for j in of_answer]
    return files, {
        "judgements": len(judged),
        "mean_score": mean([j["score"] for j in judged if j["score"] is not None]),
        "unparsable": mean([j["score"] is None for j in judged]),
    }


def make_pairs(run: Context, t: int, draft: bool = False) -> PhaseResult:
    """The pairs of iteration t; mT/pairs.jsonl, or of the draft mT/draft_pairs.jsonl."""
    path = run.run_dir / f"m{t}/{'draft_' if draft else ''}pairs.jsonl"

    def make() -> dict[str, Any]:
        options = run.config.pairs
        rho = options.length_control[min(t, len(options.length_control)) - 1]
        weights_id = checkpoint.weights_id(run.weights(f"m{t}"))
        records = list(_records(run, t, draft))
        rows, counts = pairs.make_pairs(
            records,
            weights_id=weights_id,
            select=options.select,
            k=options.k,
            margin=options.margin,
            length_control=rho,
            ties=options.ties,
            keep_truncated=options.keep_truncated,
            seed=derive_seed(run.config.seed, f"m{t}/pairs"),
        )
        if not rows:
            raise UserError(
                f"m{t}/pairs: no prompt gave a pair ({counts}); if most judgements are unparsable the model needs more "
                "EFT data or judge.mode=expected, if most scores are equal more candidates"
            )
        shown: dict[str, Any] = {**counts, **_origins(run, rows)}
        if run.config.meta_judge.enabled and t <= run.config.meta_judge.iterations and not draft:
            judged, found = judge_pairs(run, t, weights_id, len(rows))
            if not judged:
                print(
                    f"m{t}/pairs: no pair of judgements was made ({found}); if most comparisons are undecided "
                    f"(m{t}/comparisons) the model cannot keep to their format: meta_judge.mode=direct",
                    flush=True,
                )
            rows, shown = [*rows, *judged], {**shown, **found}
        shown |= _label(run, t, records, rows)
        write_jsonl(path, rows)
        return shown

    return [path], run.main(make)


def _records(run: Context, t: int, draft: bool) -> Iterator[dict[str, Any]]:
    """The candidates of M_t, followed by those of the past and of the future model where there are such."""
    kinds = ["past"] * (run.config.temporal.anchor is not None)
    kinds += ["future"] * (run.config.temporal.future and not draft)
    answers = {kind: {row["prompt_id"]: row for row in shard_rows(run, f"m{t}/{kind}")} for kind in kinds}
    judged = {kind: {row["id"]: row["judgements"] for row in shard_rows(run, f"m{t}/{kind}_judged")} for kind in kinds}
    for record in shard_rows(run, f"m{t}/candidates"):
        key, everything = record["prompt_id"], list(record["candidates"])
        for kind in kinds:
            others = answers[kind][key]["candidates"]
            for candidate, found in zip(others, judged[kind].get(key, ()), strict=True):
                score = run.judge.score(Judgement(**judgement) for judgement in found)
                index = len(everything)
                everything.append({**candidate, "index": index, "judgements": found, "score": score, "by": kind})
        yield {**record, "candidates": everything}


def _origins(run: Context, rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many answers of past and future models are in the pairs."""
    if run.config.temporal.anchor is None:
        return {}
    sides = {"rejected_past": ("rejected_index", "past"), "chosen_future": ("chosen_index", "future")}
    return {
        name: sum(row["candidates"][row[index]].get("by") == kind for row in rows)
        for name, (index, kind) in sides.items()
    }


def _label(run: Context, t: int, records: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Writes the labels that pairs.labels asks for into the rows; pairs of judgements are certain."""
    options, mode = run.config.pairs, run.config.judge.mode
    if options.labels is None:
        return {}
    answers = [row for row in rows if row["kind"] == "answers"]
    for row in rows:
        row["label"] = 1.0
    if options.labels == "scores":
        consistency.from_scores(answers)
        return {"mean_label": mean([row["label"] for row in answers])}
    own = {r["prompt_id"]: [c for c in r["candidates"] if "by" not in c] for r in records}
    if options.labels == "previous":
        before = {row["id"]: row["judgements"] for row in shard_rows(run, f"m{t}/previous")}
        rankings = {
            key: [(c["score"], run.judge.score(Judgement(**j) for j in found)) for c, found in zip(of, before[key])]
            for key, of in own.items()
            if of
        }
    else:
        rankings = {key: [consistency.halves(c["judgements"], mode) for c in of] for key, of in own.items()}
    found = {key: consistency.consistency(*zip(*both)) if both else None for key, both in rankings.items()}
    labels, average = consistency.labels(found, options.label_scope)
    for row in answers:
        row["label"] = labels[row["prompt_id"]]
    return {"consistency": None if average is None else round(average, 4)}


def positives(run: Context, t: int) -> PhaseResult:
    """The answers of M_t that all its judgements give judge.max_score, as examples for SFT; mT/positives.jsonl.

    Of equal answers to a prompt one is taken, and of those cut off at the token limit none.
    """
    path = run.run_dir / f"m{t}/positives.jsonl"
    best = run.config.judge.max_score

    def make() -> dict[str, Any]:
        taken: dict[tuple[str, str], Example] = {}
        n = 0
        for row in shard_rows(run, f"m{t}/candidates"):
            for candidate in row["candidates"]:
                n += 1
                text = candidate["text"].strip()
                if candidate["score"] == best and candidate["finish_reason"] != "length":
                    identity = f"{row['prompt_id']}/{candidate['index']}"
                    taken.setdefault((row["prompt_id"], text), Example(identity, row["prompt"], text))
        if not taken:
            print(f"m{t}/positives: no answer has the best score; M{t + 1} learns from the seed data", flush=True)
        write_jsonl(path, map(asdict, taken.values()))
        return {"candidates": n, "positives": len(taken)}

    return [path], run.main(make)
