"""Bytes that cross the memory of a device, and operations, counted in the optimized HLO of a compiled program.

An instruction reads its operands and writes its results; what happens inside of a fusion stays on the chip. Of a slice
only the slice is read, of an update in place only the update is written. The body of a loop counts as often as it runs.
An array counts as it lies in memory, padded to whole tiles; one that a TPU keeps on the chip does not count.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_BITS = re.compile(r"\d+")

# These name, rename or wait for what another instruction has moved.
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding"}
# Seen through on the way from an array to the slice of it that is read: they are computed for that slice alone.
_ELEMENTWISE = {"bitcast", "convert", "copy", "negate", "reshape", "transpose"}
_SLICES = {"dynamic-slice", "gather", "slice"}
KERNEL_CALLS = {"tpu_custom_call", "__gpu$xla.gpu.triton"}


@dataclass(frozen=True)
class Array:
    """One array of a result: how it lies in memory, and in which."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def itemsize(self) -> float:
        """Bytes of an element; 0 for a token."""
        if self.dtype == "pred":
            return 1
        bits = _BITS.search(self.dtype)
        return int(bits.group()) / 8 if bits else 0

    def bytes(self, *, padded: bool = True) -> int:
        dims = list(self.dims)
        if padded:
            for axis, size in zip(self.minor_to_major, reversed(self.tile), strict=False):
                dims[axis] = size * ceil(dims[axis] / size)
        return ceil(prod(dims) * self.itemsize)


def arrays(text: str) -> list[Array]:
    """All arrays of a type, those of nested tuples in one list."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        order, _, rest = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        space = re.search(r"(?<![A-Z])S\((\d+)\)", rest)
        shape = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(
            Array(
                dtype,
                shape,
                tuple(int(axis) for axis in order.split(",") if axis) or tuple(reversed(range(len(shape)))),
                tuple(int(size) for size in tile.group(1).split(",")) if tile else (),
                int(space.group(1)) if space else 0,
            )
        )
    return found


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @cached_property
    def results(self) -> list[Array]:
        return arrays(self.type)

    def called(self, *names: str) -> str | None:
        """The computation that one of these attributes names."""
        for name in names:
            if found := re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes):
                return found.group(1)
        return None

    @property
    def target(self) -> str:
        """Of a custom call, what it calls; else nothing."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


class Computation:
    def __init__(self, instructions: list[Instruction]) -> None:
        self.instructions = instructions
        self.by_name = {instruction.name: instruction for instruction in instructions}
        self.root = next((i for i in instructions if i.root), instructions[-1])
        self.users: dict[str, list[Instruction]] = {}
        for instruction in instructions:
            for operand in dict.fromkeys(instruction.operands):
                self.users.setdefault(operand, []).append(instruction)

    def parameter(self, index: int) -> Instruction:
        return next(i for i in self.instructions if i.opcode == "parameter" and i.literal == str(index))


@dataclass(frozen=True)
class Crossing:
    """What one instruction moves in one run of it, and how often it runs."""

    instruction: Instruction
    times: int
    bytes: int
    flops: int


