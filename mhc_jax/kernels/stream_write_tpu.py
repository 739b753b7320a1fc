"""The merge of n streams as Pallas kernels for TPU; tpu_tiles.py says how a map becomes one product for many tokens.

Of a group of tokens, with the rows of X and y below each other: X' = [res, post] [X; y]. Backward the same with
[res^T; post^T] for [dX; dy], and the sums over features are the diagonals of dX' [X; y]^T.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mhc_jax.kernels.launch import LANES, filled
from mhc_jax.kernels.tpu_tiles import (
    GROUP,
    GROUPS,
    TOKENS,
    Diagonal,
    call,
    features,
    of_tile,
    off_rows,
    on_rows,
    product,
    table,
    tile,
    whole,
    working,
)


def forward(
    streams: Float[Array, "T n C"],
    output: Float[Array, "T C"],
    post: Float[Array, "T n"],
    res: Float[Array, "T n n"],
    *,
    options: dict[str, Any],
) -> Float[Array, "T n C"]:
    """res X + post y."""
    tokens, n, width = streams.shape
    dtype, sums = working(streams, post)
    t = tile(n, width, 2 * n + 1, streams.dtype.itemsize)
    streams, output = filled(streams, (TOKENS, t.features)), filled(output, (TOKENS, t.features))
    maps = jnp.concatenate([res, post[..., None]], axis=2).astype(sums)
    maps = table([filled(maps[:, i], (TOKENS, 1)) for i in range(n)])
    mix = Diagonal((n,), (n, 1), 2 if dtype == jnp.bfloat16 else 1)

    def kernel(
        x_ref: Any, y_ref: Any, maps_ref: Any, spread_ref: Any, same_ref: Any, new_ref: Any, rows_ref: Any, mix_ref: Any
    ) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            on_rows(maps_ref, rows_ref, 0, n)
            mix.fill(mix_ref, [rows_ref], spread_ref, same_ref, dtype)

        def step(k: Array, _: Any) -> None:
            at_step = features(k, t)
            for g in range(GROUPS):
                at = pl.ds(g * GROUP, GROUP)
                x, y = x_ref[at, :, at_step].reshape(t.rows, t.step), y_ref[at, at_step]
                both = [x.astype(dtype), y.astype(dtype)]
                new = product(mix_ref[g], jnp.concatenate(both * mix.copies, axis=0), sums=sums)
                new_ref[at, :, at_step] = new.astype(new_ref.dtype).reshape(GROUP, n, t.step)

        lax.fori_loop(0, t.features // t.step, step, None)

    wide = pl.BlockSpec((TOKENS, n, t.features), lambda i, c: (i, 0, c))
    one = pl.BlockSpec((TOKENS, t.features), lambda i, c: (i, c))
    constants = mix.constants(dtype, sums)
    new = call(
        kernel,
        streams,
        output,
        maps,
        *constants,
        flops=2 * (n + 1) * streams.size,
        options=options,
        name="stream_write",
        grid=(streams.shape[0] // TOKENS, streams.shape[2] // t.features),
        in_specs=[wide, one, of_tile(maps), *(whole(c) for c in constants)],
        out_specs=wide,
        out_shape=jax.ShapeDtypeStruct(streams.shape, streams.dtype),
        scratch_shapes=[
            pltpu.VMEM((TOKENS * n, LANES), sums),
            pltpu.VMEM((GROUPS, mix.height, mix.width), dtype),
        ],
    )
    return new[:tokens, :, :width]


def backward(
    cotangent: Float[Array, "T n C"],
    streams: Float[Array, "T n C"],
    output: Float[Array, "T C"],
    post: Float[Array, "T n"],
    res: Float[Array, "T n n"],
    *,
    options: dict[str, Any],
) -> tuple[Float[Array, "T n C"], Float[Array, "T C"], Float[Array, "T n"], Float[Array, "T n n"]]:
    """The derivatives of the four arguments of `forward`."""
    tokens, n, width = streams.shape
    dtype, sums = working(streams, post)
    t = tile(n, width, 3 * n + 2, streams.dtype.itemsize)
    cotangent, streams, output = (filled(array, (TOKENS, t.features)) for array in (cotangent, streams, output))
    # For each old stream and the output, what it takes of each new stream.
    maps = table([filled(array.astype(sums), (TOKENS, 1)) for array in (*jnp.moveaxis(res, 2, 0), post)])
    mix = Diagonal((n, 1), (n,), 2 if dtype == jnp.bfloat16 else 1)
    products = Diagonal((n,), (n, 1), 1)

    def kernel(
        d_ref: Any,
        x_ref: Any,
        y_ref: Any,
        maps_ref: Any,
        spread_ref: Any,
        same_ref: Any,
        gather_ref: Any,
        same_products_ref: Any,
        dx_ref: Any,
        dy_ref: Any,
        d_maps_ref: Any,
        rows_ref: Any,
        row_ref: Any,
        mix_ref: Any,
        products_ref: Any,
    ) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            on_rows(maps_ref, rows_ref, 0, n)
            on_rows(maps_ref, row_ref, n, 1)
            mix.fill(mix_ref, [rows_ref, row_ref], spread_ref, same_ref, dtype)
            products_ref[...] = jnp.zeros(products_ref.shape, sums)

        def step(k: Array, _: Any) -> None:
            at_step = features(k, t)
            for g in range(GROUPS):
                at = pl.ds(g * GROUP, GROUP)
                d, x = (ref[at, :, at_step].reshape(t.rows, t.step).astype(dtype) for ref in (d_ref, x_ref))
                both = jnp.concatenate([x, y_ref[at, at_step].astype(dtype)], axis=0)
                products_ref[g] += product(d, both, (1, 1), sums=sums)
                old = product(mix_ref[g], jnp.concatenate([d] * mix.copies, axis=0), sums=sums)
                dx_ref[at, :, at_step] = old[: t.rows].astype(dx_ref.dtype).reshape(GROUP, n, t.step)
                dy_ref[at, at_step] = old[t.rows :].astype(dy_ref.dtype)

        lax.fori_loop(0, t.features // t.step, step, None)

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _() -> None:
            products.gather(products_ref, rows_ref, gather_ref, same_products_ref, dtype)
            off_rows(rows_ref, d_maps_ref, 0, n)

    wide = pl.BlockSpec((TOKENS, n, t.features), lambda i, c: (i, 0, c))
    one = pl.BlockSpec((TOKENS, t.features), lambda i, c: (i, c))
    d_maps = jax.ShapeDtypeStruct((n, n + 1 + -(n + 1) % 8, streams.shape[0]), sums)
    constants = mix.constants(dtype, sums) + products.constants(dtype, sums)
    dx, dy, d_maps = call(
        kernel,
        cotangent,
        streams,
        output,
        maps,
        *constants,
        flops=4 * (n + 1) * streams.size,
        options=options,
        name="stream_write_backward",
        grid=(streams.shape[0] // TOKENS, streams.shape[2] // t.features),
        in_specs=[wide, wide, one, of_tile(maps), *(whole(c) for c in constants)],
        out_specs=[wide, one, of_tile(d_maps)],
        out_shape=[
            jax.ShapeDtypeStruct(streams.shape, streams.dtype),
            jax.ShapeDtypeStruct(output.shape, output.dtype),
            d_maps,
        ],
        scratch_shapes=[
            pltpu.VMEM((TOKENS * n, LANES), sums),
            pltpu.VMEM((TOKENS, LANES), sums),
            pltpu.VMEM((GROUPS, mix.height, mix.width), dtype),
            pltpu.VMEM((GROUPS, products.height, products.width), sums),
        ],
    )
    d_maps = d_maps.transpose(2, 0, 1)[:tokens].astype(jnp.promote_types(post.dtype, res.dtype))
    return dx[:tokens, :, :width], dy[:tokens, :width], d_maps[:, :, n], d_maps[:, :, :n]
