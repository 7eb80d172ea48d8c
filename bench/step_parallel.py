"""What FSDP2 costs: the same steps by one process and by two, for `bench/step.py --parallel`.

    torchrun --nproc-per-node 2 bench/step_parallel.py WAY FOLDER BATCH      rank 0 prints one line of JSON

Every way gets the same pairs in the same steps and the same number of threads in all. "apart" is what two processes can
do at best: each trains a whole model of its own on its half of every step, and they never talk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import environment, peak_bytes
from step_case import BETA, LEARNING_RATE, llama_config, read_pairs, write

from srlm_fast import checkpoint
from srlm_fast.config import TrainConfig
from srlm_fast.config.keys import ParallelConfig
from srlm_fast.model import Llama
from srlm_fast.parallel import World, parallelize
from srlm_fast.reference import ReferenceCache, response_keys
from srlm_fast.trainer import Trainer

TOKENS = 4096
WAYS: dict[str, tuple[int, str, dict]] = {
    "plain": (1, "one process, the model as it is", {}),
    "apart": (2, "two processes, a model each, half of every step, no exchange", {}),
    "fsdp2": (2, "two processes, FSDP2", {}),
    "kept": (2, "the same, `parallel.reshard=never`", {"reshard": "never"}),
    "full": (2, "the same, `parallel.checkpointing=full`", {"checkpointing": "full"}),
}
"""Name -> processes, what the table calls it, keys parallel.*."""


class Alone(World):
    """A rank that takes its share of every batch and keeps what comes of it to itself."""

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


def measure(way: str, folder: Path, batch_size: int) -> None:
    """Rank 0 prints the seconds of each step on the slowest rank, losses, peak bytes of the worst rank and of all."""
    together = World()
    world = Alone() if way == "apart" else together
    items, cache, steps = read_pairs(folder), ReferenceCache("m0"), []
    for item in items:  # values that cost nothing to get
        cache.update(zip(response_keys("m0", item), (-900.0, -900.0), strict=True))
    config = TrainConfig(
        loss="dpo",
        beta=BETA,
        lr=LEARNING_RATE,
        schedule="constant",
        batch_size=batch_size,
        tokens_per_microbatch=TOKENS,
    )

    def run() -> None:
        with torch.device("meta"):
            model = Llama(checkpoint.read_config(folder / "model"))
        if way != "apart":
            model = parallelize(model, world, ParallelConfig(**WAYS[way][2]))
        model = model.to_empty(device="cpu")
        checkpoint.load_weights(model, folder / "model")
        Trainer(model, items, config, reference=cache, world=world, on_step=steps.append).fit()

    together.barrier()
    peaks = together.gather(peak_bytes(run, world.device) or 0)
    seconds = [max(of_ranks) for of_ranks in zip(*together.gather([step["seconds"] for step in steps]))]
    if together.is_main:
        losses = [step["loss"] for step in steps]
        tokens = sum(step["tokens"] for step in steps[1:])
        print(json.dumps({"seconds": seconds, "losses": losses, "tokens": tokens, "peaks": peaks}))
    together.exit(0)


def start(way: str, folder: Path, batch_size: int, threads: int) -> dict:
    """The result of one way in processes of its own."""
    n_ranks = WAYS[way][0]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
    command = [sys.executable, *launcher, __file__, way, str(folder), str(batch_size)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // n_ranks))}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(arguments: argparse.Namespace, batch_size: int) -> None:
    """Prints the page bench/results/parallel-cpu.md."""
    config = llama_config(arguments.shape)
    results: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, arguments.shape, arguments.pairs)
        for _ in range(arguments.rounds):
            for way, found in results.items():
                found.append(start(way, folder, batch_size, arguments.threads))
    torch.set_num_threads(arguments.threads)
    print("# FSDP2 on two processes against one\n")
    print(f"    python bench/step.py {' '.join(sys.argv[1:])}\n")
    print(environment(torch.device("cpu")) + "\n")
    print(
        f"DPO, D={config.hidden_size}, {config.num_hidden_layers} layers, V={config.vocab_size}, fp32, "
        f"{arguments.pairs} pairs in steps of {batch_size}, at most {TOKENS} tokens a pass, reference cached. "
        f"{arguments.threads} threads in all: one process has them, or two share them. The ways alternate; medians of "
        f"{arguments.rounds}, the first step of each left out. Two processes without any exchange are the floor of two "
        "processes: what they lose against one is the machine's, what FSDP2 takes beyond is its own. Memory is what a "
        "process needs beside what it had before the model.\n"
    )
    print("| way | tokens/s | time, plain = 1 | time, apart = 1 | peak of a rank, MiB | all ranks, MiB | loss apart |")
    print("|---|---|---|---|---|---|---|")
    times = {way: statistics.median(sum(result["seconds"][1:]) for result in found) for way, found in results.items()}
    for way, found in results.items():
        peak = statistics.median(max(result["peaks"]) for result in found) / 2**20
        everywhere = statistics.median(sum(result["peaks"]) for result in found) / 2**20
        pairs = zip(found[0]["losses"], results["plain"][0]["losses"], strict=True)
        apart = "" if way == "apart" else f"{max(abs(a - b) for a, b in pairs):.0e}"
        print(
            f"| {WAYS[way][1]} | {found[0]['tokens'] / times[way]:,.0f} | {times[way] / times['plain']:.2f} "
            f"| {times[way] / times['apart']:.2f} | {peak:,.0f} | {everywhere:,.0f} | {apart} |"
        )


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
