"""Follow-up methods in the loop: the commands of docs/methods.md, made small, and what their files then hold."""

import json
import re
import subprocess
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_iterate import ENVIRONMENT, SMALL, command, run, weights

from srlm_fast.config import load_config
from srlm_fast.context import Context
from srlm_fast.dry_run import Seeds, walk
from srlm_fast.engine.base import Completion
from srlm_fast.errors import UserError
from srlm_fast.iterate import iterate, phases
from srlm_fast.model import LlamaConfig
from srlm_fast.packing import Item
from srlm_fast.parallel import World
from srlm_fast.phases import meta_judging
from srlm_fast.phases.training import pair_items
from srlm_fast.plan import Machine, Plan
from srlm_fast.reference import ReferenceCache
from srlm_fast.rundir import write_jsonl
from srlm_fast.summary import print_summary

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    match.replace("\\\n", " ").split()[6:]
    for match in re.findall(r"```\n(torchrun [^`]+)```", (ROOT / "docs/methods.md").read_text(encoding="utf-8"))
]
"""The keys of every command of docs/methods.md, run_dir first."""


def loop(run_dir: Path, *overrides: str) -> Context:
    """A small run in this process, with its summary."""
    done = iterate(
        load_config(ROOT / "configs/tiny.yaml", [*SMALL, "judge.n=2", *overrides, f"run_dir={run_dir}"]), World()
    )
    print_summary(done)
    return done


def example(name: str, run_dir: Path, *overrides: str) -> Context:
    """The command of docs/methods.md whose run_dir is runs/NAME."""
    (keys,) = (keys for place, *keys in COMMANDS if place == f"run_dir=runs/{name}")
    return loop(run_dir, *keys, *overrides)


