"""Sinkhorn-Knopp, logits to doubly stochastic matrices, by two algorithms that neither overflow nor store iterations.

`sinkhorn` is for many small matrices and a few iterations, as in hyper-connections: one fused loop in plain arithmetic.
`log_sinkhorn` is for matrices of any size and any number of iterations, or as many as a tolerance needs: what plain
arithmetic would round to zero may grow again in a long run, and stays exact in logarithms, at several times the cost.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.meshes import Axes, on_parts

# Matrices per step of the loop over chunks: 4x4 matrices of a chunk stay in a core's cache for all iterations.
CHUNK = 4096
# States of `log_sinkhorn` that its backward pass keeps, whatever the number of iterations.
_CHECKPOINTS = 8


def sinkhorn(
    logits: Float[Array, "*batch n n"], iterations: int = 20, epsilon: float = 0.0
) -> Float[Array, "*batch n n"]:
    """exp(logits), then `iterations` times: columns divided by their sums, rows divided by their sums. Rows come last.

    Sinkhorn and Knopp (1967), in the order of equation 9 of arXiv 2512.24880. The first iteration is taken in the
    log domain; after it every row sums to 1, so that every later row and column sum lies in [1/n, n] and the
    following iterations are safe in plain arithmetic, for any finite logits.

    The derivative is that of the iterations themselves, not of their limit. Backward runs the loop again and keeps
    the 2n sums of an iteration for the chunk at hand: since P = P' * sums, each iterate is rebuilt from its successor.

    Args:
        logits: square matrices, float32 or float64. Element [i, j] belongs to row i and column j.
        iterations: number of column-then-row normalizations, at least 1.
        epsilon: DeepSeek-V4's `hc_eps`: added to the matrix after the first column normalization, and to every sum
            after it. With 0 the result is the paper's.

    Returns:
        Matrices of the same shape: rows sum to 1 exactly (up to rounding), columns as far as the iterations go.
    """

    def of_part(logits: Array, over: Axes) -> Array:
        return _sinkhorn(logits, iterations, epsilon)

    return on_parts(of_part, "...ij -> ...ij", logits)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sinkhorn(logits: Array, iterations: int, epsilon: float) -> Array:
    return forward(logits, iterations=iterations, epsilon=epsilon)


@partial(jax.jit, static_argnames=("iterations", "epsilon"), inline=True)
def forward(logits: Array, *, iterations: int, epsilon: float) -> Array:
    """The operations of `sinkhorn`, with the derivatives of both modes that JAX finds."""
    return _over_chunks(partial(_forward, iterations=iterations, epsilon=epsilon), logits)


@partial(jax.jit, static_argnames=("iterations", "epsilon"), inline=True)
def backward(logits: Array, cotangent: Array, *, iterations: int, epsilon: float) -> Array:
    """The derivative of `sinkhorn`: the gradient of its logits from that of its result."""
    return _over_chunks(partial(_backward, iterations=iterations, epsilon=epsilon), logits, cotangent)


def _over_chunks(function: Callable[..., Array], *matrices: Array) -> Array:
    """Applies `function`, written for matrices laid out (n, n, ...) so that the batch fills the vector unit."""

    def in_a_row(*matrices: Array) -> Array:
        *lead, n, _ = matrices[0].shape
        matrices = tuple(m.reshape(-1, n, n) for m in matrices)
        batch = matrices[0].shape[0]
        chunks = -(-batch // CHUNK)
        if chunks <= 1:
            result = function(*(m.transpose(1, 2, 0) for m in matrices))
            return result.transpose(2, 0, 1).reshape(*lead, n, n)
        padding = ((0, -batch % chunks), (0, 0), (0, 0))
        # Chunk k holds the matrices k, k + chunks, ...: a batch that is sharded stays where it is.
        split = tuple(jnp.pad(m, padding).reshape(-1, chunks, n, n).transpose(1, 2, 3, 0) for m in matrices)
        result = jax.lax.map(lambda chunk: function(*chunk), split)
        return result.transpose(3, 0, 1, 2).reshape(-1, n, n)[:batch].reshape(*lead, n, n)

    def as_they_lie(*matrices: Array) -> Array:
        # An accelerator has the memory for all of them; and axes that a mesh splits cannot be joined in place.
        result = function(*(jnp.moveaxis(m, (-2, -1), (0, 1)) for m in matrices))
        return jnp.moveaxis(result, (0, 1), (-2, -1))

    return jax.lax.platform_dependent(*matrices, cpu=in_a_row, default=as_they_lie)


def _row_sums(matrix: Array) -> Array:
    return jnp.sum(matrix, axis=1, keepdims=True)


def _column_sums(matrix: Array) -> Array:
    return jnp.sum(matrix, axis=0, keepdims=True)


def _first(logits: Array, epsilon: float) -> tuple[Array, Array]:
    """The column softmax, and what the first row normalization makes of it."""
    log_columns = jax.nn.log_softmax(logits, axis=0)
    columns = jnp.exp(log_columns)
    if epsilon == 0:
        return columns, jax.nn.softmax(log_columns, axis=1)
    return columns, (columns + epsilon) / (_row_sums(columns + epsilon) + epsilon)


def _iterate(matrix: Array, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    columns = _column_sums(matrix) + epsilon
    matrix = matrix / columns
    rows = _row_sums(matrix) + epsilon
    return matrix / rows, (columns, rows)


def _forward(logits: Array, *, iterations: int, epsilon: float) -> Array:
    _, matrix = _first(logits, epsilon)
    return jax.lax.fori_loop(1, iterations, lambda _, matrix: _iterate(matrix, epsilon)[0], matrix)


def _backward(logits: Array, cotangent: Array, *, iterations: int, epsilon: float) -> Array:
    first_columns, first = _first(logits, epsilon)
    matrix, sums = jax.lax.scan(lambda m, _: _iterate(m, epsilon), first, None, length=iterations - 1)

    def undo(carry: tuple[Array, Array], sums: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        matrix, log_cotangent = carry
        columns, rows = sums
        log_cotangent -= matrix * _row_sums(log_cotangent)
        matrix = matrix * rows
        log_cotangent -= matrix * _column_sums(log_cotangent)
        return (matrix * columns, log_cotangent), None

    # Cotangents are of the logarithm of the matrix: there a normalization subtracts a weighted sum and never divides.
    (_, log_cotangent), _ = jax.lax.scan(undo, (matrix, matrix * cotangent), sums, reverse=True)
    log_cotangent -= first * _row_sums(log_cotangent)
    if epsilon != 0:
        log_cotangent *= first_columns / (first_columns + epsilon)
    return log_cotangent - first_columns * _column_sums(log_cotangent)


def _sinkhorn_fwd(logits: Array, iterations: int, epsilon: float) -> tuple[Array, Array]:
    # Not `_sinkhorn`, whose derivative is reverse only: a Hessian takes the forward-mode derivative of this.
    return forward(logits, iterations=iterations, epsilon=epsilon), logits


def _sinkhorn_bwd(iterations: int, epsilon: float, logits: Array, cotangent: Array) -> tuple[Array]:
    return (backward(logits, cotangent, iterations=iterations, epsilon=epsilon),)


_sinkhorn.defvjp(_sinkhorn_fwd, _sinkhorn_bwd)


def log_sinkhorn(
    logits: Float[Array, "*batch n n"], iterations: int, tolerance: float | None = None
) -> Float[Array, "*batch n n"]:
    """exp(logits), then `iterations` times: rows divided by their sums, columns by theirs. Columns come last.

    Args:
        logits: square matrices, float32 or float64, any finite values.
        iterations: how often both sides are normalized, at least 1; the largest number of times with a `tolerance`.
        tolerance: stop once all rows sum to 1 within this. The derivative is then the implicit one at the fixed point;
            without a tolerance it is that of exactly `iterations` iterations.

    Source: Sinkhorn and Knopp (1967).
    """
    return _repeated(logits, iterations) if tolerance is None else _converged(logits, iterations, tolerance)


# The state of the iteration is v, the logarithm of the column scales. One iteration normalizes the rows of
# exp(z + v) and then corrects v by what its columns lack, so that rounding errors do not add up.


def _log_step(z: Array, v: Array) -> Array:
    return v - jax.nn.logsumexp(jax.nn.log_softmax(z + v[..., None, :], axis=-1), axis=-2)


def _log_last_step(z: Array, v: Array) -> Array:
    # The same step, ending in weights: softmax makes the columns sum to 1 where exp(z + u + v) would round.
    return jax.nn.softmax(jax.nn.log_softmax(z + v[..., None, :], axis=-1), axis=-2)


def _log_steps(z: Array, v: Array, steps: int | Array) -> Array:
    return jax.lax.fori_loop(0, steps, lambda _, v: _log_step(z, v), v)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeated(z: Array, iterations: int) -> Array:
    return _repeated_fwd(z, iterations)[0]


# Without `_repeated`, as in `_sinkhorn_fwd`.
@partial(jax.jit, static_argnums=1, inline=True)
def _repeated_fwd(z: Array, iterations: int) -> tuple[Array, Array]:
    return _log_last_step(z, _log_steps(z, jnp.zeros_like(z[..., 0, :]), iterations - 1)), z


@partial(jax.jit, static_argnums=0, inline=True)
def _repeated_bwd(iterations: int, z: Array, g: Array) -> tuple[Array]:
    """Walks the iterations backwards, finding each v again from the nearest of a fixed number of checkpoints."""
    stride = -(-iterations // _CHECKPOINTS)
    start = jnp.zeros_like(z[..., 0, :])
    _, checkpoints = jax.lax.scan(lambda v, _: (_log_steps(z, v, stride), v), start, length=_CHECKPOINTS)

    def state(t: int | Array) -> Array:
        return _log_steps(z, checkpoints[t // stride], t % stride)

    def back(i: Array, cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
        dz, dv = cotangents
        _, pullback = jax.vjp(_log_step, z, state(iterations - 2 - i))
        dz_step, dv = pullback(dv)
        return dz + dz_step, dv

    _, pullback = jax.vjp(_log_last_step, z, state(iterations - 1))
    dz, _ = jax.lax.fori_loop(0, iterations - 1, back, pullback(g))
    return (dz,)


_repeated.defvjp(_repeated_fwd, _repeated_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _converged(z: Array, iterations: int, tolerance: float) -> Array:
    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        count, v, v_next = carry
        return (count < iterations) & jnp.any(jnp.abs(jnp.expm1(v - v_next)) > tolerance)

    def advance(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, _, v = carry
        return count + 1, v, _log_step(z, v)

    v = jnp.zeros_like(z[..., 0, :])
    # v - v_next is the logarithm of the column sums after the rows were normalized.
    _, v, _ = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), v, _log_step(z, v)))
    return _log_last_step(z, v)


def _converged_fwd(z: Array, iterations: int, tolerance: float) -> tuple[Array, Array]:
    weights = _converged(z, iterations, tolerance)
    return weights, weights


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _converged_bwd(iterations: int, tolerance: float, p: Array, g: Array) -> tuple[Array]:
    """At the fixed point ``dz = P * (g - a_i - b_j)``, with a, b such that its rows and columns sum to 0.

    Eliminating a leaves ``(I - P^T P) b = (P * g)^T 1 - P^T (P * g) 1``, positive semidefinite; the constant vector,
    and more for a reducible P, lies in its kernel and does not change dz. Hence the pseudo-inverse.
    """
    del iterations, tolerance
    pg = p * g
    rows, columns = pg.sum(axis=-1), pg.sum(axis=-2)
    values, vectors = jnp.linalg.eigh(jnp.eye(p.shape[-1], dtype=p.dtype) - p.mT @ p)
    cutoff = 10 * p.shape[-1] * jnp.finfo(p.dtype).eps
    inverse = jnp.where(values > cutoff, 1.0 / jnp.maximum(values, cutoff), 0.0)
    b = columns - jnp.einsum("...ij,...i->...j", p, rows)
    b = jnp.einsum("...jk,...k,...lk,...l->...j", vectors, inverse, vectors, b)
    a = rows - jnp.einsum("...ij,...j->...i", p, b)
    return (p * (g - a[..., :, None] - b[..., None, :]),)


_converged.defvjp(_converged_fwd, _converged_bwd)
