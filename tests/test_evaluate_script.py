"""scripts/evaluate.py: answers, comparisons and AlpacaEval files of the tiny model and a worse one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_case import TINY, lines, prompts, run, worse_model
from test_endpoint import completion, serving

from srlm_fast.chat import chat_format
from srlm_fast.config import CandidatesConfig
from srlm_fast.config.evaluate import EvaluateRunConfig
from srlm_fast.config.tree import read
from srlm_fast.engine import load_engine
from srlm_fast.errors import Interrupted, UserError
from srlm_fast.evaluation.run import Evaluation
from srlm_fast.evaluation.tasks import evaluate
from srlm_fast.head_to_head import TEMPLATE
from srlm_fast.parallel import World
from srlm_fast.rollout import answer
from srlm_fast.seeds import derive_seed
from srlm_fast.tokenizer import load_tokenizer
from srlm_fast.world import true_score

ROOT = Path(__file__).resolve().parents[1]
SHORT = "{instruction} {a} or {b}"  # a pairwise prompt that fits the tiny model


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    return worse_model(tmp_path_factory.mktemp("models") / "worse")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return prompts(tmp_path_factory.mktemp("prompts") / "held_out.jsonl")


@pytest.fixture(scope="module")
def answered(tmp_path_factory, worse, held_out):
    """Two answers of each model to each prompt."""
    files = []
    for model in (TINY, worse):
        folder = tmp_path_factory.mktemp("answers")
        run(folder, "answers", model=model, prompts=held_out, answers__n=2)
        files.append(folder / "answers.jsonl")
    return files


def test_answers_are_those_of_the_engine(answered, held_out):
    texts = [row["prompt"] for row in lines(held_out)]
    engine, chat = load_engine("native"), chat_format("plain", load_tokenizer(TINY))
    engine.load(TINY)
    rows = [{"id": f"{i:05d}", "prompt": text} for i, text in enumerate(texts)]
    expected = answer(engine, chat, CandidatesConfig(n=2, max_new_tokens=24), rows, derive_seed(0, "answers"), 512)
    found = lines(answered[0])
    assert [row["prompt"] for row in found] == texts
    assert [[c["text"] for c in row["candidates"]] for row in found] == [
        [c["text"] for c in row["candidates"]] for row in expected
    ]


def test_truth(tmp_path, worse, held_out, answered):
    """Folders and files of their answers give the same; the scores are the world's, and the higher wins."""
    found = run(tmp_path / "a", "head_to_head", model=TINY, opponent=worse, prompts=held_out, answers__n=2,
                compare="truth", truth="world")  # fmt: skip
    again = run(tmp_path / "b", "head_to_head", model=answered[0], opponent=answered[1], prompts=held_out,
                compare="truth", truth="world")  # fmt: skip
    assert found == again
    rows = lines(tmp_path / "a/verdicts.jsonl")
    assert [row["id"] for row in rows] == [f"{p:05d}/{i}" for p in range(12) for i in range(2)]
    for row in rows:
        first, second = (true_score(row["prompt"], row[side]) for side in ("model", "opponent"))
        assert row["scores"] == [first, second]
        assert row["result"] == ("win" if first > second else "loss" if first < second else "tie")
    assert found["wins"] + found["ties"] + found["losses"] == found["verdicts"] == 24 and found["groups"] == 12
    assert found["wins"] == sum(row["scores"][0] > row["scores"][1] for row in rows) > 0
    assert found["win_interval"][0] <= found["win"] == found["wins"] / 24 <= found["win_interval"][1]
    summary = json.loads((tmp_path / "a/head_to_head.json").read_text())
    assert (summary["model"], summary["opponent"], summary["judge"]) == ("tiny", "worse", "world")
    assert summary["win"] == found["win"]


def test_scores(tmp_path, held_out, answered):
    """Mean pointwise scores of the tiny judge decide; the same texts tie without being judged."""
    keys = {"judge__path": TINY, "judge__n": 2, "judge__max_new_tokens": 64, "prompts": held_out, "compare": "scores"}
    run(tmp_path / "a", "head_to_head", model=answered[0], opponent=answered[1], **keys)
    rows = lines(tmp_path / "a/verdicts.jsonl")
    judged = [row for row in rows if "scores" in row]
    assert len(judged) >= 4 and all(row["model"] == row["opponent"] for row in rows if "scores" not in row)
    for row in judged:
        for score, judgements in zip(row["scores"], row["judgements"]):
            read = [j["score"] for j in judgements if j["score"] is not None]
            assert len(judgements) == 2 and score == (sum(read) / len(read) if read else None)
        if None in row["scores"]:
            assert row["result"] == "tie" and row["unparsable"]
        else:
            first, second = row["scores"]
            assert row["result"] == ("win" if first > second else "loss" if first < second else "tie")
    same = run(tmp_path / "b", "head_to_head", model=answered[0], opponent=answered[0], **keys)
    assert same["tie"] == 1.0 and all("scores" not in row for row in lines(tmp_path / "b/verdicts.jsonl"))