def rows(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


def counts(run_dir: Path, phase: str) -> dict:
    return json.loads((run_dir / f"phases/{phase}.json").read_text())["counts"]


def test_every_command_can_be_read():
    assert len(COMMANDS) == 6
    for _, *keys in COMMANDS:
        phases(load_config(ROOT / "configs/tiny.yaml", keys))


@pytest.mark.slow
def test_meta_rewarding(tmp_path):
    example("meta", tmp_path, "iterations=1")
    pairs = rows(tmp_path, "m1/pairs.jsonl")
    judged = [pair for pair in pairs if pair["kind"] == "judgements"]
    assert judged and len(judged) == counts(tmp_path, "m1/pairs")["judge_pairs"] < len(pairs)
    assert counts(tmp_path, "m2/train")["items"] == len(pairs), "both kinds are trained on"
    for pair in judged:
        (candidate,) = pair["candidates"]
        texts = [judgement["text"] for judgement in candidate["judgements"]]
        assert pair["chosen"] == texts[pair["chosen_index"]] and pair["rejected"] == texts[pair["rejected_index"]]
        assert pair["chosen_score"] > pair["rejected_score"] and candidate["text"] in pair["prompt"]
    for file in (tmp_path / "m1/comparisons").glob("shard-*.jsonl"):
        for row in rows(tmp_path, str(file.relative_to(tmp_path))):
            orders = [(c["first"], c["second"]) for c in row["comparisons"]]
            assert len(set(orders)) == len(orders) and {(b, a) for a, b in orders} == set(orders)


class Reviewer:
    """An engine that prefers, in so many words, the judgement with the higher score, and says nothing of equal ones."""

    def __init__(self, chat) -> None:
        self.chat, self.asked = chat, []

    def stream(self, requests):
        self.asked += requests
        for request in requests:
            text = self.chat.decode(request.prompt_ids)
            first, second = (int(score) for score in re.findall(r"Score: (\d)", text)[-2:])
            said = "They agree." if first == second else f"The higher.\nWinner: {1 if first > second else 2}"
            ids = self.chat.encode_response(said)
            yield Completion(request, 0, ids, [0.0] * len(ids), "stop")


def test_explained_comparisons_from_files_to_pairs(tmp_path, monkeypatch):
    """The candidates' file in, comparisons and pairs of judgements out; only too long a chosen judgement stops one."""
    keys = ["meta_judge.enabled=true", "meta_judge.max_new_tokens=30", "judge.n=3", "evaluate.prompts=none"]
    (tmp_path / "meta.txt").write_text("{instruction} {response} 1: {first} 2: {second}")
    keys += [f"meta_judge.template={tmp_path}/meta.txt", f"run_dir={tmp_path}/run", "evaluate.truth=none"]
    done = Context(load_config(ROOT / "configs/tiny.yaml", keys), World())
    scores = {"m1-0": [(5, 5, 5), (2, 4, 3)], "m1-1": [(3, 3, 3), (1, 1, 1)], "m1-2": [(4, 0, None), (2, 3, 3)]}
    records = [
        {
            "prompt_id": key,
            "prompt": "List 3 birds.",
            "candidates": [
                {"index": i, "text": "owl", "judgements": [judgement(k, score) for k, score in enumerate(of_answer)]}
                for i, of_answer in enumerate(of_prompt)
            ],
        }
        for key, of_prompt in scores.items()
    ]
    write_jsonl(tmp_path / "run/m1/candidates/shard-00000.jsonl", records)
    engine = Reviewer(done.chat)
    monkeypatch.setattr(done, "engine", lambda weights: engine)
    files, found = meta_judging.compare(done, 1)
    assert len(engine.asked) == found["comparisons"] == 6 + 2 and found["undecided"] == 0 and found["first_wins"] == 0.5
    assert len({request.seed for request in engine.asked}) == 8
    assert [row["index"] for file in files for row in rows(tmp_path, str(file.relative_to(tmp_path)))] == [1, 0]
    pairs, counted = meta_judging.judge_pairs(done, 1, "w", 10)
    assert [(p["id"], p["chosen_index"], p["rejected_index"]) for p in pairs] == [
        ("m1-0/1/judge", 1, 0),
        ("m1-2/0/judge", 0, 1),
    ]
    assert counted["judge_pairs"] == 2 and counted["first_place_weight"] == 0.5
    done.config.meta_judge.max_share = 0.1
    assert meta_judging.judge_pairs(done, 1, "w", 10)[1]["judge_left_out"] == 1
    done.config.meta_judge.max_share, done.config.meta_judge.max_chosen_tokens = 1.0, 3
    assert meta_judging.judge_pairs(done, 1, "w", 10)[1]["judge_long"] == 2


def judgement(number: int, score: int | None) -> dict:
    text = f"owl {'yes' if number else 'no'}. Score: {score}" if score is not None else "owl"
    return {"text": text, "score": score, "expected": None, "seed": 0, "finish_reason": "stop"}


@pytest.mark.slow
def test_irpo_keeps_the_chosen_answers(tmp_path):
    """With the likelihood among the losses the chosen responses fall less than by DPO alone."""
    longer = ("iterations=1", "dpo.max_steps=12", "dpo.epochs=6", "model.dropout=0")
    loop(tmp_path / "dpo", *longer)
    example("irpo", tmp_path / "irpo", *longer)
    falls = [counts(tmp_path / name, "m2/train")["chosen_fall"] for name in ("irpo", "dpo")]
    assert falls[0] < falls[1]


@pytest.mark.slow
def test_cream(tmp_path):
    example("cream", tmp_path, "iterations=1", "pairs.label_scope=prompt")
    consistency = counts(tmp_path, "m1/pairs")["consistency"]
    labels = [pair["label"] for pair in rows(tmp_path, "m1/pairs.jsonl")]
    assert 0 < consistency < 1 and len(set(labels)) > 1 and all(0 <= label <= 1 for label in labels)
    items = pair_items(tmp_path / "m1/pairs.jsonl")
    assert [item.labels for item in items] == [(label, 1 - label) for label in labels]
    (step,) = [
        row for row in rows(tmp_path, "metrics.jsonl") if row.get("phase") == "m2/train" and row.get("step") == 1
    ]
    assert step["loss"] == pytest.approx(0.693147, abs=0.1)


@pytest.mark.slow
def test_temporal_self_rewarding(tmp_path):
    example("temporal", tmp_path, "iterations=1")
    found = counts(tmp_path, "m1/pairs")
    draft, final = rows(tmp_path, "m1/draft_pairs.jsonl"), rows(tmp_path, "m1/pairs.jsonl")
    assert found["candidates"] == 12 * 3 * 4 and found["rejected_past"] > 0
    assert found["rejected_past"] == counts(tmp_path, "m1/draft_pairs")["rejected_past"]
    drafted = {pair["id"]: pair for pair in draft}
    for pair in final:
        scored = [c for c in pair["candidates"] if c["score"] is not None]
        scores = {by: [c["score"] for c in scored if c.get("by") == by] for by in (None, "past", "future")}
        assert pair["chosen_score"] == max(scores[None] + scores["future"])
        assert pair["rejected_score"] == min(scores[None] + scores["past"])
        if pair["id"] in drafted:
            assert pair["chosen_score"] >= drafted[pair["id"]]["chosen_score"]
    future, final_model = weights(tmp_path, "m1f"), weights(tmp_path, "m2")
    assert any((future[name] != final_model[name]).any() for name in future)


@pytest.mark.slow
def test_all_pairs_accumulated_against_a_fixed_reference(tmp_path):
    done = example("pairs", tmp_path, "pairs.margin=0", "iterations=2")
    first, second = (len(rows(tmp_path, f"m{t}/pairs.jsonl")) for t in (1, 2))
    assert first > 12, "some prompts give two pairs"
    assert counts(tmp_path, "m2/train")["items"] == first and counts(tmp_path, "m3/train")["items"] == first + second
    caches = [ReferenceCache.read(tmp_path / f"m{t}/reference.safetensors") for t in (1, 2)]
    assert caches[0].weights_id == caches[1].weights_id, "M1 in both iterations"
    items: list[Item] = pair_items(tmp_path / "m1/pairs.jsonl")
    assert (caches[0].lookup(items) == caches[1].lookup(items)).all()
    assert [row["pairs"] for row in json.loads((done.run_dir / "summary.json").read_text())][2:] == [
        first,
        first + second,
    ]


EVERYTHING = [
    "meta_judge.enabled=true",
    "meta_judge.mode=direct",
    "judge.n=3",
    "temporal.anchor=sft",
    "temporal.future=true",
    "pairs.labels=previous",
    "dpo.loss=cream",
    "pairs.data=accumulate",
    "reference.model=m1",
    "pairs.length_control=[0.2]",
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_everything_at_once_on_two_ranks_with_a_stop_in_between(tmp_path):
    """SIGTERM on the way; the files end as those of an undisturbed run."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = run(command(whole, *EVERYTHING, ranks=2), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    process = subprocess.Popen(
        command(stopped, *EVERYTHING, ranks=2), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (stopped / "phases/m1/past_judged.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    process.wait(timeout=300)
    assert not (stopped / "phases/m2/candidates.json").exists()
    done = run(command(stopped, *EVERYTHING, ranks=2), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for t in (1, 2):
        assert rows(stopped, f"m{t}/pairs.jsonl") == rows(whole, f"m{t}/pairs.jsonl")
    for name in ("m1f", "m2f", "m3"):
        one, other = weights(whole, name), weights(stopped, name)
        assert all((one[tensor] == other[tensor]).all() for tensor in one), name
    assert {pair["kind"] for pair in rows(whole, "m1/pairs.jsonl")} == {"answers", "judgements"}
    assert_foretold(whole)


def assert_foretold(run_dir: Path) -> None:
    """What --dry-run says about such a run holds: files read and written, and counts."""
    config = load_config(ROOT / "configs/tiny.yaml", [*SMALL, *EVERYTHING, f"run_dir={run_dir}"])
    shape = LlamaConfig.from_hf(json.loads((ROOT / "configs/tiny/config.json").read_text()))
    for step in walk(config, Plan(config, shape, Machine.parse("1xH100-80")), Seeds.read(config)):
        record = json.loads((run_dir / f"phases/{step.name}.json").read_text())
        for file in record["outputs"]:
            assert any(fnmatch(file, pattern) for pattern in step.writes), (step.name, file)
        for read in step.reads:
            assert "/" not in read or list(run_dir.glob(read)), (step.name, read)
        for name in step.counts.keys() & record["counts"].keys():
            count, value = step.counts[name], record["counts"][name]
            assert value <= count.value if count.most else value == count.value, (step.name, name)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["dpo.loss=cream"], "choose how they are made by pairs.labels"),
        (["pairs.labels=scores"], "reads no labels"),
        (["pairs.labels=judgements", "dpo.loss=cream", "judge.n=1"], "judge.n=1 is one"),
        (["meta_judge.enabled=true", "judge.n=1"], "judge.n=1 is one"),
        (["meta_judge.enabled=true"], "meta_judge.max_new_tokens=512 leaves no room"),
        (["temporal.future=true"], "needs temporal.anchor"),
        (["temporal.anchor=m1", "pairs.select=all"], "pairs.select=max_min"),
        (["temporal.anchor=m1", "judge.endpoint=http://x"], "judge.endpoint scores"),
        (["pairs.length_control=[0.2]", "pairs.select=all"], "widens max_min"),
        (["pairs.length_control=[0,0.6]"], "at most 0.5"),
        (["pairs.length_control=[]"], "is empty"),
        (["pairs.k=2"], "top_bottom"),
        (["reference.source=rollout", "reference.model=m1"], "reference.model=m1 needs others too"),
        (["reference.source=rollout", "pairs.data=accumulate"], "pairs.data=accumulate needs others too"),
        (["guards.score_share=1.5"], "guards.score_share=1.5: must be at most 1"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(tmp_path, keys, says):
    with pytest.raises(UserError, match=re.escape(says)):
        config = load_config(ROOT / "configs/tiny.yaml", [*keys, f"run_dir={tmp_path}/run"])
        Context(config, World())
