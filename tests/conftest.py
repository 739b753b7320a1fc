"""Settings that must stand before jax or torch is first imported, in this process and in every worker."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import FunctionType

import jaxtyping
import pytest
from hypothesis import settings

import tests.checked  # (pytest is told its name, and does not import it)

# Two xdist workers on two cores: one thread each, or they fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Sharding is tested on a mesh of eight host devices, which may wait for each other long where cores are few. Most of
# the time goes into compiling: LLVM need not try hard, nor in parts, and the older emitters take half as long.
_XLA_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=500",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones have no older emitters, and end at a flag that they do not know
    _XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_XLA_FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept between runs and shared by the workers.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Kernels of Triton run on the CPU, by its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLBACKEND", "agg")
# How Lightning uses jsonargparse is not ours to mend.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
# Nothing in the tests may wait for a network.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The first example of a property compiles; and compiling is what most of a property's time goes into.
settings.register_profile("compiled", deadline=None, max_examples=30)
settings.load_profile("compiled")


class _WrongOnPurpose:
    """What `with pytest.raises(...)` hands over is wrong on purpose, and it is our own error that is asked for."""

    enter, leave = pytest.RaisesExc.__enter__, pytest.RaisesExc.__exit__

    def __enter__(self):
        self.checked_before = not jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        return _WrongOnPurpose.enter(self)

    def __exit__(self, *error):
        jaxtyping.config.update("jaxtyping_disable", not self.checked_before)
        return _WrongOnPurpose.leave(self, *error)


pytest.RaisesExc.__enter__, pytest.RaisesExc.__exit__ = _WrongOnPurpose.__enter__, _WrongOnPurpose.__exit__


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_this_file_alone():
    """What JAX has compiled grows to gigabytes, and full caches forget what a test counts on being found."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def unchecked(monkeypatch):
    """Functions as they are written, without the checks of annotations: `torch.compile` would have to trace them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # where somebody else holds a function
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("mhc_jax", "mhc_torch", "bridge"):
            continue
        own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name]
        for owner in (module, *own):
            for attribute, value in list(vars(owner).items()):
                if (plain := _plain(value)) is not value:
                    monkeypatch.setattr(owner, attribute, plain)


_WRAPPERS = ("jaxtyping._decorator", tests.checked.__name__)


def _plain(value):
    """What jaxtyping, or `tests.checked` in its place, has wrapped."""
    if isinstance(value, property):
        return value if (get := _plain(value.fget)) is value.fget else property(get, value.fset, value.fdel)
    if isinstance(value, (staticmethod, classmethod)):
        return value if (plain := _plain(value.__func__)) is value.__func__ else type(value)(plain)
    if not (isinstance(value, FunctionType) and value.__globals__["__name__"] in _WRAPPERS):
        return value
    marks = {name: mark for name, mark in vars(value).items() if name != "__wrapped__"}  # such as those for dynamo
    vars(value.__wrapped__).update(marks)
    return value.__wrapped__
