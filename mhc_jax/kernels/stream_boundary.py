"""The boundary between two branches of streams as Pallas kernels for TPU, one pass forward and one backward.

Forward reads (n+1)C numbers a token and writes (n+1)C; backward reads (2n+2)C and writes (n+1)C. What is left to the
caller are the few numbers of the maps: he makes H_post and H_res of the projection, and their derivatives.

All that is long is a product of matrices. GROUP tokens of all arrays that a step reads are stacked, a row for each
(array, token): of streams and output that is S, of (n + 1) * GROUP rows. What a map does to a token is then a matrix
whose blocks are diagonal, one for each pair of arrays:

    X' = L S                    with L[(i, t), (j, t)] = res[i, j] or post[i] of token t
    dX, dy = L' [dX'; dx'; S; phi^T]            by linearity: X' is not even built
    sums over features = the diagonals of S [dX'; dx'; S]^T

A product with diagonal blocks wastes the multiplier's zeros, and is still several times faster than the vector unit.
Numbers of the maps, (rows, tokens), have their tokens on lanes. Float32 coefficients of bfloat16 streams enter as two
bfloat16 numbers, their sum: 16 bits, where a stream has 8. Sums are float32.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mhc_jax.kernels.launch import LANES, launched, rows
from mhc_jax.kernels.tpu_tiles import GROUP, parts_of, product

TOKENS = 128  # of a tile at most: the tokens of a register of maps
FEATURES = 2048  # of a step at most
# Of the vector memory of a core: what tiles may take, and what kernels may take in all.
_TILES, _VMEM = 0.83, 0.97
MAX_ROWS = 1024  # of phi^T: n times the logits of a token

F32 = jnp.float32


def on_every_platform(tpu: Callable[..., Any], gpu: Callable[..., Any], *arguments: Array) -> Any:
    """The kernel of the platform that the program is compiled for; on any other that of a TPU is interpreted.

    Raises:
        TypeError: if the streams, the first argument, are neither bfloat16 nor float32.
        ValueError: if the maps are too many for the kernels.
    """
    if arguments[0].dtype not in (jnp.bfloat16, F32):
        raise TypeError(
            f"implementation='pallas' takes streams of bfloat16 or float32, got {arguments[0].dtype}: "
            "use implementation='xla'"
        )
    return lax.platform_dependent(*arguments, tpu=tpu, cuda=gpu, rocm=gpu, default=partial(tpu, interpret=True))


class Sizes(NamedTuple):
    """What follows from the shapes: sizes are multiples of 8 unless said otherwise."""

    n: int
    tokens: int  # of a tile
    width: int  # C, filled up to whole steps
    step: int  # features of a step
    logits: int  # of a token, filled up

    @property
    def groups(self) -> int:
        return self.tokens // GROUP

    @property
    def own(self) -> int:
        """Rows of S."""
        return (self.n + 1) * GROUP

    @property
    def rows(self) -> int:
        """Rows of a table for streams and output, a map's row filled up."""
        return _up(self.n + 1, 8)

    @property
    def phi(self) -> int:
        """Rows of phi^T, all streams below each other."""
        return _up(self.n * self.logits, 16)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def sizes(tokens: int, n: int, width: int, logits: int, itemsize: int, arrays: int) -> Sizes:
    """How `tokens` are cut in tiles for a kernel that moves `arrays` arrays of the width of one stream.

    Raises:
        ValueError: if the maps are too many for the kernels.
    """
    logits = _up(logits, 8)
    if n * logits > MAX_ROWS:
        raise ValueError(
            f"implementation='pallas' takes at most {MAX_ROWS} logits of all streams, streams * logits, got "
            f"{n} * {logits}: use implementation='xla', fewer streams or constraint='kronecker'"
        )
    width = _up(width, LANES)
    step = next(step for step in range(FEATURES, 0, -LANES) if width % step == 0)
    tile = min(TOKENS, _up(tokens, 16))
    # Each tile is in memory twice: one is worked on, the other is on its way.
    while tile > 16 and 2 * arrays * tile * width * itemsize > _TILES * _vector_memory():
        tile = _up(tile // 2, 16)
    return Sizes(n, tile, width, step, logits)


def _vector_memory() -> int:
    """Bytes that a core of the TPU has; where none is known, what the smallest has."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return 64 * 2**20


def _filled(array: Array, s: Sizes, streams: int) -> Array:
    """(T, streams * C) with whole tiles of tokens and whole steps of features."""
    tokens, width = array.shape[0], array.shape[1] // streams
    if width != s.width:
        array = jnp.pad(array.reshape(tokens, streams, width), ((0, 0), (0, 0), (0, s.width - width)))
        array = array.reshape(tokens, -1)
    return jnp.pad(array, ((0, -tokens % s.tokens), (0, 0)))


def _cut(array: Array, tokens: int, streams: int, width: int) -> Array:
    """Undoes `_filled`."""
    filled = array.shape[1] // streams
    array = array[:tokens]
    if filled != width:
        array = array.reshape(tokens, streams, filled)[:, :, :width].reshape(tokens, -1)
    return array


def _table(arrays: list[Array], s: Sizes) -> Array:
    """Arrays (T, rows) as (tiles, rows, lanes): tokens on lanes, the rows of each filled up to a multiple of 8."""
    columns = jnp.concatenate([jnp.pad(a, ((0, 0), (0, -a.shape[1] % 8))) for a in arrays], axis=1)
    columns = jnp.pad(columns, ((0, -columns.shape[0] % s.tokens), (0, 0)))
    tiles = columns.reshape(-1, s.tokens, columns.shape[1]).transpose(0, 2, 1)
    return jnp.pad(tiles, ((0, 0), (0, 0), (0, LANES - s.tokens)))


def _untable(table: Array, s: Sizes, tokens: int) -> Array:
    """(tiles, rows, lanes) to (T, rows)."""
    return table[:, :, : s.tokens].transpose(0, 2, 1).reshape(-1, table.shape[1])[:tokens]


def _phi_rows(phi: Array, s: Sizes) -> Array:
    """phi (nC, m) as (n, m, C), filled up."""
    rows = phi.T.reshape(phi.shape[1], s.n, -1).transpose(1, 0, 2)
    return jnp.pad(rows, ((0, 0), (0, s.logits - rows.shape[1]), (0, s.width - rows.shape[2])))


def _step(ref: Any, s: Sizes, at: Any, k: Array, stream: int = 0) -> Any:
    """Features of step k of a stream: an index of (tokens, streams * C)."""
    return (at, pl.ds(pl.multiple_of(stream * s.width + k * s.step, LANES), s.step))


def _stack(refs: list[tuple[Any, int]], s: Sizes, group: int, k: Array) -> list[Array]:
    """Step k of a group of tokens: one block (GROUP, features) for each stream of each array."""
    at = pl.ds(group * GROUP, GROUP)
    return [ref[_step(ref, s, at, k, j)] for ref, streams in refs for j in range(streams)]


def _to_groups(blocks: list[Array], group: int) -> Array:
    """Rows (r, lanes) of a group's tokens, side by side: block b on lanes GROUP * b and on."""
    width = _up(len(blocks) * GROUP, LANES)
    parts = []
    for start in range(0, width, LANES):
        lane = lax.broadcasted_iota(jnp.int32, blocks[0].shape, 1)
        part = jnp.zeros_like(blocks[0])
        for slot, block in enumerate(blocks[start // GROUP : (start + LANES) // GROUP]):
            moved = pltpu.roll(block, (slot - group) * GROUP % LANES, 1)
            part = jnp.where(lax.div(lane, GROUP) == slot, moved, part)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)[:, : len(blocks) * GROUP]


def _diagonals(rows: Array, count: int) -> Array:
    """(count, blocks * GROUP) to (count * GROUP, .): row i becomes the diagonals of a row of blocks."""
    shape = GROUP, rows.shape[1]
    on = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 1), GROUP) == lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.concatenate([jnp.where(on, rows[i : i + 1], 0.0) for i in range(count)], axis=0)


