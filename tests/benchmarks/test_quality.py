"""The quality study: a run is what a plain loop gives, and what is recorded is not run again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.quality import protocol, train
from benchmarks.quality.arms import ARMS, network
from mhc_jax.nn import ConnectionParam

SIZES = protocol.QUICK.sizes


def plain_loop(arm, sizes, seed, rate):
    """The last loss of held-out text, step by step with optax's Adam."""
    model = network(arm, sizes, seed)
    schedule = [rate * min((i + 1) / sizes.warmup, 1) * (1 - i / sizes.steps) for i in range(sizes.steps)]

    def adam(factor):
        return optax.adam(lambda count: factor * jnp.array(schedule)[count])

    params = nnx.state(model, nnx.Param)
    kinds = {True: adam(arm.maps_rate), False: adam(1.0)}
    of_maps = jax.tree.map(
        lambda leaf: isinstance(leaf, ConnectionParam), params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    optimizer = nnx.Optimizer(model, optax.multi_transform(kinds, of_maps), wrt=nnx.Param)
    batches = protocol.windows(protocol.TRAINED, seed, sizes.length, sizes.steps, sizes.batch)
    for tokens in batches:
        optimizer.update(model, nnx.grad(lambda model, tokens=tokens: model.loss(tokens))(model))
    held_out = protocol.windows(protocol.HELD_OUT, 0, sizes.length, sizes.held_out)
    return model.loss(held_out) / np.log(2)


@pytest.mark.parametrize("name", ["residual", "mHC, maps at 10 times the rate"])
def test_a_run_is_the_one_of_a_plain_loop(name):
    run = train.train(ARMS[name], SIZES, 3, 0.01)
    np.testing.assert_allclose(run["loss"], plain_loop(ARMS[name], SIZES, 3, 0.01), rtol=1e-5)
    assert run["loss"] != train.train(ARMS[name], SIZES, 4, 0.01)["loss"]
