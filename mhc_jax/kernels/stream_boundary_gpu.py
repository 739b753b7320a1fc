"""The boundary between two branches of streams as Pallas kernels for GPU, one pass forward and one backward.

A program has a few tokens and goes over their features twice, since what it must know of a token first is a sum over
all of its features: forward of the norm and the projection, before X' can be collapsed; backward what arrives at
H_pre, before it goes on through the projection. The second time it begins with what it saw last, which the cache still
has. From the memory it reads (n+1)C numbers a token and writes (n+1)C forward, and reads (2n+2)C and writes (n+1)C
backward; what the cache has lost by then, at most nC forward and (n+2)C backward, is read again.

phi is read by every program, from the cache, and its derivative is a sum over programs, which they add to one array in
the order in which they come: its last bits differ from run to run. More TOKENS make less of both, and fewer programs.

Arguments and results are those of `stream_boundary`, whose kernels are for TPU. Products have 64 rows, of phi^T or of
features, and are transposed where they have to be: of fewer rows the compiler gives a copy of what it multiplies to
every warp.
"""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from mhc_jax.kernels.launch import cost, filled, launched, rows

TOKENS = 32  # of a program
FEATURES = 64  # of a step, with up to 4 streams: a thread has 8 of each array
WARPS, STAGES = 8, 2
HELD = 4  # streams whose maps, and sums for their derivatives, stay in registers; of more they are in the cache
ROWS = 64  # of a product at least

F32 = jnp.float32


