"""Answers and judgements through the real native engine, on the tokenizer of configs/tiny and a random Llama."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srlm_fast.chat import chat_format
from srlm_fast.checkpoint import save_weights
from srlm_fast.config import CandidatesConfig, JudgeConfig
from srlm_fast.engine import load_engine
from srlm_fast.errors import UserError
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.rollout import Judge, Reply, answer, judge_replies
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
def engine(tmp_path_factory):
    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("model") / "m"
    save_weights(model, folder, dtype=torch.float32)
    engine = load_engine("native", max_batch=5)
    engine.load(folder)
    yield engine
    engine.close()


def test_every_candidate_is_judged(engine, chat):
    done = []
    records = answer(engine, chat, CANDIDATES, PROMPTS, 7, 256, judge=Judge(chat, JUDGE, 256), on_done=done.append)
    assert [r["prompt_id"] for r in records] == ["p0", "p1", "p2"] and sum(done) == 3
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
    judgements = judge_replies(engine, judge, [reply], 3)["r"]
    model = engine_model(engine)
    for judgement in judgements:
        before, mark, text = judgement.text.rpartition("Score:")
        head = before if mark else f"{text.rstrip()}\n"
        prompt = chat.encode_prompt([{"role": "user", "content": judge.prompt(reply)}])
        coded = [chat.encode_text(f"{head}Score: {digit}") for digit in range(6)]
        logits = model([*prompt, *coded[0][:-1]])[-1]
        p = logits.double().softmax(-1)[[ids[-1] for ids in coded]]
        assert judgement.score == pytest.approx(float((p / p.sum() * torch.arange(6)).sum()), abs=1e-4)


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
    assert judge_replies(engine, Judge(chat, JUDGE, 20), [Reply("r", "x", "y")], 0) == {"r": []}
