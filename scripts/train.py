"""Train a model on files of rows with any loss of docs/losses.md.

    torchrun --nproc-per-node N scripts/train.py --config configs/dpo.yaml model=PATH data=pairs.jsonl [key=value ...]

Started again with the same arguments it goes on where it was. The model is in RUN_DIR/model, metrics are in
RUN_DIR/metrics.jsonl. Exit codes of a process: 0 done, 2 bad input (one line says what); after a checkpoint 75 stopped
by save_by or SIGUSR1, 143 by SIGTERM or SIGINT. RUN_DIR/state says in a word how it ended.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from srlm_fast import command
from srlm_fast.config import describe
from srlm_fast.config.train import TrainRunConfig
from srlm_fast.config.tree import read

if TYPE_CHECKING:
    from srlm_fast.parallel import World


def main() -> int:
    epilog, formatter = f"keys:\n{describe(TrainRunConfig())}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=formatter)
    parser.add_argument("--config", help="YAML file of keys")
    parser.add_argument("--cache-only", action="store_true", help="stop when the reference log-probs are there")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()

    def work(config: TrainRunConfig, world: World) -> None:
        from srlm_fast.train_run import train

        counts = train(config, world, cache_only=arguments.cache_only)
        if world.is_main:
            print(", ".join(f"{name} {value:.6g}" for name, value in counts.items()))

    return command.run(lambda: read(TrainRunConfig(), arguments.config, arguments.overrides), work)


if __name__ == "__main__":
    sys.exit(main())
