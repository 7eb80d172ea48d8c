"""Answers and judgements through the real native engine, on the tokenizer of configs/tiny and a random Llama."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srlm_fast.chat import chat_format
from srlm_fast.checkpoint import save_weights
from srlm_fast.config import CandidatesConfig, JudgeConfig
from srlm_fast.engine import load_engine
from srlm_fast.engine.base import Completion
from srlm_fast.errors import UserError
from srlm_fast.judge import TEMPLATE
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.rollout import Judge, Reply, answer, answer_each, answer_parts, judge_each
from srlm_fast.shards import Shard
from srlm_fast.tokenizer import load_tokenizer

TINY = Path(__file__).resolve().parents[1] / "configs/tiny"
CONFIG = LlamaConfig(
    vocab_size=760,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
)
CANDIDATES = CandidatesConfig(n=3, max_new_tokens=6)
JUDGE = JudgeConfig(n=2, max_new_tokens=8, template=str(TINY / "judge.txt"))
TEXTS = ("List 3 birds.", "Name 4 tools from z to a.", "Hm?")
PROMPTS = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def chat():
    return chat_format("plain", load_tokenizer(TINY / "tokenizer.model"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("model") / "m"
    save_weights(model, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def engine(model_folder):
    engine = load_engine("native", max_batch=5)
    engine.load(model_folder)
    yield engine
    engine.close()


def test_every_candidate_is_judged(engine, chat):
    steps = []
    judge = Judge(chat, JUDGE, 256)
    records = answer(engine, chat, CANDIDATES, PROMPTS, 7, 256, judge=judge, on_step=lambda: steps.append(1))
    assert [r["prompt_id"] for r in records] == ["p0", "p1", "p2"] and len(steps) == 3 * 3 * 2
    for record in records:
        assert [c["index"] for c in record["candidates"]] == [0, 1, 2]
        for candidate in record["candidates"]:
            assert len(candidate["judgements"]) == 2
            assert candidate["text"] == chat.decode(candidate["token_ids"])
            assert candidate["logprob"] < 0
            assert candidate["score"] is None, "a random model writes no score"


def test_results_do_not_depend_on_order_or_company(engine, chat):
    judge = Judge(chat, JUDGE, 256)
    together = {r["prompt_id"]: r for r in answer(engine, chat, CANDIDATES, PROMPTS, 7, 256, judge=judge)}
    turned = {r["prompt_id"]: r for r in answer(engine, chat, CANDIDATES, PROMPTS[::-1], 7, 256, judge=judge)}
    (alone,) = answer(engine, chat, CANDIDATES, PROMPTS[1:2], 7, 256, judge=judge)
    assert turned == together and alone == together["p1"]
    (other_seed,) = answer(engine, chat, CANDIDATES, PROMPTS[1:2], 8, 256, judge=judge)
    assert other_seed["candidates"] != alone["candidates"]


def test_expected_score_is_the_mean_of_the_digits(engine, chat):
    judge = Judge(chat, replace(JUDGE, mode="expected"), 256)
    reply = Reply("r", "List 3 birds.", "owl, crow, dove.")
    judgements = dict(judge_each(engine, judge, [reply], 3))["r"]
    model = engine_model(engine)
    for judgement in judgements:
        before, mark, text = judgement.text.rpartition("Score:")
        head = before if mark else f"{text.rstrip()}\n"
        prompt = chat.encode_prompt([{"role": "user", "content": judge.prompt(reply)}])
        coded = [chat.encode_text(f"{head}Score: {digit}") for digit in range(6)]
        logits = model([*prompt, *coded[0][:-1]])[-1]
        p = logits.double().softmax(-1)[[ids[-1] for ids in coded]]
        assert judgement.expected == pytest.approx(float((p / p.sum() * torch.arange(6)).sum()), abs=1e-4)
        assert judgement.score is None, "the text of a random model holds none"
    assert judge.score(judgements) == pytest.approx(sum(j.expected for j in judgements) / len(judgements))
    assert Judge(chat, JUDGE, 256).score(judgements) is None


@pytest.mark.parametrize(
    ("text", "which", "digit"),
    [
        ("1 bird, 2 words.\nScore: 4", "last", "1 bird, 2 words.\nScore: 4"),
        ("Score:3", "last", "Score:3"),
        ("So **Score: 2/5**, 5 of 5", "last", "So **Score: 2"),
        ("Score: 1 or\nScore: 5", "first", "Score: 1"),
        ("Score: 1 or\nScore: 5", "last", "Score: 1 or\nScore: 5"),
        ("Score: 4.5", "last", "Score: 4"),
    ],
)
def test_a_judgement_brings_the_distribution_of_its_score_digit(chat, text, which, digit):
    """The log-probs of the one step that wrote the digit decide, wherever other digits stand."""
    judge = Judge(chat, replace(JUDGE, which=which), 256)
    request = judge.request(Reply("r", "Hm?", "owl"), 0, None)
    ids = chat.encode_response(text)
    place = len(chat.encode_text(digit)) - 1
    assert ids[: place + 1] == chat.encode_text(digit)
    digits = [chat.encode_text(f"{digit[:-1]}{k}")[-1] for k in range(6)]
    logprobs = torch.randn(len(ids), len(request.logprob_token_ids), generator=torch.Generator().manual_seed(1))
    completion = Completion(request, 0, ids, [0.0] * len(ids), "stop", logprobs.tolist())
    p = logprobs[place, [request.logprob_token_ids.index(i) for i in digits]].double().softmax(0)
    judgement = judge.read(completion)
    assert int(judgement.score) == int(digit[-1])
    assert judgement.expected == pytest.approx(float((p * torch.arange(6)).sum()), abs=1e-9)


@pytest.mark.parametrize("text", ["no number at all", "Score: 7", "Score: many", "4 of 5"])
def test_an_answer_without_a_score_is_unparsable(chat, text):
    judge = Judge(chat, JUDGE, 256)
    request = judge.request(Reply("r", "Hm?", "owl"), 0, None)
    ids = chat.encode_response(text)
    logprobs = [[-1.0] * len(request.logprob_token_ids)] * len(ids)
    judgement = judge.read(Completion(request, 0, ids, [0.0] * len(ids), "stop", logprobs))
    assert (judgement.score, judgement.expected) == (None, None) and judge.score([judgement]) is None


@pytest.mark.parametrize("mode", ["cot", "expected"])
def test_sequential_gives_the_same_records(engine, chat, mode):
    judge = Judge(chat, replace(JUDGE, mode=mode), 256)
    sequential = replace(CANDIDATES, schedule="sequential")
    streamed = answer(engine, chat, CANDIDATES, PROMPTS, 7, 256, judge=judge)
    assert answer(engine, chat, sequential, PROMPTS, 7, 256, judge=judge) == streamed


class Watched:
    """An engine that notes what is submitted."""

    def __init__(self, engine):
        self.engine, self.kinds, self.max_batch = engine, [], engine.max_batch

    def submit(self, requests):
        self.kinds += [request.metadata[:2] for request in requests]
        self.engine.submit(requests)

    def stream(self):
        for completion in self.engine.stream():
            self.kinds.append("done")
            yield completion


def test_judgements_join_while_answers_are_under_way_or_wait_for_all(engine, chat):
    for schedule in ("streamed", "sequential"):
        watched = Watched(engine)
        config = replace(CANDIDATES, schedule=schedule)
        answer(watched, chat, config, PROMPTS, 7, 256, judge=Judge(chat, JUDGE, 256))
        kinds = [kind if kind == "done" else kind[0] for kind in watched.kinds]
        assert kinds[:3] == ["answer"] * 3, "answers go first"
        assert kinds.count("judge") == 9
        first = kinds.index("judge")
        if schedule == "streamed":
            assert kinds[first - 1] == "done" and kinds[:first].count("done") == 1, "asked as soon as one is there"
        else:
            owners = [kind[1][0] for kind in watched.kinds[first : first + 9]]
            assert kinds[:first].count("done") == 9
            assert owners == sorted(owners), "a prompt's requests are neighbours"


def test_streamed_parts_overlap_and_give_the_same_records(engine, chat):
    """The second part begins while the first is under way, or after it; nothing else changes."""
    prompts = [{"id": f"p{i}", "prompt": f"{TEXTS[i % 3]} {i}"} for i in range(6)]
    judge, found = Judge(chat, JUDGE, 256), {}
    for schedule, overlap in (("streamed", True), ("streamed", False), ("sequential", True)):
        watched, config = Watched(engine), replace(CANDIDATES, schedule=schedule)
        parts = (prompts[:3], [], prompts[3:])
        records = list(answer_parts(watched, chat, config, parts, 7, 256, judge=judge, overlap=overlap))
        found[schedule, overlap] = sorted(records, key=lambda record: record["prompt_id"])
        second = watched.kinds.index(("answer", "p3"))
        done, all_done = watched.kinds[:second].count("done"), 3 * (3 + 3 * 2)
        assert (done < all_done) if (schedule, overlap) == ("streamed", True) else (done == all_done)
    together = answer(engine, chat, CANDIDATES, prompts, 7, 256, judge=judge)
    assert all(records == together for records in found.values())


def test_judge_prompts_share_the_rubric_and_those_of_a_prompt_the_instruction(chat):
    judge = Judge(chat, replace(JUDGE, template=None), 4096)

    def ids(instruction, response):
        return judge.request(Reply("r", instruction, response), 0, None).prompt_ids

    def shared(one, other):
        return next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)

    first, second, other = ids("List 3 birds.", "owl"), ids("List 3 birds.", "crow"), ids("Name 4 tools.", "saw")
    rubric = len(chat.encode_prompt([{"role": "user", "content": TEMPLATE.partition("{instruction}")[0]}]))
    assert shared(first, other) > 0.95 * rubric - 10 and rubric > 0.7 * len(first)
    assert shared(first, second) > shared(first, other) + 4


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_rollout as case
from srlm_fast.engine import load_engine
from srlm_fast.chat import chat_format
from srlm_fast.tokenizer import load_tokenizer
engine = load_engine("native", max_batch=5)
engine.load({model!r})
chat = chat_format("plain", load_tokenizer(case.TINY / "tokenizer.model"))
case.write_shard(engine, chat, Path({file!r}), after=lambda n: n == 2 and os.kill(os.getpid(), signal.SIGKILL))
"""


