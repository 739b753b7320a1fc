"""The transformer against its mathematics written out, and what a language model must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mhc_jax.models import MHCTransformer
from mhc_jax.training import TrainState, make_train_step

SIZES = {"features": 8, "num_heads": 2, "depth": 3, "max_length": 6}
TOKENS = jnp.array([[1, 5, 2, 7, 3], [4, 4, 0, 9, 6]])


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def attention(x, qkv, out, heads):
    length, width = x.shape
    q, k, v = np.split(x @ qkv, 3, axis=-1)
    result = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        for t in range(length):
            scores = np.array([q[t, part] @ k[s, part] for s in range(t + 1)]) / np.sqrt(width // heads)
            weights = np.exp(scores - scores.max())
            result[t, part] = weights / weights.sum() @ v[: t + 1, part]
    return result @ out


@pytest.mark.parametrize("connection", ["residual", "history"])
def test_the_model_is_its_mathematics(connection):
    options = {"init": "uniform"} if connection == "history" else {}
    model = MHCTransformer(10, **SIZES, connection=connection, rngs=nnx.Rngs(0), **options)
    embedding = np.asarray(model.embed.embedding[...], float)
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, float), nnx.to_pure_dict(nnx.state(model.stack.layers)))
    for row, tokens in enumerate(np.asarray(TOKENS)):
        states = [embedding[tokens] + np.asarray(model.positions.embedding[...], float)[: len(tokens)]]
        for layer in range(3):
            p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers)
            x = states[-1]
            first, second = p["attention"], p["mlp"]
            weights = (first["attention"][name]["kernel"] for name in ("qkv", "out"))
            a = attention(rms(x, first["norm"]["scale"]), *weights, heads=2)
            hidden = np.asarray(jax.nn.gelu(rms(x + a, second["norm"]["scale"]) @ second["up"]["kernel"]), float)
            mixed = x if connection == "residual" else np.mean(states, axis=0)
            states.append(a + hidden @ p["mlp"]["down"]["kernel"] + mixed)
        expected = rms(states[-1], np.asarray(model.norm.scale[...])) @ embedding.T
        np.testing.assert_allclose(model(TOKENS)[row], expected, atol=1e-4)


def test_the_future_is_not_seen():
    model = MHCTransformer(10, **SIZES, rngs=nnx.Rngs(0))
    changed = TOKENS.at[:, 3:].set(0)
    np.testing.assert_allclose(model(TOKENS)[:, :3], model(changed)[:, :3], atol=1e-6)
    assert not np.allclose(model(TOKENS)[:, 3:], model(changed)[:, 3:])


def test_it_learns_a_sequence_by_heart_in_low_precision():
    model = MHCTransformer(10, **SIZES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def loss_fn(model, tokens):
        logits = model(tokens[:, :-1])
        assert logits.dtype == jnp.float32
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), {}

    optimizer = optax.adam(1e-2)
    state, train_step = TrainState.create(model, optimizer), make_train_step(loss_fn, optimizer)
    for _ in range(60):
        state, metrics = train_step(state, TOKENS)
    assert metrics["loss"] < 0.1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="connection must be one of"):
        MHCTransformer(10, **SIZES, connection="highway", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'residual' has no options"):
        MHCTransformer(10, **SIZES, connection="residual", constraint="sparse", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiple of num_heads=3"):
        MHCTransformer(10, **{**SIZES, "num_heads": 3}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="length 7, longer than max_length=6"):
        MHCTransformer(10, **SIZES, rngs=nnx.Rngs(0))(jnp.zeros((1, 7), int))
