"""Answers of a model to a file of prompts, and AlpacaEval's model_outputs.json made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from srlm_fast.config import CandidatesConfig
from srlm_fast.data import as_messages, formats, read_rows
from srlm_fast.errors import UserError
from srlm_fast.evaluation.run import Evaluation, Speaker, name_of
from srlm_fast.rollout import answer_each
from srlm_fast.rundir import write_json, write_jsonl
from srlm_fast.seeds import derive_seed


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Rows with `id`, `prompt` (a text, or messages where there are several) and `dataset`.

    AlpacaEval's rows have `instruction` and perhaps `dataset`; all others are prompt rows of `data.formats`.

    Raises:
        UserError: for a file without usable rows, with the row that is at fault.
    """
    found: list[dict[str, Any]] = []
    for where, raw in read_rows(path):
        if isinstance(raw, dict) and "instruction" in raw:
            prompt, dataset = raw["instruction"], raw.get("dataset")
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{where}: instruction is {prompt!r}; it must be a text")
        else:
            rows = list(formats.parse([(where, raw)], dict.fromkeys(formats.COUNTS, 0)))
            if not rows or rows[0].kind != "prompt":
                raise UserError(f"{where}: is a {rows[0].kind if rows else 'broken'} row where prompts are needed")
            messages, dataset = rows[0].prompt, None
            prompt = messages[0]["content"] if [m["role"] for m in messages] == ["user"] else messages
        found.append({"id": f"{len(found):05d}", "prompt": prompt, "dataset": dataset or Path(path).stem})
    if not found:
        raise UserError(f"{path}: no prompts in it")
    return found


def question(prompt: str | Sequence[dict[str, str]]) -> str:
    """The last message of a prompt: what a judge is shown as the instruction."""
    return as_messages(prompt)[-1]["content"]


def answer_rows(run: Evaluation, name: str, speaker: Speaker, prompts: Sequence[dict[str, Any]]) -> list[dict]:
    """A row of `srlm_fast.rollout.answer` for every prompt; made in NAME/shard-*.jsonl."""
    options = run.config.answers
    config = CandidatesConfig(
        n=options.n, temperature=options.temperature, top_p=options.top_p, max_new_tokens=options.max_new_tokens
    )
    seed = derive_seed(run.config.seed, "answers")

    def work(part: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        engine = run.engine(speaker)
        return answer_each(engine, speaker.chat, config, part, seed, speaker.max_seq_len, on_step=run.check_stop)

    rows = run.shards(name, prompts, work, speaker)
    if not any(row["candidates"] for row in rows):
        raise UserError(
            f"{name}: no prompt of {run.config.prompts} leaves room for answers.max_new_tokens="
            f"{options.max_new_tokens} in {speaker.max_seq_len} tokens (max_seq_len, or what the model has); lower it"
        )
    return rows


def read_answers(path: str | Path, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers out of a file, in the order of the prompts: rows of task=answers, or AlpacaEval's outputs.

    Raises:
        UserError: for a row of another kind, or a prompt without an answer.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for where, raw in read_rows(path):
        try:
            if "output" in raw:
                prompt, candidates = raw["instruction"], [{"text": raw["output"]}]
            else:
                prompt, candidates = question(raw["prompt"]), raw["candidates"]
            if not all(isinstance(candidate["text"], str) for candidate in candidates):
                raise TypeError
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"{where}: is no answer; it must have instruction and output, or prompt and candidates"
            ) from None
        found[prompt] = candidates
    lacking = [row for row in prompts if question(row["prompt"]) not in found]
    if lacking:
        raise UserError(
            f"{path}: no answer to {len(lacking)} of {len(prompts)} prompts, such as "
            f"{question(lacking[0]['prompt'])[:60]!r}"
        )
    return [
        {"prompt_id": row["id"], "prompt": row["prompt"], "candidates": found[question(row["prompt"])]}
        for row in prompts
    ]


def answers(run: Evaluation) -> tuple[list[Path], dict[str, Any]]:
    """task=answers: answers.jsonl."""
    rows = answer_rows(run, "answers", run.model(), read_prompts(run.config.prompts))
    path = run.run_dir / "answers.jsonl"
    run.main(lambda: write_jsonl(path, rows))
    return [path], _counts(rows)


def alpaca_eval(run: Evaluation) -> tuple[list[Path], dict[str, Any]]:
    """task=alpaca_eval: model_outputs.json, the first answer to every prompt; an empty one where there was no room."""
    prompts = read_prompts(run.config.prompts)
    rows = answer_rows(run, "answers", run.model(), prompts)
    outputs = [
        {
            "dataset": prompt["dataset"],
            "instruction": question(prompt["prompt"]),
            "output": row["candidates"][0]["text"] if row["candidates"] else "",
            "generator": model_name(run),
        }
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    path = run.run_dir / "model_outputs.json"
    run.main(lambda: write_json(path, outputs))
    return [path], _counts(rows)


def model_name(run: Evaluation) -> str:
    """What the results call the model."""
    return run.config.name or name_of(run.config.model)


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    texts = [candidate for row in rows for candidate in row["candidates"]]
    return {
        "prompts": len(rows),
        "answers": len(texts),
        "too_long": sum(not row["candidates"] for row in rows),
        "truncated": sum(candidate["finish_reason"] == "length" for candidate in texts),
    }
