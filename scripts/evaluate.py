"""Evaluate a model: answers, a comparison with another model, AlpacaEval and MT-Bench files, ratings.

    torchrun --nproc-per-node N scripts/evaluate.py [--config FILE] task=TASK model=FOLDER [key=value ...]

Tasks and their keys are in docs/evaluation.md. Started again with the same arguments it goes on where it was. Exit
codes of a process: 0 done, 2 bad input (one line says what); with the finished answers kept 75 stopped by save_by or
SIGUSR1, 143 by SIGTERM or SIGINT. RUN_DIR/state says in a word how it ended.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from srlm_fast import command
from srlm_fast.config import describe
from srlm_fast.config.evaluate import EvaluateRunConfig
from srlm_fast.config.tree import read

if TYPE_CHECKING:
    from srlm_fast.parallel import World


def main() -> int:
    epilog, formatter = f"keys:\n{describe(EvaluateRunConfig())}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=formatter)
    parser.add_argument("--config", help="YAML file of keys")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()

    def work(config: EvaluateRunConfig, world: World) -> None:
        from srlm_fast.evaluation.tasks import evaluate

        counts = evaluate(config, world)
        if world.is_main:
            for name, value in counts.items():
                print(f"{name}: {value}")

    return command.run(lambda: read(EvaluateRunConfig(), arguments.config, arguments.overrides), work)


if __name__ == "__main__":
    sys.exit(main())
