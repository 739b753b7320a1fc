"""Private names of torch, JAX and Flax stand in one place, exist today, and are missed by the proof alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridge import _private
from tests.private_names import private_names

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "nn", "jax", "jex", "jnp", "flax", "nnx", "optax")
# Attributes of their objects, whatever the object is called here. Those of named tuples are public.
OF_OBJECTS = re.compile("_(schema|modules|parameters|buffers|forward_hooks|c|pytree__.*)")


def test_no_other_file_names_one():
    files = [file for file in (ROOT / "bridge").rglob("*.py") if file.name != "_private.py"]
    assert [name for file in files for name in private_names(file, LIBRARIES, OF_OBJECTS)] == []


# Hidden from bridge alone: torch itself goes on.
HIDE = {
    "torch.utils._python_dispatch.TorchDispatchMode": """
def found(name):
    if asked_by_bridge() or name != "TorchDispatchMode":
        raise AttributeError(name)
    return mode
mode = vars(torch.utils._python_dispatch).pop("TorchDispatchMode")
torch.utils._python_dispatch.__getattr__ = found
""",
    "torch._ops.OpOverload._schema": """
class Hidden:
    def __get__(self, instance, owner):
        if asked_by_bridge():
            raise AttributeError("_schema")
        return vars(instance)["_schema"]
    def __set__(self, instance, value):
        vars(instance)["_schema"] = value
torch._ops.OpOverload._schema = Hidden()
""",
}


def test_every_one_is_tried():
    assert list(HIDE) == list(_private.NAMES)


@pytest.mark.parametrize("name", HIDE)
def test_without_it_there_is_no_reference_and_the_report_says_so(name):
    program = f"""
import sys
import numpy, torch
import torch.utils._python_dispatch
from flax import nnx
def asked_by_bridge():
    return sys._getframe(2).f_globals["__name__"] == "bridge._private"
{HIDE[name]}
import bridge
jax_model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
torch_model = bridge.convert(jax_model, torch.nn.Linear(2, 2))
report = bridge.verify(jax_model, torch_model, numpy.ones((1, 2), "float32"))
print(report.verdict, *report.unproved)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("NOT PROVED there is no float64 reference: torch_model cannot be run in float64")
    assert name.rpartition(".")[2] in result.stdout