def test_a_checkpoint_as_pairwise_judge(tmp_path, held_out, answered):
    """The tiny model knows no verdicts: every pair is asked about in both orders, all is unparsable and a tie."""
    (tmp_path / "pairwise.txt").write_text(SHORT)
    found = run(tmp_path / "a", "head_to_head", model=answered[0], opponent=answered[1], prompts=held_out,
                judge__path=TINY, judge__pairwise_template=tmp_path / "pairwise.txt")  # fmt: skip
    rows = [row for row in lines(tmp_path / "a/verdicts.jsonl") if row["model"] != row["opponent"]]
    assert all(len(row["judgements"]) == 2 and all(j["text"] for j in row["judgements"]) for row in rows)
    assert found["tie"] == 1.0 and found["unparsable"] == len(rows) / 24


def longer_is_better(number, body):
    """A server that prefers the longer output, and A when they are equally long."""
    asked = body["messages"][0]["content"]
    a, b = (asked.split(f"[Output {x}]\n")[1].split(f"\n[End of output {x}]")[0] for x in "AB")
    return completion(f"Longer is [[{'A' if len(a) >= len(b) else 'B'}]]")


def test_a_server_as_pairwise_judge_goes_on_where_it_failed(tmp_path, held_out, answered):
    keys = {"model": answered[0], "opponent": answered[1], "prompts": held_out, "judge__endpoint_model": "big"}
    with serving(longer_is_better) as (url, asked):
        undisturbed = run(tmp_path / "a", "head_to_head", **keys, judge__endpoint=url)
        n_asked = len(asked)
    rows = lines(tmp_path / "a/verdicts.jsonl")
    different = [row for row in rows if row["model"] != row["opponent"]]
    assert n_asked == 2 * len(different) and {body["temperature"] for body in asked} == {0.0}
    for row in different:
        a, b = len(row["model"]), len(row["opponent"])
        assert (row["result"], row["disagree"]) == (
            ("win", False) if a > b else ("loss", False) if a < b else ("tie", True)
        )
    assert undisturbed["unparsable"] == 0 and {"win", "loss"} <= {row["result"] for row in different}

    def breaking(number, body):
        return (400, {"error": {"message": "no more"}}) if number >= n_asked - 3 else longer_is_better(number, body)

    keys |= {"judge__endpoint_concurrency": 1}
    with serving(breaking) as (url, asked), pytest.raises(UserError, match="no more"):
        run(tmp_path / "b", "head_to_head", **keys, judge__endpoint=url)
    assert not (tmp_path / "b/head_to_head.json").exists() and (tmp_path / "b/state").read_text() == "failed\n"
    with serving(longer_is_better) as (url, asked):
        assert run(tmp_path / "b", "head_to_head", **keys, judge__endpoint=url) == undisturbed
        assert 3 <= len(asked) < n_asked
    for name in ("verdicts.jsonl", "head_to_head.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_stopped_and_started_again_equals_undisturbed(tmp_path, worse, held_out, monkeypatch):
    """Stopped while it answers, and again while it judges."""
    keys = {"model": TINY, "opponent": worse, "prompts": held_out, "compare": "scores", "judge__n": 1}
    undisturbed = run(tmp_path / "a", "head_to_head", **keys)
    shards, check_stop, at = Evaluation.shards, Evaluation.check_stop, {"place": "", "checks": 0}

    def noting(self, place, *arguments):
        at.update(place=place, checks=0)
        return shards(self, place, *arguments)

    def stopping(self):
        at["checks"] += 1
        if at["place"] == stop_in and at["checks"] > 8:
            raise Interrupted("stopped")
        check_stop(self)

    monkeypatch.setattr(Evaluation, "shards", noting)
    monkeypatch.setattr(Evaluation, "check_stop", stopping)
    for stop_in in ("answers/model", "answers/opponent", "verdicts"):
        with pytest.raises(Interrupted):
            run(tmp_path / "b", "head_to_head", **keys)
        assert at["place"] == stop_in and list((tmp_path / "b" / stop_in).iterdir())
        assert (tmp_path / "b/state").read_text() == "stopped\n"
    stop_in = ""
    assert run(tmp_path / "b", "head_to_head", **keys) == undisturbed
    for name in ("verdicts.jsonl", "head_to_head.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    monkeypatch.setattr(Evaluation, "engine", lambda *arguments: pytest.fail("a finished task starts no engine"))
    assert run(tmp_path / "b", "head_to_head", **keys) == undisturbed


def test_alpaca_eval(tmp_path):
    """Rows like those of AlpacaEval's own prompt file; the fields are those that its `--model_outputs` reads."""
    rows = [
        {
            "dataset": "helpful_base",
            "instruction": "List 3 birds from a to z. Include owl. End with bye.",
            "output": "x",
        },
        {"instruction": "Name 3 tools, a to z, with axe among them, and close with bye."},
    ]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    run(tmp_path / "run", "alpaca_eval", model=TINY, prompts=tmp_path / "eval.json", name="tiny-1")
    found = json.loads((tmp_path / "run/model_outputs.json").read_text())
    assert [list(row) for row in found] == [["dataset", "instruction", "output", "generator"]] * 2
    assert [row["instruction"] for row in found] == [row["instruction"] for row in rows]
    assert [row["dataset"] for row in found] == ["helpful_base", "eval"]
    assert {row["generator"] for row in found} == {"tiny-1"} and all(row["output"] for row in found)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "task=head_to_head needs opponent: opponent=PATH"),
        ({"opponent": "none"}, "opponent: .*none does not exist"),
        ({"opponent": "bad.jsonl"}, r"bad.jsonl:1: is no answer; it must have instruction and output"),
        ({"opponent": "one.jsonl"}, "one.jsonl: no answer to 12 of 12 prompts, such as 'List"),
        ({"opponent": "empty"}, "empty.*config.json"),
        ({"opponent": TINY, "compare": "truth"}, "compare=truth needs truth"),
        ({"opponent": TINY, "prompts": "one.jsonl", "compare": "truth", "truth": "world"}, "cannot score .*'Hm.'"),
        ({"opponent": TINY, "prompts": "number.jsonl"}, "number.jsonl:1"),
        ({"opponent": TINY, "judge__pairwise_template": "one.jsonl"}, "the pairwise template has no place {a}"),
        ({"opponent": TINY, "judge__endpoint": "http://h", "judge__n": 1}, "judge.endpoint_model is empty"),
        ({"opponent": TINY, "answers__max_new_tokens": 600}, "no prompt of .* leaves room.*512 tokens"),
        ({"opponent": "one.jsonl", "model": "one.jsonl", "prompts": "one.jsonl"}, "there is no model to judge"),
    ],
)
def test_bad_input(tmp_path, held_out, keys, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "one.jsonl").write_text('{"instruction": "Hm?", "output": "x"}\n')
    (tmp_path / "number.jsonl").write_text("3\n")
    named = {name: tmp_path / value if isinstance(value, str) and "/" not in value and name != "compare"
             and name != "truth" else value for name, value in keys.items()}  # fmt: skip
    with pytest.raises(UserError, match=says):
        run(tmp_path / "run", "head_to_head", **({"model": TINY, "prompts": held_out} | named))


