"""What is read from one compiled program."""

import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.accelerators.bundles import schedule
from benchmarks.accelerators.hlo import KERNEL_CALLS, Crossing, Module
from benchmarks.accelerators.ptx import assemble
from benchmarks.accelerators.targets import Target


def figures(compiled: Any, target: Target, folder: Path | None) -> dict[str, Any]:
    """Bytes, seconds, memory and kernels of a compiled program.

    Args:
        compiled: a `jax.stages.Compiled`.
        folder: where the compiler wrote the schedules of kernels; None where it did not.

    Raises:
        RuntimeError: the assembler refuses a kernel.
    """
    module = Module(compiled.as_text(), on_chip=target.platform == "tpu")
    memory = compiled.memory_analysis()
    calls = [crossing for crossing in module.crossings if crossing.instruction.target in KERNEL_CALLS]
    kernels = _kernels(calls, target, folder) if folder is not None else []
    # Of a kernel, its bundles; of all else what XLA itself goes by, but with loops at their lengths.
    bound = {call.instruction.name: kernel.get("seconds", 0.0) for call, kernel in zip(calls, kernels, strict=False)}
    seconds = sum(
        c.times * max(c.bytes / target.bandwidth, c.flops / target.peak, bound.get(c.instruction.name, 0.0))
        for c in module.crossings
    )
    return {
        "bytes": module.bytes,
        "seconds": seconds,
        # Loops count once here, and kernels as they say themselves; XLA for GPU says nothing.
        "optimal_seconds": (compiled.cost_analysis() or {}).get("optimal_seconds"),
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "unknown loops": module.unknown_loops,
        "kernels": kernels,
    }


def _kernels(calls: list[Crossing], target: Target, folder: Path) -> list[dict[str, Any]]:
    """Of every call of a kernel: bundles, or registers, beside the time that its bytes take."""
    kernels = [
        {"times": call.times, "bytes": call.bytes, "seconds of bytes": call.bytes / target.bandwidth} for call in calls
    ]
    if target.platform == "tpu":
        for kernel, call in zip(kernels, calls, strict=True):
            name = call.instruction.name
            (file,) = (p for p in folder.glob(f"*-{name}-*final_bundles.txt") if "schedule-analysis" not in p.name)
            read = schedule(file.read_text())
            kernel |= asdict(read) | {"name": re.sub(r"\.\d+$", "", name), "seconds": read.total / target.clock}
        return kernels
    names = {re.search(r'\bname = "(\w+)"', call.instruction.attributes) for call in calls}
    entries = "|".join(found.group(1) for found in names if found)
    assembled = [k for k in assemble(folder, ptxas()) if re.fullmatch(rf"({entries})(_+\d+)?", k.name)]
    if len(assembled) != len(kernels):
        # Calls of equal kernels share one that was assembled.
        return [asdict(read) for read in assembled]
    return [kernel | asdict(read) for kernel, read in zip(kernels, assembled, strict=True)]


def ptxas() -> Path:
    """The assembler of the nvcc package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = find_spec("nvidia.cuda_nvcc")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("nvidia-cuda-nvcc-cu12 is not installed: make accelerators")
    return Path(next(iter(found.submodule_search_locations))) / "bin" / "ptxas"


def complaint(text: str) -> str:
    """The sentence of an error that says what is wrong, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next(
        (line for line in lines if re.search(r"exceed|Ran out|Unsupported|not implemented|must|cannot", line)), ""
    )
    return (told or (lines[0] if lines else "no message"))[:300]
