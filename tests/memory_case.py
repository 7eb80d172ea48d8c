"""Bytes that a rank of two really needs for steps of DPO with FSDP2, for test_plan.py:

torchrun --nproc-per-node 2 tests/memory_case.py OUT POLICY ...

Resident memory of the process, from before there is a model to the fullest moment of two steps. OUT gets the most of
both ranks by policy of recomputation, as JSON. What is freed has to go back to the system at once, which glibc's malloc
does with MALLOC_MMAP_THRESHOLD_=65536.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from sharded_case import status

from srlm_fast.config.keys import ParallelConfig
from srlm_fast.config.train import DpoConfig
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.packing import Item
from srlm_fast.parallel import World, parallelize
from srlm_fast.reference import ReferenceCache, response_keys
from srlm_fast.trainer import Trainer

SHAPE = LlamaConfig(
    vocab_size=8000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
)
PROMPT, ANSWER = 384, 128
"""Tokens of every pair: a prompt and two answers."""


def train(shape: LlamaConfig, policy: str, world: World) -> torch.nn.Module:
    """Two steps of a pair a rank, as long as allowed."""
    with torch.device("meta"):
        model = Llama(shape)
    options = ParallelConfig(checkpointing=policy, reduce="microbatch", dtype="float32")
    model = parallelize(model, world, options).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(std=0.02)
    model.reset_buffers()
    items = [Item((1 + i,) * PROMPT, ((2,) * ANSWER, (3,) * ANSWER)) for i in range(2)]
    cache = ReferenceCache("w")
    for item in items:
        cache.update(zip(response_keys("w", item), (-1.0, -1.0), strict=True))
    config = DpoConfig(max_steps=2, epochs=2, batch_size=2, tokens_per_microbatch=PROMPT + 2 * ANSWER)
    Trainer(model, items, config, reference=cache, world=world).fit()
    return model


def needed(policy: str, world: World) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark
    before = status("VmRSS")
    train(SHAPE, policy, world)
    return status("VmHWM") - before


if __name__ == "__main__":
    out, *policies = sys.argv[1:]
    torch.set_num_threads(1)
    world = World()
    train(LlamaConfig(**{**vars(SHAPE), "num_hidden_layers": 1, "vocab_size": 64}), "none", world)  # warm up
    found = {policy: max(world.gather(needed(policy, world))) for policy in policies}
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    world.exit(0)
