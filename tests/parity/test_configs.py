"""A configuration means the same in both packages: fields, defaults, what is accepted, what is refused and how."""

import dataclasses
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

import mhc_jax
import mhc_jax.history.config
import mhc_jax.projections
import mhc_jax.streams
import mhc_jax.streams.constraints
import mhc_jax.streams.norm
import mhc_torch.history.config
import mhc_torch.projections
import mhc_torch.streams
import mhc_torch.streams.constraints
import mhc_torch.streams.norm

MATRIX = (mhc_jax.history.config.MatrixConfig, mhc_torch.history.config.MatrixConfig)
HISTORY = (mhc_jax.MHCConfig, mhc_torch.history.config.MHCConfig)
STREAMS = (mhc_jax.streams.StreamConfig, mhc_torch.streams.StreamConfig)
# In PyTorch a module holds states between two calls, or between the layers of a model that was there.
TORCH_ALONE = {"clear_history_each_forward", "history_scope"}

VALUES = [None, True, False, "", "no", -1, 0, 1, 2, 3, 4, 16, 17, 0.0, -0.1, 0.5, 1.0, 1.5, 2.0, 1e-46, 1e40]
VALUES += [float("nan"), float("inf"), -float("inf"), (), [1], {}, 1j, b"mhc"]
VALUES += [
    "mhc",
    "hc",
    "residual",
    "simplex",
    "identity",
    "sparse",
    "uniform",
    "mixed",
    "sinkhorn",
    "permutations",
    "kronecker",
]
VALUES += ["none", "global", "Simplex", "columns", "rows", "rms", "rms_outside", "streams"]


def outcome(kind, **fields):
    """The config's fields, or the error that it is refused with."""
    try:
        return {name: repr(value) for name, value in dataclasses.asdict(kind(**fields)).items() if name in fields}
    except TypeCheckError:  # the tests check annotations, and find a wrong type before the config does
        return TypeError
    except Exception as error:
        return type(error), str(error)


def defaults(kind):
    return {field.name: field.default for field in dataclasses.fields(kind)}


def test_fields_and_defaults():
    jax_history, torch_history = map(defaults, HISTORY)
    assert {name: value for name, value in torch_history.items() if name not in TORCH_ALONE} == jax_history
    assert torch_history.keys() - jax_history.keys() == TORCH_ALONE
    assert defaults(STREAMS[0]) == defaults(STREAMS[1])
    assert defaults(MATRIX[0]) == defaults(MATRIX[1]) == {"max_history": 4, "doubly_stochastic": True, "iterations": 10}


def test_order_of_fields():
    """Positional arguments mean the same, but for the fields that PyTorch has alone."""
    ours, theirs = ([field.name for field in dataclasses.fields(kind)] for kind in HISTORY)
    assert ours == [name for name in theirs if name not in TORCH_ALONE]
    for kinds in (STREAMS, MATRIX):
        ours, theirs = ([field.name for field in dataclasses.fields(kind)] for kind in kinds)
        assert ours == theirs


@pytest.mark.usefixtures("unchecked")  # it is our own refusals that are compared
@pytest.mark.parametrize("kinds", [HISTORY, STREAMS, MATRIX], ids=["history", "streams", "matrix"])
def test_single_values(kinds):
    for field in defaults(kinds[0]):
        for value in VALUES:
            ours, theirs = (outcome(kind, **{field: value}) for kind in kinds)
            assert ours == theirs, f"{field}={value!r}"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("constraint", mhc_jax.streams.constraints.CONSTRAINTS)
def test_numbers_of_streams(constraint):
    for streams in range(1, 17):
        ours, theirs = (outcome(kind, streams=streams, constraint=constraint) for kind in STREAMS)
        assert ours == theirs
        if isinstance(ours, dict):
            ours, theirs = (kind(streams=streams, constraint=constraint).logits for kind in STREAMS)
            assert ours == theirs


def test_registries():
    assert list(mhc_jax.projections.PROJECTIONS) == list(mhc_torch.projections.PROJECTIONS)
    for name, projection in mhc_jax.projections.PROJECTIONS.items():
        assert projection.options == mhc_torch.projections.PROJECTIONS[name].options
    ours, theirs = mhc_jax.streams.constraints.CONSTRAINTS, mhc_torch.streams.constraints.CONSTRAINTS
    assert list(ours) == list(theirs)
    for name, constraint in ours.items():
        assert (constraint.bounded, constraint.mixes) == (theirs[name].bounded, theirs[name].mixes)
        assert all(constraint.transposed(n) == theirs[name].transposed(n) for n in (1, 2, 3, 4, 6))
    assert list(mhc_jax.streams.norm.NORMS) == list(mhc_torch.streams.norm.NORMS)


@pytest.mark.parametrize("name", ["options.py", "models/config.py", "streams/starts.py", "streams/conventions.py"])
def test_one_text(name):
    """Two copies, since neither package may import the other; but for the name of the package."""
    ours, theirs = (Path(package.__file__).parent / name for package in (mhc_jax, mhc_torch))
    assert ours.read_text().replace("mhc_jax", "mhc_torch") == theirs.read_text()
