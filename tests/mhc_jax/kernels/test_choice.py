"""Who decides which form of an operation runs: the caller, or a table by platform."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mhc_jax.history import apply_layers, mix
from mhc_jax.kernels import choice
from mhc_jax.models import Decoder, DecoderConfig, MHCResNet
from mhc_jax.nn import (
    HyperConnections,
    MatrixMHCSkip,
    MHCBasicBlock,
    MHCBottleneck,
    MHCConv,
    MHCSequential,
    MHCSkip,
    MHCStack,
    StreamHead,
)

ARGUMENTS = jnp.ones(128), jnp.ones((2, 128)), jnp.ones(2)


def kernels(function, platform, *arguments):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return lowered.count("tpu_custom_call") + lowered.count("triton")


def test_none_is_what_the_table_says_of_the_platform_that_is_compiled_for(monkeypatch):
    assert kernels(mix, "tpu", *ARGUMENTS) == kernels(mix, "cuda", *ARGUMENTS) == 0
    monkeypatch.setattr(choice, "CHOICES", {"mix": {"tpu": "pallas"}})
    jax.clear_caches()
    assert kernels(mix, "tpu", *ARGUMENTS)
    assert kernels(mix, "cuda", *ARGUMENTS) == 0
    # A caller's word goes before the table's.
    assert kernels(lambda *a: mix(*a, implementation="xla"), "tpu", *ARGUMENTS) == 0


def test_modules_pass_the_implementation_on():
    x, history, rngs = jnp.ones((2, 8)), [jnp.ones((2, 8))] * 2, nnx.Rngs(0)
    linear = nnx.Linear(8, 8, rngs=rngs)
    calls = [
        (MHCSkip(2, implementation="pallas"), (x, history)),
        (MatrixMHCSkip(2, implementation="pallas", rngs=rngs), (x, history)),
        (MHCSequential([linear], implementation="pallas"), (x,)),
        (StreamHead(8, implementation="pallas"), (jnp.ones((2, 4, 8)),)),
        (HyperConnections(linear, 8, implementation="pallas"), (jnp.ones((2, 4, 8)),)),
        (MHCConv(3, 3, (1, 1), implementation="pallas", rngs=rngs), (jnp.ones((2, 4, 4, 3)),)),
        (MHCBasicBlock(3, 3, implementation="pallas", rngs=rngs), (jnp.ones((2, 4, 4, 3)),)),
        (MHCBottleneck(4, 1, implementation="pallas", rngs=rngs), (jnp.ones((2, 4, 4, 4)),)),
        (MHCResNet((1,), 2, features=4, implementation="pallas", rngs=rngs), (jnp.ones((2, 4, 4, 3)),)),
    ]
    for module, arguments in calls:
        graph, state = nnx.split(module)
        assert kernels(lambda s, *a, graph=graph: nnx.merge(graph, s)(*a), "tpu", state, *arguments), type(module)


def test_a_decoder_passes_the_implementation_to_its_connections():
    config = DecoderConfig(10, features=8, mlp_features=8, num_heads=2, depth=2)
    model = Decoder(config, "streams", implementation="pallas", attention="plain", rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    assert kernels(lambda s, t: nnx.merge(graph, s)(t), "tpu", state, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="implementation is of use to connection='streams' alone, got 'pallas'"):
        Decoder(config, "history", implementation="pallas", rngs=nnx.Rngs(0))


def test_a_kernel_that_does_not_exist_is_refused_where_it_is_asked_for():
    with pytest.raises(ValueError, match=r"implementation='pallas': apply_layers has no kernel.*use None or 'xla'"):
        MHCStack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), depth=2, implementation="pallas", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="apply_layers has no kernel"):
        apply_layers(lambda p, x: p * x, jnp.ones(2), jnp.ones(3), jnp.zeros((2, 4)), implementation="pallas")
    for module in (MHCSkip, lambda **o: StreamHead(8, **o), lambda **o: HyperConnections(jnp.tanh, 8, **o)):
        with pytest.raises(ValueError, match="implementation must be 'xla', 'pallas' or None, got 'triton'"):
            module(implementation="triton")
