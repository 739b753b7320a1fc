"""apply_layers and MHCStack: value, gradient and second derivative against NumPy in float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhc_jax import MHCConfig, apply_layers, mix
from mhc_jax.nn import MHCStack
from tests import reference

WIDTH, BATCH = 3, 2
# Few, since a compiled program is kept of each. The window is wider than a ring of cotangents in one of them.
CASES = [
    (6, MHCConfig(max_history=3), jnp.float64),
    (11, MHCConfig(max_history=10, detach_history=True), jnp.float64),
    (5, MHCConfig(max_history=2, detach_history=True, constraint="identity", use_gating=True), jnp.float64),
    (6, MHCConfig(max_history=4, constraint="sparse", temperature=0.5), jnp.float32),
    (4, MHCConfig(max_history=3, mode="hc", prune_threshold=0.05), jnp.float16),
]
TOLERANCE = {jnp.float64: 1e-7, jnp.float32: 1e-4, jnp.float16: 3e-2}


def branch(w, x):
    return jnp.tanh(x @ w)


def objective(apply, arrays, weights):
    return jnp.sum(weights * apply(*arrays))


@cache
def derivatives(case):
    _, config, dtype = CASES[case]

    def apply(w, x, logits, gates):
        gates = gates if config.use_gating else None
        out = apply_layers(branch, w, x, logits, config, gate_logits=gates)
        return out.astype(jnp.float32 if dtype == jnp.float16 else dtype)

    def all_of(arrays, weights, direction):
        value_and_gradient = jax.value_and_grad(partial(objective, apply))
        if dtype != jnp.float64:
            return *value_and_gradient(arrays, weights), None
        (value, gradient), (_, second) = jax.jvp(
            lambda arrays: value_and_gradient(arrays, weights), (arrays,), (direction,)
        )
        return value, gradient, second

    return jax.jit(all_of)


def numpy_objective(config, arrays, weights, frozen=None):
    """The objective and the states. With detached history the mixed states are `frozen`, if they are given."""
    w, x, logits, gates = arrays
    states = [x]
    for layer in range(len(w)):
        live = min(layer + 1, config.max_history)
        row = reference.mixing_weights(
            logits[layer, config.max_history - live :],
            config.mode,
            config.constraint,
            config.epsilon,
            config.temperature,
            gates[layer] if config.use_gating else None,
            config.prune_threshold,
        )
        window = (states if frozen is None else frozen[: layer + 1])[-live:]
        states.append(np.tanh(states[-1] @ w[layer]) + sum(a * b for a, b in zip(row, window, strict=True)))
    return np.sum(weights * states[-1]), states


def trial(seed: int) -> None:
    rng = np.random.default_rng(seed)
    if seed % 8 == 7:
        stack_trial(rng)
        return
    case = seed % 8 % len(CASES)
    depth, config, dtype = CASES[case]
    shapes = (depth, WIDTH, WIDTH), (BATCH, WIDTH), (depth, config.max_history), (depth,)
    scale = 10.0 ** rng.uniform(-2, 1.5)
    sizes = 1.0, scale, rng.choice([0.1, 1.0, 3.0]), 1.0

    def drawn():
        arrays = [size * rng.normal(size=shape) for size, shape in zip(sizes, shapes, strict=True)]
        return [np.asarray(a, b) for a, b in zip(arrays, dtypes, strict=True)]

    # States in half precision, all parameters in single.
    others = jnp.float32 if dtype == jnp.float16 else dtype
    dtypes = others, dtype, others, others
    arrays, direction, weights = drawn(), drawn(), rng.normal(size=shapes[1])
    with jax.enable_x64(dtype == jnp.float64):
        given = tuple(map(jnp.asarray, arrays)), jnp.asarray(weights, others), tuple(map(jnp.asarray, direction))
        value, gradient, second = jax.tree.map(np.float64, derivatives(case)(*given))
    arrays, direction = ([np.asarray(a, np.float64) for a in many] for many in (arrays, direction))
    expected, states = numpy_objective(config, arrays, weights)
    frozen = states if config.detach_history else None

    def moved(step):
        there = [a + step * d for a, d in zip(arrays, direction, strict=True)]
        return numpy_objective(config, there, weights, frozen)[0]

    slope = sum(np.sum(a * b) for a, b in zip(gradient, direction, strict=True))
    tolerance = TOLERANCE[dtype]
    size = 1 + np.sum(np.abs(weights)) * max(np.abs(state).max() for state in states)
    assert abs(value - expected) <= tolerance * size, f"value {value}, expected {expected}: {config}"
    if config.constraint == "sparse" or config.prune_threshold:
        return  # kinks: a difference quotient may lie across one

    def first_order(h):
        near, far = moved(h) - moved(-h), moved(2 * h) - moved(-2 * h)
        return (8 * near - far) / (12 * h)

    def second_order(h):
        near, far = moved(h) + moved(-h), moved(2 * h) + moved(-2 * h)
        return (16 * near - far - 30 * moved(0)) / (12 * h**2)

    quotient, unsure = quotient_of(first_order, 1e-5 / max(1.0, scale))
    size = sum(np.sum(np.abs(a * b)) for a, b in zip(gradient, direction, strict=True)) + 1
    error = max(tolerance, 1e-6) * size + unsure
    assert abs(slope - quotient) <= error, f"slope {slope}, expected {quotient}: {config}"
    if second is None:
        return
    curvature = sum(np.sum(a * b) for a, b in zip(second, direction, strict=True))
    quotient, unsure = quotient_of(second_order, 1e-3 / max(1.0, scale))
    size = sum(np.sum(np.abs(a * b)) for a, b in zip(second, direction, strict=True)) + size
    error = 1e-3 * size + unsure
    assert abs(curvature - quotient) <= error, f"second derivative {curvature}, expected {quotient}: {config}"


def quotient_of(quotient, step):
    """A difference quotient, and what it may be wrong by: that of half the step is as far from it as it is wrong."""
    half = quotient(step / 2)
    return half, 2 * abs(half - quotient(step))


def stack_trial(rng: np.random.Generator) -> None:
    """A stack outside jit, whose parameters change between calls, and a step of `mix`."""
    stack = one_stack()
    kernels, x = rng.normal(size=(4, WIDTH, WIDTH)), rng.normal(size=(BATCH, WIDTH))
    stack.layers.kernel[...] = jnp.asarray(kernels, jnp.float32)
    logits = rng.normal(size=(4, 2))
    stack.mixing_logits[...] = jnp.asarray(logits, jnp.float32)
    branches = [lambda x, kernel=kernel: x @ kernel for kernel in kernels]
    rows = lambda layer, live: reference.mixing_weights(logits[layer, 2 - live :])  # noqa: E731
    states = reference.history_states(branches, x, rows, 2)
    np.testing.assert_allclose(stack(jnp.asarray(x, jnp.float32)), states[-1], atol=1e-4 * np.abs(states[-1]).max())
    window, weights = np.stack(states[-3:]), rng.normal(size=3)
    mixed = mix(*(jnp.asarray(a, jnp.float32) for a in (x, window, weights)))
    np.testing.assert_allclose(mixed, x + np.tensordot(weights, window, 1), atol=1e-5 * (1 + np.abs(window).max()))


@cache
def one_stack() -> MHCStack:
    return MHCStack(lambda rngs: nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs), 4, 2, rngs=nnx.Rngs(0))
