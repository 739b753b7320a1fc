"""All measurements, against named peers, and the table of what they found.

    python -m benchmarks [--quick] [--output FOLDER] [SUITE ...]
    python -m benchmarks table [--write]

The first runs every suite (or those named), each file of results in a process of its own, so that none warms up or
crowds out another, and prints one table. With `--quick` it takes a few minutes, shows that everything runs, and leaves
the recorded results alone. The second prints the table of the recorded results; `--write` puts it, the tables of the
documentation and its figures in their places.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import table
from benchmarks.record import QUICK_RESULTS, RESULTS

# Arguments of `python -m benchmarks.<suite>`, and the file that they write.
SUITES: dict[str, list[tuple[list[str], str]]] = {
    "history": [([], "history-cpu.json")],
    "streams": [([], "streams-cpu.json")],
    "decoder": [([], "decoder-cpu.json")],
    "torch_front": [([], "torch_front-cpu.json"), (["--compiled"], "torch_front-compiled-cpu.json")],
    "bridge": [(["call"], "bridge-cpu.json"), (["conversion"], "bridge_conversion.json")],
    "quality": [([], "quality-cpu.json")],
}


def measure(suites: list[str], quick: bool, folder: Path) -> None:
    """Runs the suites in order.

    Raises:
        SystemExit: one of them fails; what was written before stays.
    """
    for suite in suites:
        for arguments, file in SUITES[suite]:
            command = [sys.executable, "-m", f"benchmarks.{suite}", *arguments, "--output", str(folder / file)]
            print("\n" + " ".join(command[1:]), flush=True)
            status = subprocess.run(command + ["--quick"] * quick).returncode
            if status:
                raise SystemExit(f"benchmarks.{suite} failed with exit status {status}")


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        parser = argparse.ArgumentParser(prog="python -m benchmarks table", description=table.__doc__)
        parser.add_argument("--write", action="store_true", help="put tables and figures in their places")
        if parser.parse_args(sys.argv[2:]).write:
            table.write()
        print(table.peers(table.load(RESULTS)))
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, small networks")
    parser.add_argument("--output", type=Path, help=f"folder; default: {RESULTS}, or {QUICK_RESULTS} if quick")
    arguments = parser.parse_args()
    if unknown := [suite for suite in arguments.suites if suite not in SUITES]:
        parser.error(f"SUITE must be of {', '.join(SUITES)}, got {', '.join(unknown)}")
    folder = arguments.output or (QUICK_RESULTS if arguments.quick else RESULTS)
    if arguments.quick and folder.resolve() == RESULTS.resolve():
        parser.error(f"--quick would overwrite the recorded results: --output must not be {folder}")
    measure(arguments.suites or list(SUITES), arguments.quick, folder)
    print("\n" + table.peers(table.load(folder)))


if __name__ == "__main__":
    main()
