"""Every implementation of the streams is held to the same float64 reference, and lowers for every platform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mhc_jax import streams
from mhc_jax.nn import HyperConnections
from mhc_jax.streams import StreamConfig, StreamParams
from tests import streams_reference as reference
from tests.lowering import lowered_for

IMPLEMENTATIONS = ["xla", "pallas"]
CONFIGS = [
    StreamConfig(4),
    StreamConfig(3, iterations=3, epsilon=1e-3, norm_epsilon=0.1),
    StreamConfig(1, iterations=1),
    StreamConfig(2, "permutations"),
    StreamConfig(2, "none"),
    StreamConfig(2, "identity", pre_epsilon=0.1, post_scale=0.7, post_epsilon=0.1),
    StreamConfig(2, order="rows", iterations=2),
    StreamConfig(2, dynamic=False),
]


def example(config, lead, width):
    """Parameters, streams and a cotangent in float64; H_res is far from symmetric."""
    rng = np.random.default_rng(0)
    features = config.streams * width
    phi, alpha = (
        (rng.normal(size=(features, config.logits)) / features**0.5, rng.normal(size=3))
        if config.dynamic
        else (None, None)
    )
    x, cotangent = rng.normal(size=(2, *lead, config.streams, width))
    return StreamParams(phi, alpha, rng.normal(size=config.logits)), x, cotangent


def branch(x):
    return np.tanh(1.5 * x) if isinstance(x, np.ndarray) else jnp.tanh(1.5 * x)


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(config, implementation, params, x, cotangent):
    layer = streams.wrap(branch, config, implementation=implementation)
    result, pullback = jax.vjp(layer, params, x)
    return result, pullback(cotangent)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer_and_gradients_are_those_of_the_equations(implementation, config):
    params, x, cotangent = example(config, (3,), 5)
    equations = partial(reference.layer, branch=branch, **reference.options(config))
    with jax.enable_x64(True):
        outcome = value_and_gradients(config, implementation, params, x, cotangent)
    result, gradients = jax.tree.map(np.asarray, outcome)
    np.testing.assert_allclose(result, equations(*params, x), rtol=1e-10, atol=1e-12)

    rng = np.random.default_rng(1)
    directions = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, x))

    def moved(step):
        moved_params, moved_x = jax.tree.map(lambda a, b: a + step * b, (params, x), directions)
        return np.sum(cotangent * equations(*moved_params, moved_x))

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradients, directions)))
    np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "lead", "width", "dtype"),
    [
        (StreamConfig(4, iterations=2), (2, 20), 130, jnp.float32),
        (StreamConfig(3, iterations=2), (3, 150), 256, jnp.float32),
        (StreamConfig(4, iterations=2), (40,), 64, jnp.bfloat16),
        (StreamConfig(6, "none"), (33,), 20, jnp.float32),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_blocks_and_half_precision(implementation, config, lead, width, dtype):
    params, x, cotangent = example(config, lead, width)
    params = StreamParams(*(p.astype(np.float32) for p in params))
    x, cotangent = jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype)
    result, gradients = value_and_gradients(config, implementation, params, x, cotangent)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x, cotangent))
        expected, expected_gradients = value_and_gradients(config, "xla", *exact)
    error = 2e-2 if dtype == jnp.bfloat16 else 1e-5
    assert result.dtype == gradients[1].dtype == dtype
    assert all(d.dtype == jnp.float32 for d in gradients[0])
    for a, b in zip(jax.tree.leaves((result, gradients)), jax.tree.leaves((expected, expected_gradients)), strict=True):
        np.testing.assert_allclose(np.float64(a), b, rtol=0, atol=error * np.abs(b).max())


@pytest.mark.parametrize("config", [StreamConfig(4), StreamConfig(3), StreamConfig(2, "permutations")], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_lower_for_accelerators(platform, dtype, config):
    params = streams.init_params(config, 640)
    x = jnp.zeros((2, 300, config.streams, 640), dtype)
    lowered = lowered_for(platform, partial(value_and_gradients, config, "pallas"), params, x, x)
    kernels = lowered.count({"tpu": "tpu_custom_call", "cuda": "xla.gpu.triton"}[platform])
    # Forward project, collapse and merge; backward merge, the weights of collapse, and streams with phi.
    assert kernels >= (8 if config.constraint == "sinkhorn" else 6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_backward_keeps_the_streams_once(implementation):
    config = StreamConfig(4, iterations=1)
    x = jnp.ones((2, 16, 4, 64))
    layer = streams.wrap(lambda h: h, config, implementation=implementation)
    _, pullback = jax.vjp(layer, streams.init_params(config, 64), x)
    kept = {id(leaf): leaf.size for leaf in jax.tree.leaves(pullback) if leaf.ndim > 1 and leaf.size >= 32 * 64}
    phi = 4 * 64 * config.logits
    # The streams, the branch's output (a quarter of them), and the parameters that a step holds anyway.
    assert sorted(kept.values()) == sorted([x.size, x.size // 4, phi])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_of_layers_keep_their_streams_once(implementation):
    config = StreamConfig(2, iterations=1)
    params = jax.vmap(lambda layer: streams.init_params(config, 48, layer))(jnp.arange(4))
    x = jnp.ones((3, 5, 2, 48))
    layer = streams.wrap(lambda h: h, config, implementation=implementation)
    _, pullback = jax.vjp(lambda p, x: streams.scan_layers(layer, p, x, block_length=2), params, x)
    kept = [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.shape[-2:] == (2, 48)]
    assert kept == [(2, *x.shape)], "the streams of two layers out of four"


def test_a_module_takes_the_implementation_and_vmap_goes_through():
    def layer(implementation):
        linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        return HyperConnections(linear, 6, streams=2, iterations=1, implementation=implementation)

    wide = jax.random.normal(jax.random.key(0), (3, 5, 2, 6))
    np.testing.assert_allclose(jax.vmap(layer("pallas"))(wide), layer("xla")(wide), rtol=1e-5)


def test_an_unknown_implementation_is_refused():
    config = StreamConfig(4)
    params, x = streams.init_params(config, 8), jnp.ones((2, 4, 8))
    message = "implementation must be 'xla', 'pallas' or None, got 'triton'"
    with pytest.raises(ValueError, match=message):
        streams.read(params, x, config, implementation="triton")
    with pytest.raises(ValueError, match=message):
        streams.write(x, x[:, 0], jnp.ones((2, 4)), jnp.ones((2, 4, 4)), implementation="triton")


@pytest.mark.parametrize("norm", ["rms_outside", "streams"])
def test_kernels_refuse_a_norm_that_they_have_not(norm):
    config = StreamConfig(2, norm=norm)
    params, (x, post, res) = streams.init_params(config, 3), map(jnp.ones, ((4, 2, 3), (4, 2), (4, 2, 2)))
    message = f"implementation='pallas' has no kernels for norm='{norm}', only for 'rms'"
    with pytest.raises(ValueError, match=message):
        streams.read(params, x, config, implementation="pallas")
    with pytest.raises(ValueError, match=message):
        streams.boundary(params, x, x[:, 0], post, res, config, implementation="pallas")
    with pytest.raises(ValueError, match=message):
        streams.head(streams.init_head_params(config, 3), x, config, implementation="pallas")
