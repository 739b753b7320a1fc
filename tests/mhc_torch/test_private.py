"""Private names of other libraries stand in one place, exist today, and are missed by speed alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_torch import _private
from tests.private_names import private_names

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "nn", "F", "forward_ad")
TORCH = [name for name in _private.NAMES if name.startswith("torch.")]


def test_no_other_file_names_one():
    files = [file for file in (ROOT / "mhc_torch").rglob("*.py") if file.name != "_private.py"]
    assert [name for file in files for name in private_names(file, LIBRARIES)] == []


# torch is imported once, and each name is missing in a child of that process.
PROGRAM = f"""
import os, traceback, torch, torch.utils.checkpoint
from torch.autograd import forward_ad, function
from torch.utils import _python_dispatch

def numbers(missing):
    if missing:
        owner, _, attribute = missing.rpartition(".")
        holder = eval(owner)
        real = getattr(holder, attribute)
        delattr(holder, attribute)
    import mhc_torch._private
    if missing:
        setattr(holder, attribute, real)  # torch itself goes on
    from mhc_torch import MHCSequential
    torch.manual_seed(0)
    stack = MHCSequential([torch.nn.Linear(3, 3) for _ in range(4)], init="uniform").double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    stack(x).square().sum().backward()
    return [float(p.grad.sum()) for p in (x, *stack.parameters())]

for name in [None, *{TORCH!r}]:
    if os.fork() == 0:
        try:
            print([name, numbers(name)], flush=True)
        except BaseException:
            print([name, traceback.format_exc()], flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def numbers():
    """What a stack and its gradients are where torch lacks a name, and, under None, where it has them all."""
    # Without the compiled nodes, which ask torch in C++.
    environment = {"PATH": "", "XDG_CACHE_HOME": "/nowhere", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return dict(map(ast.literal_eval, result.stdout.splitlines()))


@pytest.mark.parametrize("name", TORCH)
def test_it_exists_and_can_be_missed(numbers, name):
    """A stack gives the same numbers, and the same gradients, where torch has no such name."""
    assert len(numbers[None]) == 13
    assert numbers[name] == pytest.approx(numbers[None], rel=1e-12)
