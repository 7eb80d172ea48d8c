"""The examples do what they say."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

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
