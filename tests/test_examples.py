"""The examples do what they say."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch

from srlm_fast.dataset import COUNTS
from srlm_fast.losses import LOSSES, LogProbs, get_objective

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def own_method(monkeypatch):
    monkeypatch.chdir(ROOT)
    before = dict(LOSSES)
    spec = importlib.util.spec_from_file_location("own_method", ROOT / "examples/own_method.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    LOSSES.clear()
    LOSSES.update(before)


def test_own_method_trains(own_method):
    """At the reference the margin is 0 and the loss 0.5^focus ln 2; the margin grows."""
    steps = own_method.main()
    assert steps[0]["loss"] == pytest.approx(0.5 * math.log(2), rel=1e-4)
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"] and steps[-1]["rewards/margins"] > 0.1


def test_own_method_is_short_and_a_term_like_others(own_method):
    source = (ROOT / "examples/own_method.py").read_text().splitlines()
    first = next(i for i, line in enumerate(source) if line.startswith("def focal_dpo"))
    last = next(i for i, line in enumerate(source) if line.startswith('LOSSES["focal_dpo"]'))
    assert len([line for line in source[first : last + 1] if line.strip()]) <= 10
    objective = get_objective("focal_dpo + 0.5 * nll", options={"focus": 0.0})
    policy, reference = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.0])
    logps = LogProbs(policy=policy, reference=reference, lengths=torch.tensor([2, 2]))
    value = own_method.focal_dpo(logps, beta=0.1, focus=objective.terms[0].options["focus"])
    assert value.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.2))), rel=1e-6)


def python_block(document: str, heading: str) -> str:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"## {heading}\n.*?```python\n(.*?)```", text, re.S)[0]


def test_the_example_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    exec(python_block("README.md", "The trainer alone"), {})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "2 of 2 rows" and len(shown) == 4
    assert (tmp_path / "runs/ipo/model.safetensors").exists()


def test_the_example_of_the_trainers_document(tmp_path, monkeypatch, capsys, own_method):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m0").symlink_to(ROOT / "configs/tiny")
    for name in ("pairs.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in own_method.PAIRS))
    names: dict = {}
    exec(python_block("docs/trainer.md", "The library"), names)
    assert len(capsys.readouterr().out.splitlines()) == 1 and names["trainer"].history[0]["step"] == 1


def test_the_example_of_adapters(tmp_path, monkeypatch, own_method):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m0").symlink_to(ROOT / "configs/tiny")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own_method.PAIRS))
    names: dict = {}
    exec(python_block("docs/trainer.md", "Adapters"), names)
    assert names["again"].lora.rank == 16 and (tmp_path / "m1/model.safetensors").exists()


def test_the_trainers_document_names_every_reason():
    text = (ROOT / "docs/trainer.md").read_text(encoding="utf-8")
    assert COUNTS.keys() - {"rows", "kept"} <= set(re.findall(r"`(\w+)`", text))
