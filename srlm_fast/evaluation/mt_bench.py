"""MT-Bench in FastChat's files: conversations of a model, and their single-answer ratings by a judge.

Source: arXiv 2306.05685. The sampling temperature of each category and the names of all fields are FastChat's; the
wording of the rating prompt is our own.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srlm_fast.chat import Message
from srlm_fast.data import read_rows
from srlm_fast.engine.base import Request
from srlm_fast.errors import UserError
from srlm_fast.evaluation.answers import model_name
from srlm_fast.evaluation.run import Evaluation, Speaker
from srlm_fast.rundir import write_json, write_jsonl
from srlm_fast.seeds import derive_seed
from srlm_fast.templates import fill_template, read_template

TEMPLATE = """\
Below is a conversation between a user and an AI assistant. Rate the assistant's last answer.

Consider whether it helps with what the user wants, stays with the matter, is correct, goes deep enough, is well \
thought out and says as much as is called for. Earlier turns are there to be understood; rate the last answer alone, \
and be strict but fair.
{reference}
{conversation}

Explain your rating in a few sentences first. Then end with a number from 1 (useless) to 10 (could not be better) in \
exactly this form: "Rating: [[number]]", for example "Rating: [[6]]".
"""
TEMPLATE_NAME = "single-srlm-v1"
"""Second part of the field `judge` of a judgement made with `TEMPLATE`."""
_RATING = re.compile(r"\[\[\s*([0-9]+(?:\.[0-9]+)?)\s*\]\]")


def load_questions(path: str | Path) -> list[dict[str, Any]]:
    """Rows with `question_id`, `category` and `turns` (texts).

    Raises:
        UserError: naming the first row that is another thing, or a question_id that is there twice.
    """
    rows, seen = [], set()
    for where, raw in read_rows(path):
        turns = raw.get("turns") if isinstance(raw, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise UserError(f"{where}: is no question of MT-Bench; turns must be a list of texts, got {turns!r}")
        if not isinstance(raw.get("question_id"), (int, str)) or not isinstance(raw.get("category"), str):
            raise UserError(f"{where}: is no question of MT-Bench; it must have question_id and category")
        if raw["question_id"] in seen:
            raise UserError(f"{where}: question_id {raw['question_id']} is there twice")
        seen.add(raw["question_id"])
        rows.append(raw)
    if not rows:
        raise UserError(f"{path}: no questions in it")
    return rows


# ----------------------------------------------------------------------------------------------------------- answering


def mt_bench(run: Evaluation) -> tuple[list[Path], dict[str, Any]]:
    """task=mt_bench: model_answer/NAME.jsonl."""
    for category, value in run.config.temperatures.items():
        if isinstance(value, (str, bool)) or not 0 <= value < math.inf:
            raise UserError(f"temperatures.{category}={value!r}: must be a number and not negative")
    questions, speaker, name = load_questions(run.config.questions), run.model(), model_name(run)
    asked = [{"id": str(question["question_id"]), **question} for question in questions]
    rows = run.shards("conversations", asked, lambda part: _converse(run, speaker, part), speaker)
    lines = [
        {
            "question_id": question["question_id"],
            "answer_id": _answer_id(question["question_id"], name, row["choices"]),
            "model_id": name,
            "choices": row["choices"],
            "tstamp": row["tstamp"],
        }
        for question, row in zip(questions, rows, strict=True)
    ]
    path = run.run_dir / f"model_answer/{name}.jsonl"
    run.main(lambda: write_jsonl(path, lines))
    counts = {what: sum(row[what] for row in rows) for what in ("truncated", "too_long")}
    return [path], {"questions": len(rows), "turns": sum(len(q["turns"]) for q in questions), **counts}


def _converse(run: Evaluation, speaker: Speaker, questions: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All turns of all questions, each turn asked as soon as the one before is answered.

    A turn that the conversation leaves no room for is answered by an empty text and counted in `too_long`.
    """
    options, engine, chat = run.config.answers, run.engine(speaker), speaker.chat
    by_id = {question["id"]: question for question in questions}
    said: dict[tuple[str, int], list[str]] = {(key, i): [] for key in by_id for i in range(options.n)}
    left = dict.fromkeys(by_id, options.n)  # choices that are not finished
    counts = {key: {"truncated": 0, "too_long": 0} for key in by_id}

    def ask(key: str, choice: int) -> bool:
        """Asks for the next turn; False when there is none that fits."""
        question, texts = by_id[key], said[key, choice]
        while len(texts) < len(question["turns"]):
            ids = chat.encode_prompt(_messages(question["turns"], texts))
            room = speaker.max_seq_len - len(ids)
            if room >= 1:
                request = Request(
                    prompt_ids=ids,
                    temperature=run.config.temperatures.get(question["category"], options.temperature),
                    top_p=options.top_p,
                    max_new_tokens=min(options.max_new_tokens, room),
                    seed=derive_seed(run.config.seed, "mt_bench", key, choice, len(texts)),
                    stop_ids=chat.stop_ids,
                    metadata=(key, choice),
                )
                engine.submit([request])
                return True
            texts.append("")
            counts[key]["too_long"] += 1
        return False

    def finished(key: str) -> Iterator[dict[str, Any]]:
        left[key] -= 1
        if not left[key]:
            choices = [{"index": i, "turns": said[key, i]} for i in range(options.n)]
            yield {"id": key, "choices": choices, "tstamp": time.time(), **counts[key]}

    for key, choice in said:
        if not ask(key, choice):
            yield from finished(key)
    for completion in engine.stream():
        run.check_stop()
        key, choice = completion.request.metadata
        said[key, choice].append(chat.decode(completion.token_ids))
        counts[key]["truncated"] += completion.finish_reason == "length"
        if not ask(key, choice):
            yield from finished(key)


