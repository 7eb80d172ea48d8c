"""Models, prompts and one evaluation of them, for the tests of scripts/evaluate.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from srlm_fast.checkpoint import load_model, save_weights
from srlm_fast.config.evaluate import EvaluateRunConfig
from srlm_fast.config.tree import read
from srlm_fast.evaluation.tasks import evaluate
from srlm_fast.parallel import World
from srlm_fast.tokenizer import load_tokenizer

TINY = Path(__file__).resolve().parents[1] / "configs/tiny"


def worse_model(folder: Path, noise: float = 0.05) -> Path:
    """The tiny model with noise on its weights."""
    model = load_model(TINY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    save_weights(model, folder, dtype=torch.float32, extra_files=load_tokenizer(TINY).files)
    return folder


def prompts(path: Path, n: int = 12) -> Path:
    """The first held-out prompts of the small world."""
    path.write_text("".join((TINY / "heldout.jsonl").read_text().splitlines(keepends=True)[:n]))
    return path


def configured(run_dir: Path, task: str, **keys: Any) -> EvaluateRunConfig:
    """A configuration for the tiny model; `judge__n` stands for judge.n."""
    settings = {"chat_format": "plain", "answers.max_new_tokens": 24, "judge.max_new_tokens": 24, "shard_size": 5}
    settings |= {
        "judge.template": TINY / "judge.txt",
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    return read(EvaluateRunConfig(), None, [f"run_dir={run_dir}", f"task={task}", *overrides])


def run(run_dir: Path, task: str, **keys: Any) -> dict[str, Any]:
    """What an evaluation says it found."""
    return evaluate(configured(run_dir, task, **keys), World())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
