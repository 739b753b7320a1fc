"""What docs/performance.md shows of the lab's record: one table of history and one of streams for each platform."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from benchmarks.accelerators.targets import TARGETS
from benchmarks.markdown import ABSENT, NOT_RECORDED, markdown

RECORD = "accelerators.json"
HISTORY = [
    (layers, width, size) for layers, width in (("MLP", 2048), ("MLP", 4096), ("Attention", 2048)) for size in (4, 16)
]
WORK = {
    "read": "read",
    "read, backward": "its derivative",
    "write": "write",
    "write, backward": "its derivative",
    "boundary": "boundary",
    "boundary, backward": "its derivative",
    "4 layers, forward and backward": "4 layers, both ways",
    "a stack of 4 layers, forward and backward": "a stack of 4, both ways",
}
NAMES = {
    "xla": "XLA",
    "pallas": "Pallas",
    "maxtext": "MaxText",
    "liger": "Liger",
    "transformer_engine": "TransformerEngine",
    "mhc_torch": "Triton, `mhc_torch`",
}


def shown(records: Mapping[str, Any], platform: Literal["tpu", "cuda"]) -> str:
    """Both tables of a platform, and the versions of its compilers."""
    if RECORD not in records:
        return NOT_RECORDED
    record = records[RECORD]
    targets = [name for name, target in TARGETS.items() if target.platform == platform]
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    tables = [
        markdown(["history, over the residual stack: bytes / estimated time", *targets], _history(record, targets)),
        markdown(["n = 4, C = 2048: MB / estimated µs", "least", *targets], _streams(record, targets)),
    ]
    return "\n".join([*tables, f"Compiled by {packages}; {record['date']}.\n"])


def _history(record: Any, targets: list[str]) -> Iterator[list[str]]:
    for layers, width, size in HISTORY:
        case = record["compiled for"].get(f"history, {layers} layers, C={width}", {})
        yield [f"{layers} layers, C = {width}, H = {size}", *(_over(case, f"H={size}", target) for target in targets)]
    step = record["compiled for"].get("train step, decoder, C=1024", {})
    for way, name in (("history, H=4", "H = 4"), ("4 streams", "4 streams")):
        yield [f"whole training step, C = 1024, {name}", *(_over(step, way, target) for target in targets)]


def _over(case: Mapping[str, Any], way: str, target: str) -> str:
    one, base = (case.get(name, {}).get(target, {}) for name in (way, "residual"))
    if "bytes" not in one or "bytes" not in base:
        return ABSENT
    return f"{one['bytes'] / base['bytes']:.2f} / {one['seconds'] / base['seconds']:.2f}"


def _streams(record: Any, targets: list[str]) -> Iterator[list[str]]:
    for work, name in WORK.items():
        for way, found in record["compiled for"].get(f"streams, {work}, n=4, C=2048", {}).items():
            cells = [found.get(target, {}) for target in targets]
            if not any("bytes" in one for one in cells):
                continue
            least = next(one["least"] for one in cells if one.get("least"))
            figures = [
                f"{one['bytes'] / 1e6:.0f} / {1e6 * one['seconds']:.0f}" if "bytes" in one else ABSENT for one in cells
            ]
            yield [f"{name}: {NAMES[way]}", f"{least / 1e6:.0f}", *figures]