def test_pairwise_prompt_asks_for_what_is_read():
    assert "[[A]]" in TEMPLATE and "[[B]]" in TEMPLATE and "[[tie]]" in TEMPLATE


@pytest.mark.distributed
def test_the_command_with_two_processes(tmp_path, worse, held_out):
    """Two processes share the shards and give what one gives, byte for byte."""
    keys = {"model": TINY, "opponent": worse, "prompts": held_out, "compare": "scores", "judge__n": 1}
    found = run(tmp_path / "one", "head_to_head", **keys)
    config = tmp_path / "one/config.yaml"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["scripts/evaluate.py", "--config", config, f"run_dir={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("win_rate: ") == 1 and f"win_rate: {found['win_rate']}" in done.stdout
    for name in ("verdicts.jsonl", "head_to_head.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_bad_word_is_one_line():
    command = [sys.executable, "scripts/evaluate.py", "task=alpaca"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "task='alpaca': must be one of" in done.stderr


@pytest.mark.parametrize("document", ["README.md", "docs/evaluation.md"])
def test_the_example_of_the_documents(tmp_path, worse, monkeypatch, document):
    text = (ROOT / document).read_text(encoding="utf-8")
    (command,) = re.findall(r"^python scripts/evaluate.py --config (configs/evaluate_tiny.yaml .*)$", text, re.M)
    config, *overrides = command.split()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs/tiny/models").mkdir(parents=True)
    for name, model in (("m3", TINY), ("sft", worse)):
        (tmp_path / f"runs/tiny/models/{name}").symlink_to(model)
    found = evaluate(
        read(EvaluateRunConfig(), config, [*overrides, f"prompts={prompts(tmp_path / 'few.jsonl')}"]), World()
    )
    assert (found["verdicts"], found["groups"]) == (48, 12) and (
        tmp_path / "runs/evaluate_tiny/verdicts.jsonl"
    ).exists()
