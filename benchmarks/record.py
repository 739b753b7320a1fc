"""Where measurements are written: the recorded results are those of full runs only."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("runs/benchmarks")


def output_file(given: Path | None, name: str, *, full: bool) -> Path:
    """The file for the results of one suite: as `given`, or by default the recorded one if it is a `full` run.

    Raises:
        SystemExit: a run that is not full would overwrite a recorded result.
    """
    path = given or (RESULTS if full else QUICK_RESULTS) / name
    if not full and path.resolve().parent == RESULTS.resolve():
        raise SystemExit(f"--output: a quick or short run would overwrite recorded results, so it must not be {path}")
    return path
