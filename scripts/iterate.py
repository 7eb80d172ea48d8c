"""Self-rewarding training from one command: M0 -> SFT -> M1 -> M2 -> M3.

    torchrun --nproc-per-node N scripts/iterate.py --config configs/tiny.yaml [section.key=value ...]

Started again with the same arguments it goes on where it was. --status tells where that is. Exit codes of a process:
0 done, 2 bad input (one line says what), 143 stopped by SIGTERM or SIGINT with everything finished saved.
"""

import argparse
import sys

from srlm_fast.config import Config, describe, load_config
from srlm_fast.errors import Interrupted, UserError


def main() -> int | None:
    epilog, formatter = f"keys:\n{describe(Config())}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=formatter)
    parser.add_argument("--config", help="YAML file of keys")
    parser.add_argument("--status", action="store_true", help="print where the run is and change nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        from srlm_fast.iterate import iterate, status
        from srlm_fast.parallel import World
        from srlm_fast.summary import print_summary

        if arguments.status:
            print(status(config))
            return 0
        world = World()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = 0
    try:
        run = iterate(config, world)
        if world.is_main:
            print_summary(run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        code = 143
    world.exit(code)


if __name__ == "__main__":
    sys.exit(main())
