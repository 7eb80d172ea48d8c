"""What FSDP2 does with Llama 2 70B on many ranks, for test_plan.py: ranks of a group that does not exist.

python tests/plan_case.py OUT

Nothing is allocated: parameters are on the meta device, and a step of training runs on fake tensors under torch's
memory tracker. OUT gets the findings as JSON.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from srlm_fast.config.keys import ParallelConfig
from srlm_fast.kernels import linear_logprob as head
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.packing import Item, pack
from srlm_fast.parallel import World, parallelize
from srlm_fast.reference import token_logps

LAYERS = 8
"""Of the model whose step is tracked; every block has the shape of 70B's."""
PAIR = Item(tuple(range(3072)), (tuple(range(1024)),) * 2)
"""As long as the configuration allows: max_seq_len and another answer, less the last tokens, which nothing follows."""


def sharded(shape: LlamaConfig, n_ranks: int, rank: int, **options) -> torch.nn.Module:
    """One rank's model on the meta device."""
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n_ranks))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n_ranks)
    with torch.device("meta"):
        model = Llama(shape)
    return parallelize(model, World(), ParallelConfig(**options))


def local(model: torch.nn.Module) -> dict[str, int]:
    parts = [parameter.to_local() for parameter in model.parameters()]
    return {"parameters": sum(part.numel() for part in parts), "bytes": sum(part.nbytes for part in parts)}


def peak(checkpointing: str) -> dict[str, int]:
    """Bytes by kind at the fullest moment of the second step on the first of 16 ranks, optimizer left out."""
    shape = replace(LlamaConfig.named("llama2-70b"), num_hidden_layers=LAYERS)
    model = sharded(shape, 16, 0, dtype="bfloat16", checkpointing=checkpointing)
    batch = pack([PAIR])
    head.check_range = lambda *arguments: None  # it looks at the targets
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device="cpu").train()
        for holder in (batch, batch.segments):
            for name, value in list(vars(holder).items()):
                if isinstance(value, torch.Tensor):
                    setattr(holder, name, mode.from_tensor(value))
        tracker = FSDPMemTracker(model)
        with tracker:
            for _ in range(2):
                model.zero_grad()
                tracker.reset_mod_stats()
                token_logps(model, batch).sum().backward()
            (found,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "name", kind)): size for kind, size in found.items()}


if __name__ == "__main__":
    big = LlamaConfig.named("llama2-70b")
    found = {f"{n}/{rank}": local(sharded(big, n, rank)) for n in (16, 32, 64) for rank in (0, n - 1)}
    found["32/5 hsdp"] = local(sharded(big, 32, 5, replicate=2))
    found["peak"] = {policy: peak(policy) for policy in ("none", "selective", "full")}
    Path(sys.argv[1]).write_text(json.dumps(found))
