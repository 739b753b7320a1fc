"""python -m tests.fuzz [SUBJECT ...] [--minutes N] [--seed S] [--trials N]: random trials of each subject in turn."""

import argparse
import math
import sys
import traceback

from tests import fuzz


def main() -> int:
    """0 if no trial failed, 1 if one did, 2 for arguments that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"{', '.join(fuzz.SUBJECTS)}; default: all")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each subject (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial (default: 0)")
    parser.add_argument("--trials", type=int, help="at most so many of each subject, whatever the time")
    given = parser.parse_args()
    if not 0 < given.minutes < math.inf:
        parser.error(f"--minutes must be positive, got {given.minutes}")
    if given.trials is not None and given.trials < 1:
        parser.error(f"--trials must be at least 1, got {given.trials}")
    if unknown := sorted(set(given.subjects) - set(fuzz.SUBJECTS)):
        parser.error(f"SUBJECT must be one of {', '.join(fuzz.SUBJECTS)}, got {', '.join(unknown)}")
    failed = 0
    for subject in given.subjects or fuzz.SUBJECTS:
        try:
            done = fuzz.run(subject, given.seed, seconds=60 * given.minutes, trials=given.trials)
        except fuzz.Failure as failure:
            failed += 1
            traceback.print_exception(failure.__cause__)
            print(f"{subject}: FAILED  {failure}", flush=True)
        else:
            print(f"{subject}: {done} trials passed, seeds {given.seed} to {given.seed + done - 1}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
