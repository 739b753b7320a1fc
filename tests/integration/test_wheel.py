"""The wheel as a user gets it: built, installed, and imported with and without the other framework."""

import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKER = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with the packages of this one but not its editable install."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(packages), str(wheel)], check=True, capture_output=True)
    # A line of a .pth file is a path to search, after the environment's own; the .pth files there are not read.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin" / "python"


def run(python: Path, program: str, blocked: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [python, "-I", "-c", BLOCKER + program, blocked]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_wheel_holds_the_three_packages_and_their_types(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"mhc_jax", "mhc_torch", "bridge"}
    for package in ("mhc_jax", "mhc_torch", "bridge"):
        assert f"{package}/py.typed" in names
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= set(names)


JAX_PROGRAM = """
import jax.numpy as jnp, mhc_jax, mhc_jax.training.checkpoint, mhc_jax.monitoring.diagnostics, mhc_jax.streams
from flax import nnx
from mhc_jax.nn import MHCStack
stack = MHCStack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), depth=3, rngs=nnx.Rngs(0))
assert stack(jnp.ones((2, 4))).shape == (2, 4)
print(mhc_jax.__file__)
"""
TORCH_PROGRAM = """
import torch, mhc_torch
from mhc_torch import MHCSequential, plot_mixing_weights
assert MHCSequential([torch.nn.Linear(4, 4) for _ in range(3)])(torch.ones(2, 4)).shape == (2, 4)
print(mhc_torch.__file__)
"""
TRACKING_PROGRAM = """
import lightning, mhc_torch, pytorch_lightning
from mhc_torch.tracking import start_logging
with start_logging("run", "project", "tensorboard"):
    for package in (lightning, pytorch_lightning):
        trainer = package.Trainer(accelerator="cpu", logger=False)
        assert "AttachExperiment" in [type(callback).__name__ for callback in trainer.callbacks]
print(mhc_torch.__file__)
"""


@pytest.mark.parametrize(
    ("program", "blocked"),
    [
        pytest.param(JAX_PROGRAM, "torch,lightning,pytorch_lightning,mhc_torch,bridge", id="mhc_jax without torch"),
        pytest.param(TORCH_PROGRAM, "jax,jaxlib,flax,optax,orbax,chex,mhc_jax,bridge", id="mhc_torch without jax"),
        pytest.param(TRACKING_PROGRAM, "jax,jaxlib,flax,optax,orbax,chex,mhc_jax,bridge", id="entry points"),
    ],
)
def test_each_front_end_works_without_the_other_framework(
    python: Path, program: str, blocked: str, tmp_path: Path
) -> None:
    done = run(python, program, blocked, tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(python.parents[1]), "the wheel was imported, not the checkout"


def test_bridge_says_what_is_missing(python: Path, tmp_path: Path) -> None:
    done = run(python, "import bridge; bridge.convert", "torch", tmp_path)
    assert "No module named 'torch" in done.stderr
