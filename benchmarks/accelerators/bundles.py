"""Instruction bundles of a kernel for TPU: the schedule that the compiler writes, and how often each part of it runs.

A TensorCore starts one bundle a cycle. The kernel's grid is a loop; so is every `fori_loop` that is left in it.
"""

import re
from dataclasses import dataclass

_LINE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:(LB|LH|LE|PB|PF|CT)\s*)?:\s*(>(?: ?>)*)?\s*\{")
_EXIT = re.compile(r"totalorder %(\w+), (\d+) /\* loop exit test \*/")
_STEP = re.compile(r"%(\w+) = sadd\.s32 (\d+), %")
_SPILL = re.compile(r"\bvst\b[^;]*_spill")


@dataclass(frozen=True)
class Schedule:
    """What the schedule of one kernel says.

    Attributes:
        turns: turns of the grid's loop, two of which fill and empty the pipeline.
        bundles: bundles of one turn, with the loops inside at their lengths.
        total: bundles of the whole kernel.
        spills: vectors that one turn puts aside because the registers are full.
        unknown: loops whose length is no constant; they count as one turn, so that `bundles` and `total` are at least.
    """

    turns: int
    bundles: int
    total: int
    spills: int
    unknown: int


@dataclass(frozen=True)
class _Bundle:
    depth: int
    opens: bool
    spill: bool
    trips: int | None


def schedule(text: str) -> Schedule:
    """Reads a `*-final_bundles.txt` of `--xla_jf_dump_llo_text`.

    Raises:
        ValueError: there are no bundles in it.
    """
    steps = {name: int(by) for name, by in _STEP.findall(text)}
    lines = [_bundle(line, found, steps) for line in text.splitlines() if (found := _LINE.match(line))]
    if not lines:
        raise ValueError(f"text must be a schedule of final bundles, got {text[:60]!r}")
    whole = _Loop(lines, 0, len(lines))
    grid = max(whole.inner, key=lambda loop: loop.total, default=whole)
    return Schedule(grid.trips or 1, grid.turn, whole.turn, grid.spills, whole.unknown - 1)


def _bundle(line: str, found: re.Match[str], steps: dict[str, int]) -> _Bundle:
    test = _EXIT.search(line)
    # A loop that the kernel unrolls counts by more than one.
    trips = -(-int(test.group(2)) // steps.get(test.group(1), 1)) if test else None
    depth = (found.group(3) or "").count(">")
    return _Bundle(depth, found.group(2) == "LB", bool(_SPILL.search(line)), trips)


class _Loop:
    """The bundles from `start` to `end`, those of the loops among them apart.

    The compiler moves bundles across the borders of a loop, so that depths go up and down: a loop goes from its header
    to the last bundle of its depth before the next header that is no deeper.
    """

    def __init__(self, lines: list[_Bundle], start: int, end: int, header: _Bundle | None = None) -> None:
        self.inner: list[_Loop] = []
        self.trips: int | None = None
        self.turn: int = 0
        self.spills: int = 0
        at = start
        while at < end:
            line = lines[at]
            if line.opens and line is not header:
                stop = next((i for i in range(at + 1, end) if lines[i].opens and lines[i].depth <= line.depth), end)
                stop = max(i for i in range(at, stop) if lines[i].depth >= line.depth) + 1
                self.inner.append(_Loop(lines, at, stop, line))
                at = stop
                continue
            self.turn += 1
            self.spills += line.spill
            self.trips = line.trips if line.trips is not None else self.trips
            at += 1
        self.turn += sum(loop.total for loop in self.inner)
        self.spills += sum(loop.spills * (loop.trips or 1) for loop in self.inner)
        self.unknown: int = (self.trips is None) + sum(loop.unknown for loop in self.inner)

    @property
    def total(self) -> int:
        return self.turn * (self.trips or 1)
