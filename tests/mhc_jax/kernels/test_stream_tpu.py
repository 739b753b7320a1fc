"""The kernels that TPUs have for themselves, interpreted, against the equations in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mhc_jax.kernels import stream_read_tpu as read_kernels
from mhc_jax.kernels import stream_write_tpu as write_kernels
from mhc_jax.kernels import tpu_tiles
from mhc_jax.streams import norm

CASES = [
    ((1, 5, 20), jnp.float32),
    ((2, 130, 100), jnp.float64),
    ((3, 12, 300), jnp.bfloat16),
    ((4, 200, 256), jnp.bfloat16),
    ((5, 9, 128), jnp.float32),
    ((16, 3, 40), jnp.float64),
]
"""Streams, tokens, width; dtype of the streams."""


def merge(x, y, post, res):
    return np.einsum("tij,tjc->tic", res, x) + post[..., None] * y[:, None]


def merge_backward(d, x, y, post, res):
    return (
        np.einsum("tij,tic->tjc", res, d),
        np.einsum("ti,tic->tc", post, d),
        np.einsum("tic,tc->ti", d, y),
        np.einsum("tic,tjc->tij", d, x),
    )


def project(x, phi):
    flat = x.reshape(len(x), -1)
    return flat @ phi, np.sum(flat**2, axis=1)


def project_and_plain_squares(x, phi, **options):
    raw, squares = read_kernels.project(x, phi, **options)
    return raw, squares[:, 0]


def read_backward(x, phi, pre, d_input, d_raw, radial, inverse_rms):
    through_phi = (d_raw @ phi.T).reshape(x.shape)
    d_x = through_phi + (radial * inverse_rms)[..., None] * x + pre[..., None] * d_input[:, None]
    return d_x, x.reshape(len(x), -1).T @ d_raw


OPERATIONS = {
    "read_backward": (read_kernels.backward, read_backward, ("wide", "phi", "n", "one", "raw", "1", "1")),
    "collapse": (read_kernels.collapse, lambda pre, x: np.einsum("ti,tic->tc", pre, x), ("n", "wide")),
    "collapse_weights": (
        lambda d, x, **options: read_kernels.collapse_weights(
            d, x, dtype=jnp.promote_types(d.dtype, jnp.float32), **options
        ),
        lambda d, x: np.einsum("tc,tic->ti", d, x),
        ("one", "wide"),
    ),
    "project": (project_and_plain_squares, project, ("wide", "phi")),
    "write": (write_kernels.forward, merge, ("wide", "one", "n", "n n")),
    "write_backward": (write_kernels.backward, merge_backward, ("wide", "wide", "one", "n", "n n")),
}


def arrays(kinds, shape, dtype):
    """What an operation takes: arrays of streams in `dtype`, those of maps in float32 or float64."""
    n, tokens, width = shape
    rng = np.random.default_rng(n)
    sizes = {"wide": (tokens, n, width), "one": (tokens, width), "n": (tokens, n), "n n": (tokens, n, n)}
    sizes |= {"phi": (n * width, 2 * n + 1), "raw": (tokens, 2 * n + 1), "1": (tokens, 1)}
    maps = jnp.promote_types(dtype, jnp.float32)
    return [jnp.asarray(rng.normal(size=sizes[k]), dtype if k in ("wide", "one") else maps) for k in kinds]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_are_those_of_the_equations(name, shape, dtype, monkeypatch):
    kernel, equation, kinds = OPERATIONS[name]
    # Several turns over features, and several steps in each.
    monkeypatch.setattr(tpu_tiles, "_FEATURES", 128)
    monkeypatch.setattr(tpu_tiles, "_TILES", 2 * 2**20)
    with jax.enable_x64(dtype == jnp.float64):
        given = arrays(kinds, shape, dtype)
        found = jax.tree.leaves(jax.jit(partial(kernel, options={"interpret": True}))(*given))
        expected = equation(*(np.float64(a) for a in given))
    expected = expected if isinstance(expected, tuple) else (expected,)
    # Streams in bfloat16 have 8 bits, as has what goes through phi; other sums have 16 bits of every coefficient.
    error = {jnp.float64: 1e-13, jnp.float32: 1e-6, jnp.bfloat16: 8e-3 if name == "read_backward" else 4e-3}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        sums = dtype == jnp.bfloat16 and a.dtype == jnp.float32 and name != "read_backward"
        close = 3e-5 if sums else error
        np.testing.assert_allclose(np.float64(a), b, rtol=0, atol=close * np.abs(b).max())


@pytest.mark.parametrize("name", OPERATIONS)
def test_turns_do_not_race(name):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    kernel, equation, kinds = OPERATIONS[name]
    given = arrays(kinds, (2, 130, 100), jnp.float32)
    found = jax.tree.leaves(kernel(*given, options={"interpret": pltpu.InterpretParams(detect_races=True)}))
    expected = equation(*(np.float64(a) for a in given))
    for a, b in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
    assert not interpreter.races.races_found


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_squares_of_numbers_of_any_size(size, monkeypatch):
    monkeypatch.setattr(tpu_tiles, "_TILES", 2 * 2**20)
    x, phi = arrays(("wide", "phi"), (2, 20, 2000), jnp.float32)
    x = x.at[3:].multiply(size)
    _, squares = read_kernels.project(x, phi, options={"interpret": True})
    found = norm.inverse_rms_of_squares(squares, phi.shape[0], 0.0)
    expected = 1 / np.sqrt(np.mean(np.float64(x).reshape(20, -1) ** 2, axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
