"""Preference training, ours against TRL's DPOTrainer: pairs per second, memory, and what each lever brings.

    python bench/step.py                                    # the small Llama; levers, and TRL where it is installed
    python bench/step.py --shape medium --pairs 32 --rounds 1
    python bench/step.py --parallel | tee bench/results/parallel-cpu.md      # instead: FSDP2 on two processes

DPO in fp32 on pairs of log-normal lengths (bench/step_case.py), in steps of 16 pairs. Every trainer has a process of
its own, the processes alternate, and the table has medians. TRL runs with a precomputed reference, without gradient
checkpointing, with each batch sorted by length, at several numbers of pairs per forward pass. Losses are compared step
by step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import environment
from step_case import SHAPES, llama_config, read_pairs, write
from step_parallel import compare
from step_trainers import LEVERS, OURS

BATCH = 16


def run(what: str, folder: Path, threads: int) -> dict | None:
    """The result of one process; None, with its last line, where it fails."""
    script = str(Path(__file__).with_name("step_trainers.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HOME": str(folder / "hf"), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, script, what, str(folder), str(BATCH)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        print(f"{what} failed: {lines[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(name: str, results: list[dict], n_pairs: int, best: float, reference_losses: list[float]) -> str:
    """A line of the table; `best` is our median seconds with the reference pass."""
    steps = statistics.median(result["steps"] for result in results)
    both = statistics.median(result["steps"] + result["reference"] for result in results)
    peak = statistics.median(result["peak"] or 0 for result in results) / 2**20
    apart = max(abs(a - b) for a, b in zip(results[0]["losses"], reference_losses, strict=True))
    return f"| {name} | {n_pairs / both:.2f} | {n_pairs / steps:.2f} | {both / best:.2f} | {peak:,.0f} | {apart:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", type=int, nargs="*", default=(1, 2, 4, 8), help="pairs per forward pass of TRL")
    parser.add_argument("--levers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--parallel", action="store_true", help="ours on two processes against one")
    arguments = parser.parse_args()
    if arguments.parallel:
        return compare(arguments, BATCH)
    peers = [f"trl/{n}" for n in arguments.trl] if find_spec("trl") else []
    ours = [f"ours/{i}" for i in range(len(OURS))]
    names = [*ours, *peers, *(f"levers/{i}" for i in range(len(LEVERS)) if arguments.levers)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, arguments.shape, arguments.pairs)
        items = read_pairs(folder)
        results: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                if result := run(name, folder, arguments.threads):
                    results[name].append(result)
    torch.set_num_threads(arguments.threads)
    config = llama_config(arguments.shape)
    print(environment(torch.device("cpu"), ("trl", "transformers")))
    print(
        f"\nD={config.hidden_size}, {config.num_hidden_layers} layers, V={config.vocab_size}, fp32, "
        f"{len(items)} pairs, {sum(item.n_tokens for item in items)} tokens with shared prompts, steps of {BATCH}; "
        f"medians of {arguments.rounds}\n"
    )
    print("| trainer | pairs/s with the reference pass | pairs/s without | time, ours = 1 | peak MiB | loss apart |")
    print("|---|---|---|---|---|---|")
    plain = results["ours/0"]
    best = statistics.median(result["steps"] + result["reference"] for result in plain)
    for name, found in results.items():
        kind, _, number = name.partition("/")
        shown = {"ours": OURS, "levers": LEVERS}[kind][int(number)] if kind != "trl" else f"TRL, {number} pairs a pass"
        if found:
            print(row(shown, found, len(items), best, plain[0]["losses"]))


if __name__ == "__main__":
    main()
