"""Self-rewarding training from one command: M0 -> SFT -> M1 -> M2 -> M3.

    torchrun --nproc-per-node N scripts/iterate.py --config configs/tiny.yaml [section.key=value ...]

Started again with the same arguments it goes on where it was. --status tells where that is, --dry-run what would be
done and whether it can. Exit codes of a process: 0 done, 2 bad input (one line says what); with everything finished
saved 75 stopped by save_by or SIGUSR1, 143 by SIGTERM or SIGINT. RUN_DIR/state says in a word how it ended.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from srlm_fast import command
from srlm_fast.config import Config, describe, load_config

if TYPE_CHECKING:
    from srlm_fast.parallel import World


def main() -> int:
    epilog, formatter = f"keys:\n{describe(Config())}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=formatter)
    parser.add_argument("--config", help="YAML file of keys")
    parser.add_argument("--status", action="store_true", help="print where the run is and change nothing")
    parser.add_argument("--dry-run", action="store_true", help="check all that can be checked before a run; start none")
    parser.add_argument("--gpus", help="of --dry-run: number x kind, such as 16xH100-80; without it the key gpus")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()

    def work(config: Config, world: World) -> None:
        from srlm_fast.iterate import iterate
        from srlm_fast.summary import print_card, print_summary

        run = iterate(config, world)
        if world.is_main:
            print_summary(run)
            print_card(run.run_dir)

    def show(config: Config, world: World) -> None:
        from srlm_fast.iterate import status

        print(status(config))

    def check(config: Config, world: World) -> None:
        from srlm_fast.dry_run import dry_run

        for line in dry_run(config, arguments.gpus):
            print(line, flush=True)

    read = partial(load_config, arguments.config, arguments.overrides)
    return command.run(read, show if arguments.status else check if arguments.dry_run else work)


if __name__ == "__main__":
    sys.exit(main())
