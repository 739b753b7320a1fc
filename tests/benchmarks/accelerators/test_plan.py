"""Plans of whole training steps for TPUs, where the environment of the lab exists."""

import json

from tests.benchmarks.accelerators.test_compile import in_lab
from tests.benchmarks.accelerators.test_compile import pytestmark as pytestmark

PLAN = """
import json
from dataclasses import asdict
from mhc_jax.models import DecoderConfig
from mhc_jax.training.config import DataConfig, ModelConfig, TrainingConfig
from mhc_jax.training.plan import plan

model = ModelConfig(
    DecoderConfig(512, features=256, mlp_features=512, depth=4, num_heads=4, head_dim=64),
    connection="streams",
    dtype="bfloat16",
    remat=("attention", "attention_out", "mlp_out"),
    block_length=2,
    implementation="pallas",
)
config = TrainingConfig(model=model, data=DataConfig(length=512, batch=4), tensor=2, sequence=2)
print(json.dumps(asdict(plan(config, "v5p:2x2x1"))))
"""


def test_kernels_compile_on_a_mesh_of_all_axes_and_the_memory_is_parted():
    result = in_lab("-c", PLAN)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["complaint"] == ""
    assert list(found["memory"]) == ["parameters", "optimizer", "kept for backward", "the rest"]
    assert all(size > 0 for size in found["memory"].values())
    # Of four devices, each has its part of kernels: 4 * 256 * 256 and 3 * 256 * 512 in a layer, and two of 512 * 256.
    kernels = 4 * (4 * (4 * 256 * 256 + 3 * 256 * 512) + 2 * 512 * 256) / 4
    assert kernels < found["memory"]["parameters"] < 1.2 * kernels
    # Streams twice in four layers, and of each layer three states, of 4 * 512 tokens of 256 bfloat16.
    assert found["memory"]["kept for backward"] > (2 * 4 + 4 * 3) * 4 * 512 * 256 * 2 / 4
    assert found["seconds"] > 0
    assert "all-gather" in found["collectives"]
