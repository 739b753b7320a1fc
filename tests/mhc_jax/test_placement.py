"""A decoder on a mesh of eight devices: what one device computes, and no device holds more than its part."""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax.models import Decoder, DecoderConfig, attention
from mhc_jax.streams import StreamConfig
from mhc_jax.training import TrainState, make_train_step
from mhc_jax.training.sharding import data_mesh, fully_sharded, replicated, shard_batch

# No two lengths of axes are the same, nor their parts: shapes in a program tell whose they are.
SIZES = DecoderConfig(44, features=32, mlp_features=56, depth=2, num_heads=4, head_dim=6)
ROWS, LENGTH, STREAMS, CHUNK = 16, 20, 3, 10
CONNECTIONS = {"residual": "residual", "history": "history", "streams": StreamConfig(STREAMS)}


class Placed(NamedTuple):
    place: object
    tensor: int = 1
    sequence: int = 1


PLACEMENTS = {
    "fully sharded": Placed(fully_sharded),
    "tensor": Placed(replicated, tensor=4),
    "fully sharded, tensor": Placed(fully_sharded, tensor=2),
    "sequence": Placed(fully_sharded, sequence=4),
    "all": Placed(fully_sharded, tensor=2, sequence=2),
}


def step(connection, placed=None, **options):
    """The parameters and the loss after a step, whose change is the gradient; and the program of a device."""
    optimizer = optax.sgd(1.0)
    state = TrainState.create(Decoder(SIZES, CONNECTIONS[connection], **options, rngs=nnx.Rngs(0)), optimizer)
    tokens = np.random.default_rng(0).integers(0, 44, (ROWS, LENGTH + 1)).astype(np.int32)
    shardings = None
    if placed is not None:
        mesh = data_mesh(placed.tensor, placed.sequence)
        shardings = placed.place(state, mesh)
        state, tokens = jax.device_put(state, shardings), shard_batch(tokens, mesh)

    def loss(model, tokens):
        return model.loss(tokens, chunk=CHUNK), {}

    program = make_train_step(loss, optimizer, shardings=shardings).lower(state, tokens).compile()
    state, metrics = program(state, tokens)
    return jax.tree.map(np.asarray, state.params), metrics["loss"], program.as_text()


@pytest.fixture(scope="module")
def on_one_device():
    return {connection: step(connection)[:2] for connection in CONNECTIONS}


def check(found, expected):
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found[0], expected[0])


def check_states(program, placed):
    """No device sees more of states and streams than its tokens; the shapes of all its arrays."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", program)}
    rows = ROWS * placed.tensor * placed.sequence // jax.device_count()
    own = LENGTH // (placed.sequence * placed.tensor)
    assert (rows, own, SIZES.features) in shapes
    # Of all rows, a device looks up its part of each embedding, before rows are exchanged, and no more.
    part = SIZES.features // (jax.device_count() // placed.tensor)
    looked_up = {(ROWS, LENGTH, part), (ROWS * LENGTH, part), (ROWS * LENGTH, 1, part)}
    seen = {shape for shape in shapes if shape[:2] == (ROWS, LENGTH) or ROWS * LENGTH in shape}
    assert not seen - (looked_up if placed.place is fully_sharded else set())
    streams = {shape[:-2] for shape in shapes if shape[-2:] == (STREAMS, SIZES.features)}
    streams |= {shape[:-1] for shape in shapes if shape[-1] == STREAMS * SIZES.features}
    assert all(np.prod(tokens) <= SIZES.depth * rows * own for tokens in streams)
    return shapes


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_every_placement_computes_what_one_device_does_from_parts(connection, name, on_one_device):
    placed = PLACEMENTS[name]
    *found, program = step(connection, placed)
    check(found, on_one_device[connection])
    shapes = check_states(program, placed)
    # Of heads, MLP and vocabulary a device has its part, in parameters and in states, and of one layer at a time.
    wide = (SIZES.mlp_features, SIZES.vocabulary, SIZES.num_heads * SIZES.head_width)
    gathered = {s for s in shapes for length in wide if length in s and np.prod(s) >= length * SIZES.features}
    assert placed.tensor == 1 or not gathered
    if placed.place is fully_sharded:
        inner = SIZES.mlp_features // placed.tensor
        assert not {(SIZES.depth, SIZES.features, inner), (SIZES.depth, inner, SIZES.features)} & shapes


def test_parameters_are_split_by_their_names_and_what_has_none_by_its_longest_axis():
    state = nnx.state(nnx.eval_shape(lambda: Decoder(SIZES, "streams", rngs=nnx.Rngs(0))), nnx.Param)

    def specs(placed):
        shardings = placed.place(state, data_mesh(placed.tensor, placed.sequence))
        return {"/".join(map(str, path)): leaf.get_value().spec for path, leaf in nnx.to_flat_state(shardings)}

    both, whole = ("sequence", "data"), specs(PLACEMENTS["all"])
    assert whole["stack/layers/self_attn/q_proj/kernel"] == P(None, both, "tensor")
    assert whole["stack/layers/mlp/down_proj/kernel"] == P(None, "tensor", both)
    assert whole["embed_tokens/embedding"] == P("tensor", both)
    assert whole["norm/scale"] == P(both)
    assert whole["stack/layers/attn_hc/bias"] == P(None, both)
    tensor = specs(PLACEMENTS["tensor"])
    assert tensor["lm_head/kernel"] == P(None, "tensor")
    assert all(axis is None for axis in tensor["norm/scale"])


def test_kernels_run_on_the_tokens_of_each_device(on_one_device):
    placed = PLACEMENTS["all"]
    *found, program = step("streams", placed, implementation="pallas")
    check(found, on_one_device["streams"])
    check_states(program, placed)


def test_fused_attention_runs_on_the_rows_queries_and_heads_of_each_device(monkeypatch):
    interpreted = partial(attention.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention.splash, "make_splash_mha", interpreted)
    q, k, v, cotangent = (jax.random.normal(jax.random.key(i), (2, 256, 2, 64)) for i in range(4))
    segments = jnp.repeat(jnp.array([[4, 1, 9], [1, 2, 3]]), jnp.array([50, 130, 76]), axis=1)

    def both(implementation):
        def attend(*arrays):
            return attention.attend(*arrays, segments=segments, implementation=implementation)

        mixed, pullback = jax.vjp(attend, q, k, v)
        return mixed, pullback(cotangent)

    expected = jax.jit(both, static_argnums=0)("plain")
    with jax.set_mesh(data_mesh(tensor=2, sequence=2)):
        found = jax.jit(both, static_argnums=0)("splash")
    assert found[0].sharding.shard_shape(q.shape) == (1, 128, 1, 64)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found, expected)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_on_explicit_axes_it_is_one_device_too(connection, on_one_device):
    graphdef, params = nnx.split(Decoder(SIZES, CONNECTIONS[connection], rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 44, (ROWS, LENGTH + 1)).astype(np.int32)
    mesh = jax.make_mesh((4, 2), ("data", "model"))

    def loss(params, tokens):
        return nnx.merge(graphdef, params).loss(tokens, chunk=CHUNK)

    with jax.set_mesh(mesh):
        arguments = (jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((params, P()), (tokens, P("data"))))
        found, gradient = jax.jit(jax.value_and_grad(loss))(*arguments)
    check((jax.tree.map(jnp.subtract, params, jax.device_get(gradient)), found), on_one_device[connection])
