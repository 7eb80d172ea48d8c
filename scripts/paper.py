"""The paper's result in miniature: SFT, M1, M2, M3 and the ablations over several seeds, on the embedded world.

    python scripts/paper.py [--study configs/miniature.yaml] [--runs runs/miniature] [--out docs/results/miniature.md]
    python scripts/paper.py --report-only       the page again, from the runs that are finished

Started again it goes on where it was. Exit codes: 0 done, 2 bad input, 143 stopped by SIGTERM or SIGINT.
"""

import argparse
import sys
from pathlib import Path

from srlm_fast.errors import Interrupted, UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("configs/miniature.yaml"), help="arms and seeds")
    parser.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=Path("docs/results/miniature.md"), help="the page to write")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--arms", nargs="+", default=[], help="only these")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="this run alone, in this process")
    arguments = parser.parse_args()
    try:
        from srlm_fast.study import report, run
        from srlm_fast.study.arms import Study

        study = Study.read(arguments.study)
        if arguments.one:
            run.run_one(study, arguments.one[0], int(arguments.one[1]), arguments.runs)
            return 0
        if not arguments.report_only:
            report.check()
            places = ("--study", str(arguments.study), "--runs", str(arguments.runs))
            command = run.script_command(__file__, *places, "--one")
            run.run_all(study, arguments.runs, command, jobs=arguments.jobs, only=arguments.arms)
        report.write(study, arguments.runs, arguments.out)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 143


if __name__ == "__main__":
    sys.exit(main())
