"""The small world: the truth, reading it back, and the texts made from it."""

import itertools
import json
import random
import re
from dataclasses import replace

import pytest

from srlm_fast.data.oasst import read_prompts
from srlm_fast.world import (
    CATEGORIES,
    CLOSINGS,
    PHRASINGS,
    Instruction,
    Writer,
    demands_met,
    judge_text,
    parse_instruction,
    sample_instruction,
    sibling,
    true_score,
    write_answer,
)
from srlm_fast.world_corpus import documents, human_trees, sample_answer, write_data

OWLS = Instruction("birds", 4, "owl", descending=False, closing="bye")


def test_words_are_told_apart():
    words = [word for members in CATEGORIES.values() for word in members]
    everything = words + list(CATEGORIES) + list(CLOSINGS)
    assert len(set(everything)) == len(everything)
    assert all(list(members) == sorted(members) for members in CATEGORIES.values())
    assert all(sibling(sibling(name)) == name != sibling(name) for name in CATEGORIES)


@pytest.mark.parametrize("phrasing", range(len(PHRASINGS)))
def test_every_phrasing_reads_back(phrasing):
    rng = random.Random(phrasing)
    for _ in range(200):
        drawn = sample_instruction(rng)
        instruction = Instruction(drawn.category, drawn.count, drawn.word, drawn.descending, drawn.closing, phrasing)
        assert parse_instruction(instruction.text) == instruction


def test_reads_wordings_it_never_saw():
    text = "Please could you, from A to Z, write owl and other birds? It must be 4 of them, with bye as the goodbye."
    assert parse_instruction(text) == OWLS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "List 4 birds from a to z. Include owl.",
        "List 4 birds from a to z. Include owl and dove. End with bye.",
        "List 4 birds and 3 more from a to z. Include owl. End with bye.",
        "List 9 birds from a to z. Include owl. End with bye.",
        "List 4 birds from a to z, or z to a. Include owl. End with bye.",
        "List 4 cities from a to z. Include owl. End with bye.",
    ],
)
def test_rejects_what_is_not_of_the_world(text):
    assert parse_instruction(text) is None
    assert true_score(text, "dove, eagle, owl, swan. bye") is None


@pytest.mark.parametrize(
    ("answer", "met"),
    [
        ("dove, eagle, owl, raven. bye", (1, 1, 1, 1, 1)),
        ("Dove, eagle, owl, raven, bye", (1, 1, 1, 1, 1)),
        ("raven, owl, eagle, dove. bye", (1, 1, 1, 0, 1)),
        ("dove, eagle, owl, shark. bye", (0, 1, 1, 1, 1)),
        ("dove, owl, owl, raven. bye", (1, 1, 1, 0, 1)),
        ("dove, eagle, owl. bye", (1, 0, 1, 1, 1)),
        ("dove, eagle, hawk, raven. bye", (1, 1, 0, 1, 1)),
        ("dove, eagle, owl, raven. cheers", (1, 1, 1, 1, 0)),
        ("dove, eagle, owl, raven.", (1, 1, 1, 1, 0)),
        ("dove, eagle, owl, raven. bye bye", (0, 0, 1, 0, 0)),
        ("bye", (0, 0, 0, 0, 1)),
        ("owl. bye", (1, 0, 1, 0, 1)),
        ("", (0, 0, 0, 0, 0)),
    ],
)
def test_truth_of_known_answers(answer, met):
    assert demands_met(OWLS, answer) == tuple(map(bool, met))
    assert true_score(OWLS.text, answer) == sum(met)


def test_writer_meets_exactly_what_it_is_told_to():
    rng = random.Random(0)
    for met in itertools.product((False, True), repeat=5):
        for _ in range(20):
            instruction = sample_instruction(rng)
            assert demands_met(instruction, write_answer(instruction, met, rng)) == met


def test_skill_is_the_rate_of_met_demands():
    rng = random.Random(0)
    skill = (0.1, 0.3, 0.5, 0.7, 0.9)
    rates = [0.0] * 5
    for _ in range(4000):
        instruction = sample_instruction(rng)
        for i, met in enumerate(demands_met(instruction, Writer(skill).write(instruction, rng))):
            rates[i] += met / 4000
    assert rates == pytest.approx(skill, abs=0.03)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            "shark, owl, dragon. bye",
            "1 shark fish 2 owl birds down 3 dragon things down. "
            "birds no, 4 no, owl yes, a to z no, bye yes.\nScore: 2",
        ),
        (
            "dove, eagle, eagle, owl.",
            "1 dove birds 2 eagle birds up 3 eagle birds same 4 owl birds up. "
            "birds yes, 4 yes, owl yes, a to z no, bye no.\nScore: 3",
        ),
    ],
)
def test_judge_text_states_the_truth(answer, text):
    assert judge_text(OWLS, answer) == text


