"""What the compilers of TPUs and GPUs make of this library: `make accelerators`, or in the environment that it makes

    python -m benchmarks.accelerators [--quick] [--target NAME ...] [--case TEXT ...] [--record]

Prints one table. A run of everything records it, and `--record` a part of it, beside what the same compilers have made
before. A program that was compiled before is taken from the cache.
"""

import argparse
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.accelerators import report
from benchmarks.accelerators.targets import TARGETS
from benchmarks.accelerators.worker import PACKAGES, prepare

RECORD = Path(__file__).parents[1] / "results" / "accelerators.json"
QUICK_TARGETS = ("v5p", "h100")


def versions(targets: list[str]) -> dict[str, str]:
    """Of the compilers that these targets need.

    Raises:
        SystemExit: one is not installed.
    """
    found = {}
    for package in dict.fromkeys(p for target in targets for p in PACKAGES[TARGETS[target].platform]):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            raise SystemExit(f"{package} is not installed in {sys.prefix}: make accelerators") from None
    return found


def known(targets: list[str], found: dict[str, str]) -> None:
    """Asks the installed compilers for each target.

    Raises:
        SystemExit: a compiler does not know one.
    """
    for name in targets:
        try:
            TARGETS[name].device()
        except Exception as error:
            said = str(error).strip().splitlines()[0][:160]
            installed = ", ".join(f"{p} {found[p]}" for p in PACKAGES[TARGETS[name].platform])
            raise SystemExit(
                f"--target {name}: not known to {installed} ({said}); "
                "`make accelerators` installs the compilers that know every target"
            ) from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(TARGETS)
    parser.add_argument("--quick", action="store_true", help="a few cases in at most three minutes")
    parser.add_argument("--target", nargs="+", default=[], metavar="NAME", help=f"of {names}; default: all")
    parser.add_argument("--case", nargs="+", default=[], metavar="TEXT", help="the cases whose names hold one of these")
    parser.add_argument("--record", action="store_true", help="record a part, too")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.target if name not in TARGETS]:
        parser.error(f"--target must be of {names}, got {', '.join(unknown)}")
    targets = arguments.target or list(QUICK_TARGETS if arguments.quick else TARGETS)
    found = versions(targets)

    # These import JAX, which looks for devices as it is told to now.
    prepare("tpu", None)
    known(targets, found)
    from benchmarks.accelerators.cases import CASES
    from benchmarks.accelerators.pool import Job, compile_all
    from benchmarks.timing import write_json

    chosen = [
        name
        for name, case in CASES.items()
        if (case.quick or not arguments.quick) and (not arguments.case or any(text in name for text in arguments.case))
    ]
    if not chosen:
        parser.error(f"--case: no name holds any of {arguments.case}; they are:\n  " + "\n  ".join(CASES))
    jobs = [
        Job(case, way, target)
        for case in chosen
        for way in CASES[case].implementations
        for target in targets
        if CASES[case].only.get(way, TARGETS[target].platform) == TARGETS[target].platform
    ]
    jobs += [
        Job(case, name, target)
        for case in chosen
        for name in CASES[case].peers
        for target in targets
        if TARGETS[target].platform == "cuda"
    ]
    count = 0

    def done(job: Job, result: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        print(
            f"\r{count} of {len(jobs)}: {job.target}, {job.case}, {job.implementation}\x1b[K", end="", file=sys.stderr
        )

    results = compile_all(jobs, done)
    print("\r\x1b[K", end="", file=sys.stderr)
    compiled: dict[str, dict[str, dict[str, Any]]] = {}
    for job in jobs:
        result = results[job]
        # A peer does the work of the case, whose least is that of its own programs.
        own = results[Job(job.case, next(iter(CASES[job.case].implementations)), job.target)]
        result["least"] = CASES[job.case].least or own.get("arguments and results")
        compiled.setdefault(job.case, {}).setdefault(job.implementation, {})[job.target] = result
    over = {name: CASES[name].over for name in chosen}
    print(report.table(compiled, over))
    print("\ncompiled by", ", ".join(f"{name} {number}" for name, number in found.items()))
    everything = not (arguments.quick or arguments.target or arguments.case)
    if everything or arguments.record:
        write_json(RECORD, merged({} if everything else recorded(), found, over, compiled))
        print(f"recorded in {RECORD}")


def recorded() -> dict[str, Any]:
    """The record, if there is one."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def merged(
    record: dict[str, Any], versions: dict[str, str], over: dict[str, str | None], compiled: report.Results
) -> dict[str, Any]:
    """A record with what was compiled now beside what it has of the same compilers; what others made is left out."""
    known = record.get("versions", {})
    if any(known.get(name, version) != version for name, version in versions.items()):
        record = known = {}
    results = {
        case: {way: dict(found) for way, found in ways.items()} for case, ways in record.get("compiled for", {}).items()
    }
    for case, ways in compiled.items():
        for way, found in ways.items():
            results.setdefault(case, {}).setdefault(way, {}).update(found)
    return {
        "versions": {**known, **versions},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "over": {**record.get("over", {}), **over},
        "compiled for": results,
    }


if __name__ == "__main__":
    main()
