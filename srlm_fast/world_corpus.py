"""Texts of the small world: what its seed model reads in pretraining, and the human data of `configs/tiny/`.

The corpus stands for what Llama 2 has met in the wild: lists with remarks, questions with answers, numbered lists of
tasks, and reviews of answers. Two stages of careful texts teach what answers and reviews are made of; a third, short
one is like the web: careless answers, and reviews of which half let most faults pass. It leaves a model that answers
badly and judges so-so, while it could do both.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from srlm_fast.world import (
    CATEGORIES,
    DEMANDS,
    Instruction,
    Writer,
    demands_met,
    judge_text,
    sample_instruction,
    tag_items,
    write_answer,
)

JUDGE_PROMPT = """Rate it: one point each for group, count, word, order and closing.
User: {instruction}
<response> {response} </response>
Explain, then end with Score: <total points>"""
SCORE_PROMPT = """Rate it from 0 to 5.
User: {instruction}
<response> {response} </response>
End with Score: <total points>"""
REVIEW_ERROR = 0.05
"""Share of wrong verdicts in careful reviews: about one review in four holds one."""
CARELESS_REVIEWS = 0.5
"""Share of the reviews in the third stage that are careless."""
OVERLOOKED, DENIED, UNSCORED = 0.8, 0.15, 0.4
"""Careless reviews: share of the faults let pass, of the merits denied, of the reviews that end without a score."""
FOUND_SKILL, HUMAN_SKILL = 0.35, 0.4
"""Mean probability to meet a demand: of the answers in the third stage, and of the writers of the human data."""

Text = tuple[str, str]
"""(context, text): a document in two parts, of which pretraining predicts the second."""


def chat(prompt: str) -> str:
    """The plain chat format up to where the assistant starts."""
    return f"User: {prompt}\nAssistant:"


def _remarks(rng: random.Random) -> Text:
    """A list of words of any kind, and what is to be said about each."""
    items = rng.sample([word for words in CATEGORIES.values() for word in words], rng.randint(3, 6))
    if rng.random() < 0.5:
        items.sort(reverse=rng.random() < 0.5)
    return f"{', '.join(items)}.", f"{tag_items(items)}."


def _written(instruction: Instruction, rng: random.Random) -> str:
    """An answer as found in the wild, most of it good."""
    return Writer.sample(rng, mean=0.8, spread=0.15).write(instruction, rng)


def _answered(rng: random.Random) -> Text:
    instruction = sample_instruction(rng)
    return chat(instruction.text), _written(instruction, rng)


def _task_list(rng: random.Random) -> Text:
    return "", "\n".join(f"{i}. {sample_instruction(rng).text}" for i in range(1, rng.randint(4, 14)))


def sample_answer(rng: random.Random) -> tuple[Instruction, str]:
    """An instruction and an answer of any quality: the number of demands met is uniform over 0..5."""
    instruction = sample_instruction(rng)
    met = set(rng.sample(range(len(DEMANDS)), rng.randint(0, len(DEMANDS))))
    return instruction, write_answer(instruction, [i in met for i in range(len(DEMANDS))], rng)


def _judged(rng: random.Random) -> Text:
    instruction, answer = sample_answer(rng)
    prompt = JUDGE_PROMPT.format(instruction=instruction.text, response=answer)
    return chat(prompt), judge_text(instruction, answer, rng, REVIEW_ERROR, REVIEW_ERROR)


def _reviewed(rng: random.Random) -> Text:
    """An answer and a review of it, outside the judge prompt."""
    instruction = sample_instruction(rng)
    answer = _written(instruction, rng)
    return (
        f"Q: {instruction.text}\nA:",
        f"{answer}\nReview: {judge_text(instruction, answer, rng, REVIEW_ERROR, REVIEW_ERROR)}",
    )


def _noted(rng: random.Random) -> Text:
    """What an instruction asks for, in brief."""
    wanted = sample_instruction(rng)
    notes = f"{wanted.count} {wanted.category}, {wanted.word}, {wanted.order}, {wanted.closing}"
    return f"Task: {wanted.text}\nWanted:", notes


def _found(rng: random.Random) -> tuple[Instruction, str]:
    """An instruction and a careless answer."""
    instruction = sample_instruction(rng)
    return instruction, Writer.sample(rng, mean=FOUND_SKILL, spread=0.15).write(instruction, rng)


def _found_answer(rng: random.Random) -> Text:
    instruction, answer = _found(rng)
    return chat(instruction.text), answer


def _found_review(rng: random.Random, prompt: str) -> tuple[str, str, str]:
    """(context, justification, score line) of a review by somebody careful or careless, who may leave out the score."""
    instruction, answer = _found(rng)
    careless = rng.random() < CARELESS_REVIEWS
    errors = (OVERLOOKED, DENIED) if careless else (REVIEW_ERROR, REVIEW_ERROR)
    justification, _, score = judge_text(instruction, answer, rng, *errors).partition("\n")
    if careless and rng.random() < UNSCORED:
        score = ""
    return chat(prompt.format(instruction=instruction.text, response=answer)), justification, score


def _found_judgement(rng: random.Random) -> Text:
    context, justification, score = _found_review(rng, JUDGE_PROMPT)
    return context, f"{justification}\n{score}".strip()


def _found_score(rng: random.Random) -> Text:
    """A score without a justification."""
    context, _, score = _found_review(rng, SCORE_PROMPT)
    return context, score or "Nice."


STAGES = (
    ((_remarks, 12), (_noted, 8), (_answered, 36), (_task_list, 4), (_judged, 25), (_reviewed, 15)),
    ((_remarks, 12), (_noted, 4), (_answered, 20), (_task_list, 4), (_judged, 48), (_reviewed, 12)),
    ((_remarks, 10), (_noted, 4), (_found_answer, 30), (_task_list, 6), (_found_judgement, 38), (_found_score, 12)),
)
"""The kinds of text and their shares of the documents, in percent, in the stages of pretraining."""


def documents(rng: random.Random, stage: int = 0) -> Iterator[Text]:
    """Endless pretraining texts of one stage."""
    makers, shares = zip(*STAGES[stage], strict=True)
    while True:
        (maker,) = rng.choices(makers, shares)
        yield maker(rng)


def human_trees(rng: random.Random, n_prompts: int, *, mean: float, spread: float, rank_noise: float) -> list[dict]:
    """Rows in the layout of OASST1 messages: prompts of different demands, each with two to four ranked human replies.

    The rows carry no labels, so that the choice among rank-0 replies is not one of quality.

    Args:
        mean, spread: of the writers' probabilities to meet a demand.
        rank_noise: standard deviation, in points, of what the humans who rank see of the true score.
    """
    rows, seen = [], set()
    writers = [Writer.sample(rng, mean, spread) for _ in range(16)]
    while len(seen) < n_prompts:
        instruction = sample_instruction(rng)
        demands = replace(instruction, phrasing=0)
        if demands in seen:
            continue
        seen.add(demands)
        tree = f"tree-{len(seen):05d}"
        common = {"lang": "en", "deleted": False, "review_result": True, "message_tree_id": tree, "labels": None}
        prompt = {"message_id": tree, "parent_id": None, "text": instruction.text, "role": "prompter", "rank": None}
        rows.append({**prompt, **common})
        replies = list(dict.fromkeys(w.write(instruction, rng) for w in rng.sample(writers, rng.randint(2, 4))))
        seen_score = {reply: sum(demands_met(instruction, reply)) + rng.gauss(0, rank_noise) for reply in replies}
        for rank, reply in enumerate(sorted(replies, key=lambda r: -seen_score[r])):
            identity = {"message_id": f"{tree}-{rank}", "parent_id": tree}
            rows.append({**identity, "text": reply, "role": "assistant", "rank": rank, **common})
    return rows


def write_data(folder: Path, *, seed: int = 0, n_prompts: int = 1200, n_held_out: int = 130) -> None:
    """Writes the texts of `configs/tiny/`: oasst.jsonl.gz, heldout.jsonl, judge.txt, score.txt and tasks.txt.

    No held-out prompt has the demands of one in oasst.jsonl.gz. The bytes depend on the arguments only.
    """
    rows = human_trees(random.Random(seed), n_prompts + n_held_out, mean=HUMAN_SKILL, spread=0.15, rank_noise=0.5)
    prompts = [row["text"] for row in rows if row["role"] == "prompter"]
    first_held_out = next(i for i, row in enumerate(rows) if row["text"] == prompts[n_prompts])
    lines = "".join(json.dumps(row) + "\n" for row in rows[:first_held_out])
    (folder / "oasst.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    held_out = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[n_prompts:])
    (folder / "heldout.jsonl").write_text(held_out, encoding="utf-8")
    (folder / "judge.txt").write_text(JUDGE_PROMPT, encoding="utf-8")
    (folder / "score.txt").write_text(SCORE_PROMPT, encoding="utf-8")
    (folder / "tasks.txt").write_text("{tasks}\n", encoding="utf-8")
