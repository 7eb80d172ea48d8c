"""Texts of the small world: what its seed model reads in pretraining, and the human data of `configs/tiny/`.

The corpus stands for what Llama 2 has met in the wild: facts, sorted lists, questions with answers of mixed quality,
lists of tasks, and reviews of answers (some of them wrong) in the format of the judge prompt and in others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from srlm_fast.world import (
    CATEGORIES,
    DEMANDS,
    MAX_SCORE,
    Instruction,
    Writer,
    demands_met,
    judge_text,
    sample_instruction,
    write_answer,
)

JUDGE_PROMPT = """Review the answer to the task below. Add 1 point for each:
- every item fits the group
- the count is right
- the word is there
- the order is right
- the closing is right
User: {instruction}
<response> {response} </response>
First justify the points in brief, then end with the line
Score: <total points>"""
TASK_LIST_OPENING = "Come up with a series of tasks:"
REVIEW_ERROR = 0.01
"""Share of wrong verdicts (not reviews) in the reviews of the corpus: about one review in twenty."""

def chat(prompt: str) -> str:
    """The plain chat format up to where the assistant starts."""
    return f"User: {prompt}\nAssistant:"


def _facts(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(2, 5)):
        name, words = rng.choice(list(CATEGORIES.items()))
        first, second = rng.sample(words, 2)
        lines.append(
            rng.choice(
                (
                    f"{first} and {second} are {name}.",
                    f"{min(first, second)} comes before {max(first, second)}.",
                    f"{max(first, second)} comes after {min(first, second)}.",
                )
            )
        )
    return " ".join(lines)


def _sorted_list(rng: random.Random) -> str:
    """Some or all words of one category, or words of any kind, in order."""
    descending = rng.random() < 0.5
    order = "z to a" if descending else "a to z"
    name, pool = rng.choice(list(CATEGORIES.items()))
    if rng.random() < 0.5:
        name, pool = "words", [word for words in CATEGORIES.values() for word in words]
    items = sorted(rng.sample(pool, rng.randint(4, 10)), reverse=descending)
    return f"{name} {order}: {', '.join(items)}."


def _answered(rng: random.Random) -> str:
    instruction = sample_instruction(rng)
    answer = Writer.sample(rng).write(instruction, rng)
    return f"{chat(instruction.text)} {answer}"


def _task_list(rng: random.Random) -> str:
    """Tasks in the Self-Instruct template; one list keeps to one count of tasks between 4 and 14."""
    tasks = [f"Task {i}: {sample_instruction(rng).text}" for i in range(1, rng.randint(4, 14) + 1)]
    return "\n".join([TASK_LIST_OPENING, *tasks])


def sample_answer(rng: random.Random) -> tuple[Instruction, str]:
    """An instruction and an answer of any quality: the number of demands met is uniform over 0..5."""
    instruction = sample_instruction(rng)
    met = set(rng.sample(range(MAX_SCORE), rng.randint(0, MAX_SCORE)))
    return instruction, write_answer(instruction, [i in met for i in range(MAX_SCORE)], rng)


def _judged(rng: random.Random) -> str:
    instruction, answer = sample_answer(rng)
    prompt = JUDGE_PROMPT.format(instruction=instruction.text, response=answer)
    return f"{chat(prompt)} {judge_text(instruction, answer, rng, REVIEW_ERROR)}"


def _reviewed(rng: random.Random) -> str:
    """A review outside the judge prompt: the same checks, another wording, no score or another line for it."""
    instruction, answer = sample_answer(rng)
    review = judge_text(instruction, answer, rng, REVIEW_ERROR)
    style = rng.randrange(3)
    if style == 0:
        return f"Q: {instruction.text}\nA: {answer}\nReview: {review}"
    if style == 1:
        points, score = review.rsplit("\nScore: ", 1)
        return f"Task: {instruction.text}\nAnswer: {answer}\nPoints: {score} of 5. {points}"
    met = demands_met(instruction, answer)
    order = rng.sample(range(MAX_SCORE), MAX_SCORE)
    notes = ", ".join(f"{DEMANDS[i]} {'good' if met[i] else 'bad'}" for i in order)
    return f"Wanted: {instruction.text}\nGot: {answer}\nChecked: {notes}."


SOURCES = ((_facts, 6), (_sorted_list, 8), (_answered, 30), (_task_list, 4), (_judged, 18), (_reviewed, 34))
"""The kinds of text and their shares of the documents, in percent."""


def documents(rng: random.Random) -> Iterator[str]:
    """Endless pretraining texts."""
    makers, weights = zip(*SOURCES, strict=True)
    while True:
        (maker,) = rng.choices(makers, weights)
        yield maker(rng)
