"""An exported model under EleutherAI's lm_eval, by the command of docs/evaluation.md."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srlm_fast.checkpoint import load_model, save_weights
from srlm_fast.packing import Item, pack
from srlm_fast.reference import sequence_logps
from srlm_fast.tokenizer import load_tokenizer
from srlm_fast.world import DEMANDS, sample_instruction, write_answer

TINY = Path(__file__).parents[1] / "configs/tiny"
TASK = """\
task: world_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: answers
doc_to_target: best
metric_list:
  - metric: acc
"""


def questions(n: int) -> list[dict]:
    """Instructions of the world, one answer that meets all demands and three that fail some."""
    rng = random.Random(0)
    rows = []
    for i in range(n):
        instruction = sample_instruction(rng)
        answers = [write_answer(instruction, [True] * len(DEMANDS), rng)]
        while len(answers) < 4:
            worse = write_answer(instruction, [rng.random() < 0.6 for _ in DEMANDS[1:]] + [False], rng)
            answers += [worse] * (worse not in answers)
        best = i % 4
        answers[0], answers[best] = answers[best], answers[0]
        rows.append({"question": instruction.text, "answers": answers, "best": best})
    return rows


def logps(rows: list[dict]) -> list[list[float]]:
    """Summed log-probabilities of " answer" behind each question, from our model and tokenizer."""
    tokenizer, items = load_tokenizer(TINY), []
    for row in rows:
        prompt = tuple(tokenizer.encode(row["question"], bos=True))
        whole = [tuple(tokenizer.encode(f"{row['question']} {answer}", bos=True)) for answer in row["answers"]]
        assert all(ids[: len(prompt)] == prompt for ids in whole)
        items.append(Item(prompt, tuple(ids[len(prompt) :] for ids in whole)))
    with torch.no_grad():
        return sequence_logps(load_model(TINY).eval(), pack(items)).view(len(rows), 4).tolist()


@pytest.mark.slow
def test_accuracy_and_every_likelihood_are_our_models(tmp_path):
    save_weights(load_model(TINY), tmp_path / "model", extra_files=load_tokenizer(TINY).files)
    rows = questions(40)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/world_choice.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"),
        *("--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"),
        *("--include_path", tmp_path / "tasks", "--tasks", "world_choice"),
        *("--output_path", tmp_path / "out", "--log_samples"),
    ]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_world_choice_*.jsonl")
    theirs = sorted((json.loads(line) for line in samples.open()), key=lambda sample: sample["doc_id"])
    expected = logps(rows)
    got = [[float(logp) for logp, _ in sample["filtered_resps"]] for sample in theirs]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=1e-3)
    right = sum(max(range(4), key=of_row.__getitem__) == row["best"] for of_row, row in zip(expected, rows))
    accuracy = json.loads(results.read_text())["results"]["world_choice"]["acc,none"]
    assert 0 < right < len(rows) and accuracy == pytest.approx(right / len(rows))
