"""Loading a model onto several ranks: host memory and seconds, ours against transformers.

    python bench/load.py                  # 2 ranks, a Llama of 134M parameters, bf16 files, fp32 parameters

Every way to load runs in processes of its own. Memory is the most that a rank holds beside what it held before, files
mapped into memory included; the floor is a rank's shard and the largest tensor as it is stored. transformers gives
every rank the whole model, and FSDP2 then takes the shards of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import environment, peak_bytes
from step_case import SHAPES, llama_config
from torch import nn

from srlm_fast import checkpoint
from srlm_fast.model import Llama
from srlm_fast.parallel import World, parallelize, shard

WAYS = {
    "ours": "srlm-fast",
    "whole": "srlm-fast, the model built whole on every rank first",
    "transformers": "transformers.from_pretrained, then FSDP2",
}


def load(way: str, folder: Path, world: World) -> nn.Module:
    """A sharded model in fp32."""
    if way == "transformers":
        from torch.distributed.fsdp import fully_shard
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    config = checkpoint.read_config(folder)
    if way == "whole":
        model = shard(Llama(config), world)
    else:
        with torch.device("meta"):
            model = Llama(config)
        model = parallelize(model, world).to_empty(device=world.device)
    checkpoint.load_weights(model, folder)
    return model


def measure(way: str, folder: Path) -> None:
    """Of one rank; rank 0 prints peak of the worst rank, of all ranks together, bytes of a shard, and seconds."""
    world = World()
    load(way, folder / "warm-up", world)  # imports, and what is allocated once
    seconds, kept = 0.0, []

    def run() -> None:
        nonlocal seconds
        started = time.perf_counter()
        kept.append(load(way, folder / "model", world))
        seconds = time.perf_counter() - started

    peaks = world.gather(peak_bytes(run, world.device) or 0)
    local = sum(parameter.to_local().nbytes for parameter in kept[0].parameters())
    if world.is_main:
        print(max(peaks), sum(peaks), local, seconds)
    world.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="medium")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    with tempfile.TemporaryDirectory() as temporary:
        folder, config = Path(temporary), llama_config(arguments.shape)
        for name, shape in (("model", config), ("warm-up", llama_config("small", vocab_size=64))):
            checkpoint.save_weights(Llama(shape), folder / name, dtype=torch.bfloat16)
        with torch.device("meta"):
            largest = 2 * max(parameter.numel() for parameter in Llama(config).parameters())
        print(environment(torch.device("cpu"), ("transformers", "safetensors")))
        print(
            f"\n{arguments.ranks} ranks, {arguments.shape}: D={config.hidden_size}, {config.num_hidden_layers} layers\n"
        )
        print("| way | peak of a rank, MiB | shard + largest tensor | peak / that | all ranks, MiB | seconds |")
        print("|---|---|---|---|---|---|")
        for way, shown in WAYS.items():
            if way == "transformers" and not find_spec("transformers"):
                continue
            command = [sys.executable, *torchrun, __file__, "--measure", way, temporary]
            found = []
            for _ in range(arguments.rounds):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr[-2000:])
                found.append([float(value) for value in done.stdout.split()])
            peak, together, local, _ = max(found)
            floor, seconds = local + largest, min(result[3] for result in found)
            numbers = f"{peak / 2**20:.0f} | {floor / 2**20:.0f} | {peak / floor:.2f} | {together / 2**20:.0f}"
            print(f"| {shown} | {numbers} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
