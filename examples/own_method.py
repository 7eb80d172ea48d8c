"""A preference loss of one's own: a function of log-probabilities and a line in the registry.

    python examples/own_method.py            trains the model of configs/tiny on three pairs
    python examples/own_method.py MODEL PAIRS.jsonl

The loss is DPO with less weight on pairs that are decided already (after the focal loss of arXiv:1708.02002); its
keyword arguments become options, and it can be a term of a sum: "focal_dpo + 0.1 * nll".
"""

import sys
from typing import Annotated

import torch
import torch.nn.functional as F

from srlm_fast.chat import chat_format
from srlm_fast.checkpoint import load_model
from srlm_fast.config import DpoConfig
from srlm_fast.dataset import read_items
from srlm_fast.losses import LOSSES, LogProbs, Loss, halves
from srlm_fast.tokenizer import load_tokenizer
from srlm_fast.trainer import Trainer, reference_cache, training_objective


def focal_dpo(logps: LogProbs, *, beta: float, focus: Annotated[float, "at least 0"] = 2.0) -> torch.Tensor:
    """s(-h)^focus (-log s(h)), h the margin of the rewards: one value per pair."""
    chosen, rejected = halves(logps.rewards(beta))
    margin = chosen - rejected
    return torch.sigmoid(-margin) ** focus * -F.logsigmoid(margin)


LOSSES["focal_dpo"] = Loss(focal_dpo, unit="pairs", paired=True, needs_reference=True)

PAIRS = [
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Why?"},
    {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A chair."},
    {"prompt": "Name an animal.", "chosen": "A fox.", "rejected": "No."},
]


def main(model_folder: str = "configs/tiny", source: object = None) -> list[dict[str, float]]:
    """Train on pairs; returns the metrics of every step."""
    config = DpoConfig(loss="focal_dpo", loss_options={"focus": 1.0}, lr=1e-4, epochs=8, schedule="constant")
    model, chat = load_model(model_folder), chat_format("plain", load_tokenizer(model_folder))
    objective = training_objective(config)
    data = read_items(source or PAIRS, chat, objective, max_length=512, max_tokens=config.tokens_per_microbatch)
    steps: list[dict[str, float]] = []
    cache = reference_cache(model, config, data.items)
    Trainer(model, data.items, config, reference=cache, on_step=steps.append).fit()
    return steps


if __name__ == "__main__":
    for step in main(*sys.argv[1:]):
        print(f"step {step['step']}: loss {step['loss']:.4f}, rewards/margins {step['rewards/margins']:.3f}")
