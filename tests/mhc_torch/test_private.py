"""Private names of other libraries stand in one place, exist today, and are missed by speed alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_torch import _private

ROOT = Path(__file__).parents[2]
TORCH = [name for name in _private.NAMES if name.startswith("torch.")]


def private_names(file):
    """Dotted private names below torch in a file, and private modules and names that it imports from torch."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
        else:
            continue
        if parts[0] in ("torch", "nn", "F", "forward_ad") and any(
            re.fullmatch("_[A-Za-z]\\w*", part) for part in parts
        ):
            yield f"{file.relative_to(ROOT)}:{node.lineno}: {'.'.join(parts)}"


def test_no_other_file_names_one():
    files = [file for file in (ROOT / "mhc_torch").rglob("*.py") if file.name != "_private.py"]
    assert [name for file in files for name in private_names(file)] == []


@pytest.mark.parametrize("name", TORCH)
def test_it_exists_and_can_be_missed(name):
    """A stack gives the same numbers, and the same gradients, where torch has no such name."""
    holder, _, attribute = name.rpartition(".")
    program = f"""
import importlib, torch
from torch.autograd import forward_ad, function
from torch.utils import _python_dispatch
holder = {{"torch": torch, "forward_ad": forward_ad}}.get("{holder}")
if holder is None:
    holder = eval("{holder}", {{"torch": torch}})
real = getattr(holder, "{attribute}")
delattr(holder, "{attribute}")
import mhc_torch._private
setattr(holder, "{attribute}", real)  # torch itself goes on
from mhc_torch import MHCSequential
torch.manual_seed(0)
stack = MHCSequential([torch.nn.Linear(3, 3) for _ in range(4)], init="uniform").double()
x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
stack(x).square().sum().backward()
print([float(p.grad.sum()) for p in (x, *stack.parameters())])
"""
    missing = _printed(program)
    whole = _printed(program.replace("delattr", "getattr"))
    assert len(whole) == 13
    assert missing == pytest.approx(whole, rel=1e-12)


def _printed(program):
    # Without the compiled nodes, which ask torch in C++.
    environment = {"PATH": "", "XDG_CACHE_HOME": "/nowhere", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return eval(result.stdout)