class Module:
    """An optimized program, from the text that `compiled.as_text()` gives.

    Args:
        text: the HLO.
        on_chip: whether memory spaces other than 0 are on the chip, as those of a TPU are.

    Raises:
        ValueError: the text is no HLO of a whole program.

    Example:
        >>> text = '''HloModule m
        ... ENTRY %main (x: f32[8,128]) -> f32[8,128] {
        ...   %x = f32[8,128]{1,0} parameter(0)
        ...   ROOT %copy = f32[8,128]{1,0} copy(%x)
        ... }
        ... '''
        >>> Module(text, on_chip=False).bytes
        8192
    """

    def __init__(self, text: str, *, on_chip: bool) -> None:
        self.on_chip = on_chip
        self.unknown_loops: list[str] = []
        self.computations, entry = _parse(text)
        if entry is None:
            raise ValueError(f"text must be HLO with an ENTRY computation, got {text[:60]!r}")
        self.crossings = list(self._walk(self.computations[entry], 1))

    @property
    def bytes(self) -> int:
        return sum(crossing.times * crossing.bytes for crossing in self.crossings)

    def _walk(self, computation: Computation, times: int) -> Iterator[Crossing]:
        for instruction in computation.instructions:
            opcode = instruction.opcode
            if opcode == "while":
                trips = self._trips(instruction)
                for name in ("body", "condition"):
                    yield from self._walk(self.computations[instruction.called(name) or ""], times * trips)
            elif opcode == "conditional":
                # Which branch will run is not known: the one that moves most.
                branches = [list(self._walk(branch, times)) for branch in self._branches(instruction)]
                yield from max(branches, key=lambda b: sum(c.times * c.bytes for c in b))
            elif opcode == "call":
                yield from self._walk(self.computations[instruction.called("to_apply", "calls") or ""], times)
            elif self._moves(instruction):
                flops = self._flops(computation, instruction)
                yield Crossing(instruction, times, self._crossed(computation, instruction), flops)

    def _flops(self, computation: Computation, instruction: Instruction) -> int:
        """Of matrix products and convolutions; everything else is bound by memory."""
        inside = self.computations.get(instruction.called("calls") or "")
        if inside is not None:
            return sum(self._flops(inside, nested) for nested in inside.instructions)
        if instruction.opcode not in ("convolution", "dot"):
            return 0
        left, right = (computation.by_name[name].results[0].dims for name in instruction.operands[:2])
        if instruction.opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            summed = prod(left[int(axis)] for axis in axes.group(1).split(",") if axis) if axes else 1
        else:
            summed = _summed(instruction, right)
        return 2 * prod(instruction.results[0].dims) * summed

    def _branches(self, instruction: Instruction) -> list[Computation]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        if listed:
            names = [name.strip().lstrip("%") for name in listed.group(1).split(",")]
        else:
            names = [instruction.called(f"{which}_computation") or "" for which in ("true", "false")]
        return [self.computations[name] for name in names]

    def _trips(self, instruction: Instruction) -> int:
        known = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', instruction.attributes)
        if known:
            return int(known.group(1))
        # JAX counts from 0, and compares with the one integer of the condition.
        condition = self.computations[instruction.called("condition") or ""]
        found = {
            i.literal
            for i in condition.instructions
            if i.opcode == "constant" and i.type.startswith(("s32[]", "u32[]", "s64[]"))
        }
        if len(found) == 1:
            return int(found.pop())
        self.unknown_loops.append(instruction.name)
        return 1

    def _moves(self, instruction: Instruction) -> bool:
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            return False
        return instruction.target not in _FREE_CALLS

    def _in_memory(self, array: Array) -> int:
        return 0 if self.on_chip and array.space else array.bytes()

    def _crossed(self, computation: Computation, instruction: Instruction) -> int:
        opcode = instruction.opcode
        operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        inside = self.computations.get(instruction.called("calls") or "")
        if opcode == "copy-start":
            # The result is the copy, the original, and a context.
            return sum(self._in_memory(array) for array in instruction.results[:2])
        if opcode == "call-start":
            # What the call reads stands among its results, too.
            return sum(self._in_memory(array) for array in instruction.results)
        if opcode in ("slice-start", "dynamic-slice-start"):
            # The result is the operands, the slice, and a context.
            moved = instruction.results[len(operands)]
            source = operands[0].results[0]
            return self._in_memory(moved) + (moved.bytes() if self._in_memory(source) else 0)
        if opcode == "async-start" and inside is not None:
            return self._crossed(inside, inside.root)
        if opcode == "fusion" and inside is not None:
            read = 0
            for index, operand in enumerate(operands):
                parameter = inside.parameter(index)
                if any(self._in_memory(array) for array in operand.results):
                    read += self._read(inside, parameter)
            return read + self._written(inside, inside.root, instruction.results)
        if opcode in _SLICES:
            moved = instruction.results[0]
            return self._in_memory(moved) + (moved.bytes() if self._in_memory(operands[0].results[0]) else 0)
        if opcode == "dynamic-update-slice":
            update = operands[1].results[0]
            written = update.bytes() if self._in_memory(instruction.results[0]) else 0
            return self._in_memory(update) + written
        if opcode == "scatter":
            rest = [array for operand in operands[1:] for array in operand.results]
            return 2 * self._in_memory(rest[-1]) + sum(self._in_memory(array) for array in rest[:-1])
        # The results of an operand that is a tuple (only its names are passed on) are those of its elements.
        read = sum(self._in_memory(array) for operand in operands for array in operand.results)
        return read + sum(self._in_memory(array) for array in instruction.results)

    def _read(self, inside: Computation, value: Instruction) -> int:
        """Bytes of a parameter that a fusion reads: all of it, unless all that looks at it looks at slices."""
        whole = sum(array.bytes() for array in value.results)
        return min(whole, self._slices(inside, value, value.results[0].itemsize, whole))

    def _slices(self, inside: Computation, value: Instruction, itemsize: float, whole: int) -> int:
        read = 0
        for user in inside.users.get(value.name, []):
            if user.opcode in _SLICES and user.operands[0] == value.name:
                read += ceil(prod(user.results[0].dims) * itemsize)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                if value.name in user.operands[1:]:
                    return whole
            elif (user.opcode in _ELEMENTWISE or _alias(user)) and not user.root:
                read += self._slices(inside, user, itemsize, whole)
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls") or ""]
                for index, operand in enumerate(user.operands):
                    if operand == value.name:
                        read += self._slices(nested, nested.parameter(index), itemsize, whole)
            elif user.opcode == "bitcast":
                read += self._slices(inside, user, itemsize, whole)
            else:
                return whole
        if value.root and value.opcode == "parameter":
            return whole
        return read

    def _written(self, inside: Computation, value: Instruction, results: list[Array]) -> int:
        """Bytes that a fusion writes for a value that it returns."""
        if value.opcode == "tuple":
            # A part that is itself many arrays, as a sum of many at once is, takes as many of the results.
            written, rest = 0, results
            for part in (inside.by_name[name] for name in value.operands):
                count = len(part.results)
                written, rest = written + self._written(inside, part, rest[:count]), rest[count:]
            return written
        if not any(self._in_memory(result) for result in results):
            return 0
        if value.opcode == "fusion" and not _alias(value):
            nested = self.computations[value.called("calls") or ""]
            return self._written(nested, nested.root, results)
        while _alias(value) and value.operands[0] in inside.by_name:
            value = inside.by_name[value.operands[0]]
        if value.opcode == "dynamic-update-slice" and self._is_parameter(inside, value.operands[0]):
            return inside.by_name[value.operands[1]].results[0].bytes()
        return sum(self._in_memory(result) for result in results)

    def _is_parameter(self, inside: Computation, name: str) -> bool:
        value = inside.by_name[name]
        while _alias(value) or value.opcode == "dynamic-update-slice":
            value = inside.by_name[value.operands[0]]
        return value.opcode == "parameter"