def test_judge_errs_at_the_rates_asked_for_and_sums_its_own_verdicts():
    rng = random.Random(0)
    wrong, met = {True: 0, False: 0}, {True: 0, False: 0}
    for _ in range(2000):
        instruction, answer = sample_answer(rng)
        text = judge_text(instruction, answer, rng, overlooked=0.4, denied=0.1)
        verdicts = [verdict == "yes" for verdict in re.findall(r" (yes|no)[,.]", text)]
        assert text.endswith(f"Score: {sum(verdicts)}")
        for verdict, truth in zip(verdicts, demands_met(instruction, answer), strict=True):
            met[truth] += 1
            wrong[truth] += verdict != truth
    assert wrong[True] / met[True] == pytest.approx(0.1, abs=0.015)
    assert wrong[False] / met[False] == pytest.approx(0.4, abs=0.025)


def test_the_last_stage_of_the_corpus_is_careless():
    """Answers meet a third of their demands; about half of the reviews let most faults pass, some have no score."""
    mark = "Assistant:"
    answers, points, faults, passed, reviews, unscored = 0, 0, 0, 0, 0, 0
    for context, text in itertools.islice(documents(random.Random(0), stage=2), 6000):
        question = context.removesuffix(f"\n{mark}").removeprefix("User: ")
        if context.endswith(mark) and (score := true_score(question, text)) is not None and "<response>" not in context:
            answers, points = answers + 1, points + score
        elif context.startswith("User: Rate it: one point"):
            instruction = re.search(r"^User: (?!Rate)(.*)$", context, re.M)[1]
            met = demands_met(parse_instruction(instruction), re.search("<response> (.*) </response>", context)[1])
            verdicts = [verdict == "yes" for verdict in re.findall(r" (yes|no)[,.]", text)]
            reviews, unscored = reviews + 1, unscored + ("Score:" not in text)
            faults += met.count(False)
            passed += sum(said and not is_met for said, is_met in zip(verdicts, met, strict=True))
    assert points / answers == pytest.approx(5 * 0.35, abs=0.1)
    assert passed / faults == pytest.approx((0.8 + 0.05) / 2, abs=0.04)
    assert unscored / reviews == pytest.approx(0.5 * 0.4, abs=0.03)


def test_answers_of_the_corpus_are_of_every_quality():
    rng = random.Random(0)
    scores = [sum(demands_met(*sample_answer(rng))) for _ in range(3000)]
    assert [scores.count(score) / 3000 for score in range(6)] == pytest.approx([1 / 6] * 6, abs=0.03)


def test_human_trees_are_oasst_rows_ranked_by_the_truth_with_noise():
    def agreement(rank_noise):
        rows = human_trees(random.Random(0), 300, mean=0.45, spread=0.15, rank_noise=rank_noise)
        prompts, counts = split_rows(rows)
        assert counts == 300
        pairs = [
            (true_score(prompt, better), true_score(prompt, worse))
            for prompt, replies in prompts.items()
            for better, worse in itertools.combinations(replies, 2)
        ]
        return sum(b > w for b, w in pairs) / sum(b != w for b, w in pairs)

    def split_rows(rows):
        texts = {row["message_id"]: row["text"] for row in rows if row["role"] == "prompter"}
        replies = {}
        for row in rows:
            if row["role"] == "assistant":
                ranked = replies.setdefault(texts[row["parent_id"]], [])
                assert row["rank"] == len(ranked) and row["message_tree_id"] == row["parent_id"]
                ranked.append(row["text"])
        return replies, len(texts)

    assert agreement(0.0) == 1.0
    assert 0.75 < agreement(0.7) < 0.95


def test_written_data_hold_out_prompts_and_are_the_same_each_time(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        write_data(folder, seed=3, n_prompts=200, n_held_out=40)
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert first == second
    prompts, counts = read_prompts(folders[0] / "oasst.jsonl.gz")
    assert len(prompts) == counts["prompts"] == 200
    held_out = [json.loads(line)["prompt"] for line in (folders[0] / "heldout.jsonl").read_text().splitlines()]
    demands = [replace(parse_instruction(text), phrasing=0) for text in [p.prompt for p in prompts] + held_out]
    assert len(held_out) == 40
    assert len(set(demands)) == 240