def write_shard(engine, chat, file, after=lambda n: None):
    """A shard of judged answers through its part."""
    prompts = [{"id": f"p{i}", "prompt": f"{TEXTS[i % 3]} {i}"} for i in range(5)]
    shard = Shard(file, [row["id"] for row in prompts], lambda row: row["prompt_id"])
    todo = [prompts[i] for i in shard.missing]
    records = answer_each(engine, chat, CANDIDATES, todo, 7, 256, judge=Judge(chat, JUDGE, 256))
    for made, record in enumerate(records, 1):
        shard.add(record)
        after(made)
    shard.seal()
    return len(todo)


def test_a_killed_process_resumes_with_the_same_records(engine, chat, model_folder, tmp_path):
    write_shard(engine, chat, tmp_path / "whole.jsonl")
    file = tmp_path / "killed.jsonl"
    code = KILLED.format(tests=str(Path(__file__).parent), model=str(model_folder), file=str(file))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL and not file.exists()
    assert write_shard(engine, chat, file) == 3
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def engine_model(engine):
    """The engine's weights run without its cache."""
    from srlm_fast.kernels.attention import Segments, varlen_attention

    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))

    def logits(ids):
        segments = Segments.causal([len(ids)])
        with torch.no_grad():
            attend = lambda _, q, k, v: varlen_attention(q, k, v, segments)  # noqa: E731
            return model(torch.tensor(ids), torch.arange(len(ids)), attend)

    return logits


