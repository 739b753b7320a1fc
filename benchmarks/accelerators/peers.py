"""Kernels of other projects, compiled as their packages have them, for the same shapes as ours.

A peer is a function of a target: its figures, or an error that says why there are none.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from math import ceil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

from benchmarks.accelerators.ptx import Assembled, read
from benchmarks.accelerators.targets import Target


@dataclass(frozen=True)
class Peer:
    """What a peer's kernel is written for, and what compiles it."""

    platform: Literal["tpu", "cuda"]
    figures: Callable[[Target], dict[str, Any]]


def package(name: str) -> Path:
    """The folder of an installed package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed: make accelerators")
    return Path(next(iter(found.submodule_search_locations)))


def liger_write(tokens: int, n: int, width: int, target: Target) -> dict[str, Any]:
    """The merge of Liger (`liger_kernel.ops.mhc`), with the blocks that it picks, from bfloat16 to its float32."""
    liger = _liger()
    tokens_of_block, features, warps, stages = liger._post_res_default_meta(width)
    strides = {"xn": n * width, "xh": width, "xc": 1, "fn": width, "fc": 1, "hpn": n, "hph": 1}
    strides |= {"hrn": n * n, "hri": n, "hrj": 1, "on": n * width, "oh": width, "oc": 1}
    constants = {"N": tokens, "HC": n, "C": width, "BLOCK_N": tokens_of_block, "BLOCK_C": features}
    constants |= {f"stride_{name}": size for name, size in strides.items()}
    pointers = {"x_ptr": "*bf16", "f_ptr": "*bf16", "hpost_ptr": "*fp32", "hres_ptr": "*fp32", "out_ptr": "*fp32"}
    kernel = _triton(liger._mhc_post_res_fwd_kernel, pointers, constants, warps, stages, target)
    programs = ceil(tokens / tokens_of_block) * ceil(width / features)
    moved = tokens * (2 * (n + 1) * width + 4 * (n + n * n) + 4 * n * width)
    return _figures(moved, kernel, programs, 32 * warps, target)


def _figures(
    moved: int, kernel: tuple[str, int, int, int], programs: int, threads: int, target: Target
) -> dict[str, Any]:
    """Each argument read and each result written once: what a Triton kernel moves stands in no HLO."""
    name, registers, spills, shared = kernel
    return {
        "bytes": moved,
        "seconds": moved / target.bandwidth,
        "optimal_seconds": None,
        "memory": moved,
        "unknown loops": [],
        "kernels": [asdict(Assembled(name, registers, spills, shared, programs, threads))],
    }


def _liger() -> ModuleType:
    # Its kernels need no torch, but the file that holds them has PyTorch functions, too, which are not called here.
    torch = SimpleNamespace(Tensor=object, Size=tuple, dtype=object, autograd=SimpleNamespace(Function=object))
    utils = SimpleNamespace(ensure_contiguous=lambda function: function)
    file = package("liger_kernel") / "ops" / "mhc.py"
    spec = spec_from_file_location("liger_mhc", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    absent = {"torch": torch, "liger_kernel": utils, "liger_kernel.ops": utils, "liger_kernel.ops.utils": utils}
    # First, or it would be forgotten with what stands in for torch, and it cannot be imported twice.
    import_module("triton.language")
    with patch.dict(sys.modules, absent):
        spec.loader.exec_module(module)
    return module


def _triton(
    kernel: Any, pointers: dict[str, str], constants: dict[str, int], warps: int, stages: int, target: Target
) -> tuple[str, int, int, int]:
    """Name, registers, spilled bytes and shared memory of a kernel, compiled by Triton and its own assembler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # JAX and torch both allocate at multiples of 16 bytes.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target.capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    text = compiled.asm["ptx"]
    architecture = next(line.split()[1] for line in text.splitlines() if line.startswith(".target"))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [get_ptxas(target.capability).path, "-v", "--gpu-name", architecture, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    ((name, (registers, spills, shared)),) = read(said).items()
    return name.lstrip("_"), registers, spills, shared + compiled.metadata.shared


def maxtext(target: Target) -> dict[str, Any]:
    """MaxText's kernels, from its package."""
    if find_spec("maxtext") is None:
        here = ".".join(map(str, sys.version_info[:2]))
        raise ModuleNotFoundError(f"maxtext has no release for Python {here}")
    raise NotImplementedError("maxtext is installed, but the lab does not know its kernels yet")
