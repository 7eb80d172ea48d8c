"""The judge behind a server: a small one on this machine that fails as told, and a real `vllm serve`."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import test_rollout as case
import torch

from srlm_fast.checkpoint import save_weights
from srlm_fast.config import JudgeConfig
from srlm_fast.endpoint import EndpointJudge
from srlm_fast.errors import UserError
from srlm_fast.model import Llama
from srlm_fast.rollout import Reply, answer, answer_each
from srlm_fast.shards import Shard

pytest.importorskip("openai", reason="the judge extra is not installed")
chat, engine, model_folder = case.chat, case.engine, case.model_folder
REPLY = Reply("r", "List 3 birds.", "owl, crow, dove.")


def completion(*texts, logprobs=None):
    choices = [
        {
            "index": i,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": logprobs} if logprobs else None,
        }
        for i, text in enumerate(texts)
    ]
    return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}


@contextmanager
def serving(respond):
    """A server whose answers are respond(number of the request, its body) -> (status, JSON or text); yields (URL, the
    bodies asked so far)."""
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(asked)
                asked.append({**body, "path": self.path, "key": self.headers["authorization"]})
            status, content = respond(number, body)
            is_text = isinstance(content, str)
            data = (content if is_text else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("content-type", "text/html" if is_text else "application/json")
            self.send_header("content-length", str(len(data)))
            self.send_header("retry-after-ms", "5")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def judge_at(url, **options):
    settings = {"n": 2, "endpoint": url, "endpoint_model": "big", "endpoint_retries": 3, **options}
    return EndpointJudge(replace(JudgeConfig(template=str(case.TINY / "judge.txt")), **settings))


def test_a_busy_server_is_asked_again():
    answers = [(429, {"error": {"message": "slow down"}}), (500, {"error": {"message": "oops"}}), (503, "down")]

    def respond(number, body):
        return answers[number] if number < 3 else completion("Fine. Score: 4", "Score: 2/5")

    with serving(respond) as (url, asked):
        judgements = judge_at(url).judge(REPLY, 5)
    assert [(j.score, j.seed, j.expected) for j in judgements] == [(4.0, 5, None), (2.0, 5, None)]
    assert len(asked) == 4 and asked[0]["path"] == "/v1/chat/completions"
    (message,) = asked[0]["messages"]
    assert REPLY.text in message["content"] and REPLY.instruction in message["content"]
    sent = {name: asked[0][name] for name in ("model", "n", "temperature", "top_p", "max_tokens", "seed")}
    assert sent == {"model": "big", "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 512, "seed": 5}


@pytest.mark.parametrize(
    ("status", "content", "times", "says"),
    [
        (429, {"error": {"message": "slow down"}}, 3, "answered 429: .*slow down.* Tried 3 times"),
        (500, "oops", 3, "answered 500: .* Tried 3 times"),
        (401, {"error": {"message": "bad key"}}, 1, "bad key.*environment variable MY_KEY"),
        (404, {"error": {"message": "no model big"}}, 1, "no model big.*judge.endpoint_model=big"),
        (400, {"error": {"message": "n must be 1"}}, 1, "answered 400: .*n must be 1"),
        (200, "<html>hello</html>", 1, "does not answer like an OpenAI server"),
        (200, {"choices": []}, 1, "does not answer like an OpenAI server"),
    ],
)
def test_what_the_server_refuses_is_one_clear_error(monkeypatch, status, content, times, says):
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(lambda number, body: (status, content)) as (url, asked):
        with pytest.raises(UserError, match=f"judge.endpoint={url} .*{says}"):
            judge_at(url, endpoint_key="MY_KEY", endpoint_retries=2).judge(REPLY, 0)
    assert len(asked) == times and asked[0]["key"] == "Bearer secret"


def test_a_server_that_is_not_there_is_one_clear_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"judge.endpoint=http://127.0.0.1:{port}/v1 cannot be reached .*tried 2 times"):
        judge_at(f"http://127.0.0.1:{port}/v1", endpoint_retries=1).judge(REPLY, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"endpoint": "host:8000"}, "judge.endpoint='host:8000' is no address"),
        ({"endpoint_model": None}, "judge.endpoint_model is empty"),
    ],
)
def test_half_a_configuration_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        judge_at("http://127.0.0.1:1/v1", **options)


def test_without_a_score_a_judgement_is_unparsable():
    with serving(lambda number, body: completion("I would rather not.", None)) as (url, _):
        judge = judge_at(url)
        judgements = judge.judge(REPLY, 0)
    assert [(j.text, j.score) for j in judgements] == [("I would rather not.", None), ("", None)]
    assert judge.score(judgements) is None


def test_a_server_that_knows_no_n_is_asked_for_each():
    with serving(lambda number, body: completion(f"Score: {number}")) as (url, asked):
        judgements = judge_at(url, n=3).judge(REPLY, 9)
    assert [j.score for j in judgements] == [0.0, 1.0, 2.0] and len({body["seed"] for body in asked}) == 3


def test_a_reply_too_long_for_the_server_has_no_judgements():
    error = {"error": {"message": "This model's maximum context length is 512 tokens"}}
    with serving(lambda number, body: (400, error)) as (url, _):
        assert judge_at(url).judge(REPLY, 0) == []


def test_the_expected_score_comes_from_the_tokens_of_the_server():
    def top(**found):
        return [{"token": token.strip("_"), "logprob": value, "bytes": None} for token, value in found.items()]

    pieces = [("4", top()), (" of 5. Score:", top()), (" 3", top(_3=-1.0, _4=-0.5, x=-0.1, _9=-2.0)), (".", top())]
    tokens = [{"token": text, "logprob": -1.0, "bytes": None, "top_logprobs": tops} for text, tops in pieces]
    with serving(lambda number, body: completion("4 of 5. Score: 3.", logprobs=tokens)) as (url, asked):
        judge = judge_at(url, n=1, mode="expected")
        (judgement,) = judge.judge(REPLY, 0)
    p = torch.tensor([-1.0, -0.5], dtype=torch.float64).softmax(0)
    assert judgement.score == 3.0 and judgement.expected == pytest.approx(float(p @ torch.tensor([3.0, 4.0]).double()))
    assert judge.score([judgement]) == judgement.expected and asked[0]["top_logprobs"] == 20


def test_answers_are_judged_while_the_engine_goes_on(engine, chat):
    active, most, lock = 0, 0, threading.Lock()

    def respond(number, body):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.03)
        with lock:
            active -= 1
        return completion("Score: 1", f"Score: {len(body['messages'][0]['content']) % 6}")

    with serving(respond) as (url, asked):
        judge = judge_at(url, endpoint_concurrency=3)
        records = answer(engine, chat, case.CANDIDATES, case.PROMPTS, 7, 256, judge=judge)
    assert [r["prompt_id"] for r in records] == ["p0", "p1", "p2"] and len(asked) == 9 and 1 < most <= 3
    for candidate in (c for record in records for c in record["candidates"]):
        first, second = (j["score"] for j in candidate["judgements"])
        assert candidate["score"] == (first + second) / 2 and first == 1.0
    alone = answer(engine, chat, case.CANDIDATES, case.PROMPTS, 7, 256)
    assert [c["token_ids"] for r in records for c in r["candidates"]] == [
        c["token_ids"] for r in alone for c in r["candidates"]
    ]
    for thread in threading.enumerate():
        assert thread.name != "judge.endpoint" or thread.join(5) or not thread.is_alive(), "threads end with the work"


def test_a_server_that_fails_on_the_way_leaves_the_finished_prompts(engine, chat, tmp_path):
    failing = threading.Event()

    def respond(number, body):
        if number >= 4:
            failing.set()
        return (403, {"error": {"message": "no credit"}}) if failing.is_set() else completion("Score: 1", "Score: 2")

    def make(shard, url):
        todo = [case.PROMPTS[i] for i in shard.missing]
        judge = judge_at(url, endpoint_concurrency=1)
        for record in answer_each(engine, chat, case.CANDIDATES, todo, 7, 256, judge=judge):
            shard.add(record)
        return len(todo)

    def shard():
        return Shard(tmp_path / "s.jsonl", [row["id"] for row in case.PROMPTS], lambda row: row["prompt_id"])

    with serving(respond) as (url, _):
        with pytest.raises(UserError, match="no credit"):
            make(shard(), url)
    with engine_cleared(engine), serving(lambda number, body: completion("Score: 1", "Score: 2")) as (url, _):
        again = shard()
        assert make(again, url) == 2
        again.seal()
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == ["p0", "p1", "p2"]
    assert all(c["score"] == 1.5 for row in rows for c in row["candidates"])


@contextmanager
def engine_cleared(engine):
    """Without the answers that a failed rollout left under way; a run would have ended."""
    list(engine.stream())
    yield


@pytest.fixture(scope="module")
def vllm_server(bpe_folder, tmp_path_factory):
    """The URL of a real `vllm serve` with a random Llama and a chat template."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = tmp_path_factory.mktemp("served") / "m"
    model = Llama(replace(case.CONFIG, vocab_size=600, head_dim=32, max_position_embeddings=512))
    model.init_weights(torch.Generator().manual_seed(0))
    save_weights(model, folder, dtype=torch.float32)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((bpe_folder / file).read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve`, which the CPU build of another name does not start
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--port", port, "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 512, "--served-model-name", "tiny"]
    command += ["--kv-cache-memory-bytes", 64 << 20, "--no-enable-chunked-prefill"]  # as in srlm_fast/engine/vllm.py
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = folder.parent / "log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"vllm serve does not answer: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_serves_the_judge(vllm_server, engine, chat):
    judge = judge_at(vllm_server, endpoint_model="tiny", n=3, max_new_tokens=16, mode="expected")
    records = answer(engine, chat, case.CANDIDATES, case.PROMPTS, 7, 256, judge=judge)
    judgements = [j for record in records for c in record["candidates"] for j in c["judgements"]]
    assert len(judgements) == 27 and all(j["score"] is None for j in judgements), "a random model writes no score"
    assert len({j["text"] for j in judgements}) > 20, "the three of a request are drawn apart"
    assert all(c["score"] is None for record in records for c in record["candidates"])
    (first, *_), (again, *_) = judge.judge(REPLY, 3), judge.judge(REPLY, 3)
    assert first.text == again.text, "the seed reaches the server"
    assert judge.judge(replace(REPLY, text="owl " * 2000), 0) == [], "too long for the model"
    with pytest.raises(UserError, match="answered 404: .*judge.endpoint_model=other"):
        judge_at(vllm_server, endpoint_model="other").judge(REPLY, 0)
