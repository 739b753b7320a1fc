"""Timings that can be compared: candidates take turns within every round, so that a slow spell hits all of them."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile of one quantity over the rounds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        return cls(*(float(np.percentile(values, q)) for q in (50, 10, 90)))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.p10:.3f}, {self.p90:.3f}]"


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 5.0, warmup: int = 3
) -> dict[str, np.ndarray]:
    """Seconds per call of every candidate, one value per round, in rounds that go on for about ``seconds`` in all.

    A candidate is called without arguments; JAX arrays that it returns are waited for. Its turn is two calls, of which
    the second is timed: as in training, where a step follows a step of the same kind, its data are in the caches as far
    as they fit. Every other round runs in reverse order. There are at least 10 rounds.
    """
    for call in candidates.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[order[0]]) < 10:
        for name in order:
            jax.block_until_ready(candidates[name]())
            start = time.perf_counter()
            jax.block_until_ready(candidates[name]())
            samples[name].append(time.perf_counter() - start)
        order.reverse()
    return {name: np.array(values) for name, values in samples.items()}


def ratio(samples: Mapping[str, np.ndarray], name: str, base: str) -> Spread:
    """How many times the time of ``base`` the candidate takes, compared round by round."""
    return Spread.of(samples[name] / samples[base])


def environment(*packages: str) -> dict[str, Any]:
    """The machine, and the versions of Python, JAX and the ``packages`` named (None where not installed)."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in ("jax", *packages)},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes a record with ``Spread`` values in it, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(record, indent=2, default=asdict) + "\n")
    os.replace(temporary, path)
