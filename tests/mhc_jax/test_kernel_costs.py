"""Every Pallas kernel tells XLA what it costs: the compiler cannot look into one, and plans around it by that."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from mhc_jax import mix, streams

N, WIDTH, TOKENS = 4, 256, 64
CONFIG = streams.StreamConfig(N)
X = jnp.ones((TOKENS, N, WIDTH))


def kernels_of(function, *arguments):
    """Equations of all kernel calls, in the branches of every platform."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation
                continue
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    if isinstance(inner, core.ClosedJaxpr):
                        yield from walk(inner.jaxpr)
                    elif isinstance(inner, core.Jaxpr):
                        yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def history_mix(x, states, weights):
    return mix(x, states, weights, implementation="pallas")


def read(params, x):
    return streams.read(params, x, CONFIG, implementation="pallas")


def write(x, output, post, res):
    return streams.write(x, output, post, res, implementation="pallas")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (history_mix, (X[0], jnp.ones((3, *X[0].shape)), jnp.ones(3))),
        (read, (streams.init_params(CONFIG, WIDTH), X)),
        (write, (X, X[:, 0], jnp.ones((TOKENS, N)), jnp.ones((TOKENS, N, N)))),
    ],
)
def test_every_kernel_has_a_name_and_says_what_it_moves(function, arguments):
    def forward_and_backward(*arguments):
        out, pullback = jax.vjp(function, *arguments)
        return out, pullback(out)

    found = kernels_of(forward_and_backward, *arguments)
    assert found
    for equation in found:
        name, cost = equation.params["name"], equation.params["cost_estimate"]
        assert name not in (None, "kernel")
        arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
        moved = sum(array.size * array.dtype.itemsize for array in arrays)
        # Beside these there is at most a table of a few weights.
        assert moved - 4096 <= cost.bytes_accessed <= moved, name
        assert cost.flops >= max(array.size for array in arrays), name
