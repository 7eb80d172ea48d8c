"""The model of a plan on the meta device, sharded among ranks that do not exist, and a step of it on fake tensors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from srlm_fast.errors import UserError
from srlm_fast.kernels import linear_logprob
from srlm_fast.lora import add_adapters
from srlm_fast.model import Llama, LlamaConfig
from srlm_fast.packing import Item, PackedBatch, pack
from srlm_fast.parallel import World, parallelize
from srlm_fast.plan import Plan
from srlm_fast.plan.memory import GIB
from srlm_fast.reference import token_logps

BLOCKS = 4
"""Of the model whose step is tried: all blocks are alike."""


def check_shards(plan: Plan) -> Iterator[str]:
    """What the first and the last rank hold, as FSDP2 divides it.

    Raises:
        UserError: when that is not what the planner says.
    """
    for rank in sorted({0, plan.machine.n_gpus - 1}):
        with _rank(rank, plan.machine.n_gpus) as world:
            parts = [_local(parameter) for parameter in _sharded(plan, plan.shape, world).parameters()]
        number, size = sum(part.numel() for part in parts), sum(part.nbytes for part in parts)
        place = rank % plan.shard
        planned, planned_size = plan.local_parameters(place), plan.parameter_bytes(place)
        if (number, size) != (planned, planned_size):
            raise UserError(
                f"rank {rank} gets {number:,} parameters in {size:,} bytes and the planner says {planned:,} in "
                f"{planned_size:,}: the plan cannot be trusted with this torch {torch.__version__}"
            )
        yield f"rank {rank}: {number:,} parameters, {size / GIB:.1f} GiB, as planned"


def fake_step(plan: Plan, section: str) -> str:
    """Packs, runs forward and backward what the largest micro-batch of `section` may be, on `BLOCKS` blocks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = replace(plan.shape, num_hidden_layers=min(BLOCKS, plan.shape.num_hidden_layers))
    tokens, _ = plan.microbatch(section)
    longest, answer = plan.longest(section), plan.config.candidates.max_new_tokens
    answers = (answer, answer) if section == "dpo" else (min(answer, longest - 1),)
    item = Item((0,) * (longest - sum(answers)), tuple((0,) * n for n in answers))
    batch = pack([item] * (tokens // longest))
    with _rank(0, plan.machine.n_gpus) as world:
        model = _sharded(plan, shape, world)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            _step(model, batch, mode)
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without
    responses = f"{len(batch.lengths)} response{'s' * (len(batch.lengths) > 1)}"
    return (
        f"{section}: forward and backward of {shape.num_hidden_layers} of {plan.shape.num_hidden_layers} blocks on "
        f"{responses}, {tokens:,} tokens, checkpointing {plan.config.parallel.checkpointing}"
    )


def _step(model: nn.Module, batch: PackedBatch, mode: Any) -> None:
    """Forward and backward of one micro-batch on fake tensors."""
    model.to_empty(device="cpu").train()
    for holder in (batch, batch.segments):
        for name, value in list(vars(holder).items()):
            if isinstance(value, torch.Tensor):
                setattr(holder, name, mode.from_tensor(value))
    with patch.object(linear_logprob, "check_range"):  # it looks at numbers, of which there are none
        token_logps(model, batch).sum().backward()


@contextmanager
def _rank(rank: int, n_ranks: int) -> Iterator[World]:
    """This process as a rank of a group that does not exist: collectives return at once, with nothing in them."""
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError:
        raise UserError(f"torch {torch.__version__} has no fake process group; --dry-run needs one") from None
    names = {"RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
    with patch.dict(os.environ, names), patch.object(sys, "excepthook", sys.excepthook):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n_ranks)
        try:
            world = World()
            world.device = torch.device("cpu")
            yield world
        finally:
            dist.destroy_process_group()


def _sharded(plan: Plan, shape: LlamaConfig, world: World) -> nn.Module:
    with torch.device("meta"):
        model = add_adapters(Llama(shape, plan.config.model.dropout), plan.config.lora, base_dtype=plan.dtype)
    dtype = str(plan.dtype).removeprefix("torch.")  # that of a GPU
    return parallelize(model, world, replace(plan.config.parallel, compile=False, dtype=dtype))


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
