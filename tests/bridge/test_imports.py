"""`import bridge` waits for nothing; each public name is found where the type checker is told to look."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import bridge

ROOT = Path(__file__).parents[2]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_waits_for_no_framework():
    heavy = ("jax", "torch", "flax", "orbax", "mhc_jax", "mhc_torch")
    assert run(f"import sys, bridge; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_who_converts_does_not_wait_for_a_proof():
    proof = "[m for m in sys.modules if m.startswith('bridge.proof')]"
    assert run(f"import sys, bridge; bridge.convert, bridge.load; print({proof})") == "[]"


def test_one_list_of_names():
    tree = ast.parse(Path(bridge.__file__).read_text())
    imported = {
        (alias.name, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("bridge")
        for alias in node.names
    }
    assert {name for name, _ in imported} == set(bridge.__all__)
    for name, home in imported:
        assert getattr(bridge, name) is getattr(import_module(home), name)
        assert name in dir(bridge)


def test_a_rule_replaces_one_that_is_declared_however_early_it_comes():
    code = (
        "import bridge; from flax import nnx; from torch import nn\n"
        "bridge.register(nnx.Linear, nn.Linear)\n"  # which says nothing of kernel and weight
        "try: bridge.convert(nn.Linear(3, 3), nnx.Linear(3, 3, rngs=nnx.Rngs(0)))\n"
        "except ValueError as error: print('kernel' in str(error))"
    )
    assert run(code) == "True"
