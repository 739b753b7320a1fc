"""The tables and figures of recorded results, where README.md and the documentation show them.

A table stands between two comments, `<!-- benchmarks: NAME -->` and `<!-- /benchmarks -->`.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import decoder, plans
from benchmarks.accelerators import pages
from benchmarks.markdown import ABSENT, markdown
from benchmarks.quality import report as quality
from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
HISTORY, STREAMS, FRONT, COMPILED, CALL, CONVERSION = (
    f"{name}.json"
    for name in (
        "history-cpu",
        "streams-cpu",
        "torch_front-cpu",
        "torch_front-compiled-cpu",
        "bridge-cpu",
        "bridge_conversion",
    )
)


def load(folder: Path) -> dict[str, Any]:
    """The records of a folder by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def find(record: Any, *path: str) -> Any:
    """What lies at the path, or None if it was not recorded."""
    for key in path:
        if not isinstance(record, Mapping) or key not in record:
            return None
        record = record[key]
    return record


def cell(value: Mapping[str, float] | float | None) -> str:
    """A median with its 10th and 90th percentile, or a number."""
    if value is None:
        return ABSENT
    if isinstance(value, Mapping):
        return f"{value['median']:.2f} ({value['p10']:.2f} to {value['p90']:.2f})"
    return f"{value:.2f}"


def history_table(records: Mapping[str, Any]) -> str:
    sizes = [(64, 32), (256, 128), (1024, 512)]

    def of_size(part: str, width: int) -> Any:
        rows = find(records, HISTORY, part, "rows") or []
        return next((row for row in rows if row["L"] == 50 and row["C"] == width), None)

    def in_jax(part: str, name: str) -> list[str]:
        return [cell(find(of_size(part, width), name)) for width, _ in sizes]

    def in_torch(file: str, name: str, over: str = "time") -> list[str]:
        return [cell(find(records, file, "sizes", f"C={width} B={batch}", name, over)) for width, batch in sizes]

    return markdown(
        ["history, H = 4", "over", *(f"C={width}, B={batch}" for width, batch in sizes)],
        [
            ["`mhc_jax`", "residual in JAX", *in_jax("overhead", "history_time")],
            ["`mhc_jax`, temporary memory", "residual in JAX", *in_jax("overhead", "history_memory")],
            ["plain autodiff in JAX", "residual in JAX", *in_jax("overhead", "window_time")],
            ["plain autodiff in JAX, temporary memory", "residual in JAX", *in_jax("overhead", "window_memory")],
            ["`mhc` 0.5.5", "`mhc_jax`", *in_jax("published", "eager / ours")],
            ["`mhc` 0.5.5, torch.compile", "`mhc_jax`", *in_jax("published", "torch.compile / ours")],
            ["`mhc_torch`", "residual in PyTorch", *in_torch(FRONT, "mhc_torch")],
            ["`mhc_torch`, nodes in Python", "residual in PyTorch", *in_torch(FRONT, "mhc_torch, nodes in Python")],
            ["`mhc` 0.5.5", "residual in PyTorch", *in_torch(FRONT, "published")],
            ["`mhc` 0.5.5", "`mhc_torch`", *in_torch(FRONT, "published", "time over mhc_torch")],
            ["`mhc_torch`, torch.compile", "residual, torch.compile", *in_torch(COMPILED, "mhc_torch")],
            [
                "`mhc_torch`, torch.compile",
                "residual with as many parameters, torch.compile",
                *in_torch(COMPILED, "mhc_torch", "time over as many parameters"),
            ],
        ],
    )


def streams_table(records: Mapping[str, Any]) -> str:
    rows = []
    for part, name, label, base in (
        ("jax", "mhc_jax", "`mhc_jax`", "residual in JAX"),
        ("jax", "naive", "the equations in plain JAX", "residual in JAX"),
        ("torch", "mhc_torch", "`mhc_torch`", "residual in PyTorch"),
        ("torch", "hyper-connections", "`hyper-connections`", "residual in PyTorch"),
        ("torch-compiled", "mhc_torch", "`mhc_torch`, torch.compile", "residual, torch.compile"),
        ("torch-compiled", "hyper-connections", "`hyper-connections`, torch.compile", "residual, torch.compile"),
    ):
        found = [cell(find(records, STREAMS, part, f"{name}: {kind}")) for kind in ("time", "temporary memory")]
        rows.append([label, base, *found])
    return markdown(["4 streams in a transformer", "over", "time", "temporary memory"], rows)


def bridge_table(records: Mapping[str, Any]) -> str:
    rows = []
    for kind in ("forward", "forward and backward"):
        time = cell(find(records, CALL, kind, "times the floor"))
        rows.append([f"`JaxFunction`, {kind}", "an autograd function written by hand", time])
    for model, times in (find(records, CONVERSION, "times of a copy") or {}).items():
        for way, time in times.items():
            if way != "copy of the file":
                rows.append([f"{model}: {way}", "a copy of the file", cell(time)])
    return markdown(["bridge", "over", "time"], rows)


def machine(records: Mapping[str, Any]) -> str:
    """Where and with what the records were measured, in one line; whatever differs between them is listed."""
    found: dict[str, set[str]] = {}
    for file in (HISTORY, STREAMS, FRONT, COMPILED, CALL, CONVERSION):
        for place in _environments(records.get(file, {})):
            seen = {"": f"{place['processor']}, {place['cores']} cores", "Python": place["python"], **place["versions"]}
            for name, value in {**seen, "measured": place["date"]}.items():
                found.setdefault(name, set()).add(str(value))
    dates = found.pop("measured", set())
    named = (f"{name} {' and '.join(sorted(values))}".strip() for name, values in found.items())
    return "; ".join([*named, " and ".join(sorted(dates))])


def _environments(record: Mapping[str, Any]) -> list[Any]:
    """Where a record was measured: it says so itself, in its `environment`, or for every part that ran alone."""
    if "processor" in record:
        return [record]
    if "environment" in record:
        return [record["environment"]]
    return [part["environment"] for part in record.values()]


def peers(records: Mapping[str, Any]) -> str:
    """Every ratio to a named peer, as tables, and the machine."""
    tables = [table(records) for table in (history_table, streams_table, bridge_table)]
    return "\n".join([*tables, machine(records) + "\n"])


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "peers": peers,
    **{f"quality_{name}": make for name, make in quality.TABLES.items()},
    "tpu": partial(pages.shown, platform="tpu"),
    "gpu": partial(pages.shown, platform="cuda"),
    "plans": plans.table,
    "decoder": decoder.table,
}
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("quality", "performance", "scaling"))]


def filled(page: str, records: Mapping[str, Any]) -> str:
    """The text of a page with its tables as the records have them.

    Raises:
        KeyError: a comment names a table that there is not.
    """
    # Without the blank lines Markdown would take a table for part of the comment.
    return PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]](records)}\n{place[3]}", page)


def write() -> None:
    """Puts the tables into their pages and draws the figures again, from the recorded results."""
    records = load(RESULTS)
    for page in PAGES:
        text = filled(page.read_text(), records)
        _replace(page, partial(Path.write_text, data=text))
    for draw, result, figure in quality.figures(records):
        _replace(ROOT / figure, partial(draw, records[result.name]))


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    """Lets `make` write a file beside the path, and moves it there once it is whole."""
    temporary = path.with_name(f".part-{path.name}")
    make(temporary)
    os.replace(temporary, path)
