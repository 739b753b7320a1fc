"""A new module starts from the same parameters in both packages, and both are the numbers that the documents give."""

import itertools

import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import mhc_jax.nn as jax_nn
import mhc_torch.nn as torch_nn
from mhc_jax.streams.constraints import CONSTRAINTS


def same(ours, theirs, expected=None):
    ours, theirs = np.asarray(ours[...]), theirs.detach().numpy()
    np.testing.assert_array_equal(ours, theirs)
    if expected is not None:
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def logits(init, size):
    return [{"identity": -10.0, "uniform": 0.0, "mixed": -2.0}[init]] * (size - 1) + [0.0]


@pytest.mark.parametrize(("init", "size"), [*itertools.product(("identity", "uniform", "mixed"), (1, 4))])
def test_skip(init, size):
    options = {"max_history": size, "init": init, "use_gating": True}
    ours, theirs = jax_nn.MHCSkip(**options), torch_nn.MHCSkip(**options)
    same(ours.mixing_logits, theirs.mixing_logits, logits(init, size))
    same(ours.gate_logit, theirs.gate_logit, 2.0)


@pytest.mark.parametrize("temperature", [0.25, 3.0])
@pytest.mark.parametrize(
    ("mode", "constraint"), [("mhc", "simplex"), ("mhc", "identity"), ("mhc", "sparse"), ("hc", "sparse")]
)
@pytest.mark.parametrize("live", [2, 4])
def test_mixed_start_is_near_the_residual_one_and_every_logit_has_a_gradient(temperature, mode, constraint, live):
    options = {"init": "mixed", "temperature": temperature, "mode": mode, "constraint": constraint}
    ours, theirs = jax_nn.MHCSkip(**options), torch_nn.MHCSkip(**options)
    same(ours.mixing_logits, theirs.mixing_logits)
    weights = theirs.mixing_weights(live)
    assert 0.6 < weights[-1] < 0.9
    for weight in weights:
        (gradient,) = torch.autograd.grad(weight, theirs.mixing_logits, retain_graph=True)
        assert abs(gradient[-live:]).min() * temperature > 5e-3


def test_stacks():
    depth = 3
    stack = jax_nn.MHCStack(lambda rngs: nnx.Linear(2, 2, rngs=rngs), depth, use_gating=True, rngs=nnx.Rngs(0))
    chain = jax_nn.MHCSequential([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(depth)], use_gating=True)
    theirs = torch_nn.MHCSequential([nn.Linear(2, 2) for _ in range(depth)], use_gating=True)
    for layer in range(depth):
        skip = theirs.skip_layers[layer]
        same(chain.skip_layers[layer].mixing_logits, skip.mixing_logits, logits("identity", 4))
        same(stack.mixing_logits[layer], skip.mixing_logits)
        same(stack.gate_logit[layer], skip.gate_logit, 2.0)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("streams", [1, 2, 4, 6])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("start", "gates", "logit"), [("identity", 0.01, -8.0), ("mixed", 1.0, -2.0)])
def test_hyper_connections(constraint, streams, dynamic, start, gates, logit):
    options = {"streams": streams, "constraint": constraint, "dynamic": dynamic, "start": start, "layer_index": 5}
    ours = jax_nn.HyperConnections(lambda x: x, 3, **options)
    theirs = torch_nn.HyperConnections(nn.Identity(), 3, **options)
    np.testing.assert_allclose(ours.bias[...], theirs.bias.detach(), rtol=1e-6, atol=1e-7)
    assert (ours.phi is None) == (theirs.phi is None) == (ours.alpha is None) == (theirs.alpha is None) == (not dynamic)
    if dynamic:
        same(ours.phi, theirs.phi, 0.0)
        same(ours.alpha, theirs.alpha, [gates] * 3)
    if constraint != "none":
        assert {*np.asarray(ours.bias[2 * streams :])} <= {0.0, logit}


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_head(streams):
    ours, theirs = jax_nn.StreamHead(3, streams=streams), torch_nn.StreamHead(3, streams=streams)
    same(ours.phi, theirs.phi, 0.0)
    same(ours.alpha, theirs.alpha, 0.01)
    np.testing.assert_allclose(ours.bias[...], theirs.bias.detach(), rtol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-np.asarray(ours.bias))), 1 / streams, rtol=1e-5)
