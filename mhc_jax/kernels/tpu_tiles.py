"""What the kernels of one layer of streams share on a TPU: tiles of tokens, and what a map does to them as one product.

A TPU keeps the n rows of a token together, (T, n, C), and its vector unit would have to take them apart. So GROUP
tokens are worked on as they lie: GROUP * n rows (t, i), and a map of every token is one matrix with rows (t, i) and
columns (t', j) that is zero where t is not t'. The multiplier wastes these zeros, and is still several times faster.
Where a token is not finite, the results of its group are not finite either.

Float32 coefficients of bfloat16 streams enter as two bfloat16 numbers, their sum: 16 bits, where a stream has 8. Sums
are float32. Maps of a tile have their tokens on lanes, (rows, entries, tokens): entry j of row i is what row i takes of
row j.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from mhc_jax.kernels.launch import LANES, cost, launched

GROUP = 8  # tokens: the rows of a register
TOKENS = LANES  # of a tile
GROUPS = TOKENS // GROUP
# Bytes of the vector memory of a core, of which every TPU since v5e has 64 MiB: for tiles, twice each, as one is worked
# on while another is on its way; and for all of a kernel.
_TILES, _VMEM = 24 * 2**20, 56 * 2**20
# Of a step, features at most, and bytes of the streams of a group: what the registers hold.
_FEATURES, _STEP = 1024, 2**16


class Tile(NamedTuple):
    """How a kernel cuts streams: `features` at a time in the grid, `step` of them at a time inside."""

    n: int
    features: int
    step: int

    @property
    def rows(self) -> int:
        """Of a group of streams."""
        return self.n * GROUP

    @property
    def several(self) -> int:
        """Groups whose rows together are what a product of many columns takes at a time."""
        return next(count for count in (16, 8, 4, 2, 1) if count * self.rows <= 128 or count == 1)


def tile(n: int, width: int, arrays: int, itemsize: int) -> Tile:
    """For a kernel that moves `arrays` arrays of the width of one stream."""
    units = pl.cdiv(width, LANES)

    def largest(units: int, limit: float) -> int:
        return next((u for u in range(units, 1, -1) if units % u == 0 and u * LANES <= limit), 1)

    block = largest(units, _TILES / (2 * arrays * TOKENS * itemsize))
    return Tile(n, block * LANES, largest(block, min(_FEATURES, _STEP / (n * GROUP * itemsize))) * LANES)


def call(kernel: Callable[..., None], *arguments: Array, flops: int, options: dict[str, Any], **specs: Any) -> Any:
    """`launched` over a grid whose first axis is of turns that share nothing; others follow each other."""
    results = specs["out_shape"]
    order: list[Any] = ["parallel", *["arbitrary"] * (len(specs["grid"]) - 1)]
    return launched(
        kernel,
        cost_estimate=cost(flops, *arguments, *(results if isinstance(results, list) else [results])),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM, dimension_semantics=order),
        **specs,
        **options,
    )(*arguments)


def working(streams: Array, maps: Array) -> tuple[Any, Any]:
    """The dtypes that are multiplied and that are summed."""
    sums = jnp.promote_types(maps.dtype, jnp.float32)
    return (streams.dtype if streams.dtype == jnp.bfloat16 else sums), sums


def parts_of(array: Array, dtype: Any) -> list[Array]:
    """Arrays of `dtype` that sum up to a float32 array: to 16 bits in bfloat16."""
    if dtype != jnp.bfloat16:
        return [array.astype(dtype)]
    high = array.astype(dtype)
    return [high, (array - high.astype(jnp.float32)).astype(dtype)]


def product(a: Array, b: Array, contract: tuple[int, int] = (1, 0), *, sums: Any = jnp.float32) -> Array:
    """Of two matrices: which axis of each goes, and the dtype of the sums."""
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=sums)


def table(rows: Sequence[Array]) -> Array:
    """Entries (T, k) of each row, as (rows, entries filled up to 8, T)."""
    filled = [jnp.pad(row.T, ((0, -row.shape[1] % 8), (0, 0))) for row in rows]
    return jnp.stack(filled)


def _labels(counts: Sequence[int]) -> np.ndarray:
    """Token and row of a token (2, rows), of a group of arrays below each other with so many rows a token."""
    found = []
    for k, count in enumerate(counts):
        token, row = np.divmod(np.arange(count * GROUP), count)
        found.append(np.stack([token, row + sum(counts[:k])]))
    return np.concatenate(found, axis=1)


class Diagonal(NamedTuple):
    """A matrix of diagonal blocks for a group, `copies` of it side by side.

    It makes arrays with so many rows a token as `rows` says of such as `columns` says. Its constants enter a kernel as
    arguments.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    copies: int

    @property
    def height(self) -> int:
        return sum(self.rows) * GROUP

    @property
    def width(self) -> int:
        return sum(self.columns) * GROUP * self.copies

    def same(self) -> np.ndarray:
        """1 where row and column are of the same token, (height, width)."""
        return (_labels(self.rows)[0][:, None] == self._columns()[0]).astype(np.float32)

    def spread(self) -> np.ndarray:
        """1 from the lane of an entry to its columns, of each copy from its own lanes, (copies * LANES, width)."""
        copy = np.repeat(np.arange(self.copies), self.width // self.copies)
        lane = copy * LANES + self._columns()[1]
        return (np.arange(self.copies * LANES)[:, None] == lane).astype(np.float32)

    def constants(self, dtype: Any, sums: Any) -> list[Array]:
        """Arguments of a kernel that calls `fill` or `gather`."""
        return [jnp.asarray(self.spread(), dtype), jnp.asarray(self.same(), sums)]

    def fill(self, mix_ref: Any, rows_refs: Sequence[Any], spread_ref: Any, same_ref: Any, dtype: Any) -> None:
        """The matrix of every group (GROUPS, height, width), of rows with their entries on lanes, of each array."""

        def group(g: Array, _: Any) -> None:
            entries = [ref[of_group(g, count * GROUP), :] for ref, count in zip(rows_refs, self.rows, strict=True)]
            split = jnp.concatenate(parts_of(jnp.concatenate(entries, axis=0), dtype), axis=1)
            everywhere = product(split, spread_ref[...], sums=same_ref.dtype)
            mix_ref[g] = jnp.where(same_ref[...] > 0, everywhere, 0).astype(dtype)

        lax.fori_loop(0, GROUPS, group, None, unroll=max(1, 160 // self.height))

    def gather(self, matrix_ref: Any, rows_ref: Any, spread_ref: Any, same_ref: Any, dtype: Any) -> None:
        """Undoes `fill`, of a matrix of one array of rows: the entries of each row, on lanes."""

        def group(g: Array, _: Any) -> None:
            own = jnp.where(same_ref[...] > 0, matrix_ref[g], 0)
            entries = [product(part, spread_ref[...], (1, 1), sums=same_ref.dtype) for part in parts_of(own, dtype)]
            rows_ref[of_group(g, self.height), :] = sum(entries)

        lax.fori_loop(0, GROUPS, group, None, unroll=max(1, 160 // self.height))

    def _columns(self) -> np.ndarray:
        return np.tile(_labels(self.columns), self.copies)


def on_rows(table_ref: Any, rows_ref: Any, first: int, count: int) -> None:
    """`count` rows of a table, (count, entries, tokens), to rows (t, i), (tokens * count, lanes)."""
    entries = table_ref.shape[1]
    for i in range(count):
        lanes = jnp.concatenate([table_ref[first + i], jnp.zeros((LANES - entries, TOKENS), table_ref.dtype)], axis=0)
        rows_ref[pl.ds(i, TOKENS, count), :] = lanes.T


def off_rows(rows_ref: Any, table_ref: Any, first: int, count: int) -> None:
    """Undoes `on_rows`."""
    for i in range(count):
        table_ref[first + i] = rows_ref[pl.ds(i, TOKENS, count), :].T[: table_ref.shape[1]]


def of_group(group: Any, rows: int) -> Any:
    """An index of the rows of a group."""
    return pl.ds(pl.multiple_of(group * rows, rows), rows)


def features(step: Any, t: Tile) -> Any:
    return pl.ds(pl.multiple_of(step * t.step, LANES), t.step)


def of_tile(maps: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """The maps of a tile of tokens."""
    return pl.BlockSpec((*maps.shape[:2], TOKENS), lambda i, _: (0, 0, i))


def whole(constant: Array) -> pl.BlockSpec:
    """All of an array, in every turn."""
    return pl.BlockSpec(constant.shape, lambda *_: (0,) * constant.ndim, pipeline_mode=pl.Buffered(1))
