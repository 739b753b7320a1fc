"""Kernels written in Triton: compiled by it and by its assembler, without a GPU and without torch."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.accelerators.ptx import Assembled, read
from benchmarks.accelerators.targets import Target

SIZES = {"bf16": 2, "fp32": 4}
# By source, which is a project or one of several files of ours, the package and the file that holds the kernels.
FILES = {
    "liger": ("liger_kernel", "ops/mhc.py"),
    "transformer_engine": ("transformer_engine", "common/triton/mhc.py"),
    "boundary": ("mhc_torch", "kernels/triton_boundary.py"),
    "maps": ("mhc_torch", "kernels/triton_maps.py"),
}
Array = tuple[str, tuple[int, ...]]
"""The dtype and the shape of an argument."""


@dataclass(frozen=True)
class Launch:
    """One kernel and what it is called with.

    Attributes:
        arrays: its pointers, each of an array that is read or written once; None where the kernel can do without.
        constants: its other arguments, without strides and blocks.
        strides: those of its arguments whose names say so, in their order.
        programs: how many there are, of the sizes of blocks.
        blocks: those sizes; None where Triton's tuner chooses, of whose choices the first is taken.
        source: the name in `FILES` of the file that holds it, where that is not the project's.
    """

    kernel: str
    arrays: Mapping[str, Array | None]
    constants: Mapping[str, Any]
    strides: Sequence[int]
    programs: Callable[[Mapping[str, Any]], int]
    blocks: Mapping[str, Any] | None = None
    warps: int = 4
    stages: int = 3
    source: str = ""

    @property
    def bytes(self) -> int:
        """Each array once: what a Triton kernel moves stands in no HLO."""
        return sum(SIZES[array[0]] * prod(array[1]) for array in self.arrays.values() if array)


def figures(project: str, launches: Sequence[Launch], target: Target) -> dict[str, Any]:
    """What all of these move, and of each its registers, spills and shared memory.

    Raises:
        ModuleNotFoundError: the package of the project is not installed.
    """
    moved = sum(launch.bytes for launch in launches)
    return {
        "bytes": moved,
        "seconds": moved / target.bandwidth,
        "optimal_seconds": None,
        "memory": moved,
        "unknown loops": [],
        "kernels": [asdict(_compiled(module(launch.source or project), launch, target)) for launch in launches],
    }


@cache
def module(source: str) -> ModuleType:
    """The file with the kernels of a source.

    Its kernels need no torch, but the file may have PyTorch functions, too, which are not called here.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    name, path = FILES[source]
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed: make accelerators")
    torch = SimpleNamespace(Tensor=object, Size=tuple, dtype=object, autograd=SimpleNamespace(Function=object))
    utils = SimpleNamespace(ensure_contiguous=lambda function: function)
    spec = spec_from_file_location(f"{source}_kernels", Path(next(iter(found.submodule_search_locations))) / path)
    assert spec is not None
    assert spec.loader is not None
    loaded = module_from_spec(spec)
    absent = {"torch": torch, "liger_kernel": utils, "liger_kernel.ops": utils, "liger_kernel.ops.utils": utils}
    # First, or it would be forgotten with what stands in for torch, and it cannot be imported twice.
    import_module("triton.language")
    with patch.dict(sys.modules, absent):
        spec.loader.exec_module(loaded)
    return loaded


def _compiled(source: ModuleType, launch: Launch, target: Target) -> Assembled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    kernel = getattr(source, launch.kernel)
    blocks, warps, stages = launch.blocks, launch.warps, launch.stages
    if blocks is None:
        choices = kernel.configs
        if kernel.early_config_prune:
            choices = kernel.early_config_prune(choices, launch.constants)
        blocks, warps, stages = choices[0].kwargs, choices[0].num_warps, choices[0].num_stages
        kernel = kernel.fn
    names = kernel.arg_names
    strides = dict(zip([name for name in names if name.startswith("stride_")], launch.strides, strict=True))
    constants = {**launch.constants, **strides, **blocks}
    constants |= {name: None for name, array in launch.arrays.items() if array is None}
    pointers = {name: f"*{array[0]}" for name, array in launch.arrays.items() if array}
    compiled = triton.compile(
        ASTSource(
            kernel,
            {name: pointers.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            # JAX and torch both allocate at multiples of 16 bytes.
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
        ),
        target=GPUTarget("cuda", target.capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    text = compiled.asm["ptx"]
    architecture = next(line.split()[1] for line in text.splitlines() if line.startswith(".target"))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [get_ptxas(target.capability).path, "-v", "--gpu-name", architecture, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    ((name, (registers, spills, shared)),) = read(said).items()
    shared += compiled.metadata.shared
    return Assembled(name.lstrip("_"), registers, spills, shared, launch.programs(blocks), 32 * warps)
