"""The boundary of PyTorch beside other projects', where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import stream_kernels

ROOT = Path(__file__).parents[2]


def test_a_quick_run_on_a_cpu_and_what_fails_in_it(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such card")

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    cases = stream_kernels.candidates("cpu")
    assert list(cases) == ["torch.compile", "torch"]
    monkeypatch.setattr(stream_kernels, "candidates", lambda _: cases | {"liger": broken})
    found = stream_kernels.measure("cpu", quick=True, seconds=0)
    assert [case["least bytes"] for case in found.values()] == [2 * 64 * 64 * 10, 2 * 64 * 64 * 25]
    for case in found.values():
        assert case["torch: over torch.compile"].median > 0
        assert case["torch: share of a copy's rate"].median > 0
        assert case["liger: failed"] == "RuntimeError: no such card"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "benchmarks.streams", "--device", "cuda", "--quick"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "--device cuda: torch" in refused.stderr
    assert "finds no GPU here; --device cpu runs the same cases on the CPU" in refused.stderr
