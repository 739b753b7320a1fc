"""What is registered from outside goes through training, dashboard and bridge like what the packages ship."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
import mhc_jax.nn as jax_nn
import mhc_torch.nn as torch_nn
from mhc_jax import projections as jax_projections
from mhc_jax.monitoring.dashboard import dashboard
from mhc_jax.monitoring.diagnostics import diagnose
from mhc_jax.streams import constraints as jax_constraints
from mhc_jax.training import TrainState, make_train_step
from mhc_torch import extract_mixing_weights
from mhc_torch import projections as torch_projections
from mhc_torch.streams import constraints as torch_constraints

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


@pytest.fixture
def softplus(monkeypatch):
    """The manifold of normalized softplus, in ten lines."""

    def in_jax(logits, temperature):
        positive = jax.nn.softplus(logits / temperature)
        return positive / positive.sum(-1, keepdims=True)

    def in_torch(logits, temperature):
        positive = nn.functional.softplus(logits / temperature)
        return positive / positive.sum(-1, keepdim=True)

    monkeypatch.setitem(jax_projections.PROJECTIONS, "softplus", jax_projections.Projection(in_jax))
    monkeypatch.setitem(torch_projections.PROJECTIONS, "softplus", torch_projections.Projection(in_torch))
    return "softplus"


def trained(model):
    """The model after two updates, and what the dashboard shows of it then."""
    optimizer = optax.adam(0.1)
    step = make_train_step(lambda model, x: (jnp.mean((model(x) - x) ** 2), {}), optimizer, diagnose=diagnose)
    state = TrainState.create(model, optimizer)
    for _ in range(2):
        state, _ = step(state, jnp.asarray(X))
    _, metrics = step(jax.tree.map(jnp.copy, state), jnp.asarray(X))
    return state.model, dashboard(state.model, metrics["diagnostics"])[1]


def test_a_manifold(softplus):
    options = {"max_history": 3, "constraint": softplus, "init": "uniform", "temperature": 0.7}
    stack = jax_nn.MHCStack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), 4, rngs=nnx.Rngs(0), **options)
    chain = torch_nn.MHCSequential([nn.Linear(3, 3) for _ in range(4)], **options)
    model, shown = trained(stack)
    bridge.convert(model, chain)
    assert bridge.verify(model, chain, X).ok
    chain(torch.from_numpy(X))
    weights = extract_mixing_weights(chain)
    assert list(weights) == list(shown)
    for layer, logits in zip(weights, np.asarray(model.mixing_logits[...], np.float64), strict=True):
        expected = np.logaddexp(0, logits / 0.7)[-len(shown[layer]) :]
        np.testing.assert_allclose(shown[layer], expected / expected.sum(), rtol=1e-5)
        np.testing.assert_allclose(weights[layer], shown[layer], rtol=1e-5)
    assert not np.allclose(model.mixing_logits[...], 0)  # it has learned


def test_a_residual_constraint(monkeypatch):
    """The mean of the streams and what a gate leaves of the identity: one logit a token."""
    in_jax = jax_constraints.Constraint(
        lambda n: 1,
        lambda logits, config, _: (
            jnp.eye(config.streams) + jax.nn.sigmoid(logits[..., None]) * (1 / config.streams - jnp.eye(config.streams))
        ),
        lambda n: np.array([-8.0]),
    )
    in_torch = torch_constraints.Constraint(
        lambda n: 1,
        lambda logits, config: (
            torch.eye(config.streams)
            + torch.sigmoid(logits[..., None]) * (1 / config.streams - torch.eye(config.streams))
        ),
        lambda n: torch.tensor([-8.0]),
    )
    monkeypatch.setitem(jax_constraints.CONSTRAINTS, "mean", in_jax)
    monkeypatch.setitem(torch_constraints.CONSTRAINTS, "mean", in_torch)

    def layer(rngs, index):
        return jax_nn.HyperConnections(nnx.Linear(3, 3, rngs=rngs), 3, constraint="mean", layer_index=index)

    stack = jax_nn.StreamStack(layer, 3, rngs=nnx.Rngs(0))
    chain = torch_nn.StreamStack(
        [torch_nn.HyperConnections(nn.Linear(3, 3), 3, constraint="mean", layer_index=i) for i in range(3)], 4
    )
    model, shown = trained(stack)
    bridge.convert(model, chain)
    assert bridge.verify(model, chain, X).ok
    for row in range(4):
        np.testing.assert_allclose(shown[f"layers.0.res.{row}"].sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", [jax_nn.MHCSkip, torch_nn.MHCSkip, jax_nn.StreamHead, torch_nn.StreamHead])
def test_a_name_that_nobody_registered(kind):
    arguments = (3,) if "Stream" in kind.__name__ else ()
    with pytest.raises(ValueError, match=r"constraint must be one of .*, got 'softplus'"):
        kind(*arguments, constraint="softplus")
