"""What whole training steps of large models take of a TPU, as the plan of the training program says.

    python -m benchmarks.plans [NAME ...]

in the environment of the lab (`make accelerators`). Every plan is recorded when it is there, beside those that are: it
takes minutes. The peaks of history and of streams are set against the residual decoder's, all else being equal.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.markdown import ABSENT, NOT_RECORDED, markdown
from benchmarks.record import RESULTS
from benchmarks.timing import write_json
from mhc_jax.models import DecoderConfig
from mhc_jax.models.decoder import REMAT_NAMES
from mhc_jax.training.config import DataConfig, ModelConfig, TrainingConfig
from mhc_jax.training.plan import plan

RESULT = RESULTS / "plan.json"
LENGTH = 4096
# Llama 2 7B (arXiv 2307.09288), and a dense decoder of as many parameters as the largest of arXiv 2512.24880.
SIZES = {
    "7 B": DecoderConfig(32_000, features=4096, mlp_features=11_008, depth=32, num_heads=32),
    "27 B": DecoderConfig(32_000, features=5120, mlp_features=14_848, depth=80, num_heads=40),
}
CONNECTIONS: dict[str, dict[str, Any]] = {
    "residual": {"connection": "residual"},
    "history, H = 4": {"connection": "history"},
    "streams, n = 4": {"connection": "streams", "implementation": "pallas"},
}
# Target, devices, and rows of 4096 tokens on each of them.
PLACES = {"7 B": ("v5p:2x2x4", 16, 4), "27 B": ("v5p:8x8x4", 256, 4)}
# Of each layer, as much as there is room for.
KEPT = {"7 B": REMAT_NAMES, "27 B": ("attention", "attention_out", "mlp_out")}
# Of how many layers the streams are kept once: what took the least of 1, 4 and, of 27 B, 8.
BLOCKS = {"7 B": 1, "27 B": 4}


def config(size: str, connection: str) -> TrainingConfig:
    _, devices, rows = PLACES[size]
    options = CONNECTIONS[connection]
    if options["connection"] == "streams":
        options = {**options, "block_length": BLOCKS[size]}
    model = ModelConfig(SIZES[size], dtype="bfloat16", remat=KEPT[size], **options)
    return TrainingConfig(model=model, data=DataConfig(length=LENGTH, batch=rows * devices))


NAMES = {f"{size}, {connection}": (size, connection) for size in SIZES for connection in CONNECTIONS}


def table(records: Mapping[str, Any]) -> str:
    """Every plan: what fills the memory of a device in GiB, and its peak over the residual decoder's."""
    if RESULT.name not in records:
        return NOT_RECORDED
    record = records[RESULT.name]
    parts = ("parameters", "optimizer", "kept for backward", "the rest")
    lines = []
    for name, (size, _) in NAMES.items():
        if name not in record["plans"]:
            continue
        found = record["plans"][name]
        cells = [f"{found['memory'][part] / 2**30:.2f}" for part in parts] if not found["complaint"] else [ABSENT] * 4
        base = record["plans"].get(f"{size}, residual", {}).get("memory")
        peak = sum(found["memory"].values())
        over = f"{peak / sum(base.values()):.2f}" if base and peak else ABSENT
        lines.append([name, PLACES[size][0], *cells, f"{peak / 2**30:.2f}" if peak else found["complaint"], over])
    text = markdown(["GiB a device", "target", *parts, "peak", "over residual"], lines)
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"{text}\nCompiled by {packages}; {record['date']}.\n"


def recorded(names: list[str]) -> Iterator[tuple[str, Any]]:
    """Makes the plans one after the other."""
    for name in names:
        size, connection = NAMES[name]
        made = plan(config(size, connection), PLACES[size][0])
        print(f"{name}\n{made}", flush=True)
        yield name, made


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plans", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {'; '.join(NAMES)}. Default: all")
    parser.add_argument("--output", type=Path, default=RESULT, help="file; default: %(default)s")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in NAMES]:
        parser.error(f"NAME must be of {'; '.join(NAMES)}, got {'; '.join(unknown)}")
    versions = {package: version(package) for package in ("jax", "libtpu")}
    for name, made in recorded(given.names or list(NAMES)):
        record = json.loads(given.output.read_text()) if given.output.exists() else {}
        plans = record.get("plans", {}) if record.get("versions") == versions else {}
        date = time.strftime("%Y-%m-%d", time.gmtime())
        write_json(given.output, {"versions": versions, "date": date, "plans": {**plans, name: asdict(made)}})


if __name__ == "__main__":
    main()
