import json
import random
import re
from collections import Counter

import pytest

from srlm_fast.data.prompts import COUNTS, TEMPLATE, PromptPool, load_template, parse_completion, rouge_tokens
from srlm_fast.errors import UserError

# No two of these share more than a few words.
SEEDS = [
    "Explain how tides come about.",
    "Suggest three names for a bakery in Lisbon.",
    "What is a good way to learn chess openings?",
    "Translate 'good morning' into Finnish and Welsh.",
    "Why do cats purr when nobody is touching them?",
    "Give me a recipe without onions or garlic.",
    "Summarise the plot twist typical of detective novels.",
    "How many litres of paint does an average bedroom need?",
    "Compose a short poem about the last bus home.",
    "Compare steel with aluminium for bicycle frames.",
]
GENERATED = [
    "Name the longest river of Asia.",
    "Which tree keeps its leaves in winter?",
    "Plan a quiet weekend by the sea.",
    "Tell me about medieval cooking.",
    "Write to my landlord about mould.",
]


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure in floats, by the textbook table: precision, recall, then their harmonic mean."""
    a, b = (re.sub(r"[^a-z0-9]+", " ", text.lower()).split() for text in (prediction, reference))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    lcs = table[-1][-1]
    if not lcs:
        return 0.0
    precision, recall = lcs / len(a), lcs / len(b)
    return 2 * precision * recall / (precision + recall)


def test_the_request_holds_six_ift_and_two_generated_shots():
    pool = PromptPool(SEEDS, seed=4)
    generated = pool.add("\n".join(f"9. {prompt}" for prompt in GENERATED))
    assert generated == GENERATED
    seen = Counter()
    for index in range(50):
        text = pool.request(index)
        head = TEMPLATE[: TEMPLATE.index("{tasks}")]
        assert text.startswith(head)
        lines = text[len(head) :].split("\n")
        assert [line.split(". ")[0] for line in lines] == [*"12345678", "9."]
        shots = [line.split(". ", 1)[1] for line in lines[:-1]]
        assert len(set(shots)) == 8
        assert sum(shot in SEEDS for shot in shots) == 6 and sum(shot in generated for shot in shots) == 2
        seen.update(shots)
        assert text == pool.request(index)
    assert set(seen) == set(SEEDS + generated)  # everything has its turn
    assert PromptPool(SEEDS, seed=5).request(0) != PromptPool(SEEDS, seed=4).request(0)


def test_ift_fills_in_while_too_few_are_accepted():
    pool = PromptPool(SEEDS, ift_shots=3, generated_shots=2)
    for accepted in range(4):
        shots = [line.split(". ", 1)[1] for line in pool.request(0).splitlines() if re.match(r"\d\. ", line)]
        assert len(shots) == 5
        assert sum(shot in SEEDS for shot in shots) == 5 - min(2, accepted)
        pool.add(f"9. {GENERATED[accepted]}")
    with pytest.raises(UserError, match="7 IFT prompts"):
        PromptPool(SEEDS[:7])


def test_shots_are_put_in_literally_and_on_one_line():
    pool = PromptPool(["with {tasks}\nand {braces}"], ift_shots=1, generated_shots=0, template="T\n{tasks}")
    assert pool.request(0) == "T\n1. with {tasks} and {braces}\n2."


@pytest.mark.parametrize(
    ("completion", "prompts"),
    [
        (" Name rivers.\n10. Name lakes.\n11. Name a sea.", ["Name rivers.", "Name lakes.", "Name a sea."]),
        ("Sure! Here are more tasks:\n\n9. One thing\n10) Another\n11: third", ["One thing", "Another", "third"]),
        ("9. Sort these\n   words:  b a\n\nAnswer: a b\n10. Next", ["Sort these words: b a", "Next"]),
        ("9.\nOn its own line\n10.\n", ["On its own line"]),
        ("9. About the year\n1990 was warm", ["About the year 1990 was warm"]),
        ("9. Is 3.5 more than\n2.5 litres?", ["Is 3.5 more than 2.5 litres?"]),
        ("", []),
        ("\n\n", []),
    ],
)
def test_parse_completion(completion, prompts):
    assert parse_completion(completion) == prompts


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("Name three rivers", "too_short"),
        ("Name three long rivers", None),
        (" ".join(f"w{i}" for i in range(150)), None),
        (" ".join(f"w{i}" for i in range(151)), "too_long"),
        ("Describe the image shown below", "keyword"),
        ("Describe what MAPS are good for", "keyword"),
        ("Where would you go  to relax?", "keyword"),
        ("How do profiles and imagery differ?", None),  # only whole words
        ("write a program that counts sheep", "opening"),
        ("(a) explain gravity to children", "opening"),
        ("Écris une lettre à grand-mère", "opening"),
        ("explain how  TIDES come about.", "duplicate"),
        ("Explain how the tides come about", "similar"),  # 2 * 5 / (5 + 6)
        ("What makes tides rise and fall?", None),
    ],
)
def test_filters(prompt, rule):
    pool = PromptPool(SEEDS)
    assert pool.rejects(prompt) == rule
    assert pool.add(f"9. {prompt}") == ([] if rule else [" ".join(prompt.split())])
    assert pool.counts == dict.fromkeys(COUNTS, 0) | {"completions": 1, "proposed": 1, rule or "accepted": 1}


def test_filters_are_options():
    pool = PromptPool(SEEDS, min_words=1, max_words=2, blacklist=(), forbidden_starts=(), rouge_threshold=1.0)
    assert pool.add("9. image\n10. Explain how tides\n11. how tides") == ["image", "how tides"]


def test_accepted_prompts_count_as_seen_at_once():
    pool = PromptPool(SEEDS)
    completion = "Name the longest river of Asia.\n10. Name the longest river of Peru.\n11. Name a deep lake nearby."
    assert pool.add(completion) == ["Name the longest river of Asia.", "Name a deep lake nearby."]
    assert (pool.counts["similar"], pool.counts["accepted"]) == (1, 2)


def test_known_prompts_are_avoided_but_never_shown():
    pool = PromptPool(SEEDS, known=["Name the longest river of Asia."])
    assert pool.add("9. Name the longest river of Asia.\n10. Name the longest river of Peru.") == []
    assert (pool.counts["duplicate"], pool.counts["similar"]) == (1, 1)
    assert not any("river" in pool.request(index) for index in range(30))


def test_a_completion_cut_off_is_dropped_whole():
    pool = PromptPool(SEEDS)
    assert pool.add("9. Name the longest river of Asia.\n10. Name the", finish_reason="length") == []
    assert pool.counts == dict.fromkeys(COUNTS, 0) | {"completions": 1, "cut_off": 1}


def test_similarity_is_rouge_l(shared_data):
    """Against an independent table in floats, on real instructions and on variants of them."""
    lines = shared_data("self_instruct/seed_tasks.jsonl").read_text().splitlines()
    seeds = [json.loads(line)["instruction"] for line in lines][:60]
    pool = PromptPool(seeds, rouge_threshold=0.3)
    rng = random.Random(0)
    reached = 0
    for _ in range(150):
        words = rng.choice(seeds).split()
        for _ in range(rng.randrange(6)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(rng.choice(seeds).split()))
            words.pop(rng.randrange(len(words)))
        prompt = " ".join(words)
        expected = max(rouge_l(prompt, seed) for seed in seeds)
        got = pool.similarity(prompt)
        assert got == (pytest.approx(expected, abs=1e-12) if expected >= 0.3 else 0.0)
        reached += 0.3 <= expected < 1
    assert reached > 50


def test_the_threshold_itself_is_allowed():
    """7 of 10 tokens in common: F = 0.7, which is not above 0.7; 8 of 10 are."""
    base = "a b c d e f g h i j"
    pool = PromptPool([base, *SEEDS[1:]])
    assert pool.similarity("a b c d e f g x y z") == 0.7
    assert pool.rejects("a b c d e f g x y z") is None
    assert pool.rejects("a b c d e f g h y z") == "similar"


def test_prompts_without_latin_letters_are_like_nothing():
    pool = PromptPool(["как дела сегодня у вас", *SEEDS[1:]])
    assert rouge_tokens("как дела") == []
    assert pool.similarity("что нового у тебя") == 0.0


def test_every_proposed_prompt_is_counted_once(shared_data):
    lines = shared_data("self_instruct/user_oriented_instructions.jsonl").read_text().splitlines()
    pool, again = (PromptPool(SEEDS, rouge_threshold=0.5) for _ in range(2))
    for line in lines:
        completion = f"9. {json.loads(line)['instruction']}"
        assert again.add(completion) == pool.add(completion)
    assert pool.counts["accepted"] == len(pool.accepted) > 100 and pool.counts["similar"] > 3
    assert sum(pool.counts.values()) == 2 * pool.counts["proposed"] + pool.counts["completions"]
    assert again.request(7) == pool.request(7)


def test_template_files(tmp_path):
    path = tmp_path / "tasks.txt"
    path.write_text("List:\n{tasks}\n")
    assert load_template(path) == "List:\n{tasks}"
    assert load_template() == TEMPLATE
    path.write_text("List:")
    with pytest.raises(UserError, match=r"tasks.txt: .*\{tasks\}"):
        load_template(path)
    with pytest.raises(UserError, match="cannot read"):
        load_template(tmp_path / "absent")
