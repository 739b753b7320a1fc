"""The merge of n streams as Pallas kernels: forward reads (n+1)C numbers a token and writes nC, backward reads (2n+1)C
and writes (n+1)C, each in one pass (arXiv 2512.24880, section 4.3.1). Those for GPU are here, those for TPU in
stream_write_tpu.py."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mhc_jax.kernels import stream_write_tpu
from mhc_jax.kernels.launch import GPU_BLOCK, by_platform, cost, filled, launched, rows, specs


def write(
    streams: Float[Array, "*tokens n C"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"],
) -> Float[Array, "*tokens n C"]:
    """``mhc_jax.streams.write``: res @ streams + post ⊗ output, summed in the dtype of the maps."""
    arguments = rows(streams, 2), rows(output, 1), rows(post, 1), rows(res, 2)
    return by_platform(*arguments, tpu=stream_write_tpu.forward, gpu=_forward).reshape(streams.shape)


def write_backward(
    cotangent: Float[Array, "*tokens n C"],
    streams: Float[Array, "*tokens n C"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"],
) -> tuple[Array, Array, Array, Array]:
    """The derivatives of the four arguments of `write`."""
    arguments = rows(cotangent, 2), rows(streams, 2), rows(output, 1), rows(post, 1), rows(res, 2)
    gradients = by_platform(*arguments, tpu=stream_write_tpu.backward, gpu=_backward)
    return tuple(d.reshape(a.shape) for d, a in zip(gradients, (streams, output, post, res), strict=True))


def _table(post: Array, res: Array) -> Array:
    """Both maps of a token in one row: post, then the rows of res."""
    return jnp.concatenate([post, res.reshape(-1, post.shape[1] ** 2)], axis=1)


def _forward(streams: Array, output: Array, post: Array, res: Array, *, options: dict[str, Any]) -> Array:
    (tokens, n, features), block, table = streams.shape, GPU_BLOCK, _table(post, res)
    streams, output = filled(streams, block), filled(output, block)
    # Triton loads powers of two only.
    table = filled(table, (block[0], pl.next_power_of_2(table.shape[1])))

    def kernel(streams_ref: Any, output_ref: Any, table_ref: Any, new_ref: Any) -> None:
        added = output_ref[...].astype(table.dtype)
        old = [streams_ref[:, j, :].astype(table.dtype) for j in range(n)]
        for i in range(n):
            total = table_ref[:, i][:, None] * added
            for j in range(n):
                total += table_ref[:, n + n * i + j][:, None] * old[j]
            new_ref[:, i, :] = total.astype(new_ref.dtype)

    wide, one, maps = specs(n, table.shape[1], block)
    new = launched(
        kernel,
        grid=(streams.shape[0] // block[0], streams.shape[2] // block[1]),
        in_specs=[wide, one, maps],
        out_specs=wide,
        out_shape=jax.ShapeDtypeStruct(streams.shape, streams.dtype),
        cost_estimate=cost(2 * (n + 1) * streams.size, streams, output, table, streams),
        name="stream_write",
        **options,
    )(streams, output, table)
    return new[:tokens, :, :features]


def _backward(
    cotangent: Array,
    streams: Array,
    output: Array,
    post: Array,
    res: Array,
    *,
    options: dict[str, Any],
) -> tuple[Array, Array, Array, Array]:
    (tokens, n, features), block, table = streams.shape, GPU_BLOCK, _table(post, res)
    cotangent, streams, output = (filled(array, block) for array in (cotangent, streams, output))
    table = filled(table, (block[0], pl.next_power_of_2(table.shape[1])))
    grid = (streams.shape[0] // block[0], streams.shape[2] // block[1])

    def kernel(
        d_ref: Any,
        streams_ref: Any,
        output_ref: Any,
        table_ref: Any,
        d_streams_ref: Any,
        d_output_ref: Any,
        part_ref: Any,
    ) -> None:
        d = [d_ref[:, i, :].astype(table.dtype) for i in range(n)]
        added = output_ref[...].astype(table.dtype)
        d_output = jnp.zeros_like(added)
        for i in range(n):
            d_output += table_ref[:, i][:, None] * d[i]
            part_ref[0, :, i] = jnp.sum(d[i] * added, axis=1)
        d_output_ref[...] = d_output.astype(d_output_ref.dtype)
        for j in range(n):
            old = streams_ref[:, j, :].astype(table.dtype)
            d_old = jnp.zeros_like(old)
            for i in range(n):
                d_old += table_ref[:, n + n * i + j][:, None] * d[i]
                part_ref[0, :, n + n * i + j] = jnp.sum(d[i] * old, axis=1)
            d_streams_ref[:, j, :] = d_old.astype(d_streams_ref.dtype)

    wide, one, maps = specs(n, table.shape[1], block)
    partial_sums = jax.ShapeDtypeStruct((grid[1], *table.shape), table.dtype)
    d_streams, d_output, parts = launched(
        kernel,
        grid=grid,
        in_specs=[wide, wide, one, maps],
        # The sums over features are of one block each: programs of a GPU cannot add to one another's.
        out_specs=[wide, one, pl.BlockSpec((1, block[0], table.shape[1]), lambda t, c: (c, t, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(streams.shape, streams.dtype),
            jax.ShapeDtypeStruct(output.shape, output.dtype),
            partial_sums,
        ],
        cost_estimate=cost(
            4 * (n + 1) * streams.size, cotangent, streams, output, table, streams, output, partial_sums
        ),
        name="stream_write_backward",
        **options,
    )(cotangent, streams, output, table)
    d_post, d_res, _ = jnp.split(parts.sum(axis=0)[:tokens], [n, n + n * n], axis=1)
    return d_streams[:tokens, :, :features], d_output[:tokens, :features], d_post, d_res.reshape(tokens, n, n)