def _alias(instruction: Instruction) -> bool:
    """Whether it is its first operand under another name: a bitcast, or what a TPU7x writes for a change of tiles."""
    in_place = "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes
    return instruction.opcode == "bitcast" or (instruction.opcode == "fusion" and in_place)


def _summed(instruction: Instruction, kernel: tuple[int, ...]) -> int:
    """How many products a convolution sums for one element of its result."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    dilated = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
    # A TPU writes a batch of matrix products as a convolution over a dilated axis: one position of it counts.
    dilations = [int(d) for d in dilated.group(1).split("x")] if dilated else []
    summed = 1
    for label, size in zip(labels.group(1) if labels else "", kernel, strict=False):
        if label == "i" or (label.isdigit() and (not dilations or dilations[int(label)] == 1)):
            summed *= size
    return summed


def _parse(text: str) -> tuple[dict[str, Computation], str | None]:
    computations: dict[str, Computation] = {}
    entry: str | None = None
    name: str | None = None
    lines: list[Instruction] = []
    for line in text.splitlines():
        if name is None:
            if header := _HEADER.match(line):
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif line.startswith("}"):
            computations[name], name = Computation(lines), None
        elif found := _INSTRUCTION.match(line):
            lines.append(_instruction(line, found))
    return computations, entry


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inner = rest[len(opcode) + 1 : close]
    return Instruction(
        name=found.group(2),
        opcode=opcode,
        type=type_,
        operands=tuple(re.findall(r"%([\w.\-]+)", inner)) if opcode not in ("constant", "parameter") else (),
        literal=inner if opcode in ("constant", "parameter") else "",
        attributes=rest[close + 1 :],
        root=bool(found.group(1)),
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    raise ValueError(f"no closing parenthesis in {text[start : start + 60]!r}")
