"""Streams by XLA and by kernels, in and out of ordinary range: value, gradient, second derivative against NumPy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax import streams
from mhc_jax.streams import StreamConfig, StreamParams
from tests import streams_reference as reference

WIDTH, TOKENS = 3, 2
# Few, since a compiled program is kept of each.
CASES = [
    (StreamConfig(2, iterations=3), None, jnp.float64),
    (StreamConfig(3, "permutations", epsilon=1e-3), None, jnp.float64),
    (StreamConfig(2, iterations=2, norm_epsilon=0.0), None, jnp.float32),
    (StreamConfig(2, "none"), "pallas", jnp.float32),
    (StreamConfig(2, order="rows", iterations=2, norm="rms_outside", norm_epsilon=0.0), None, jnp.float32),
    (StreamConfig(2, "identity", norm="streams", norm_epsilon=0.0), None, jnp.float32),
]


def branch(x):
    return np.sin(x) if isinstance(x, np.ndarray) else jnp.sin(x)


@cache
def derivatives(case):
    config, implementation, dtype = CASES[case]
    layer = streams.wrap(branch, config, implementation=implementation)

    def objective(arrays, weights):
        out = layer(*arrays)
        return jnp.sum(weights * out), out

    def all_of(arrays, weights, direction):
        gradient = jax.grad(objective, has_aux=True)
        if dtype != jnp.float64:
            return *gradient(arrays, weights), None
        (gradients, out), (second, _) = jax.jvp(lambda arrays: gradient(arrays, weights), (arrays,), (direction,))
        return gradients, out, second

    return jax.jit(all_of)


def trial(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = seed % len(CASES)
    config, _, dtype = CASES[case]
    features = config.streams * WIDTH
    exponent = rng.uniform(-1, 1) if dtype == jnp.float64 else rng.uniform(-30, 35)
    # Smaller ones are no longer normalized where norm_epsilon is all that counts.
    scale = 10.0 ** (exponent if config.norm_epsilon == 0 else max(exponent, -3))
    shapes = (features, config.logits), (3,), (config.logits,), (TOKENS, config.streams, WIDTH)

    def drawn():
        phi, alpha, bias, x = (np.asarray(rng.normal(size=shape), dtype) for shape in shapes)
        return StreamParams(phi, alpha, bias), np.asarray(scale * x, dtype)

    (params, x), direction, weights = drawn(), drawn(), rng.normal(size=shapes[-1])
    with jax.enable_x64(dtype == jnp.float64):
        given = jax.tree.map(jnp.asarray, ((params, x), weights.astype(dtype), direction))
        gradient, out, second = jax.tree.map(partial(np.asarray, dtype=np.float64), derivatives(case)(*given))
    params, x, direction = jax.tree.map(np.float64, (params, x, direction))
    options = reference.options(config)

    def value(step):
        there = jax.tree.map(lambda a, d: a + step * d, (params, x), direction)
        return np.sum(weights * reference.layer(*there[0], there[1], branch, **options))

    expected = reference.layer(*params, x, branch, **options)
    # The sine of a large number is as uncertain as the number; what it adds is at most `post`.
    slack = (1e-9 if dtype == jnp.float64 else 1e-3) * np.abs(expected).max() + (10.0 if scale > 1 else 0.0) * (
        dtype == jnp.float32
    )
    assert np.abs(out - expected).max() <= slack, f"streams of {scale:.3g}, {config}: {out}, expected {expected}"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), f"gradients of streams of {scale:.3g}"
    if scale > 10:
        return  # the derivative of the sine is of no meaning there
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    slope, size = sum(np.sum(a * b) for a, b in pairs), sum(np.sum(np.abs(a * b)) for a, b in pairs)
    quotient = (value(1e-5) - value(-1e-5)) / 2e-5
    tolerance = 1e-5 if dtype == jnp.float64 else 2e-3
    assert abs(slope - quotient) <= tolerance * size, f"slope {slope}, expected {quotient}: {scale:.3g} {config}"
    if second is None:
        return
    pairs = list(zip(jax.tree.leaves(second), jax.tree.leaves(direction), strict=True))
    curvature, size = sum(np.sum(a * b) for a, b in pairs), size + sum(np.sum(np.abs(a * b)) for a, b in pairs)
    quotient = (value(1e-4) - 2 * value(0) + value(-1e-4)) / 1e-8
    assert abs(curvature - quotient) <= 1e-4 * size, f"second derivative {curvature}, expected {quotient}: {config}"
