"""Two models on a file of prompts, answer by answer: by a judge in both orders, by its scores, or by the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from srlm_fast.errors import UserError
from srlm_fast.evaluation.answers import answer_rows, model_name, question, read_answers, read_prompts
from srlm_fast.evaluation.run import Evaluation, Idle, Speaker, name_of
from srlm_fast.head_to_head import Verdict, by_orders, by_scores, load_template, pairwise_prompt, parse_choice, rates
from srlm_fast.phases.evaluation import TRUTHS
from srlm_fast.rollout import Reply, judge_each
from srlm_fast.rundir import write_json, write_jsonl
from srlm_fast.seeds import derive_seed

Item = dict[str, Any]
"""A comparison to be made: `id`, `group` (the prompt's), `prompt`, and both answers (None: there is none)."""
SIDES = ("model", "opponent")


def head_to_head(run: Evaluation) -> tuple[list[Path], dict[str, Any]]:
    """task=head_to_head: verdicts.jsonl, and head_to_head.json with the rates of the model against the opponent."""
    config = run.config
    prompts = read_prompts(config.prompts)
    work, judge = {"pairwise": _by_pairs, "scores": _by_scores, "truth": _by_truth}[config.compare](run)
    sides = {side: _side(run, side, prompts) for side in SIDES}
    items = _items(sides["model"](), sides["opponent"]())
    rows = run.shards("verdicts", items, work, judge)
    verdicts = [Verdict(row["group"], row["result"], row["unparsable"], row["disagree"]) for row in rows]
    found = rates(verdicts, bootstrap=config.bootstrap, seed=config.seed)
    names = {"model": model_name(run), "opponent": config.opponent_name or name_of(str(config.opponent))}
    names |= {"compare": config.compare, "judge": config.truth if config.compare == "truth" else run.judge_name}
    files = [run.run_dir / "verdicts.jsonl", run.run_dir / "head_to_head.json"]
    run.main(lambda: write_jsonl(files[0], rows))
    run.main(lambda: write_json(files[1], names | found))
    counts = Counter(verdict.result for verdict in verdicts)
    return files, {"wins": counts["win"], "ties": counts["tie"], "losses": counts["loss"]} | found


def _side(run: Evaluation, side: str, prompts: Sequence[Item]) -> Callable[[], list[dict[str, Any]]]:
    """The answers of one side, once they are needed; what is wrong with its model or file is said at once."""
    path = Path(getattr(run.config, side))
    if path.is_file():
        rows = read_answers(path, prompts)
        return lambda: rows
    chat = run.config.chat_format if side == "model" else run.config.opponent_chat_format or run.config.chat_format
    speaker = run.speaker(path, chat, side)
    return lambda: answer_rows(run, f"answers/{side}", speaker, prompts)


def _items(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> list[Item]:
    items = []
    for a, b in zip(first, second, strict=True):
        for i, texts in enumerate(zip_longest(a["candidates"], b["candidates"])):
            item = {"id": f"{a['prompt_id']}/{i}", "group": a["prompt_id"], "prompt": question(a["prompt"])}
            items.append(item | {side: text and text["text"] for side, text in zip(SIDES, texts)})
    return items


def _decided(item: Item) -> dict[str, Any] | None:
    """The row of an item that no judge is needed for: the answers are the same, or one is missing."""
    if item["model"] == item["opponent"]:
        return _row(item, Verdict(item["group"], "tie"))
    if None in (item["model"], item["opponent"]):
        return _row(item, Verdict(item["group"], "tie", unparsable=True))
    return None


def _row(item: Item, verdict: Verdict, **more: Any) -> dict[str, Any]:
    verdict_fields = {name: getattr(verdict, name) for name in ("result", "unparsable", "disagree")}
    return item | verdict_fields | more


Work = tuple[Callable[[Sequence[Item]], Iterator[dict[str, Any]]], Speaker | None]
"""What makes rows of verdicts of items, and the judging model of the engine, if there is one."""


def _by_pairs(run: Evaluation) -> Work:
    """Both orders: the model's answer as A, then as B."""
    template, writer, seed = load_template(run.config.judge.pairwise_template), run.writer(), run.config.seed

    def work(part: Sequence[Item]) -> Iterator[dict[str, Any]]:
        asked = {}
        prompts = []
        for item in part:
            if row := _decided(item):
                yield row
                continue
            asked[item["id"]] = item
            for order, sides in enumerate((SIDES, SIDES[::-1])):
                prompt = pairwise_prompt(item["prompt"], *(item[side] for side in sides), template)
                prompts.append(((item["id"], order), prompt, derive_seed(seed, "pairwise", item["id"], order)))
        texts: dict[str, dict[int, str | None]] = {}
        for (key, order), text in writer.write_each(prompts):
            run.check_stop()
            texts.setdefault(key, {})[order] = text
            if len(texts[key]) == 2:
                both = [texts[key][order] for order in (0, 1)]
                choices = [None if text is None else parse_choice(text) for text in both]
                judgements = [{"text": text, "choice": choice} for text, choice in zip(both, choices)]
                yield _row(asked[key], by_orders(asked[key]["group"], *choices), judgements=judgements)

    return work, writer.speaker


def _by_scores(run: Evaluation) -> Work:
    """Mean pointwise scores of both answers."""
    scorer, speaker = run.scorer()
    seed = derive_seed(run.config.seed, "head_to_head")

    def work(part: Sequence[Item]) -> Iterator[dict[str, Any]]:
        asked, replies = {}, []
        for item in part:
            if row := _decided(item):
                yield row
                continue
            for side in SIDES:
                replies.append(Reply(f"{item['id']}/{side}", item["prompt"], item[side]))
                asked[replies[-1].id] = item, side
        judged: dict[str, dict[str, list]] = {}
        engine = Idle() if speaker is None else run.engine(speaker)
        for reply_id, judgements in judge_each(engine, scorer, replies, seed):
            run.check_stop()
            item, side = asked[reply_id]
            of_item = judged.setdefault(item["id"], {})
            of_item[side] = judgements
            if len(of_item) == 2:
                scores = [scorer.score(of_item[side]) for side in SIDES]
                texts = [[asdict(judgement) for judgement in of_item[side]] for side in SIDES]
                yield _row(item, by_scores(item["group"], *scores), scores=scores, judgements=texts)

    return work, speaker


def _by_truth(run: Evaluation) -> Work:
    """The exact scorer."""
    if run.config.truth is None:
        raise UserError(f"compare=truth needs truth, the name of an exact scorer: {', '.join(TRUTHS)}")
    score = TRUTHS[run.config.truth]

    def work(part: Sequence[Item]) -> Iterator[dict[str, Any]]:
        for item in part:
            texts = [item[side] for side in SIDES]
            scores = [None if text is None else score(item["prompt"], text) for text in texts]
            if any(text is not None and found is None for text, found in zip(texts, scores)):
                raise UserError(
                    f"truth={run.config.truth} cannot score answers to {item['prompt'][:80]!r}; compare by scores or "
                    "pairwise"
                )
            yield _row(item, by_scores(item["group"], *scores), scores=scores)

    return work, None
