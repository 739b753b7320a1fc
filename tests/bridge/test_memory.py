"""A pair that fills the memory is verified layer by layer: beside its weights it needs what one layer needs."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
import jax.numpy as jnp, numpy as np, torch
from flax import nnx
from torch import nn
import bridge
from bridge.proof import precision

WIDTH = 1024

class JaxLayer(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(WIDTH, WIDTH, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.fc(x))

class JaxNet(nnx.Module):
    def __init__(self, depth):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([JaxLayer(rngs) for _ in range(depth)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x

class TorchLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
        self.factor = 1.0

    def forward(self, x):
        return x + torch.tanh(self.fc(x)) * self.factor

class TorchNet(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(TorchLayer() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def peak(depth, fault=None):
    jax_model = JaxNet(depth)
    torch_model = bridge.convert(jax_model, TorchNet(depth))
    if fault is not None:
        torch_model.blocks[fault].factor = 1.001
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    report = bridge.verify(jax_model, torch_model, np.ones((2, WIDTH), "float32").astype(jnp.bfloat16), training=False)
    found = memory("VmHWM") - before, report.verdict, list(report.faults)
    return *found, report.header.get("layers not run alone"), len(report.rows)

precision.LARGEST = WIDTH * WIDTH * 8 * 2  # two layers
print(json.dumps([peak(3, 1), peak(3), peak(15)]))
"""
LAYER = 8 * 1024**2  # in float64


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
def test_memory_beside_the_weights_is_that_of_one_layer_and_does_not_grow_with_depth():
    # What is freed is given back at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    faulty, shallow, deep = json.loads(run.stdout.splitlines()[-1])
    assert faulty[1:3] == ["DIFFERENT", ["blocks.1"]]
    assert shallow[1] == deep[1] == "EQUAL"
    assert "the model: forward only, since it has more than 0.0156 GiB of weights in float64" in deep[3]
    assert deep[0] < 20 * LAYER, run.stdout
    assert deep[0] - shallow[0] < 6 * LAYER, run.stdout  # half of one copy of the twelve layers more
