"""Reading n streams as Pallas kernels for TPU; tpu_tiles.py says how a map becomes one product for many tokens.

The projection multiplies the rows (t, i) as they lie with phi of all streams side by side, of which each row needs the
columns of its own stream: n times the products, and none of the vector unit's work to take the streams apart.
"""

from functools import reduce
from operator import add
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
    of_group,
    of_tile,
    off_rows,
    on_rows,
    parts_of,
    product,
    table,
    tile,
    whole,
    working,
)
from mhc_jax.streams import norm

MAX_COLUMNS = 1024  # of phi of all streams, streams * logits, that `project` and `backward` take


def _between(column: Array, start: int, count: int) -> Array:
    return (column >= start) & (column < start + count)


def collapse(
    pre: Float[Array, "T n"], streams: Float[Array, "T n C"], *, options: dict[str, Any]
) -> Float[Array, "T C"]:
    """pre X."""
    tokens, n, width = streams.shape
    dtype, sums = working(streams, pre)
    t = tile(n, width, n + 1, streams.dtype.itemsize)
    streams = filled(streams, (TOKENS, t.features))
    maps = table([filled(pre.astype(sums), (TOKENS, 1))])
    mix = Diagonal((1,), (n,), 2 if dtype == jnp.bfloat16 else 1)

    def kernel(
        maps_ref: Any, x_ref: Any, spread_ref: Any, same_ref: Any, out_ref: Any, row_ref: Any, mix_ref: Any
    ) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            on_rows(maps_ref, row_ref, 0, 1)
            mix.fill(mix_ref, [row_ref], spread_ref, same_ref, dtype)

        def step(k: Array, _: Any) -> None:
            at_step = features(k, t)
            for g in range(GROUPS):
                at = pl.ds(g * GROUP, GROUP)
                x = x_ref[at, :, at_step].reshape(t.rows, t.step).astype(dtype)
                total = product(mix_ref[g], jnp.concatenate([x] * mix.copies, axis=0), sums=sums)
                out_ref[at, at_step] = total.astype(out_ref.dtype)

        lax.fori_loop(0, t.features // t.step, step, None)

    constants = mix.constants(dtype, sums)
    collapsed = jax.ShapeDtypeStruct((streams.shape[0], streams.shape[2]), streams.dtype)
    out = call(
        kernel,
        maps,
        streams,
        *constants,
        flops=2 * streams.size,
        options=options,
        name="stream_collapse",
        grid=(streams.shape[0] // TOKENS, streams.shape[2] // t.features),
        in_specs=[
            of_tile(maps),
            pl.BlockSpec((TOKENS, n, t.features), lambda i, c: (i, 0, c)),
            *(whole(c) for c in constants),
        ],
        out_specs=pl.BlockSpec((TOKENS, t.features), lambda i, c: (i, c)),
        out_shape=collapsed,
        scratch_shapes=[pltpu.VMEM((TOKENS, LANES), sums), pltpu.VMEM((GROUPS, mix.height, mix.width), dtype)],
    )
    return out[:tokens, :width]


def collapse_weights(
    d_input: Float[Array, "T C"], streams: Float[Array, "T n C"], *, dtype: Any, options: dict[str, Any]
) -> Float[Array, "T n"]:
    """The derivative of `pre` in `collapse`, summed in `dtype`."""
    tokens, n, _ = streams.shape
    factors, sums = working(streams, jnp.zeros((), dtype))
    t = tile(n, streams.shape[2], n + 1, streams.dtype.itemsize)
    d_input, streams = filled(d_input, (TOKENS, t.features)), filled(streams, (TOKENS, t.features))
    products = Diagonal((1,), (n,), 1)

    def kernel(
        d_ref: Any, x_ref: Any, gather_ref: Any, same_ref: Any, out_ref: Any, row_ref: Any, products_ref: Any
    ) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            products_ref[...] = jnp.zeros(products_ref.shape, sums)

        def step(k: Array, _: Any) -> None:
            at_step = features(k, t)
            for g in range(GROUPS):
                at = pl.ds(g * GROUP, GROUP)
                x = x_ref[at, :, at_step].reshape(t.rows, t.step).astype(factors)
                products_ref[g] += product(d_ref[at, at_step].astype(factors), x, (1, 1), sums=sums)

        lax.fori_loop(0, t.features // t.step, step, None)

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _() -> None:
            products.gather(products_ref, row_ref, gather_ref, same_ref, factors)
            off_rows(row_ref, out_ref, 0, 1)

    constants = products.constants(factors, sums)
    weights = jax.ShapeDtypeStruct((1, n + -n % 8, streams.shape[0]), sums)
    out = call(
        kernel,
        d_input,
        streams,
        *constants,
        flops=2 * streams.size,
        options=options,
        name="stream_collapse_weights",
        grid=(streams.shape[0] // TOKENS, streams.shape[2] // t.features),
        in_specs=[
            pl.BlockSpec((TOKENS, t.features), lambda i, c: (i, c)),
            pl.BlockSpec((TOKENS, n, t.features), lambda i, c: (i, 0, c)),
            *(whole(c) for c in constants),
        ],
        out_specs=of_tile(weights),
        out_shape=weights,
        scratch_shapes=[
            pltpu.VMEM((TOKENS, LANES), sums),
            pltpu.VMEM((GROUPS, products.height, products.width), sums),
        ],
    )
    return out[0, :n, :tokens].T.astype(dtype)


def project(
    streams: Float[Array, "T n C"], phi: Float[Array, "nC m"], *, options: dict[str, Any]
) -> tuple[Float[Array, "T m"], Float[Array, "T 3"]]:
    """vec(X) phi, and the sums of squares of `norm.inverse_rms_of_squares`."""
    (tokens, n, width), m = streams.shape, phi.shape[1]
    dtype, sums = working(streams, phi)
    t = tile(n, width, n, streams.dtype.itemsize)
    streams = filled(streams, (TOKENS, t.features))
    split = parts_of(phi.reshape(n, width, m).transpose(0, 2, 1), dtype)
    # Columns (stream, part, logit).
    columns = jnp.concatenate(split, axis=1).reshape(-1, width)
    own = columns.shape[0] // n
    high = columns.shape[0] + -columns.shape[0] % LANES
    columns = jnp.pad(columns, ((0, high - columns.shape[0]), (0, streams.shape[2] - width)))
    logits = m + -m % 8
    # From the columns to their logits.
    column, logit = jnp.arange(high)[None, :], jnp.arange(logits)[:, None]
    fold = ((column % own % m == logit) & (column < n * own)).astype(sums)

    def kernel(
        x_ref: Any, phi_ref: Any, fold_ref: Any, out_ref: Any, sums_ref: Any, squares_ref: Any, totals_ref: Any
    ) -> None:
        squares_ref[...] = jnp.zeros(squares_ref.shape, sums)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            sums_ref[...] = jnp.zeros(sums_ref.shape, sums)
            totals_ref[...] = jnp.zeros(totals_ref.shape, sums)

        def squares(x: Array, scale: float) -> Array:
            """(rows, features) to sums (rows, lanes)."""
            wide = x.astype(sums) * scale
            return reduce(add, [wide[:, f : f + LANES] ** 2 for f in range(0, t.step, LANES)])

        def of_tokens(which: int) -> Array:
            """Sums (1, tokens)."""
            rows = [squares_ref[pl.ds(which * TOKENS * n + i, TOKENS, n), :] for i in range(n)]
            return reduce(add, rows).T.sum(axis=0, keepdims=True)

        def step(k: Array, _: Any) -> None:
            at_step = features(k, t)
            weights = phi_ref[:, at_step]
            for start in range(0, GROUPS, t.several):
                at, rows = pl.ds(start * GROUP, t.several * GROUP), pl.ds(start * t.rows, t.several * t.rows)
                x = x_ref[at, :, at_step].reshape(t.several * t.rows, t.step)
                new = product(x.astype(dtype), weights, (1, 1), sums=sums)
                for lane in range(high // LANES):
                    sums_ref[pl.ds(lane * TOKENS * n + start * t.rows, t.several * t.rows), :] += new[
                        :, lane * LANES : (lane + 1) * LANES
                    ]
                squares_ref[rows, :] += squares(x, 1.0)

        lax.fori_loop(0, t.features // t.step, step, None)
        plain = of_tokens(0)

        def scaled(group: Array, _: Any) -> None:
            def of_step(k: Array, _: Any) -> None:
                x = x_ref[of_group(group, GROUP), :, features(k, t)].reshape(t.rows, t.step)
                for which in (1, 2):
                    squares_ref[of_group(which * GROUPS + group, t.rows), :] += squares(x, norm.scales(sums)[which])

            lax.fori_loop(0, t.features // t.step, of_step, None)

        # Numbers so large or small are rare, so that the other two sums are taken only where there are any.
        sound = norm.sound(plain)
        groups = jnp.where(jnp.all(sound), 0, GROUPS)
        lax.fori_loop(0, groups, scaled, None)
        totals_ref[0:1] += plain
        for which in (1, 2):
            scale = norm.scales(sums)[which]
            totals_ref[which : which + 1] += jnp.where(sound, plain * scale * scale, of_tokens(which))

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _() -> None:
            column = lax.broadcasted_iota(jnp.int32, (TOKENS, LANES), 1)
            chosen = []
            for lane in range(high // LANES):
                rows = [sums_ref[pl.ds(lane * TOKENS * n + i, TOKENS, n), :] for i in range(n)]
                chosen.append(
                    reduce(
                        add,
                        [
                            jnp.where(_between(column + lane * LANES, i * own, own), row, 0)
                            for i, row in enumerate(rows)
                        ],
                    )
                )
            raw = product(fold_ref[...], jnp.concatenate(chosen, axis=1), (1, 1), sums=sums)
            out_ref[0] = jnp.concatenate([raw, totals_ref[...]], axis=0)

    grid = streams.shape[0] // TOKENS, streams.shape[2] // t.features
    found = jax.ShapeDtypeStruct((1, logits + 8, streams.shape[0]), sums)
    out = call(
        kernel,
        streams,
        columns,
        fold,
        flops=2 * (n * m + 1) * streams.size,
        options=options,
        name="stream_project",
        grid=grid,
        in_specs=[
            pl.BlockSpec((TOKENS, n, t.features), lambda i, c: (i, 0, c)),
            pl.BlockSpec((high, t.features), lambda i, c: (0, c), pipeline_mode=pl.Buffered(1 if grid[1] == 1 else 2)),
            whole(fold),
        ],
        out_specs=of_tile(found),
        out_shape=found,
        scratch_shapes=[
            pltpu.VMEM((high // LANES * TOKENS * n, LANES), sums),
            pltpu.VMEM((3 * TOKENS * n, LANES), sums),
            pltpu.VMEM((8, TOKENS), sums),
        ],
    )
    return out[0, :m, :tokens].T, out[0, logits : logits + 3, :tokens].T


def backward(
    streams: Float[Array, "T n C"],
    phi: Float[Array, "nC m"],
    pre: Float[Array, "T n"],
    d_input: Float[Array, "T C"],
    d_raw: Float[Array, "T m"],
    radial: Float[Array, "T 1"],
    inverse_rms: Float[Array, "T 1"],
    *,
    options: dict[str, Any],
) -> tuple[Float[Array, "T n C"], Float[Array, "nC m"]]:
    """The derivatives of the streams, d_raw phi^T + radial (X inverse_rms) + pre d_input, and of phi, X^T d_raw.

    With d_raw in the columns of its stream for each row (t, i), a matrix L, they are L phi^T and L^T X. Of bfloat16
    streams, L and phi are bfloat16, too.
    """
    (tokens, n, width), m = streams.shape, phi.shape[1]
    dtype, sums = working(streams, phi)
    itemsize = streams.dtype.itemsize
    high = n * m + -(n * m) % LANES
    # phi, and its derivative in float32 twice, have the features of a tile, too.
    t = tile(n, width, 2 * n + 1 + pl.cdiv(high * (itemsize + 8), 2 * TOKENS * itemsize), itemsize)
    streams, d_input = filled(streams, (TOKENS, t.features)), filled(d_input, (TOKENS, t.features))
    columns = phi.reshape(n, width, m).transpose(0, 2, 1).reshape(n * m, width).astype(dtype)
    columns = jnp.pad(columns, ((0, high - n * m), (0, streams.shape[2] - width)))
    columns_of_maps = [*jnp.split(pre, n, axis=1), radial, inverse_rms]
    maps = table([filled(a.astype(sums), (TOKENS, 1)) for a in columns_of_maps])
    raw = table([filled(d_raw.astype(sums), (TOKENS, 1))])
    mix = Diagonal((n,), (1,), 2 if dtype == jnp.bfloat16 else 1)
    # From the logits
    logit, column = jnp.arange(raw.shape[1])[:, None], jnp.arange(high)[None, :]
    spread_raw = ((column % m == logit) & (column < n * m)).astype(sums)

    def kernel(
        x_ref: Any,
        d_ref: Any,
        maps_ref: Any,
        raw_ref: Any,
        phi_ref: Any,
        spread_raw_ref: Any,
        spread_ref: Any,
        same_ref: Any,
        dx_ref: Any,
        d_phi_ref: Any,
        rows_ref: Any,
        radial_ref: Any,
        scale_ref: Any,
        mix_ref: Any,
        left_ref: Any,
        turned_ref: Any,
    ) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            d_phi_ref[...] = jnp.zeros(d_phi_ref.shape, sums)

        on_rows(maps_ref, rows_ref, 0, n)
        mix.fill(mix_ref, [rows_ref], spread_ref, same_ref, dtype)
        for which, ref in ((n, radial_ref), (n + 1, scale_ref)):
            lanes = jnp.broadcast_to(maps_ref[which, :1], (LANES, TOKENS)).T
            for i in range(n):
                ref[pl.ds(i, TOKENS, n), :] = lanes
        column = lax.broadcasted_iota(jnp.int32, (TOKENS, LANES), 1)
        for start in range(0, high, LANES):
            everywhere = product(raw_ref[0], spread_raw_ref[:, start : start + LANES], (0, 0), sums=sums)
            for i in range(n):
                rows_ref[pl.ds(i, TOKENS, n), :] = jnp.where(_between(column + start, i * m, m), everywhere, 0)
            left_ref[:, start : start + LANES] = rows_ref[...].astype(dtype)
            turned_ref[start : start + LANES, :] = rows_ref[...].T.astype(dtype)

        def step(k: Array, _: Any) -> None:
            at_step = features(k, t)
            for g in range(GROUPS):
                at, rows = pl.ds(g * GROUP, GROUP), pl.ds(g * t.rows, t.rows)
                x = x_ref[at, :, at_step].reshape(t.rows, t.step)
                left = jnp.concatenate([left_ref[rows, :], mix_ref[g]], axis=1)
                right = [phi_ref[:, at_step], *[d_ref[at, at_step].astype(dtype)] * mix.copies]
                d_x = product(left, jnp.concatenate(right, axis=0), sums=sums)
                across = [ref[rows, :] for ref in (radial_ref, scale_ref)]
                along, scale = (jnp.concatenate([a] * (t.step // LANES), axis=1) for a in across)
                d_x += along * (scale * x.astype(sums))
                dx_ref[at, :, at_step] = d_x.astype(dx_ref.dtype).reshape(GROUP, n, t.step)
            x = x_ref[:, :, at_step].reshape(TOKENS * n, t.step).astype(dtype)
            d_phi_ref[0, :, at_step] += product(turned_ref[...], x, sums=sums)

        lax.fori_loop(0, t.features // t.step, step, None)

    constants = spread_raw, *mix.constants(dtype, sums)
    tiles = streams.shape[0] // TOKENS
    # Two cores may share a chip: each sums up a part of phi's derivative.
    cores = 2 if tiles % 2 == 0 else 1
    turns = tiles // cores
    wide = pl.BlockSpec((TOKENS, n, t.features), lambda k, c, i: (k * turns + i, 0, c))
    d_x, d_phi = call(
        kernel,
        streams,
        d_input,
        maps,
        raw,
        columns,
        *constants,
        flops=4 * (n * m + 1) * streams.size,
        options=options,
        name="stream_read_backward",
        grid=(cores, streams.shape[2] // t.features, turns),
        in_specs=[
            wide,
            pl.BlockSpec((TOKENS, t.features), lambda k, c, i: (k * turns + i, c)),
            pl.BlockSpec((*maps.shape[:2], TOKENS), lambda k, _, i: (0, 0, k * turns + i)),
            pl.BlockSpec((*raw.shape[:2], TOKENS), lambda k, _, i: (0, 0, k * turns + i)),
            pl.BlockSpec((high, t.features), lambda k, c, i: (0, c)),
            *(whole(c) for c in constants),
        ],
        out_specs=[wide, pl.BlockSpec((1, high, t.features), lambda k, c, i: (k, 0, c))],
        out_shape=[
            jax.ShapeDtypeStruct(streams.shape, streams.dtype),
            jax.ShapeDtypeStruct((cores, high, streams.shape[2]), sums),
        ],
        scratch_shapes=[
            *[pltpu.VMEM((TOKENS * n, LANES), sums)] * 3,
            pltpu.VMEM((GROUPS, mix.height, mix.width), dtype),
            pltpu.VMEM((TOKENS * n, high), dtype),
            pltpu.VMEM((high, TOKENS * n), dtype),
        ],
    )
    d_phi = d_phi.sum(axis=0)[: n * m, :width].reshape(n, m, width).transpose(0, 2, 1).reshape(phi.shape)
    return d_x[:tokens, :, :width], d_phi.astype(phi.dtype)
