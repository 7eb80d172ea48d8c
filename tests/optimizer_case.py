"""One small regression for the optimizer's tests.

Run as a script under torchrun it trains sharded, stops, resumes from a checkpoint, and saves the weights:
    torchrun --nproc-per-node 2 tests/optimizer_case.py OUT MOMENTS
"""

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from training_case import leave

from srlm_fast.kernels.optimizer import AdamW
from srlm_fast.parallel import World
from srlm_fast.trainer.eight_bit import adamw_8bit

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-7}


def make_model(dtype=torch.float32, moments="fp32"):
    """With 8-bit moments a wider model, whose shards are large enough for them."""
    torch.manual_seed(0)
    if moments == "8bit":
        return nn.Sequential(nn.Linear(12, 128), nn.Tanh(), nn.LayerNorm(128), nn.Linear(128, 128), nn.Linear(128, 3))
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 3)).to(dtype)


def make_optimizer(model, moments, seed=7):
    if moments == "8bit":
        return adamw_8bit(groups(model), **OPTIONS)
    return AdamW(groups(model), **OPTIONS, moments=moments, seed=seed)


def groups(model):
    return [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 1e-2},
    ]


def train(model, optimizer, steps):
    """One batch for each number of `steps`; returns the last loss."""
    for step in steps:
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        loss = (model(x) - x[:, :3].sin()).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def save(model, optimizer, folder):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(model, optimizer, folder):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def weights(model):
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


if __name__ == "__main__":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    out, moments = Path(sys.argv[1]), sys.argv[2]
    world = World()
    mesh = init_device_mesh("cpu", (world.size,))

    def build():
        model = fully_shard(make_model(moments=moments), mesh=mesh)
        model.set_gradient_divide_factor(float(world.size))  # all ranks see the same batch
        model.set_force_sum_reduction_for_comms(True)
        return model, make_optimizer(model, moments, seed=world.rank)

    model, optimizer = build()
    train(model, optimizer, range(4))
    save(model, optimizer, out / "checkpoint")
    train(model, optimizer, range(4, 8))
    resumed, again = build()
    load(resumed, again, out / "checkpoint")
    train(resumed, again, range(4, 8))
    results = weights(model), weights(resumed)
    leave(world, results, out)
