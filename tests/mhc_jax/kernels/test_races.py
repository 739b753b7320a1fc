"""Kernels in the semantics of a TPU, with its blocks: memory that arrives late, and turns of the grid that may race."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mhc_jax import streams
from mhc_jax.history import mix
from mhc_jax.streams import StreamConfig


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Makes this machine run the kernels as a TPU would, and tells whether turns raced."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    def of_a_tpu(*arguments, default=None, **forms):
        return forms.get("tpu", default)(*arguments)

    checked = pltpu.InterpretParams(detect_races=True)
    monkeypatch.setattr(jax.lax, "platform_dependent", of_a_tpu)
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=checked))
    jax.clear_caches()
    yield lambda: interpreter.races.races_found
    jax.clear_caches()


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


TOKENS, N, WIDTH = 140, 2, 600  # more than one block of each
CONFIG = StreamConfig(N, iterations=2)


def read(implementation, *arguments):
    return streams.read(*arguments, CONFIG, implementation=implementation)


def write(implementation, *arguments):
    return streams.write(*arguments, implementation=implementation)


def mixed(implementation, *arguments):
    return mix(*arguments, implementation=implementation)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (read, (((N * WIDTH, CONFIG.logits), (3,), (CONFIG.logits,)), (TOKENS, N, WIDTH))),
        (write, ((TOKENS, N, WIDTH), (TOKENS, WIDTH), (TOKENS, N), (TOKENS, N, N))),
        (mixed, ((300, 140), (2, 300, 140), (2,))),
    ],
)
def test_turns_of_the_grid_do_not_race(as_on_a_tpu, function, shapes):
    arguments = jax.tree.map(lambda s: draw(len(s), *s), shapes, is_leaf=lambda s: isinstance(s[0], int))
    if function is read:
        arguments = streams.StreamParams(*arguments[0]), arguments[1]

    def forward_and_backward(implementation):
        out, pullback = jax.vjp(partial(function, implementation), *arguments)
        return out, pullback(out)

    found, expected = forward_and_backward("pallas"), forward_and_backward("xla")
    assert not as_on_a_tpu()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
