"""Memory and time of a run on given GPUs; nothing is started and no GPU is needed.

    python scripts/plan.py --config configs/llama2_70b.yaml --gpus 16xH100-80 [section.key=value ...]

Exit codes: 0 it fits, 1 it does not, 2 bad input (one line says what).
"""

import argparse
import sys

from srlm_fast.config import describe, load_config
from srlm_fast.config.tree import read
from srlm_fast.errors import UserError


def main() -> int:
    from srlm_fast.plan import GPUS, Assumptions, Machine, Plan, read_shape, report

    epilog = f"what --assume sets:\n{describe(Assumptions())}"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=formatter)
    parser.add_argument("--config", help="YAML file of keys")
    parser.add_argument("--gpus", help=f"number x one of {', '.join(GPUS)}; without it the key gpus")
    parser.add_argument("--model", help="a published size, such as llama2-70b; without it the shape of model.path")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        shape, assumptions = read_shape(config, arguments.model), read(Assumptions(), None, arguments.assume)
        plan = Plan(config, shape, Machine.parse(arguments.gpus or config.gpus), assumptions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(plan))
    return 0 if plan.room >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
