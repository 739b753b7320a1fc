"""The record of the study: a flat list of runs, and the cost of every arm; what follows from them is derived."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.quality.protocol import TEXT_HASH, bits_of_frequencies
from benchmarks.timing import environment, write_json


class Key(NamedTuple):
    """What a run is found by.

    Parts: "arms" and its "tuning", "confirm"; those of `Protocol.compared` as "long", and its "long tuning"; those of
    `Protocol.deep`.
    """

    part: str
    arm: str
    seed: int
    rate: float


def key(run: Mapping[str, Any]) -> Key:
    return Key(*(run[name] for name in Key._fields))


class Record:
    """What was run so far; `add` writes the file, whole or not at all.

    Raises:
        ValueError: what is in the file was trained on another text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "environment": environment("flax", "optax"),
            "text": TEXT_HASH,
            "bits of byte frequencies": bits_of_frequencies(),
            "costs": {},
            "runs": [],
        }
        if path.exists():
            self.content = json.loads(path.read_text())
        if self.content.get("text") != TEXT_HASH:
            raise ValueError(f"{path} is of another text than this Python ships; give another --output")
        self.keys = {key(run) for run in self.content["runs"]}

    def add(self, runs: Iterable[dict[str, Any]]) -> None:
        self.content["runs"] += runs
        self.keys = {key(run) for run in self.content["runs"]}
        write_json(self.path, self.content)

    def add_cost(self, arm: str, cost: dict[str, float]) -> None:
        self.content["costs"][arm] = cost
        write_json(self.path, self.content)


def of(content: Mapping[str, Any], part: str, arm: str, rate: float | None = None) -> list[Any]:
    """The runs of an arm in one part, by seed."""
    runs = [run for run in content["runs"] if run["part"] == part and run["arm"] == arm]
    return sorted((run for run in runs if rate in (None, run["rate"])), key=lambda run: run["seed"])


def tuned(content: Mapping[str, Any], arm: str, part: str = "tuning") -> tuple[float, bool]:
    """The learning rate with the least mean loss over the tuning seeds, and whether that is sure to be the best.

    It is not where the best rate is the least or the largest that was tried. A run that diverged counts as infinite.
    """
    rates = sorted({run["rate"] for run in of(content, part, arm)})
    means = [np.mean([losses(of(content, part, arm, rate))]) for rate in rates]
    best = int(np.argmin(means))
    return rates[best], len(rates) == 1 or 0 < best < len(rates) - 1


def losses(runs: Iterable[Mapping[str, Any]]) -> np.ndarray:
    return np.array([np.inf if run["loss"] is None else run["loss"] for run in runs])


def trains(content: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether a run learned anything of the context of a byte."""
    return run["loss"] is not None and run["loss"] < content["bits of byte frequencies"]