def _diagonal_rows(matrix: Array, count: int) -> Array:
    """Undoes `_diagonals`: (count * GROUP, w) to (count, w)."""
    shape = GROUP, matrix.shape[1]
    on = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 1), GROUP) == lax.broadcasted_iota(jnp.int32, shape, 0)
    blocks = [matrix[i * GROUP : (i + 1) * GROUP] for i in range(count)]
    return jnp.concatenate([jnp.sum(jnp.where(on, b, 0.0), axis=0, keepdims=True) for b in blocks], axis=0)


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
    interpret: Any = False,
) -> tuple[Float[Array, "*tokens nC"], Float[Array, "*tokens C"], Float[Array, "*tokens m"], Float[Array, "*tokens 1"]]:
    """X', x', vec(X') phi and 1 / rms(vec X'), of streams whose squares sum up to numbers that float32 holds.

    Args:
        pre: H_pre of the next branch is `pre(normalized logits, gate, bias)`.
    """
    lead = output.shape[:-1]
    streams, output, post, res = rows(streams, 1), rows(output, 1), rows(post, 1), rows(res, 2)
    (tokens, width), n, m, dtype = output.shape, post.shape[1], phi.shape[1], streams.dtype
    s = sizes(tokens, n, width, m, dtype.itemsize, 4 * n + 4)
    features = n * width
    # For each old stream and the output, a row for each new stream.
    maps = _table([res[:, :, j] for j in range(n)] + [post], s)
    parts = parts_of(_phi_rows(phi, s), dtype)
    projection = jnp.concatenate(parts, axis=1)
    columns = projection.shape[1]
    constants = jnp.pad(jnp.stack([gate, bias], axis=1), ((0, -n % 8), (0, 0)))
    above = _up(n, 8)
    streams, output = _filled(streams, s, n), _filled(output, s, 1)

    def kernel(
        x_ref: Any,
        y_ref: Any,
        maps_ref: Any,
        phi_ref: Any,
        gates_ref: Any,
        new_ref: Any,
        in_ref: Any,
        raw_ref: Any,
        mix_ref: Any,
        sums_ref: Any,
        squares_ref: Any,
    ) -> None:
        coefficients = [maps_ref[0, j * above : (j + 1) * above] for j in range(n + 1)]
        for q in range(s.groups):
            diagonals = parts_of(_diagonals(_to_groups(coefficients, q), n), dtype)
            mix_ref[q] = jnp.concatenate([p.astype(F32) for p in diagonals], axis=1).astype(dtype)

        def mix(k: Array, _: Any) -> None:
            for q in range(s.groups):
                at = pl.ds(q * GROUP, GROUP)
                own = _stack([(x_ref, n), (y_ref, 1)], s, q, k)
                new = product(mix_ref[q], jnp.concatenate(own * len(parts), axis=0)).astype(dtype)
                for i in range(n):
                    new_ref[_step(new_ref, s, at, k, i)] = new[i * GROUP : (i + 1) * GROUP]
                square = new.astype(F32) ** 2
                square = _sum([square[:, f : f + LANES] for f in range(0, s.step, LANES)])
                square = _sum([square[i * GROUP : (i + 1) * GROUP] for i in range(n)])
                squares_ref[at, :] = jnp.where(k == 0, square, squares_ref[at, :] + square)
            total = jnp.zeros((s.tokens, columns), F32)
            for i in range(n):
                weights = phi_ref[i, :, pl.ds(pl.multiple_of(k * s.step, LANES), s.step)]
                total += product(new_ref[_step(new_ref, s, slice(None), k, i)], weights, (1, 1))
            sums_ref[:, :columns] = jnp.where(k == 0, total, sums_ref[:, :columns] + total)

        lax.fori_loop(0, s.width // s.step, mix, None)
        sums = sums_ref[...].T
        raw = _sum([sums[p * s.logits : (p + 1) * s.logits] for p in range(len(parts))])
        squares = jnp.sum(squares_ref[...].T, axis=0, keepdims=True)
        raw_ref[0, : s.logits, : s.tokens] = raw
        raw_ref[0, s.logits :, : s.tokens] = jnp.broadcast_to(squares, (8, s.tokens))
        normalized = raw[:above] * lax.rsqrt(squares / features + norm_epsilon)
        weights = pre(normalized, gates_ref[:, :1], gates_ref[:, 1:])
        weights = jnp.concatenate([weights, jnp.zeros((LANES - above, s.tokens), F32)], axis=0).T

        def collapse(k: Array, _: Any) -> None:
            for start in range(0, s.tokens, 16):
                at = pl.ds(start, 16)
                total = jnp.zeros((16, s.step), F32)
                for i in range(n):
                    total += weights[start : start + 16, i : i + 1] * new_ref[_step(new_ref, s, at, k, i)].astype(F32)
                in_ref[_step(in_ref, s, at, k)] = total.astype(dtype)

        lax.fori_loop(0, s.width // s.step, collapse, None)

    def tile(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda t: (t, *[0] * (len(shape) - 1)))

    def whole(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda t: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))

    tiles = output.shape[0] // s.tokens
    arguments = streams, output, maps, projection, constants
    results = [
        jax.ShapeDtypeStruct(streams.shape, dtype),
        jax.ShapeDtypeStruct(output.shape, dtype),
        jax.ShapeDtypeStruct((tiles, s.logits + 8, LANES), F32),
    ]
    new, inputs, sums = launched(
        kernel,
        name="boundary_forward",
        grid=(tiles,),
        in_specs=[
            tile(s.tokens, n * s.width),
            tile(s.tokens, s.width),
            tile(1, *maps.shape[1:]),
            whole(projection),
            whole(constants),
        ],
        out_specs=[tile(s.tokens, n * s.width), tile(s.tokens, s.width), tile(1, s.logits + 8, LANES)],
        out_shape=results,
        scratch_shapes=[
            pltpu.VMEM((s.groups, n * GROUP, len(parts) * s.own), dtype),
            pltpu.VMEM((s.tokens, _up(columns, LANES)), F32),
            pltpu.VMEM((s.tokens, LANES), F32),
        ],
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=int(_VMEM * _vector_memory()), dimension_semantics=("parallel",)
        ),
        cost_estimate=_cost(arguments, results, 2 * output.size * n * (n + 2 + m)),
        interpret=interpret,
    )(*arguments)
    sums = _untable(sums, s, tokens)
    inverse_rms = lax.rsqrt(sums[:, s.logits : s.logits + 1] / features + norm_epsilon)
    return (
        _cut(new, tokens, n, width).reshape(*lead, n * width),
        _cut(inputs, tokens, 1, width).reshape(*lead, width),
        sums[:, :m].reshape(*lead, m),
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
    interpret: Any = False,
) -> tuple[
    Float[Array, "*tokens nC"],
    Float[Array, "*tokens C"],
    Float[Array, "*tokens n"],
    Float[Array, "*tokens n n"],
    Float[Array, "*tokens n"],
    Float[Array, "nC m"],
]:
    """The derivatives of streams, output, post, res, H_pre of the next branch, and phi.

    Args:
        pre, slope: H_pre of the next branch, and its derivatives by its own raw logits.
        d_new, d_input: what arrives at X' and x'.
        d_raw: what arrives at the raw logits through H_post and H_res of the next branch.
        radial: of X' / rms(X'), what arrives at X' through the norm for `d_raw`; `pull` times what arrives at the raw
            logits of H_pre comes on top.
    """
    lead = output.shape[:-1]
    streams, output, post, res = rows(streams, 1), rows(output, 1), rows(post, 1), rows(res, 2)
    pre, d_new, d_input, slope, pull = (rows(a, 1) for a in (pre, d_new, d_input, slope, pull))
    d_raw, radial, inverse_rms = (rows(a, 1) for a in (d_raw, radial, inverse_rms))
    (tokens, width), n, m, dtype = output.shape, post.shape[1], phi.shape[1], streams.dtype
    s = sizes(tokens, n, width, m, dtype.itemsize, 6 * n + 6)
    own, above, parts = s.own, _up(n, 8), 2 if dtype == jnp.bfloat16 else 1
    rows_of_map = s.rows
    both = 2 * own
    # For each new stream, a row for each old stream and one for the output.
    maps = [jnp.concatenate([res[:, i], post[:, i : i + 1]], axis=1) for i in range(n)]
    table = _table([*maps, d_raw, slope, pull, pre, radial, inverse_rms], s)
    weights = _phi_rows(phi, s).reshape(n * s.logits, s.width).astype(dtype)
    weights = jnp.pad(weights, ((0, s.phi - weights.shape[0]), (0, 0)))
    streams, output = _filled(streams, s, n), _filled(output, s, 1)
    d_new, d_input = _filled(d_new, s, n), _filled(d_input, s, 1)

    def kernel(
        x_ref: Any,
        y_ref: Any,
        d_new_ref: Any,
        d_in_ref: Any,
        table_ref: Any,
        phi_ref: Any,
        dx_ref: Any,
        dy_ref: Any,
        d_maps_ref: Any,
        d_phi_ref: Any,
        mix_ref: Any,
        last_ref: Any,
        outer_ref: Any,
        gram_ref: Any,
        phi_gram_ref: Any,
    ) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            d_phi_ref[...] = jnp.zeros(d_phi_ref.shape, F32)

        mine, arrived = [(x_ref, n), (y_ref, 1)], [(d_new_ref, n), (d_in_ref, 1)]

        def sums(k: Array, _: Any) -> None:
            for q in range(s.groups):
                stack = _stack(mine, s, q, k)
                everything = jnp.concatenate(_stack(arrived, s, q, k) + stack, axis=0)
                new = product(jnp.concatenate(stack, axis=0), everything, (1, 1))
                gram_ref[q] = jnp.where(k == 0, new, gram_ref[q] + new)
            phi_step = phi_ref[:, pl.ds(pl.multiple_of(k * s.step, LANES), s.step)]
            for j in range(n + 1):
                ref, stream = (x_ref, j) if j < n else (y_ref, 0)
                new = product(phi_step, ref[_step(ref, s, slice(None), k, stream)], (1, 1))
                phi_gram_ref[j] = jnp.where(k == 0, new, phi_gram_ref[j] + new)

        lax.fori_loop(0, s.width // s.step, sums, None)

        # The algebra of the maps, all tokens of the tile at once. Of arrays (rows_of_map, lanes), row j belongs to
        # stream j or to the output.
        lane = lax.broadcasted_iota(jnp.int32, (rows_of_map, LANES), 1)
        grams = [jnp.zeros((rows_of_map, LANES), F32) for _ in range(2 * n + 2)]
        for q in range(s.groups):
            diagonals = _diagonal_rows(gram_ref[q], n + 1)
            diagonals = jnp.concatenate([diagonals, jnp.zeros((rows_of_map - n - 1, both), F32)], axis=0)
            diagonals = jnp.concatenate([diagonals, jnp.zeros((rows_of_map, -both % LANES), F32)], axis=1)
            for b in range(2 * n + 2):
                block = diagonals[:, b * GROUP // LANES * LANES :][:, :LANES]
                moved = pltpu.roll(block, (q - b) * GROUP % LANES, 1)
                grams[b] = jnp.where(lax.div(lane, GROUP) == q, moved, grams[b])
        of_new, of_input, of_own = grams[:n], grams[n], grams[n + 1 :]

        start = iter(range(0, table.shape[1], 8))

        def take(count: int) -> Array:
            first = next(start)
            for _ in range(_up(count, 8) // 8 - 1):
                next(start)
            return table_ref[0, first : first + _up(count, 8)]

        to_new = [take(n + 1) for _ in range(n)]
        raw, slopes, pulls, pres, radials, scale = take(m), take(n), take(n), take(n), take(1), take(1)
        zeros = jnp.zeros((above - n, LANES), F32)
        weighed = [jnp.sum(to_new[i] * of_input, axis=0, keepdims=True) for i in range(n)]
        d_pre = jnp.concatenate([*weighed, *([zeros] if above > n else [])], axis=0)
        d_own = d_pre * slopes
        along = (radials[:1] + jnp.sum(d_own * pulls, axis=0, keepdims=True)) * scale[:1]
        if s.logits > above:
            d_own = jnp.concatenate([d_own, jnp.zeros((s.logits - above, LANES), F32)], axis=0)
        raw = raw + d_own[: s.logits]
        for i in range(n):
            total = of_new[i] + pres[i : i + 1] * of_input
            total += along * _sum([to_new[i][j : j + 1] * of_own[j] for j in range(n + 1)])
            phi_rows = pl.ds(i * s.logits, s.logits)
            sums_of_phi = [
                jnp.sum(raw[:, : s.tokens] * phi_gram_ref[j, phi_rows, :], axis=0, keepdims=True) for j in range(n + 1)
            ]
            through = jnp.concatenate([*sums_of_phi, *[jnp.zeros((1, s.tokens), F32)] * (rows_of_map - n - 1)], axis=0)
            d_maps_ref[0, i * rows_of_map : (i + 1) * rows_of_map, :] = total
            d_maps_ref[0, i * rows_of_map : (i + 1) * rows_of_map, : s.tokens] += through
        d_maps_ref[0, n * rows_of_map :, :] = d_pre

        through_phi = []
        for j in range(n + 1):
            blocks = [raw * to_new[i][j : j + 1] for i in range(n)]
            if s.phi > n * s.logits:
                blocks.append(jnp.zeros((s.phi - n * s.logits, LANES), F32))
            outer = jnp.concatenate(blocks, axis=0)
            outer_ref[j] = outer[:, : s.tokens].astype(dtype)
            through_phi.append(outer.T)
        to_old = [
            *to_new,
            _sum([pres[i : i + 1] * to_new[i] for i in range(n)]),
            *(along * _sum([to_new[i][j : j + 1] * to_new[i] for i in range(n)]) for j in range(n + 1)),
        ]
        for q in range(s.groups):
            # The radial part, of X and y, is small: it needs no second number.
            high, *low = parts_of(_diagonals(_to_groups(to_old, q), n + 1), dtype)
            mix = [high.astype(F32), *(p.astype(F32)[:, :own] for p in low)]
            mix_ref[q] = jnp.concatenate(mix, axis=1).astype(dtype)
            at = slice(q * GROUP, (q + 1) * GROUP)
            last = jnp.concatenate([through[at] for through in through_phi], axis=0)
            last_ref[q * own : (q + 1) * own, :] = last.astype(dtype)

        def mix_back(k: Array, _: Any) -> None:
            at_step = pl.ds(pl.multiple_of(k * s.step, LANES), s.step)
            from_phi = product(last_ref[...], phi_ref[:, at_step])
            for q in range(s.groups):
                at = pl.ds(q * GROUP, GROUP)
                far, near = _stack(arrived, s, q, k), _stack(mine, s, q, k)
                old = product(mix_ref[q], jnp.concatenate([*far, *near, *far * (parts - 1)], axis=0))
                old = (old + from_phi[q * own : (q + 1) * own]).astype(dtype)
                for j in range(n):
                    dx_ref[_step(dx_ref, s, at, k, j)] = old[j * GROUP : (j + 1) * GROUP]
                dy_ref[_step(dy_ref, s, at, k)] = old[n * GROUP :]
            total = jnp.zeros((s.phi, s.step), F32)
            for j in range(n + 1):
                ref, stream = (x_ref, j) if j < n else (y_ref, 0)
                total += product(outer_ref[j], ref[_step(ref, s, slice(None), k, stream)])
            d_phi_ref[0, :, at_step] += total

        lax.fori_loop(0, s.width // s.step, mix_back, None)

    tiles = output.shape[0] // s.tokens
    # Two cores may share a chip: each sums up a part of phi's derivative.
    cores = 2 if tiles % 2 == 0 else 1
    turns = tiles // cores

    def tile(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda c, t: (c * turns + t, *[0] * (len(shape) - 1)))

    def whole(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda c, t: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))

    wide, one = tile(s.tokens, n * s.width), tile(s.tokens, s.width)
    arguments = streams, output, d_new, d_input, table, weights
    results = [
        jax.ShapeDtypeStruct(streams.shape, dtype),
        jax.ShapeDtypeStruct(output.shape, dtype),
        jax.ShapeDtypeStruct((tiles, n * rows_of_map + above, LANES), F32),
        jax.ShapeDtypeStruct((cores, s.phi, s.width), F32),
    ]
    dx, dy, d_maps, d_phi = launched(
        kernel,
        name="boundary_backward",
        grid=(cores, turns),
        in_specs=[wide, one, wide, one, tile(1, *table.shape[1:]), whole(weights)],
        out_specs=[
            wide,
            one,
            tile(1, n * rows_of_map + above, LANES),
            pl.BlockSpec((1, s.phi, s.width), lambda c, t: (c, 0, 0)),
        ],
        out_shape=results,
        scratch_shapes=[
            pltpu.VMEM((s.groups, own, both + (parts - 1) * own), dtype),
            pltpu.VMEM((s.groups * own, s.phi), dtype),
            pltpu.VMEM((n + 1, s.phi, s.tokens), dtype),
            pltpu.VMEM((s.groups, own, both), F32),
            pltpu.VMEM((n + 1, s.phi, s.tokens), F32),
        ],
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=int(_VMEM * _vector_memory()), dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=_cost(arguments, results, 2 * output.size * n * (3 * n + 3 + 3 * m)),
        interpret=interpret,
    )(*arguments)
    d_maps = _untable(d_maps, s, tokens)
    d_new_maps = d_maps[:, : n * rows_of_map].reshape(tokens, n, rows_of_map)
    d_phi = d_phi.sum(axis=0)[: n * s.logits].reshape(n, s.logits, s.width)[:, :m, :width]
    return (
        _cut(dx, tokens, n, width).reshape(*lead, -1),
        _cut(dy, tokens, 1, width).reshape(*lead, -1),
        d_new_maps[:, :, n].reshape(*lead, n),
        d_new_maps[:, :, :n].reshape(*lead, n, n),
        d_maps[:, n * rows_of_map : n * rows_of_map + n].reshape(*lead, n),
        d_phi.transpose(0, 2, 1).reshape(phi.shape),
    )


def _sum(arrays: list[Array]) -> Array:
    return reduce(add, arrays)


def _cost(arguments: tuple[Array, ...], results: list[jax.ShapeDtypeStruct], flops: int) -> pl.CostEstimate:
    both: list[Any] = [*arguments, *results]
    moved = sum(a.size * a.dtype.itemsize for a in both)
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)
