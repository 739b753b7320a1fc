"""Runs the study, reports it, or checks one run; see `benchmarks.quality`."""

import os

# One thread a run, so that sums do not depend on the machine's cores: read as JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
# Two runs go side by side, and in each `eigh` of many matrices holds one thread of XLA's pool while it waits for
# others. The pool has a thread a core: on two cores both runs would wait for each other and never end.
# How sums are split depends on it: a run is repeated to the last digit with the threads that it was recorded with.
os.environ.setdefault("NPROC", "4")

import argparse
import time
from pathlib import Path

from benchmarks import quality, table
from benchmarks.quality.arms import ARMS
from benchmarks.quality.protocol import FULL, QUICK, RESULT
from benchmarks.quality.record import Record
from benchmarks.quality.study import CHECKED, PARTS, differences, study
from benchmarks.record import output_file


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks, 4 steps: shows that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=360, help="no run is begun later; the next call goes on")
    parser.add_argument("--output", type=Path, help="default: the recorded result, of the full study")
    parser.add_argument("--report", action="store_true", help="write pages and figures from the record; runs nothing")
    parser.add_argument("--check", action="store_true", help="train a recorded run again and compare")
    parser.add_argument("--arm", choices=ARMS, default="residual", help="of --check")
    parser.add_argument("--seed", type=int, default=0, help="of --check")
    parser.add_argument("--part", choices=CHECKED, default="arms", help="of --check")
    options = parser.parse_args()
    if options.report:
        table.write()
        return
    if options.check:
        found = differences(Record(options.output or RESULT), options.arm, options.seed, options.part)
        print("\n".join(found) or f"{options.arm}, seed {options.seed}: the recorded numbers")
        raise SystemExit(bool(found))
    output = output_file(options.output, RESULT.name, full=not options.quick)
    end = time.monotonic() + 60 * options.minutes
    study(Record(output), QUICK if options.quick else FULL, options.parts, until=end)


if __name__ == "__main__":
    main()
