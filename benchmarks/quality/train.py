"""One run of the study: an arm, a seed and a learning rate, as one compiled program, which two runs can share."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.quality.arms import Arm, network
from benchmarks.quality.protocol import HELD_OUT, TRAINED, Sizes, windows
from benchmarks.quality.watch import gains, learned
from mhc_jax.nn import ConnectionParam

WATCHED = 8  # windows of the held-out text on which maps are looked at


def rates(rate: jax.Array | float, sizes: Sizes) -> jax.Array:
    """The learning rate of every step: up in a straight line, and down to 0."""
    steps = jnp.arange(sizes.steps)
    return rate * jnp.minimum((steps + 1) / sizes.warmup, 1) * (1 - steps / sizes.steps)


@cache
def program(arm: Arm, sizes: Sizes) -> Callable[..., dict[str, Any]]:
    """(parameters, tokens (steps, B, T + 1), held-out tokens, rate) to what happened, compiled once."""
    graphdef, params, *others = nnx.split(network(arm, sizes, 0), nnx.Param, ...)
    rest: Any = others[0]
    optimizer = optax.scale_by_adam()

    def factor(variable: Any) -> Any:
        return jax.tree.map(lambda _: arm.maps_rate if isinstance(variable, ConnectionParam) else 1.0, variable)

    factors = jax.tree.map(factor, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def model(params: Any) -> Any:
        return nnx.merge(graphdef, params, rest)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return model(params).loss(tokens) / jnp.log(2)

    def step(carry: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, state = carry
        tokens, rate = given
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state)
        params = jax.tree.map(lambda leaf, update, factor: leaf - rate * factor * update, params, updates, factors)
        return (params, state), (value, optax.tree.norm(gradient))

    @jax.jit
    def run(params: Any, tokens: jax.Array, held_out: jax.Array, rate: jax.Array) -> dict[str, Any]:
        watched = held_out[:WATCHED, :-1]

        def stretch(carry: Any, given: Any) -> tuple[Any, Any]:
            carry, (losses, norms) = jax.lax.scan(step, carry, given)
            return carry, (losses.mean(), norms, *gains(model(carry[0]), watched))

        given = jax.tree.map(lambda leaf: leaf.reshape(-1, sizes.every, *leaf.shape[1:]), (tokens, rates(rate, sizes)))
        (after, _), (losses, norms, gain, largest) = jax.lax.scan(stretch, (params, optimizer.init(params)), given)
        return {
            "loss": loss(after, held_out),
            "training loss": losses,
            "first gradient norm": norms[0, 0],
            "gradient norm": norms.max(1),
            "gain": gain,
            "largest gain": largest,
            **learned(model(params), model(after), watched),
        }

    return run


def train(arm: Arm, sizes: Sizes, seed: int, rate: float) -> dict[str, Any]:
    """What happened in one run, of sizes that the arm has not changed yet; lists are over stretches of the run.

    The seed says which weights it starts with, and which text it sees. `loss` is that of the held-out text, in bits per
    byte; `training loss` the mean, `gradient norm` the largest of a stretch; gains and the rest are `watch`'s.
    """
    sizes = arm.sized(sizes)
    params = nnx.state(network(arm, sizes, seed), nnx.Param)
    tokens = windows(TRAINED, seed, sizes.length, sizes.steps, sizes.batch)
    held_out = windows(HELD_OUT, 0, sizes.length, sizes.held_out)
    found = program(arm, sizes)(params, tokens, held_out, jnp.float32(rate))
    return jax.tree.map(_plain, jax.device_get(found))


def _plain(values: Any) -> Any:
    """Numbers to 6 digits, so that a record can be read; what is not finite is None, as JSON has it."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None
