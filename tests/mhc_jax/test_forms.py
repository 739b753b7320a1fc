"""What is compiled for a TPU or a GPU computes what is compiled for a CPU, to which other tests hold the equations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import streams
from mhc_jax.history import MHCConfig, apply_layers

PLATFORMS = ("tpu", "cuda")


@pytest.fixture
def compiled_for(monkeypatch):
    """Makes this machine run the forms of another platform."""

    def choose(platform):
        def form(*arguments, default=None, **forms):
            return forms.get(platform, default)(*arguments)

        monkeypatch.setattr(jax.lax, "platform_dependent", form)
        jax.clear_caches()

    with jax.enable_x64(True):
        yield choose
    jax.clear_caches()


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def history_loss(config, weights, x, logits):
    def branch(w, x):
        return {"a": jnp.tanh(x["a"] @ w) + x["b"], "b": x["b"] * w[0, 0] + x["a"].sum()}

    y = apply_layers(branch, weights, x, logits, config)
    return jnp.sum(y["a"] ** 2) + y["b"]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("depth", "size", "detach"), [(5, 3, False), (5, 3, True), (12, 10, False)], ids=["ring", "detached", "tape"]
)
def test_gradients_of_history(compiled_for, platform, depth, size, detach):
    config = MHCConfig(max_history=size, init="uniform", detach_history=detach)
    arguments = draw(0, depth, 4, 4) / 2, {"a": draw(1, 3, 4), "b": draw(2)}, draw(3, depth, size)
    gradient = jax.grad(partial(history_loss, config), (0, 1, 2))
    compiled_for("cpu")
    expected = gradient(*arguments)
    compiled_for(platform)
    assert_same(gradient(*arguments), expected)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_second_derivatives_of_history(compiled_for, platform):
    weights, x, logits = draw(0, 3, 2, 2) / 2, {"a": draw(1, 1, 2), "b": draw(2)}, draw(3, 3, 2)
    config = MHCConfig(max_history=2)
    compiled_for("cpu")
    expected = jax.hessian(partial(history_loss, config, weights, x))(logits)
    compiled_for(platform)
    hessian = jax.hessian(partial(history_loss, config, weights, x))(logits)
    assert_same(hessian, expected)
    twice = jax.jacrev(jax.grad(partial(history_loss, config, weights, x)))(logits)
    assert_same(twice, expected)


def streams_loss(config, by_boundaries, params, x):
    def branch(x):
        return jnp.tanh(x)

    if by_boundaries:
        layer = partial(streams.Connected, branch, config=config)
        y = streams.apply_branches(lambda p: [layer(p)], params, x, config.streams)
    else:
        layer = streams.wrap(branch, config)
        y = streams.scan_layers(layer, params, streams.expand(x, config.streams))
    return jnp.sum(y**2)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("by_boundaries", [False, True], ids=["layers", "boundaries"])
def test_streams_and_their_gradients(compiled_for, platform, by_boundaries):
    config = streams.StreamConfig(3, iterations=3)
    params = jax.vmap(lambda layer: streams.init_params(config, 4, layer, jnp.float64))(jnp.arange(2))
    params = jax.tree.map(lambda leaf: leaf + draw(leaf.ndim, *leaf.shape) / 4, params)
    function = jax.value_and_grad(partial(streams_loss, config, by_boundaries), (0, 1))
    compiled_for("cpu")
    expected = function(params, draw(9, 2, 4))
    compiled_for(platform)
    assert_same(function(params, draw(9, 2, 4)), expected)


def test_second_derivatives_of_streams(compiled_for):
    config = streams.StreamConfig(2, iterations=2)
    params = streams.init_params(config, 3, 0, jnp.float64)
    params = jax.tree.map(lambda leaf: leaf[None] + draw(leaf.ndim, 1, *leaf.shape) / 4, params)
    hessian = jax.hessian(partial(streams_loss, config, False, params))
    compiled_for("cpu")
    expected = hessian(draw(9, 1, 3))
    compiled_for("tpu")
    assert_same(hessian(draw(9, 1, 3)), expected)
