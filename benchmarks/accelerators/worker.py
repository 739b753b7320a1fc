"""One process of the lab: `python -m benchmarks.accelerators.worker (tpu|cuda) [FOLDER]`.

A job is a line of standard input, {"case", "implementation", "target"}; its result is a line of standard output. With a
folder, the schedules of kernels are written to it and read. A compiler that gives up ends the process, and nobody else.
"""

import hashlib
import json
import os
import shutil
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.accelerators.figures import complaint, figures
from benchmarks.accelerators.targets import TARGETS

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "accelerators"
PACKAGES = {
    "tpu": ("jax", "jaxlib", "libtpu"),
    "cuda": ("jax", "jaxlib", "jax-cuda12-pjrt", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"),
}


def prepare(platform: str, folder: str | None) -> None:
    """Tells the compilers what to write. They read it once, before JAX is imported."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        # A program out of the cache of JAX would write no schedules.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # There is no TPU, whose metadata to ask for, and which one process alone could use.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if folder is None:
        return
    if platform == "tpu":
        options = {"dump_to": folder, "dump_llo_text": "true", "dump_llo_pass_label_regex": "final_bundles"}
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(f"--xla_jf_{name}={value}" for name, value in options.items())
    else:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder}"


def answer(job: dict[str, str], folder: Path | None) -> dict[str, Any]:
    """What the compiler makes of one program, from the cache if it was compiled before."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from benchmarks.accelerators.cases import CASES

    target, case = TARGETS[job["target"]], CASES[job["case"]]
    if job["implementation"] in case.peers:
        return case.peers[job["implementation"]](target)
    program = case.implementations[job["implementation"]](target.scale)
    place = SingleDeviceSharding(_device(target.name))
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), program.arguments
    )
    traced = jax.jit(program.function, donate_argnums=program.donate).trace(*arguments)
    lowered = traced.lower(lowering_platforms=(target.platform,))
    versions = {package: version(package) for package in PACKAGES[target.platform]}
    file = CACHE / f"{_key(lowered.as_text(), repr(target), repr(versions), repr(bool(folder)))}.json"
    if file.exists():
        return json.loads(file.read_text())
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    everything = jax.tree.leaves((program.arguments, jax.eval_shape(program.function, *program.arguments)))
    result = {"arguments and results": sum(leaf.size * leaf.dtype.itemsize for leaf in everything)}
    try:
        result |= figures(lowered.compile(), target, folder)
    except Exception as error:
        # Whatever a compiler refuses is a finding.
        result["error"] = complaint(str(error))
    CACHE.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(file)
    return result


@cache
def _device(name: str) -> Any:
    return TARGETS[name].device()


def _key(*parts: str) -> str:
    """Of a program, what it is compiled for, and the code that reads the result."""
    sources = [(HERE / name).read_text() for name in ("bundles.py", "figures.py", "hlo.py", "ptx.py")]
    return hashlib.sha256("\0".join([*parts, *sources]).encode()).hexdigest()[:32]


def main() -> None:
    platform, *rest = sys.argv[1:]
    folder = Path(rest[0]) if rest else None
    prepare(platform, str(folder) if folder else None)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result = answer(job, folder)
        except Exception as error:
            result = {"error": complaint(f"{type(error).__name__}: {error}")}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
