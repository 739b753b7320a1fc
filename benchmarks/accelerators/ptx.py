"""Registers, spills and shared memory of kernels for NVIDIA GPUs: what the assembler says of the PTX of a program."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_LAUNCH = re.compile(
    r"kCustomKernel\s+\[[^\]]*\]\s+(\S+)\s+grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+)"
)


@dataclass(frozen=True)
class Assembled:
    """One kernel. `spills` and `shared` are bytes, the former stored and loaded by a thread."""

    name: str
    registers: int
    spills: int
    shared: int
    programs: int
    threads: int


def assemble(folder: Path, ptxas: Path) -> list[Assembled]:
    """The kernels of what `--xla_dump_to` wrote into a folder, in the order in which they are launched.

    Raises:
        RuntimeError: the assembler refuses the PTX of a kernel.
    """
    said: dict[str, tuple[int, int, int]] = {}
    for source in sorted(folder.glob("*.ptx")):
        text = source.read_text()
        if not text:
            continue
        name = re.search(r"\.target (sm_\w+)", text)
        command = [str(ptxas), "-v", "--gpu-name", name.group(1) if name else "", str(source), "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"ptxas: {result.stderr.strip().splitlines()[-1]}")
        said.update(read(result.stderr))
    kernels = []
    for listing in folder.glob("*thunk_sequence.txt"):
        for kernel, grid, threads, dynamic in dict.fromkeys(_LAUNCH.findall(listing.read_text())):
            if kernel in said:
                registers, spills, shared = said[kernel]
                programs, size = (_product(text) for text in (grid, threads))
                kernels.append(Assembled(kernel, registers, spills, shared + int(dynamic), programs, size))
    return kernels


def read(text: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and static shared memory by entry function, from what `ptxas -v` says."""
    said = {}
    for part in text.split("Compiling entry function")[1:]:
        name = _ENTRY.search("Compiling entry function" + part)
        used, spills = _USED.search(part), _SPILLS.search(part)
        if name and used:
            spilled = sum(map(int, spills.groups())) if spills else 0
            said[name.group(1)] = int(used.group(1)), spilled, int(used.group(2) or 0)
    return said


def _product(text: str) -> int:
    product = 1
    for number in text.split(","):
        product *= int(number)
    return product
