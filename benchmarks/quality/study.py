"""The study, part by part, as docs/quality.md has it; what is recorded is not run again."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.quality.arms import ARMS, COMPARED, CONFIRMED, DEEP, FEWER, FIRST, FURTHER, cost
from benchmarks.quality.protocol import FULL, Comparison, Protocol, Sizes
from benchmarks.quality.record import Key, Record, of, trains, tuned
from benchmarks.quality.train import train

MOST_DOUBLINGS, MOST_HALVINGS = 8, 4
CHECKED = ("arms", "confirm", *FULL.compared)
"""The parts in which an arm has one rate."""


class OutOfTime(Exception):
    """No further run is to begin."""


class Study:
    """Runs what a record lacks.

    Args:
        until: the time of `time.monotonic` after which no run begins.
    """

    def __init__(self, record: Record, protocol: Protocol, until: float) -> None:
        self.record, self.protocol, self.until = record, protocol, until

    def run(self, keys: Iterable[Key], sizes: Sizes) -> None:
        """Runs side by side, two at a time; all are recorded, or none is."""
        missing = [key for key in keys if key not in self.record.keys]
        if not missing:
            return
        if time.monotonic() > self.until:
            raise OutOfTime

        def one(key: Key) -> dict[str, Any]:
            return key._asdict() | {"threads": threads()} | train(ARMS[key.arm], sizes, key.seed, key.rate)

        with ThreadPoolExecutor(2) as pool:
            runs = list(pool.map(one, missing))
        runs = [kept(run) for run in runs]
        for run in runs:
            print(f"{run['part']}, {run['arm']}, seed {run['seed']}, rate {run['rate']:g}: {run['loss']}", flush=True)
        self.record.add(runs)

    def compare(self, names: Iterable[str], comparison: Comparison, part: str, tuning: str) -> None:
        """Tunes the rate of every arm, and trains it from all seeds."""
        for arm in self.protocol.chosen(names):
            rates = list(comparison.rates)
            while True:
                keys = [Key(tuning, arm, seed, rate) for rate in rates for seed in self.protocol.tuning_seeds]
                self.run(keys, comparison.sizes)
                best, inside = tuned(self.record.content, arm, tuning)
                if inside:
                    break
                rates.append(best / 2 if best == min(rates) else 2 * best)
            self.run([Key(part, arm, seed, best) for seed in comparison.seeds], comparison.sizes)

    def main(self, names: Iterable[str]) -> None:
        self.compare(names, self.protocol.main, "arms", "tuning")

    def further(self, part: str) -> None:
        self.compare(COMPARED[part], self.protocol.compared[part], part, f"{part} tuning")

    def depth(self, part: str) -> None:
        """The largest learning rate at which deep networks train: factors of 2, up from one that does."""
        first, deep = self.protocol.deep_rate, self.protocol.deep[part]

        def learning(arm: str, seeds: list[int], rate: float) -> list[int]:
            self.run([Key(part, arm, seed, rate) for seed in seeds], deep.sizes)
            runs = of(self.record.content, part, arm, rate)
            return [run["seed"] for run in runs if run["seed"] in seeds and trains(self.record.content, run)]

        for arm in self.protocol.chosen(DEEP):
            up = learning(arm, list(deep.seeds), first)
            down = [seed for seed in deep.seeds if seed not in up]
            for exponent in range(1, MOST_DOUBLINGS + 1):
                up = learning(arm, up, first * 2**exponent)
            for exponent in range(1, MOST_HALVINGS + 1):
                found = learning(arm, down, first / 2**exponent)
                down = [seed for seed in down if seed not in found]

    def confirm(self) -> None:
        """The main comparison again, from seeds of its own."""
        for arm in self.protocol.chosen(CONFIRMED):
            rate, _ = tuned(self.record.content, arm)
            self.run(
                [Key("confirm", arm, seed, rate) for seed in self.protocol.confirm_seeds], self.protocol.main.sizes
            )

    def costs(self) -> None:
        """Of the arms that are recorded."""
        for name in self.protocol.chosen(ARMS):
            if of(self.record.content, "arms", name) and name not in self.record.content["costs"]:
                self.record.add_cost(name, cost(ARMS[name], self.protocol.main.sizes))


PARTS: dict[str, Callable[[Study], None]] = {
    "first": lambda study: study.main(FIRST),
    "confirm": Study.confirm,
    "fewer": lambda study: study.main(FEWER),
    "depth 100": lambda study: study.depth("100 branches"),
    "further": lambda study: study.main(FURTHER),
    "depth 200": lambda study: study.depth("200 branches"),
    "depth 100, longer": lambda study: study.depth("100 branches, 400 steps"),
    "long": lambda study: study.further("long"),
    "deep": lambda study: study.further("deep"),
    "depth 200, longer": lambda study: study.depth("200 branches, 400 steps"),
    "costs": Study.costs,
}


def study(record: Record, protocol: Protocol, parts: Iterable[str], until: float) -> None:
    """Runs the parts in order, until the time is over."""
    work = Study(record, protocol, until)
    try:
        for part in parts:
            PARTS[part](work)
    except OutOfTime:
        print("out of time: the next call goes on from here")


def kept(run: dict[str, Any]) -> dict[str, Any]:
    """What the record has of a run: what the report uses, lest it grow with every branch of every deep network."""
    part = run["part"]
    if part.endswith("tuning"):
        return {name: run[name] for name in (*Key._fields, "threads", "loss")}
    dropped = set() if part == "arms" and not run["seed"] else {"patterns"}  # pictures are of seed 0
    if part not in ("arms", "confirm"):
        dropped |= {"weights", "rank", "similarity"}
    return {name: value for name, value in run.items() if name not in dropped}


def threads() -> int:
    """Of XLA's pool."""
    return int(os.environ.get("NPROC") or os.cpu_count() or 1)


def differences(record: Record, arm: str, seed: int, part: str = "arms", protocol: Protocol = FULL) -> list[str]:
    """What comes out otherwise than recorded as a run of a comparison is done again from nothing.

    Raises:
        ValueError: it is not recorded, or was with another number of threads than this process has.
    """
    recorded = next((run for run in of(record.content, part, arm) if run["seed"] == seed), None)
    if recorded is None:
        raise ValueError(f"no run of {arm!r} from seed {seed} is recorded in the part {part!r} of {record.path}")
    if recorded["threads"] != threads():
        raise ValueError(f"it was recorded with {recorded['threads']} threads: set NPROC={recorded['threads']} first")
    comparison = protocol.compared.get(part, protocol.main)
    again = train(ARMS[arm], comparison.sizes, seed, recorded["rate"])
    return [
        f"{name}: recorded {recorded[name]}, now {again[name]}"
        for name in again
        if name in recorded and again[name] != recorded[name]
    ]
