"""Every implementation of a kernel is held to the same float64 reference, and lowers for every platform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import mix
from tests.lowering import lowered_for

IMPLEMENTATIONS = ["xla", "pallas"]
SHAPES = [(1, (3,)), (3, (5, 7)), (4, (16, 128)), (5, (3, 64, 129)), (16, (40, 1000))]


def problem(count, shape, dtype=jnp.float32):
    rng = np.random.default_rng(count)
    arrays = rng.normal(size=shape), rng.normal(size=(count, *shape)), rng.normal(size=count)
    x, states, weights = arrays
    return arrays, (jnp.asarray(x, dtype), jnp.asarray(states, dtype), jnp.asarray(weights, jnp.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("count", "shape"), SHAPES)
def test_mix_and_its_gradients(implementation, count, shape):
    (x, states, weights), arguments = problem(count, shape)
    g = np.random.default_rng(0).normal(size=shape)
    out, pullback = jax.vjp(jax.jit(partial(mix, implementation=implementation)), *arguments)
    d_x, d_states, d_weights = pullback(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(out, x + np.tensordot(weights, states, 1), atol=1e-5)
    np.testing.assert_allclose(d_x, g, atol=1e-6)
    np.testing.assert_allclose(d_states, weights.reshape(-1, *[1] * len(shape)) * g, atol=1e-5)
    np.testing.assert_allclose(d_weights, (states * g).reshape(count, -1).sum(axis=1), atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mix_in_half_precision_under_vmap(implementation):
    (x, states, weights), arguments = problem(3, (6, 40), jnp.bfloat16)
    batched = jax.vmap(partial(mix, implementation=implementation), in_axes=(0, 1, None))(*arguments)
    assert batched.dtype == jnp.bfloat16
    np.testing.assert_allclose(batched.astype(jnp.float32), x + np.tensordot(weights, states, 1), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mix_lowers_for_accelerators(implementation, platform, dtype):
    _, arguments = problem(4, (1000, 256), dtype)

    def loss(*arguments):
        return jnp.sum(mix(*arguments, implementation=implementation).astype(jnp.float32) ** 2)

    lowered = lowered_for(platform, jax.grad(loss, argnums=(0, 1, 2)), *arguments)
    kernel = {"tpu": "tpu_custom_call", "cuda": "triton"}[platform]
    assert (kernel in lowered) == (implementation == "pallas")


def test_the_default_is_one_of_them():
    _, arguments = problem(3, (5, 7))
    lowered = [jax.jit(partial(mix, implementation=i)).lower(*arguments).as_text() for i in (None, *IMPLEMENTATIONS)]
    assert lowered[0] in lowered[1:]


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"implementation must be.*'cuda'"):
        mix(jnp.zeros(3), jnp.zeros((2, 3)), jnp.zeros(2), implementation="cuda")