def _messages(turns: Sequence[str], answered: Sequence[str]) -> list[Message]:
    """The conversation so far, ending with the first turn that is not answered."""
    messages = []
    for turn, text in zip(turns, answered):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": text}]
    return [*messages, {"role": "user", "content": turns[len(answered)]}]


def _answer_id(*parts: Any) -> str:
    """22 letters and digits that depend on what was answered; FastChat's are random."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:22]


# ------------------------------------------------------------------------------------------------------------- grading


def load_template(path: str | Path | None = None) -> str:
    """Text of a rating prompt file, or the built-in `TEMPLATE` for None.

    Raises UserError when the file cannot be read or lacks {conversation} or {reference}.
    """
    return TEMPLATE if path is None else read_template(path, ("conversation", "reference"), "rating")


def rating_prompt(
    turns: Sequence[str], answers: Sequence[str], references: Sequence[str] = (), template: str = TEMPLATE
) -> str:
    """The prompt that asks for the rating of the last of `answers`; braces in the texts stay as they are."""

    def block(name: str, text: str) -> str:
        return f"[{name}]\n{text}\n[End of {name.lower()}]\n"

    spoken, known = [], []
    for i, (turn, answer) in enumerate(zip(turns, answers), start=1):
        spoken += [block(f"User, turn {i}", turn), block(f"Assistant, turn {i}", answer)]
    for i, reference in enumerate(references[: len(answers)], start=1):
        known.append(block(f"Correct answer to turn {i}", reference))
    texts = {"conversation": "\n".join(spoken), "reference": "\n" + "\n".join(known) if known else ""}
    return fill_template(template, texts)


def parse_rating(text: str) -> float:
    """The last [[number]] of a judgement; -1, as in FastChat, where there is none from 1 to 10."""
    found = _RATING.findall(text)
    rating = float(found[-1]) if found else -1.0
    return rating if 1 <= rating <= 10 else -1.0


def load_model_answers(path: str | Path, questions: Sequence[dict[str, Any]]) -> tuple[str, dict[Any, list[str]]]:
    """(model id, question id -> the turns of its first choice) of a file in FastChat's format.

    Raises:
        UserError: for a row of another kind, answers of several models, or a question without all its answers.
    """
    found: dict[Any, list[str]] = {}
    names = []
    for where, raw in read_rows(path):
        try:
            turns = raw["choices"][0]["turns"]
            names.append(raw["model_id"])
            if not all(isinstance(turn, str) for turn in turns):
                raise TypeError
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"{where}: is no answer in FastChat's format; it must have question_id, model_id and choices, a list "
                "of {index, turns}"
            ) from None
        found[raw.get("question_id")] = turns
    if len(set(names)) > 1:
        raise UserError(f"{path}: holds answers of {len(set(names))} models ({', '.join(map(str, names[:3]))}, ...)")
    for question in questions:
        if len(found.get(question["question_id"], ())) != len(question["turns"]):
            raise UserError(
                f"{path}: question {question['question_id']} has {len(found.get(question['question_id'], ()))} answers "
                f"of {len(question['turns'])}"
            )
    return names[0], found


def mt_bench_grade(run: Evaluation) -> tuple[list[Path], dict[str, Any]]:
    """task=mt_bench_grade: model_judgment/JUDGE_single.jsonl, a line per question and turn, and mt_bench.json."""
    config = run.config
    questions = load_questions(config.questions)
    model, answers = load_model_answers(config.model_answer, questions)
    references = {}
    if config.reference_answer:
        with_reference = {raw.get("question_id") for _, raw in read_rows(config.reference_answer)}
        known = [question for question in questions if question["question_id"] in with_reference]
        references = load_model_answers(config.reference_answer, known)[1]
    template, writer = load_template(config.judge.rating_template), run.writer()
    judge = [run.judge_name, Path(config.judge.rating_template).stem if config.judge.rating_template else TEMPLATE_NAME]
    items = []
    for question in questions:
        of_question = question["question_id"]
        for turn in range(1, len(question["turns"]) + 1):
            shown = answers[of_question][:turn]
            prompt = rating_prompt(question["turns"], shown, references.get(of_question, ()), template)
            items.append({"id": f"{of_question}/{turn}", "question_id": of_question, "turn": turn, "prompt": prompt})

    def work(part: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        by_id = {item["id"]: item for item in part}
        seeds = ((key, item["prompt"], derive_seed(config.seed, "rating", key)) for key, item in by_id.items())
        for key, text in writer.write_each(seeds):
            run.check_stop()
            item = by_id[key]
            line = {
                "question_id": item["question_id"],
                "model": model,
                "judge": judge,
                "user_prompt": item["prompt"],
                "judgment": text or "",
                "score": parse_rating(text or ""),
                "turn": item["turn"],
                "tstamp": time.time(),
            }
            yield {"id": key, **line}

    rows = run.shards("ratings", items, work, writer.speaker)
    lines = [{name: value for name, value in row.items() if name != "id"} for row in rows]
    files = [run.run_dir / f"model_judgment/{judge[0]}_single.jsonl", run.run_dir / "mt_bench.json"]
    run.main(lambda: write_jsonl(files[0], lines))
    means = mean_ratings(lines, questions, bootstrap=config.bootstrap, seed=config.seed)
    run.main(lambda: write_json(files[1], {"model": model, "judge": judge[0], **means}))
    return files, {name: means[name] for name in ("overall", "ratings", "unparsable")}


def mean_ratings(
    lines: Sequence[dict[str, Any]], questions: Sequence[dict[str, Any]], *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Means of the ratings of model_judgment lines; those of -1 are left out, as in FastChat.

    Returns:
        overall; overall_interval, the 95 % percentile interval over draws of questions; turns and categories, by their
        names; ratings, how many lines; unparsable, the share of -1. A mean of nothing is None.
    """
    category = {question["question_id"]: question["category"] for question in questions}
    read = [line for line in lines if line["score"] != -1]

    def mean(some: Sequence[dict[str, Any]]) -> float | None:
        return sum(line["score"] for line in some) / len(some) if some else None

    found: dict[str, Any] = {
        "overall": mean(read),
        "turns": {str(t): mean([x for x in read if x["turn"] == t]) for t in sorted({x["turn"] for x in lines})},
        "categories": {
            name: mean([line for line in read if category[line["question_id"]] == name])
            for name in dict.fromkeys(category.values())
        },
        "ratings": len(lines),
        "unparsable": 1 - len(read) / len(lines) if lines else None,
    }
    if bootstrap and read:
        sums = {key: [0.0, 0] for key in category}
        for line in read:
            sums[line["question_id"]][0] += line["score"]
            sums[line["question_id"]][1] += 1
        table = np.array(list(sums.values()))
        chances = np.full(len(table), 1 / len(table))
        draws = np.random.default_rng(seed).multinomial(len(table), chances, size=bootstrap) @ table
        drawn = draws[draws[:, 1] > 0]
        found["overall_interval"] = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5]).tolist()
    return found
