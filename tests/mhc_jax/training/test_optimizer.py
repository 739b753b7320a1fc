"""AdamW with its schedule, against its equations in float64; what trains and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mhc_jax.models import DecoderConfig
from mhc_jax.training.config import ModelConfig, OptimizerConfig
from mhc_jax.training.optimizer import make_optimizer, named


def test_updates_are_those_of_the_equations():
    config = OptimizerConfig(learning_rate=0.1, warmup=2, final=0.2, weight_decay=0.3, clip=1.0, decay=("*/kernel",))
    params = {"a": {"kernel": jnp.array([1.0, -2.0]), "scale": jnp.array([3.0])}}
    optimizer = make_optimizer(config, 6, params)
    state = optimizer.init(params)
    names = {"kernel": np.array([1.0, -2.0]), "scale": np.array([3.0])}
    first, second = ({name: 0 * value for name, value in names.items()} for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(6):
        grads = {name: rng.normal(size=value.shape) for name, value in names.items()}
        updates, state = optimizer.update({"a": jax.tree.map(jnp.float32, grads)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        rate = 0.1 * step / 2 if step < 2 else 0.1 * (0.2 + 0.8 * (1 + np.cos(np.pi * (step - 2) / 4)) / 2)
        for name, value in names.items():
            g = grads[name] / max(norm, 1)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            decay = 0.3 * value if name == "kernel" else 0
            names[name] = value - rate * (m / (np.sqrt(v) + 1e-8) + decay)
            np.testing.assert_allclose(params["a"][name], names[name], rtol=1e-5)


@pytest.mark.parametrize("connection", ["residual", "history", "streams"])
def test_matrices_and_embeddings_decay_and_connections_do_not(connection):
    sizes = DecoderConfig(256, features=8, mlp_features=8, depth=2, num_heads=1, qk_norm=True)
    params = nnx.state(ModelConfig(sizes, connection).make(nnx.Rngs(0)), nnx.Param)
    optimizer = make_optimizer(OptimizerConfig(warmup=0), 9, params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    decayed = named(updates, lambda name: name)
    changed = {n for n, u in zip(jax.tree.leaves(decayed), jax.tree.leaves(updates), strict=True) if (u != 0).any()}
    layers = [f"self_attn/{k}_proj" for k in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    expected = {"embed_tokens/embedding", "lm_head/kernel"} | {f"stack/layers/{name}/kernel" for name in layers}
    assert changed == expected


def test_what_does_not_train_stays_and_has_no_moments():
    params = {"a": {"kernel": jnp.ones(3)}, "b": {"kernel": jnp.ones(5)}}
    optimizer = make_optimizer(OptimizerConfig(train=("b/*",), decay=(), warmup=0), 9, params)
    state = optimizer.init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(5,), ()}
    updates, _ = optimizer.update(params, state, params)
    assert (updates["a"]["kernel"] == 0).all()
    assert (updates["b"]["kernel"] != 0).all()


@pytest.mark.parametrize("field", ["train", "decay"])
def test_a_pattern_that_is_no_name_is_refused(field):
    with pytest.raises(ValueError, match=rf"optimizer.{field}: no parameter has a name as 'c/\*'; they are .*a/kernel"):
        make_optimizer(OptimizerConfig(**{field: ("c/*",)}), 9, {"a": {"kernel": jnp.ones(3)}})
