"""Compilations for a TPU and a GPU, where the environment of the lab exists: `make accelerators-test` sees to it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LAB = ROOT / ".accelerators" / "bin" / "python"

pytestmark = pytest.mark.skipif(not LAB.exists(), reason="there is no environment of the lab: make accelerators-test")


def in_lab(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    # Here Triton's interpreter runs kernels; there its compiler is asked.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [str(LAB), *arguments], cwd=ROOT, env=env, input=text, capture_output=True, text=True, timeout=500, check=False
    )


KNOWN = """
import json, sys
from benchmarks.accelerators.worker import prepare
from benchmarks.accelerators.targets import TARGETS
target = TARGETS[sys.argv[1]]
prepare(target.platform, None)
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from benchmarks.accelerators.figures import figures

device, width, depth = SingleDeviceSharding(target.device()), 2**26, 16
def moved(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=device) for shape in shapes]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(target.platform,))
    return figures(lowered.compile(), target, None)["bytes"] / (4 * width)
def scan(x):
    return jax.lax.scan(lambda x, _: (x * 2, x), x, length=depth)[1]
print(json.dumps({
    "copy": moved(lambda x: x * 2, (width,)),
    "add": moved(lambda x, y: x + y, (width,), (width,)),
    "scan": moved(scan, (width,)),
}))
"""


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_traffic_that_is_known_by_hand(target):
    result = in_lab("-c", KNOWN, target)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["copy"] == pytest.approx(2, rel=1e-3)
    assert found["add"] == pytest.approx(3, rel=1e-3)
    # Of every turn: the state read, the next written, its slot written; and once the empty slots. Not 16 times all.
    assert 16 * 3 <= found["scan"] <= 16 * 7 + 3


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_a_kernel_for_a_device_that_is_not_here(target, tmp_path):
    platform = "tpu" if target == "v5e" else "cuda"
    job = {"case": "streams, write, n=4, C=1024", "implementation": "pallas", "target": target}
    arguments = ("-m", "benchmarks.accelerators.worker", platform, str(tmp_path / "schedules"))
    result = in_lab(*arguments, text=json.dumps(job) + "\n")
    found = json.loads(result.stdout)
    assert "error" not in found, found
    # 9 numbers of bfloat16 a feature of a token; maps, paddings and copies are little beside it.
    assert found["bytes"] == pytest.approx(4096 * 9 * 1024 * 2, rel=0.3)
    (kernel,) = found["kernels"]
    assert kernel["name"] == "stream_write"
    assert kernel["bundles"] > 100 if platform == "tpu" else 16 <= kernel["registers"] <= 255


FORMS = """
import json, sys
from benchmarks.accelerators.worker import prepare
from benchmarks.accelerators.targets import TARGETS
target = TARGETS[sys.argv[1]]
prepare(target.platform, None)
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from benchmarks.accelerators.figures import figures
from mhc_jax import streams
from mhc_jax.history import MHCConfig, apply_layers

device, depth, tokens, width, n = SingleDeviceSharding(target.device()), 16, 4096, 8192, 4
def moved(function, *shapes, dtype=jnp.bfloat16):
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=device) for shape in shapes]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(target.platform,))
    return figures(lowered.compile(), target, None)["bytes"] / (2 * tokens * width)
def loss(size, *arguments):
    config = MHCConfig(max_history=size, mode="mhc" if size > 1 else "residual")
    return apply_layers(lambda p, x: jnp.tanh(p * x), *arguments, config).astype(jnp.float32).sum()
def history(size):
    gradient = jax.grad(lambda *arguments: loss(size, *arguments), (0, 1, 2))
    return moved(gradient, (depth, width), (tokens, width), (depth, size))
def write(x, y):
    ones = jnp.ones(x.shape[:-1], jnp.float32)
    return streams.write(x, y, ones * y[:, :1], ones[..., None] * y[:, None, :n].astype(jnp.float32))
residual = history(1)
print(json.dumps({
    "H=4": (history(4) - residual) / depth,
    "H=12": (history(12) - residual) / depth,
    "write": moved(write, (tokens, n, width), (tokens, width)),
}))
"""


@pytest.mark.parametrize(("target", "narrow", "wide"), [("v5e", 11, 28), ("h100", 17, 39.5)])
def test_the_forms_that_a_platform_likes(target, narrow, wide):
    result = in_lab("-c", FORMS, target)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    # States a layer, beside the residual ones. A TPU reads a window once forward and once backward, and copies nothing.
    assert found["H=4"] <= narrow
    assert found["H=12"] <= wide
    # Of one stream: n + 1 read and n written.
    assert found["write"] == pytest.approx(9, rel=0.01)


MESHES = """
import json, re, sys
from benchmarks.accelerators.worker import prepare
prepare("tpu", None)
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from mhc_jax import streams

chips = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
config, width = streams.StreamConfig(4), 512
SPLITS = {"tokens": PartitionSpec("data", "model"), "features": PartitionSpec("data", None, None, "model")}

def compiled(kind, implementation, split):
    mesh = Mesh(np.array(chips).reshape(-1, 2), ("data", "model"), axis_types=(kind,) * 2)
    def placed(array, spec):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
    shapes = jax.eval_shape(lambda: (streams.init_params(config, width), jnp.zeros((len(chips), 128, 4, width))))
    params = jax.tree.map(lambda leaf: placed(leaf, PartitionSpec()), shapes[0])
    layer = streams.wrap(jnp.tanh, config, implementation=implementation)
    def back_and_forth(params, x):  # without the gradients of parameters, which the devices have to sum up
        return jax.value_and_grad(lambda x: layer(params, x).sum(axis=(1, 2, 3)).sum())(x)[1]
    function = back_and_forth if split == "tokens" and implementation == "xla" else layer
    with use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).trace(params, placed(shapes[1], SPLITS[split])).lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
    moved = re.findall(r" ((?:all|reduce|collective)-[a-z-]+?)(?:-start)?\\(", text)
    return {"collectives": moved, "kernels": text.count("tpu_custom_call")}
forms = [(AxisType.Explicit, "xla"), (AxisType.Explicit, "pallas"), (AxisType.Auto, "xla")]
print(json.dumps({
    f"{kind.name} {implementation} {split}": compiled(kind, implementation, split)
    for kind, implementation in forms
    for split in SPLITS
}))
"""


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5p:8x8x4"])
def test_what_devices_of_a_mesh_tell_each_other(topology):
    result = in_lab("-c", MESHES, topology)
    assert result.returncode == 0, result.stderr[-2000:]
    for name, found in json.loads(result.stdout.splitlines()[-1]).items():
        # Nothing where tokens are split; where features are, one sum makes the projection and the norm.
        assert found["collectives"] == (["all-reduce"] if "features" in name else []), name
        assert bool(found["kernels"]) == ("pallas" in name), name


def test_a_target_that_does_not_exist_is_one_line():
    result = in_lab("-m", "benchmarks.accelerators", "--target", "v9")
    assert result.returncode == 2
    assert "--target must be of v5e, v5p, v6e, tpu7x, a100, h100, b200, got v9" in result.stderr


def test_a_compiler_that_is_not_installed_is_one_line():
    # The environment of the tests has no libtpu.
    command = [sys.executable, "-m", "benchmarks.accelerators", "--target", "v5e"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        pytest.skip("the tests run in the environment of the lab")
    assert result.stderr.strip() == f"libtpu is not installed in {sys.prefix}: make accelerators"
