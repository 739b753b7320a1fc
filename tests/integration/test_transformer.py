"""The transformer in both frameworks: one function, connected in three ways, trained on real text."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import bridge
from mhc_jax.models.transformer import MHCTransformer
from mhc_jax.streams import StreamConfig
from mhc_torch.models.transformer import MHCTransformer as TorchTransformer
from tests.integration.text import windows

SHAPE = {"features": 32, "num_heads": 2, "depth": 2, "max_length": 32}
OPTIONS = [("residual", {}), ("history", {"max_history": 3}), ("streams", {"streams": 3})]


@pytest.mark.parametrize(("connection", "options"), OPTIONS)
def test_the_bridge_moves_it(connection, options):
    jax_model = MHCTransformer(256, connection=connection, rngs=nnx.Rngs(0), **SHAPE, **options)
    torch_model = bridge.convert(jax_model, TorchTransformer(256, connection=connection, **SHAPE, **options))
    tokens = windows(2, 16)
    expected = torch_model(torch.from_numpy(tokens).long()).detach()
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(jax_model, tokens.astype(np.int32)), expected, atol=2e-5)


def trained(connection, steps=60, **options):
    """Bits per byte of the first and last steps of training on the text."""
    model = MHCTransformer(256, connection=connection, rngs=nnx.Rngs(0), **SHAPE, **options)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            logits = model(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean() / jnp.log(2)

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    return np.array([step(model, optimizer, jnp.asarray(windows(8, 33, seed=i), jnp.int32)) for i in range(steps)])


def test_streams_learn_text_from_where_the_residual_network_starts():
    residual, streams = trained("residual"), trained("streams")
    np.testing.assert_allclose(streams[0], residual[0], rtol=1e-4)
    for bits in (residual, streams):
        assert bits[-5:].mean() < 0.7 * bits[0]


def test_options_of_another_connection_are_refused():
    with pytest.raises(ValueError, match="'residual' has no options"):
        MHCTransformer(256, connection="residual", streams=4, rngs=nnx.Rngs(0), **SHAPE)
    with pytest.raises(TypeError, match="config must be of type MHCConfig"):
        MHCTransformer(256, connection="history", config=StreamConfig(), rngs=nnx.Rngs(0), **SHAPE)
    with pytest.raises(ValueError, match="connection must be one of"):
        TorchTransformer(256, connection="dense", **SHAPE)


@pytest.mark.usefixtures("unchecked")
def test_the_torch_twin_compiles_as_one_graph():
    torch.manual_seed(0)
    model = TorchTransformer(256, connection="streams", **SHAPE)
    tokens = torch.from_numpy(windows(2, 16).astype(np.int64))
    expected = model(tokens)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), expected)
