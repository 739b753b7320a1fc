"""Kernels in Triton and of other projects, compiled from their packages, where the environment of the lab exists."""

import json

import pytest

from benchmarks.accelerators.peers import PEERS, peers
from tests.benchmarks.accelerators.test_compile import in_lab, pytestmark  # noqa: F401

TRITON = """
import json, sys
from benchmarks.accelerators.peers import peers
from benchmarks.accelerators.targets import TARGETS
found = peers(sys.argv[1], 4096, 4, 1024)
print(json.dumps({project: peer(TARGETS["h100"]) for project, peer in found.items()}))
"""


@pytest.mark.parametrize(
    ("work", "numbers"),
    # Numbers of bfloat16 a feature of a token. Liger's results are float32; TransformerEngine keeps the streams' dtype.
    # Ours read the streams once more for the derivative of phi.
    [
        ("write", {"liger": 5 + 8, "transformer_engine": 9, "mhc_torch": 9}),
        ("read, backward", {"liger": 4 + 2 + 8 + 8, "transformer_engine": 9 + 8, "mhc_torch": 9 + 4}),
        ("boundary", {"mhc_torch": 10}),
        ("boundary, backward", {"mhc_torch": 15 + 4}),
    ],
)
def test_kernels_in_triton(work, numbers):
    result = in_lab("-c", TRITON, work)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found) == set(numbers)
    for project, one in found.items():
        assert one["bytes"] == pytest.approx(4096 * 1024 * 2 * numbers[project], rel=0.15), project
        assert all(16 <= kernel["registers"] <= 255 and kernel["programs"] >= 64 for kernel in one["kernels"])
    assert not any(kernel["spills"] for kernel in found["mhc_torch"]["kernels"])


def test_kernels_of_maxtext(tmp_path):
    job = {"case": "streams, write, n=4, C=1024", "implementation": "maxtext", "target": "v5e"}
    arguments = ("-m", "benchmarks.accelerators.worker", "tpu", str(tmp_path / "schedules"))
    found = json.loads(in_lab(*arguments, text=json.dumps(job) + "\n").stdout)
    if "needs Python 3.12" in found.get("error", ""):
        pytest.skip(found["error"])
    assert "error" not in found, found
    assert found["bytes"] == pytest.approx(4096 * 9 * 1024 * 2, rel=0.3)
    (kernel,) = found["kernels"]
    assert kernel["bundles"] > 100


def test_what_is_for_four_streams_only():
    assert set(peers("write", 64, 4, 1024)) == {"liger", "transformer_engine", "mhc_torch"}
    assert set(peers("write", 64, 2, 1024)) == {"liger", "mhc_torch"}
    assert {work for _, work in PEERS} == {
        f"{name}{done}" for name in ("read", "write", "boundary") for done in ("", ", backward")
    }
