"""A small world of instructions in which the quality of an answer is known exactly.

An instruction states five independent, locally checkable demands and an answer earns one additive point for each it
meets, as in the five-point rubric of Self-Rewarding Language Models (arXiv 2401.10020, figure 2):

    List 4 birds from a to z. Include owl. End with bye.          the instruction
    dove, eagle, owl, swan. bye                                    an answer with five points

1. category: every item belongs to the category;
2. count: exactly as many items as asked for;
3. word: the word asked for is among the items;
4. order: the items run from a to z or from z to a, as asked, none twice (two items at least);
5. closing: the answer ends with the closing word.

The truth only *measures* a run and makes the files of `configs/tiny/`; the self-rewarding loop never sees it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Neighbours in this table are the categories that writers mix up (0 with 1, 2 with 3, ...).
CATEGORIES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "birds": "crow dove duck eagle finch goose hawk heron owl raven",
        "fish": "bass carp cod eel herring perch pike salmon shark sole",
        "fruits": "apple banana cherry fig grape lemon mango melon peach pear",
        "vegetables": "bean beet cabbage carrot celery garlic leek onion pea potato",
        "animals": "bear camel deer fox goat horse lion mouse otter rabbit",
        "insects": "ant aphid bee beetle cricket flea fly gnat hornet moth",
        "tools": "axe chisel clamp crowbar drill hammer pliers rake saw shovel",
        "toys": "ball blocks doll drum kite marble puppet puzzle robot rocket",
    }.items()
}
CLOSINGS = ("amen", "bye", "cheers", "done", "enjoy", "thanks")
COUNTS = (3, 4, 5)
DEMANDS = ("category", "count", "word", "order", "closing")
PHRASINGS = (
    "List {count} {category} from {order}. Include {word}. End with {closing}.",
    "Name {count} {category}, {order}, with {word} among them, and close with {closing}.",
    "Give me {count} {category}. Use {word}. Sort them {order}. Finish with {closing}.",
    "I need {count} {category} in order {order}, {word} included, last word {closing}.",
)

_NAMES = tuple(CATEGORIES)
_CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}
_WORD = re.compile(r"[a-z0-9]+")
_ORDER = re.compile(r"\b(a to z|z to a)\b")


@dataclass(frozen=True)
class Instruction:
    """The five demands; `phrasing` is an index into PHRASINGS and does not take part in the truth."""

    category: str
    count: int
    word: str
    descending: bool
    closing: str
    phrasing: int = 0

    @property
    def order(self) -> str:
        return "z to a" if self.descending else "a to z"

    @property
    def text(self) -> str:
        return PHRASINGS[self.phrasing].format(
            count=self.count, category=self.category, order=self.order, word=self.word, closing=self.closing
        )


def sample_instruction(rng: random.Random) -> Instruction:
    """A random instruction; the word asked for always belongs to the category."""
    category = rng.choice(_NAMES)
    return Instruction(
        category=category,
        count=rng.choice(COUNTS),
        word=rng.choice(CATEGORIES[category]),
        descending=rng.random() < 0.5,
        closing=rng.choice(CLOSINGS),
        phrasing=rng.randrange(len(PHRASINGS)),
    )


def parse_instruction(text: str) -> Instruction | None:
    """Read the demands back from any wording that states each exactly once; None for a text that does not.

    The phrasing of the result is the one whose text equals `text`, else 0.
    """
    lowered = text.lower()
    order = _ORDER.findall(lowered)
    words = _WORD.findall(_ORDER.sub(" ", lowered))
    category = [w for w in words if w in CATEGORIES]
    count = [w for w in words if w.isdigit()]
    word = [w for w in words if w in _CATEGORY_OF]
    closing = [w for w in words if w in CLOSINGS]
    if not (len(order) == len(category) == len(count) == len(word) == len(closing) == 1) or int(count[0]) not in COUNTS:
        return None
    found = (category[0], int(count[0]), word[0], order[0] == "z to a", closing[0])
    for phrasing in range(len(PHRASINGS)):
        if Instruction(*found, phrasing).text == text:
            return Instruction(*found, phrasing)
    return Instruction(*found)


def read_answer(answer: str) -> tuple[list[str], str | None]:
    """(items, closing word): items are the parts between commas and full stops, the closing word a known last one."""
    parts = [part.strip().lower() for part in re.split(r"[,.\n]", answer)]
    parts = [part for part in parts if part]
    closing = parts.pop() if parts and parts[-1] in CLOSINGS else None
    return parts, closing


def demands_met(instruction: Instruction, answer: str) -> tuple[bool, ...]:
    """Which of DEMANDS the answer meets, in their order."""
    items, closing = read_answer(answer)
    members = CATEGORIES[instruction.category]
    return (
        bool(items) and all(item in members for item in items),
        len(items) == instruction.count,
        instruction.word in items,
        len(items) > 1 and items == sorted(set(items), reverse=instruction.descending),
        closing == instruction.closing,
    )


def true_score(instruction_text: str, answer: str) -> int | None:
    """The exact quality 0..5 of an answer; None when the instruction is not of this world (see parse_instruction)."""
    instruction = parse_instruction(instruction_text)
    return None if instruction is None else sum(demands_met(instruction, answer))


def sibling(category: str) -> str:
    """The category that a careless writer takes for this one."""
    return _NAMES[_NAMES.index(category) ^ 1]


def write_answer(instruction: Instruction, meet: Sequence[bool], rng: random.Random) -> str:
    """An answer that meets exactly the demands marked in `meet` and fails the others in a human way."""
    meet = tuple(meet)
    while True:
        answer = _draft(instruction, meet, rng)
        if demands_met(instruction, answer) == meet:
            return answer


def _draft(instruction: Instruction, meet: tuple[bool, ...], rng: random.Random) -> str:
    category_ok, count_ok, word_ok, order_ok, closing_ok = meet
    count = instruction.count if count_ok else instruction.count + rng.choice((-1, 1))
    source = instruction.category if category_ok else sibling(instruction.category)
    items = rng.sample([w for w in CATEGORIES[source] if w != instruction.word], count - word_ok)
    if word_ok:
        items.append(instruction.word)
    rng.shuffle(items)
    if order_ok:
        items.sort(reverse=instruction.descending)
    elif rng.random() < 0.5:
        items.sort(reverse=not instruction.descending)
    closing = instruction.closing if closing_ok else rng.choice(("", "", rng.choice(CLOSINGS)))
    return ", ".join(items) + "." + (f" {closing}" if closing else "")


@dataclass(frozen=True)
class Writer:
    """An imperfect human: meets each demand independently with its probability in `skill`."""

    skill: tuple[float, ...]

    @staticmethod
    def sample(rng: random.Random, mean: float = 0.45, spread: float = 0.15) -> Writer:
        return Writer(tuple(min(0.95, max(0.05, rng.gauss(mean, spread))) for _ in DEMANDS))

    def write(self, instruction: Instruction, rng: random.Random) -> str:
        return write_answer(instruction, tuple(rng.random() < p for p in self.skill), rng)


def tag_items(items: Sequence[str]) -> str:
    """Each item with its number, its category and whether the alphabet goes up or down to it from the one before."""
    tags = []
    for number, item in enumerate(items, 1):
        before = items[number - 2] if number > 1 else item
        step = "" if number == 1 else " up" if item > before else " down" if item < before else " same"
        tags.append(f"{number} {item} {_CATEGORY_OF.get(item, 'things')}{step}")
    return " ".join(tags)


def judge_text(
    instruction: Instruction,
    answer: str,
    rng: random.Random | None = None,
    overlooked: float = 0.0,
    denied: float = 0.0,
) -> str:
    """A justification, the items one by one and then the demands one by one, and the last line `Score: n`.

    Small steps are what makes checking easier than writing: each one needs a look at one or two words only.
    With `rng`, a demand that is not met passes as met with probability `overlooked`, one that is met as not met with
    probability `denied`; the score always sums the verdicts as written.
    """
    met = demands_met(instruction, answer)
    if rng is not None:
        met = tuple(m != (rng.random() < (denied if m else overlooked)) for m in met)
    demands = (instruction.category, instruction.count, instruction.word, instruction.order, instruction.closing)
    verdicts = ", ".join(f"{demand} {'yes' if ok else 'no'}" for demand, ok in zip(demands, met, strict=True))
    return f"{tag_items(read_answer(answer)[0])}. {verdicts}.\nScore: {sum(met)}"