def _steps(n: int, columns: int, dtype: Any) -> int:
    """Features of a step: fewer with more streams, whose features a thread holds side by side, and for a wide phi.

    Of float32, whose products are three of half the digits, a thread has room for a quarter.
    """
    most = FEATURES if dtype == jnp.bfloat16 else FEATURES // 4
    return max(16, min(most, most * 4 // pl.next_power_of_2(n), most * 128 // columns))


def _wide(array: Array, streams: int, features: int) -> Array:
    """(T, streams * C) with whole tiles of tokens and whole steps of features of every stream."""
    tokens = array.shape[0]
    array = filled(array.reshape(tokens, streams, -1), (TOKENS, features))
    return array.reshape(array.shape[0], -1)


def _narrow(array: Array, tokens: int, streams: int, width: int, lead: tuple[int, ...]) -> Array:
    """Undoes `_wide`."""
    return array.reshape(array.shape[0], streams, -1)[:tokens, :, :width].reshape(*lead, streams * width)


def _product(a: Array, b: Array, contract: tuple[int, int], interpret: bool) -> Array:
    precision: Any = None
    if a.dtype == F32:
        # Three products of half the digits, by the matrix units: one of all digits has none, and spills. Nor has a CPU.
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=F32)


def _sums(array: Array) -> Array:
    """(tokens, features) to sums of 8 features, which are one thread's: no thread waits for another."""
    return array.reshape(array.shape[0], -1, 8).sum(axis=2)


def _sum(arrays: list[Array]) -> Array:
    return reduce(add, arrays)


def _at(stream: Any, stride: int, at: Array, features: int) -> Any:
    """Features of a step of a stream."""
    return pl.ds(pl.multiple_of(stream * stride + at, features), features)


def _weights(ref: Any, n: int) -> Callable[[Any], list[Array]]:
    """What each old stream and the output weigh in a new stream, from a table whose columns begin with that."""

    def of_stream(i: Any) -> list[Array]:
        return [ref[:, i * (n + 1) + j][:, None] for j in range(n + 1)]

    if n > HELD:
        return of_stream
    held = [of_stream(i) for i in range(n)]
    return lambda i: held[i]


def _each_stream(n: int, function: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`carry = function(i, carry)` of every stream: few one after the other, more in a loop."""
    if n > HELD:
        return lax.fori_loop(0, n, function, carry)
    return reduce(lambda carry, i: function(i, carry), range(n), carry)


def _phi(phi: Array, n: int, features: int, height: int) -> Array:
    """phi (nC, m) as (n * height, C), filled up."""
    by_streams = phi.T.reshape(phi.shape[1], n, -1).transpose(1, 0, 2)
    fill = (0, 0), (0, height - by_streams.shape[1]), (0, -by_streams.shape[2] % features)
    return jnp.pad(by_streams, fill).reshape(n * height, -1)


def _of_phi(ref: Any, at: tuple[Any, Any], columns: int) -> Array:
    """A step of phi of a stream, of whose rows all but the first `columns` are known to be 0."""
    row = lax.broadcasted_iota(jnp.int32, (at[0].size, at[1].size), 0)
    return triton.load(ref.at[at], mask=row < columns, other=0)


def _tile(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((TOKENS, width), lambda t: (t, 0))


def _whole(array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda t: (0,) * len(array.shape))


def _options(interpret: bool) -> dict[str, Any]:
    if interpret:
        return {"interpret": True}
    return {"compiler_params": triton.CompilerParams(num_warps=WARPS, num_stages=STAGES)}


def forward(
    streams: Float[Array, "*tokens nC"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"],
    phi: Float[Array, "nC m"],
    gate: Float[Array, " n"],
    bias: Float[Array, " n"],
    *,
    pre: Callable[[Array, Array, Array], Array],
    norm_epsilon: float,
    interpret: bool = False,
) -> tuple[Float[Array, "*tokens nC"], Float[Array, "*tokens C"], Float[Array, "*tokens m"], Float[Array, "*tokens 1"]]:
    """X', x', vec(X') phi and 1 / rms(vec X'), of streams whose squares sum up to numbers that float32 holds."""
    lead = output.shape[:-1]
    streams, output, post, res = rows(streams, 1), rows(output, 1), rows(post, 1), rows(res, 2)
    (tokens, width), n, m, dtype = output.shape, post.shape[1], phi.shape[1], streams.dtype
    # Of phi in bfloat16 there are two, whose sum has 16 bits.
    parts = [phi.astype(dtype)]
    if dtype == jnp.bfloat16:
        parts.append((phi - parts[0].astype(F32)).astype(dtype))
    columns = m * len(parts)
    height = max(ROWS, pl.next_power_of_2(columns))
    features = _steps(n, height, dtype)
    projection = _phi(jnp.concatenate(parts, axis=1), n, features, height)
    maps = jnp.concatenate([res, post[:, :, None]], axis=2).reshape(tokens, -1)
    maps = filled(maps, (TOKENS, 1))
    streams, output = _wide(streams, n, features), _wide(output, 1, features)
    stride = output.shape[1]
    steps = stride // features

    def kernel(
        x_ref: Any,
        y_ref: Any,
        maps_ref: Any,
        phi_ref: Any,
        gate_ref: Any,
        bias_ref: Any,
        new_ref: Any,
        in_ref: Any,
        raw_ref: Any,
        squares_ref: Any,
    ) -> None:
        weights = _weights(maps_ref, n)

        def mix(k: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            at = pl.multiple_of(k * features, features)
            own = [x_ref[:, _at(j, stride, at, features)].astype(F32) for j in range(n)]
            own.append(y_ref[:, pl.ds(at, features)].astype(F32))

            def mix_stream(i: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
                raw, squares = sums
                new = _sum([w * x for w, x in zip(weights(i), own, strict=True)]).astype(dtype)
                new_ref[:, _at(i, stride, at, features)] = new
                weighing = _of_phi(phi_ref, (pl.ds(i * height, height), pl.ds(at, features)), columns)
                raw += _product(weighing, new, (1, 1), interpret)
                return raw, squares + new.astype(F32) ** 2

            return _each_stream(n, mix_stream, sums)

        zeros = jnp.zeros((height, TOKENS), F32), jnp.zeros((TOKENS, features), F32)
        raw, squares = lax.fori_loop(0, steps, mix, zeros)
        squares = jnp.sum(squares, axis=1)
        raw_ref[...] = raw.T
        squares_ref[...] = squares
        inverse_rms = lax.rsqrt(squares / (n * width) + norm_epsilon)
        row = lax.rem(lax.broadcasted_iota(jnp.int32, raw.shape, 0), m)
        pres = []
        for i in range(n):
            own = jnp.sum(jnp.where(row == i, raw, 0.0), axis=0)
            pres.append(pre(own * inverse_rms, gate_ref[i], bias_ref[i])[:, None])
        if not interpret:
            # What one thread of the program wrote another may read.
            triton.debug_barrier()

        def collapse(k: Array, _: Any) -> None:
            at = pl.multiple_of((steps - 1 - k) * features, features)
            total = _sum([pres[i] * new_ref[:, _at(i, stride, at, features)].astype(F32) for i in range(n)])
            in_ref[:, pl.ds(at, features)] = total.astype(dtype)

        lax.fori_loop(0, steps, collapse, None)

    results = [
        jax.ShapeDtypeStruct(streams.shape, dtype),
        jax.ShapeDtypeStruct(output.shape, dtype),
        jax.ShapeDtypeStruct((output.shape[0], height), F32),
        jax.ShapeDtypeStruct(output.shape[:1], F32),
    ]
    new, inputs, raw, squares = launched(
        kernel,
        name="boundary_forward",
        grid=(output.shape[0] // TOKENS,),
        in_specs=[
            _tile(n * stride),
            _tile(stride),
            _tile(maps.shape[1]),
            _whole(projection),
            _whole(gate),
            _whole(bias),
        ],
        out_specs=[_tile(n * stride), _tile(stride), _tile(height), pl.BlockSpec((TOKENS,), lambda t: (t,))],
        out_shape=results,
        cost_estimate=cost(2 * output.size * n * (n + 2 + m), streams, output, maps, projection, *results),
        **_options(interpret),
    )(streams, output, maps, projection, gate, bias)
    raw = raw[:tokens, :columns].reshape(tokens, len(parts), m).sum(axis=1)
    inverse_rms = lax.rsqrt(squares[:tokens] / (n * width) + norm_epsilon)
    return (
        _narrow(new, tokens, n, width, lead),
        _narrow(inputs, tokens, 1, width, lead),
        raw.reshape(*lead, m),
        inverse_rms.reshape(*lead, 1),
    )


def backward(
    streams: Float[Array, "*tokens nC"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"],
    pre: Float[Array, "*tokens n"],
    d_new: Float[Array, "*tokens nC"],
    d_input: Float[Array, "*tokens C"],
    phi: Float[Array, "nC m"],
    slope: Float[Array, "*tokens n"],
    pull: Float[Array, "*tokens n"],
    d_raw: Float[Array, "*tokens m"],
    radial: Float[Array, "*tokens 1"],
    inverse_rms: Float[Array, "*tokens 1"],
    *,
    interpret: bool = False,
) -> tuple[
    Float[Array, "*tokens nC"],
    Float[Array, "*tokens C"],
    Float[Array, "*tokens n"],
    Float[Array, "*tokens n n"],
    Float[Array, "*tokens n"],
    Float[Array, "nC m"],
]:
    """The derivatives of streams, output, post, res, H_pre of the next branch, and phi."""
    lead = output.shape[:-1]
    streams, output, post, res = rows(streams, 1), rows(output, 1), rows(post, 1), rows(res, 2)
    pre, d_new, d_input, slope, pull = (rows(a, 1) for a in (pre, d_new, d_input, slope, pull))
    d_raw, radial, inverse_rms = (rows(a, 1) for a in (d_raw, radial, inverse_rms))
    (tokens, width), n, m, dtype = output.shape, post.shape[1], phi.shape[1], streams.dtype
    height = max(ROWS, pl.next_power_of_2(m))
    features = _steps(n, height, dtype)
    weights = _phi(phi.astype(dtype), n, features, height)
    maps = jnp.concatenate([res, post[:, :, None]], axis=2).reshape(tokens, -1)
    table = filled(jnp.concatenate([maps, pre, slope, pull, radial, inverse_rms], axis=1), (TOKENS, 1))
    d_raw = filled(d_raw, (TOKENS, height))
    streams, output = _wide(streams, n, features), _wide(output, 1, features)
    d_new, d_input = _wide(d_new, n, features), _wide(d_input, 1, features)
    stride = output.shape[1]
    steps = stride // features
    first = n * (n + 1)

    def kernel(
        x_ref: Any,
        y_ref: Any,
        d_new_ref: Any,
        d_in_ref: Any,
        table_ref: Any,
        raw_ref: Any,
        phi_ref: Any,
        _: Any,
        dx_ref: Any,
        dy_ref: Any,
        d_maps_ref: Any,
        d_phi_ref: Any,
    ) -> None:
        def column(c: Any) -> Array:
            return table_ref[:, c]

        weights = _weights(table_ref, n)

        def stack(at: Array) -> list[Array]:
            own = [x_ref[:, _at(j, stride, at, features)].astype(F32) for j in range(n)]
            return [*own, y_ref[:, pl.ds(at, features)].astype(F32)]

        def sum_up(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            at = pl.multiple_of(k * features, features)
            arrived = d_in_ref[:, pl.ds(at, features)].astype(F32)
            return tuple(total + _sums(x * arrived) for total, x in zip(totals, stack(at), strict=True))

        zero = jnp.zeros((TOKENS, features // 8), F32)
        of_input = [jnp.sum(s, axis=1) for s in lax.fori_loop(0, steps, sum_up, (zero,) * (n + 1))]
        d_raw = raw_ref[...]
        at_column = lax.broadcasted_iota(jnp.int32, d_raw.shape, 1)
        along = column(first + 3 * n)
        for i in range(n):
            d_pre = _sum([column(i * (n + 1) + j) * of_input[j] for j in range(n + 1)])
            d_maps_ref[:, first + i] = d_pre
            d_own = d_pre * column(first + n + i)
            along += d_own * column(first + 2 * n + i)
            d_raw = jnp.where(at_column == i, d_raw + d_own[:, None], d_raw)
        along = (along * column(first + 3 * n + 1))[:, None]
        d_raw = d_raw.astype(dtype)
        held = n <= HELD
        if not held:

            def clear(c: Array, _: Any) -> None:
                d_maps_ref[:, c] = jnp.zeros(TOKENS, F32)

            lax.fori_loop(0, first, clear, None)

        def mix_back(k: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            at = pl.multiple_of((steps - 1 - k) * features, features)
            own, arrived = stack(at), d_in_ref[:, pl.ds(at, features)].astype(F32)
            to_maps = list(sums)

            def mix_stream(i: Any, old: tuple[Array, ...]) -> tuple[Array, ...]:
                of_stream, to_new = (pl.ds(i * height, height), pl.ds(at, features)), weights(i)
                # First, or the compiler gives all that follows the layout of this product, which takes more registers.
                through_phi = _product(_of_phi(phi_ref, of_stream, m), d_raw, (0, 1), interpret).T
                new = _sum([w * x for w, x in zip(to_new, own, strict=True)])
                total = d_new_ref[:, _at(i, stride, at, features)].astype(F32) + along * new + through_phi
                total += column(first + i)[:, None] * arrived
                d_phi = _product(d_raw, new.astype(dtype), (0, 0), interpret)
                # The interpreter has no masks; what is left out is zero.
                mask = None if interpret else lax.broadcasted_iota(jnp.int32, d_phi.shape, 0) < m
                triton.atomic_add(d_phi_ref, of_stream, d_phi, mask=mask)
                for j, x in enumerate(own):
                    c = i * (n + 1) + j
                    if held:
                        to_maps[c] += _sums(total * x)
                    else:
                        d_maps_ref[:, c] += jnp.sum(total * x, axis=1)
                return tuple(o + w * total for o, w in zip(old, to_new, strict=True))

            old = _each_stream(n, mix_stream, (jnp.zeros((TOKENS, features), F32),) * (n + 1))
            for j in range(n):
                dx_ref[:, _at(j, stride, at, features)] = old[j].astype(dtype)
            dy_ref[:, pl.ds(at, features)] = old[n].astype(dtype)
            return tuple(to_maps)

        for c, total in enumerate(lax.fori_loop(0, steps, mix_back, (zero,) * first if held else ())):
            d_maps_ref[:, c] = jnp.sum(total, axis=1)

    results = [
        jax.ShapeDtypeStruct(streams.shape, dtype),
        jax.ShapeDtypeStruct(output.shape, dtype),
        jax.ShapeDtypeStruct((output.shape[0], first + n), F32),
        jax.ShapeDtypeStruct(weights.shape, F32),
    ]
    arguments = streams, output, d_new, d_input, table, d_raw, weights
    dx, dy, d_maps, d_phi = launched(
        kernel,
        name="boundary_backward",
        grid=(output.shape[0] // TOKENS,),
        in_specs=[
            *[_tile(a.shape[1]) for a in arguments[:-1]],
            _whole(weights),
            _whole(results[-1]),
        ],
        out_specs=[*[_tile(a.shape[1]) for a in results[:-1]], _whole(results[-1])],
        out_shape=results,
        input_output_aliases={len(arguments): 3},
        cost_estimate=cost(2 * output.size * n * (3 * n + 3 + 3 * m), *arguments, *results),
        **_options(interpret),
    )(*arguments, jnp.zeros(weights.shape, F32))
    d_maps, d_pre = d_maps[:tokens, :first].reshape(*lead, n, n + 1), d_maps[:tokens, first:].reshape(*lead, n)
    return (
        _narrow(dx, tokens, n, width, lead),
        _narrow(dy, tokens, 1, width, lead),
        d_maps[..., n],
        d_maps[..., :n],
        d_pre,
        d_phi.reshape(n, height, -1)[:, :m, :width].transpose(0, 2, 1).reshape(phi.shape),
    )
