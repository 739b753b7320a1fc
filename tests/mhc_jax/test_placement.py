"""A decoder on a mesh: each device computes for its rows alone, and what one device does."""

import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.training import TrainState, make_train_step
from mhc_jax.training.sharding import data_mesh, fully_sharded, shard_batch

SIZES = DecoderConfig(24, features=32, mlp_features=48, depth=3, num_heads=4)
BATCH, LENGTH = 16, 7


def step_and_state(connection, mesh=None):
    optimizer = optax.sgd(1.0)
    state = TrainState.create(Decoder(SIZES, connection, rngs=nnx.Rngs(0)), optimizer)
    tokens = np.random.default_rng(0).integers(0, 24, (BATCH, LENGTH + 1)).astype(np.int32)
    shardings = None
    if mesh is not None:
        shardings = fully_sharded(state, mesh)
        state, tokens = jax.device_put(state, shardings), shard_batch(tokens, mesh)
    step = make_train_step(lambda model, tokens: (model.loss(tokens), {}), optimizer, shardings=shardings)
    return step, state, tokens


@pytest.mark.parametrize("connection", ["residual", "history", "streams"])
def test_with_parameters_split_no_device_sees_the_rows_of_another(connection):
    step, state, tokens = step_and_state(connection)
    whole = step(state, tokens)
    step, state, tokens = step_and_state(connection, data_mesh())
    program = step.lower(state, tokens).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", program)}
    rows = BATCH // jax.device_count()
    assert any(shape[:2] == (rows, LENGTH) for shape in shapes)
    # Of all rows, a device looks up its part of each embedding, before the rows are exchanged, and no more.
    looked_up = {(BATCH, LENGTH, 4), (BATCH * LENGTH, 4)}
    assert not {s for s in shapes if s[:2] == (BATCH, LENGTH) or BATCH * LENGTH in s} - looked_up
    split = step(state, tokens)
    np.testing.assert_allclose(split[1]["loss"], whole[1]["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), split[0].params, whole[0].params)
