"""Where Triton's kernels run, and what is said where they cannot."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mhc_torch.kernels import choice

x = torch.ones(2, 4, 8)


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(choice, "interpreted", lambda: True)


@pytest.mark.parametrize("implementation", [None, "torch"])
def test_on_a_cpu_torch_computes(implementation, interpreter):
    assert not choice.by_kernels(implementation, [x])


def test_kernels_are_asked_for_where_an_interpreter_runs_them(interpreter):
    assert choice.by_kernels("triton", [x], [None, x])


def test_none_is_the_kernels_on_a_gpu(monkeypatch):
    # Of tensors that are only described: there need be no GPU. They are a class of tensors, which is followed.
    with FakeTensorMode():
        on_gpu, elsewhere = torch.empty(2, 4, 8, device="cuda"), torch.empty(2, 4, 8, device="cuda:1")
    monkeypatch.setattr(choice, "followed", lambda _: False)
    assert choice.by_kernels(None, [on_gpu])
    assert not choice.by_kernels("torch", [on_gpu])
    assert not choice.by_kernels(None, [on_gpu, elsewhere])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"states": [x.double()]}, "torch.float64"),
        ({"states": [x, x.bfloat16()]}, "torch.float32 and torch.bfloat16"),
        ({"states": [x.to("meta")]}, "on the device 'meta'"),
        ({"states": [x], "others": [x.to("meta")]}, "'cpu' and 'meta'"),
        ({"states": [x], "unserved": "constraint='none'"}, "nothing for constraint='none'"),
    ],
)
def test_a_kernel_that_cannot_run_says_why_and_what_can(arguments, reason):
    with pytest.raises(ValueError, match=rf"cannot run: .*{reason}.*implementation='torch' can"):
        choice.by_kernels("triton", **arguments)
    assert not choice.by_kernels(None, **arguments)


def test_what_follows_each_operation_is_not_followed_into_kernels(interpreter):
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(lambda row: choice.by_kernels("triton", [row]) * row)(x)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="must be 'torch', 'triton' or None, got 'pallas'"):
        choice.by_kernels("pallas", [x])


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from mhc_torch.kernels.choice import by_kernels
x = torch.ones(2, 4, 8)
assert not by_kernels(None, [x])
try:
    by_kernels("triton", [x])
except ValueError as error:
    print(error)
"""


def test_without_triton_torch_computes_and_the_extra_is_named():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed (pip install 'mhc-jax[triton]')" in done.stdout
    assert "implementation='torch' can" in done.stdout
