"""Reading n streams as Pallas kernels: their norm and projection, the branch's input, and the derivatives of both.

Numbers a token that cross the memory, as in table 2 of arXiv 2512.24880: `project` reads nC, `collapse` reads nC and
writes C. Backward, `collapse_weights` reads (n+1)C, and `backward` reads (n+1)C and writes nC: the gradients of streams
and of phi from one reading. Between them lie the maps, a few numbers a token, with Sinkhorn a kernel of its own.

Those for GPU are here, those for TPU in stream_read_tpu.py; a TPU has the same ones for phi of many columns.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mhc_jax.kernels import stream_read_tpu
from mhc_jax.kernels.launch import GPU_BLOCK, LANES, by_platform, common, cost, filled, launched, rows, specs
from mhc_jax.streams import norm


class Products(NamedTuple):
    """Blocks of a kernel that multiplies matrices: products of (tokens, features) blocks, `steps` of them in a loop."""

    tokens: int
    features: tuple[int, int]  # the least, for phi of many columns, and the most
    steps: int


GPU_PROJECT, GPU_BACKWARD = Products(32, (16, 128), 8), Products(32, (16, 128), 32)
TPU_PROJECT, TPU_BACKWARD = Products(128, (128, 512), 1), Products(128, (128, 512), 4)


def project(
    streams: Float[Array, "*tokens n C"], phi: Float[Array, "nC m"], epsilon: float
) -> tuple[Float[Array, "*tokens m"], Float[Array, "*tokens 3"]]:
    """vec(X) phi, and `norm.squares` of vec(X), in the dtype of `phi`."""
    del epsilon  # of the squares all three sums are taken in one pass
    tpu = stream_read_tpu.project if _few_columns(streams, phi) else partial(_project, block=TPU_PROJECT)
    raw, squares = by_platform(rows(streams, 2), phi, tpu=tpu, gpu=partial(_project, block=GPU_PROJECT))
    return raw.reshape(*streams.shape[:-2], -1), squares.reshape(*streams.shape[:-2], 3)


def collapse(pre: Float[Array, "*tokens n"], streams: Float[Array, "*tokens n C"]) -> Float[Array, "*tokens C"]:
    """pre X, summed in the dtype of `pre`, in the dtype of the streams."""
    result = by_platform(rows(pre, 1), rows(streams, 2), tpu=stream_read_tpu.collapse, gpu=_collapse)
    return result.reshape(*streams.shape[:-2], -1)


def collapse_weights(
    d_input: Float[Array, "*tokens C"], streams: Float[Array, "*tokens n C"], dtype: Any
) -> Float[Array, "*tokens n"]:
    """The derivative with respect to `pre` of `collapse`, summed in `dtype`."""
    tpu, gpu = (partial(f, dtype=dtype) for f in (stream_read_tpu.collapse_weights, _collapse_weights))
    result = by_platform(rows(d_input, 1), rows(streams, 2), tpu=tpu, gpu=gpu)
    return result.reshape(streams.shape[:-1])


def backward(
    streams: Float[Array, "*tokens n C"],
    phi: Float[Array, "nC m"],
    pre: Float[Array, "*tokens n"],
    d_input: Float[Array, "*tokens C"],
    d_raw: Float[Array, "*tokens m"],
    radial: Float[Array, "*tokens 1"],
    inverse_rms: Float[Array, "*tokens 1"],
) -> tuple[Float[Array, "*tokens n C"], Float[Array, "nC m"]]:
    """The derivative of the streams, d_raw phi^T + radial (vec(X) inverse_rms) + pre d_input, and that of phi,
    vec(X)^T d_raw."""
    arguments = rows(streams, 2), phi, *(rows(array, 1) for array in (pre, d_input, d_raw, radial, inverse_rms))
    tpu = stream_read_tpu.backward if _few_columns(streams, phi) else partial(_backward, block=TPU_BACKWARD)
    d_streams, d_phi = by_platform(*arguments, tpu=tpu, gpu=partial(_backward, block=GPU_BACKWARD))
    return d_streams.reshape(streams.shape), d_phi


def _few_columns(streams: Array, phi: Array) -> bool:
    return streams.shape[-2] * phi.shape[1] <= stream_read_tpu.MAX_COLUMNS


def _tiles(n: int, phi: Array, block: Products) -> tuple[Array, int]:
    """phi^T by streams, (n, height, C), filled up to whole blocks, and the features of a block."""
    columns = phi.shape[1]
    # Products on a GPU are of powers of 2, at least 16; three rows are left for the sums of squares.
    height = max(16, pl.next_power_of_2(columns + 3))
    least, most = block.features
    features = max(least, min(most, 32 * most // height))
    tiles = phi.reshape(n, -1, columns).transpose(0, 2, 1)
    features = common(tiles.shape[2], min(features, LANES), features)
    return jnp.pad(tiles, ((0, 0), (0, height - columns), (0, -tiles.shape[2] % features))), features


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=a.dtype)


def _project(streams: Array, phi: Array, *, block: Products, options: dict[str, Any]) -> tuple[Array, Array]:
    (tokens, n, _), m = streams.shape, phi.shape[1]
    tiles, features = _tiles(n, phi, block)
    height = tiles.shape[1]
    streams = filled(streams, (block.tokens, features))
    span = common(streams.shape[2], features, features * block.steps)

    def kernel(streams_ref: Any, phi_ref: Any, part_ref: Any) -> None:
        sums = jnp.zeros((block.tokens, height), phi.dtype), [jnp.zeros((block.tokens, 1), phi.dtype)] * 3
        # A loop for each stream: a GPU keeps in shared memory what a turn of a loop reads.
        for j in range(n):

            def step(k: Array, sums: tuple[Array, list[Array]], j: int = j) -> tuple[Array, list[Array]]:
                at = pl.ds(pl.multiple_of(k * features, features), features)
                raw, squares = sums
                x = streams_ref[:, j, at].astype(phi.dtype)
                scaled = [x * scale for scale in norm.scales(phi.dtype)]
                squares = [s + jnp.sum(y * y, axis=1, keepdims=True) for s, y in zip(squares, scaled, strict=True)]
                return raw + _product(x, phi_ref[j, :, at], (1, 1)), squares

            sums = lax.fori_loop(0, span // features, step, sums)
        raw, squares = sums
        column = lax.broadcasted_iota(jnp.int32, raw.shape, 1)
        for i, total in enumerate(squares):
            raw = jnp.where(column == m + i, total, raw)
        part_ref[0] = raw

    grid = streams.shape[0] // block.tokens, streams.shape[2] // span
    wide, _, _ = specs(n, height, (block.tokens, span))
    partial_sums = jax.ShapeDtypeStruct((grid[1], streams.shape[0], height), phi.dtype)
    parts = launched(
        kernel,
        grid=grid,
        in_specs=[wide, pl.BlockSpec((n, height, span), lambda t, c: (0, 0, c))],
        out_specs=pl.BlockSpec((1, block.tokens, height), lambda t, c: (c, t, 0)),
        out_shape=partial_sums,
        cost_estimate=cost(2 * (height + 1) * streams.size, streams, tiles, partial_sums),
        name="stream_project",
        **options,
    )(streams, tiles)
    sums = parts.sum(axis=0)[:tokens]
    return sums[:, :m], sums[:, m : m + 3]


def _collapse(pre: Array, streams: Array, *, options: dict[str, Any]) -> Array:
    (tokens, n, features), block = streams.shape, GPU_BLOCK
    streams = filled(streams, block)
    table = filled(pre, (block[0], pl.next_power_of_2(n)))

    def kernel(table_ref: Any, streams_ref: Any, out_ref: Any) -> None:
        total = jnp.zeros(block, pre.dtype)
        for j in range(n):
            total += table_ref[:, j][:, None] * streams_ref[:, j, :].astype(pre.dtype)
        out_ref[...] = total.astype(out_ref.dtype)

    wide, one, maps = specs(n, table.shape[1], block)
    collapsed = jax.ShapeDtypeStruct((streams.shape[0], streams.shape[2]), streams.dtype)
    out = launched(
        kernel,
        grid=(streams.shape[0] // block[0], streams.shape[2] // block[1]),
        in_specs=[maps, wide],
        out_specs=one,
        out_shape=collapsed,
        cost_estimate=cost(2 * streams.size, table, streams, collapsed),
        name="stream_collapse",
        **options,
    )(table, streams)
    return out[:tokens, :features]


def _collapse_weights(d_input: Array, streams: Array, *, dtype: Any, options: dict[str, Any]) -> Array:
    (tokens, n, _), block = streams.shape, GPU_BLOCK
    d_input, streams = filled(d_input, block), filled(streams, block)
    width = pl.next_power_of_2(n)
    grid = streams.shape[0] // block[0], streams.shape[2] // block[1]

    def kernel(d_ref: Any, streams_ref: Any, part_ref: Any) -> None:
        d = d_ref[...].astype(dtype)
        for j in range(n):
            part_ref[0, :, j] = jnp.sum(d * streams_ref[:, j, :].astype(dtype), axis=1)

    wide, one, _ = specs(n, width, block)
    partial_sums = jax.ShapeDtypeStruct((grid[1], streams.shape[0], width), dtype)
    parts = launched(
        kernel,
        grid=grid,
        in_specs=[one, wide],
        # The sums are of one block of features each: programs of a GPU cannot add to one another's.
        out_specs=pl.BlockSpec((1, block[0], width), lambda t, c: (c, t, 0)),
        out_shape=partial_sums,
        cost_estimate=cost(2 * streams.size, d_input, streams, partial_sums),
        name="stream_collapse_weights",
        **options,
    )(d_input, streams)
    return parts[:, :tokens, :n].sum(axis=0)


def _backward(
    streams: Array,
    phi: Array,
    pre: Array,
    d_input: Array,
    d_raw: Array,
    radial: Array,
    inverse_rms: Array,
    *,
    block: Products,
    options: dict[str, Any],
) -> tuple[Array, Array]:
    (tokens, n, width), m, dtype = streams.shape, phi.shape[1], phi.dtype
    tiles, features = _tiles(n, phi, block)
    height = tiles.shape[1]
    features = min(features, LANES)
    many = common(tokens, block.tokens, block.tokens * block.steps)
    streams, d_input = filled(streams, (many, features)), filled(d_input, (many, features))
    d_raw = filled(d_raw, (many, height))
    table = jnp.concatenate([pre, radial, inverse_rms], axis=1)
    table = filled(table, (many, pl.next_power_of_2(n + 2)))

    def kernel(
        streams_ref: Any, d_ref: Any, d_raw_ref: Any, table_ref: Any, phi_ref: Any, d_streams_ref: Any, part_ref: Any
    ) -> None:
        for j in range(n):
            phi_j = phi_ref[j]

            def step(k: Array, d_phi: Array, j: int = j, phi_j: Array = phi_j) -> Array:
                at = pl.ds(pl.multiple_of(k * block.tokens, block.tokens), block.tokens)
                x = streams_ref[at, j, :].astype(dtype)
                d_raw = d_raw_ref[at, :]
                d_x = _product(d_raw, phi_j, (1, 0))
                d_x += table_ref[at, n][:, None] * (table_ref[at, n + 1][:, None] * x)
                d_x += table_ref[at, j][:, None] * d_ref[at, :].astype(dtype)
                d_streams_ref[at, j, :] = d_x.astype(d_streams_ref.dtype)
                return d_phi + _product(d_raw, x, (0, 0))

            part_ref[0, j] = lax.fori_loop(0, many // block.tokens, step, jnp.zeros((height, features), dtype))

    grid = streams.shape[0] // many, streams.shape[2] // features
    wide, one, maps = specs(n, table.shape[1], (many, features))
    partial_sums = jax.ShapeDtypeStruct((grid[0], *tiles.shape[:2], streams.shape[2]), dtype)
    d_streams, parts = launched(
        kernel,
        grid=grid,
        in_specs=[
            wide,
            one,
            pl.BlockSpec((many, height), lambda t, c: (t, 0)),
            maps,
            pl.BlockSpec((n, height, features), lambda t, c: (0, 0, c)),
        ],
        out_specs=[wide, pl.BlockSpec((1, n, height, features), lambda t, c: (t, 0, 0, c))],
        out_shape=[
            jax.ShapeDtypeStruct(streams.shape, streams.dtype),
            partial_sums,
        ],
        cost_estimate=cost(
            4 * (height + 1) * streams.size, streams, d_input, d_raw, table, tiles, streams, partial_sums
        ),
        name="stream_read_backward",
        **options,
    )(streams, d_input, d_raw, table, tiles)
    d_phi = parts.sum(axis=0)[:, :m, :width].transpose(0, 2, 1).reshape(phi.shape)
    return d_streams[:tokens, :, :width], d_phi
