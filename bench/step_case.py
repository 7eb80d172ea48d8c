"""The preference problem that bench/step.py gives to every trainer: a random Llama and pairs of log-normal lengths."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch

from srlm_fast.checkpoint import save_weights
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.packing import Item

EOS = 2
LEARNING_RATE = 1e-4
BETA = 0.1
SHAPES = {"small": (288, 6, 6), "medium": (768, 12, 12)}
"""Name -> width, layers, heads."""


def llama_config(shape: str, vocab_size: int = 32000) -> LlamaConfig:
    """A Llama of this width, with Llama 2's vocabulary."""
    width, layers, heads = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=2048,
    )


def make_pairs(n: int, vocab_size: int = 32000, seed: int = 0) -> list[Item]:
    """Prompts of 150 and responses of 120 tokens in the median, at most 512 each, end-of-text token included."""
    rng = random.Random(seed)

    def tokens(median: float) -> tuple[int, ...]:
        length = min(512, max(2, round(math.exp(rng.gauss(math.log(median), 0.6)))))
        return tuple(rng.randrange(3, vocab_size) for _ in range(length))

    return [Item(tokens(150), tuple((*tokens(120)[:-1], EOS) for _ in range(2))) for _ in range(n)]


def write(folder: Path, shape: str, n_pairs: int) -> None:
    """The model as a Hugging Face folder and the pairs as token ids."""
    model = Llama(llama_config(shape))
    model.init_weights(torch.Generator().manual_seed(0))
    save_weights(model, folder / "model")
    rows = [{"prompt": item.prompt, "responses": item.responses} for item in make_pairs(n_pairs)]
    (folder / "pairs.json").write_text(json.dumps(rows))


def read_pairs(folder: Path) -> list[Item]:
    """The pairs that `write` wrote."""
    rows = json.loads((folder / "pairs.json").read_text())
    return [Item(tuple(row["prompt"]), tuple(map(tuple, row["responses"]))) for row in rows]


def ordered_steps(items: list[Item], batch_size: int) -> list[list[Item]]:
    """The batches of our trainer's first epoch, each sorted by length, which is what padding likes best."""
    from srlm_fast.packing import epoch_order

    order = epoch_order(len(items), 0, 0)
    batches = [[items[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    return [sorted(batch, key=lambda item: len(item.prompt) + max(map(len, item.responses))) for batch in batches]
