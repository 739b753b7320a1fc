"""Runs a pair of modules in float64 after each direction of a conversion."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import nn

import bridge
from bridge.weights.leaves import jax_leaves, put, value
from tests.bridge.models import randomize


def shuffled(model: nnx.Module, seed: int = 5) -> nnx.Module:
    """The same model with other numbers in float64 in every leaf, bare arrays included (within x64)."""
    rng = np.random.default_rng(seed)
    leaves = jax_leaves(model)
    for path, leaf in leaves.items():
        put(model, leaves, path, jax.numpy.asarray(rng.uniform(0.1, 1.1, value(leaf).shape)))
    return model


def check(
    make_jax: Callable[[], nnx.Module],
    make_torch: Callable[[], nn.Module],
    run_jax: Callable[[Any], Any],
    run_torch: Callable[[Any], Any],
    prepared: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> None:
    """Both directions: the same results in float64, and the weights come back bit for bit.

    Args:
        run_jax, run_torch: functions of the module, whose results are arrays of equal shapes.
        prepared: what is done to a torch module that is converted.
    """

    def compare(ours: nnx.Module, theirs: nn.Module) -> None:
        ours.eval()
        results = run_torch(theirs.eval())
        np.testing.assert_allclose(run_jax(nnx.clone(ours)), results.detach().numpy(), rtol=1e-11, atol=1e-12)

    with jax.enable_x64(True):
        theirs = prepared(randomize(make_torch().double()))
        ours = bridge.convert(theirs, shuffled(make_jax()))
        compare(ours, theirs)
        back = bridge.convert(ours, randomize(make_torch().double(), seed=1))
        assert all(torch.equal(leaf, back.state_dict()[name]) for name, leaf in theirs.state_dict().items())

        ours = shuffled(make_jax())
        compare(ours, bridge.convert(ours, randomize(make_torch().double())))