def test_expected_mode_refuses_a_tokenizer_without_digit_pieces(shared_data):
    other = chat_format("plain", load_tokenizer(shared_data("spm/test_model.model")))
    with pytest.raises(UserError, match="score digits of one token each"):
        Judge(other, replace(JUDGE, mode="expected"), 256)


def test_what_is_too_long_is_left_out_not_cut(engine, chat):
    long = {"id": "long", "prompt": "owl " * 300}
    records = answer(engine, chat, CANDIDATES, [long, PROMPTS[0]], 7, 256, judge=Judge(chat, JUDGE, 256))
    assert records[0]["candidates"] == [] and len(records[1]["candidates"]) == 3
    limit = len(chat.encode_prompt([{"role": "user", "content": PROMPTS[0]["prompt"]}])) + CANDIDATES.max_new_tokens
    (record,) = answer(engine, chat, CANDIDATES, PROMPTS[:1], 7, limit, judge=Judge(chat, JUDGE, limit))
    assert [c["score"] for c in record["candidates"]] == [None] * 3, "no judge prompt fits, so no score"
    assert all(c["judgements"] == [] for c in record["candidates"])
    assert dict(judge_each(engine, Judge(chat, JUDGE, 20), [Reply("r", "x", "y")], 0)) == {"r": []}
