"""Sinkhorn-Knopp as Pallas kernels: all iterations of a matrix in the registers that hold it, forward and backward."""

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mhc_jax import sinkhorn as xla
from mhc_jax.kernels.choice import implemented
from mhc_jax.kernels.launch import LANES, cost, launched, on_every_platform

# Rows of 128 matrices that one program works on. Element [i, j] of all of them is one vector: a thread's register on a
# GPU, a whole vector register on a TPU. A sum over rows or columns is a sum of vectors, and no lane waits for another.
GPU_ROWS = 1
TPU_ROWS = 8

Matrix = tuple[tuple[Array, ...], ...]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sinkhorn(logits: Float[Array, "*batch n n"], iterations: int, epsilon: float) -> Float[Array, "*batch n n"]:
    """`mhc_jax.sinkhorn.sinkhorn`. Backward finds every iterate again from the first: nothing but logits is kept."""
    return _sinkhorn_fwd(logits, iterations, epsilon)[0]


def _sinkhorn_fwd(logits: Array, iterations: int, epsilon: float) -> tuple[Array, Array]:
    forward = implemented("sinkhorn", "pallas", _forward_kernel, xla.forward)
    return forward(logits, iterations=iterations, epsilon=epsilon), logits


def _sinkhorn_bwd(iterations: int, epsilon: float, logits: Array, cotangent: Array) -> tuple[Array]:
    backward = implemented("sinkhorn", "pallas", _backward_kernel, xla.backward)
    return (backward(logits, cotangent, iterations=iterations, epsilon=epsilon),)


sinkhorn.defvjp(_sinkhorn_fwd, _sinkhorn_bwd)


def _forward_kernel(logits: Array, *, iterations: int, epsilon: float) -> Array:
    forward = partial(_forward, iterations=iterations, epsilon=epsilon)
    return _call(forward, logits, name="sinkhorn", flops=4 * iterations)


def _backward_kernel(logits: Array, cotangent: Array, *, iterations: int, epsilon: float) -> Array:
    backward = partial(_backward, iterations=iterations, epsilon=epsilon)
    return _call(backward, logits, cotangent, name="sinkhorn_backward", flops=2 * iterations**2)


def _call(function: Callable[..., Matrix], *arguments: Array, name: str, flops: int) -> Array:
    """Applies a function of matrices, whose elements are vectors of the batch, to arrays (*batch, n, n).

    `flops` are the operations that it takes for one element.
    """
    shape, n = arguments[0].shape, arguments[0].shape[-1]
    arguments = tuple(a.reshape(-1, n, n) for a in arguments)
    batch = arguments[0].shape[0]

    def run(*arrays: Array, block: int, options: dict[str, Any]) -> Array:
        def kernel(*refs: Any) -> None:
            *ins, out = refs
            result = function(*(tuple(tuple(ref[i, j] for j in range(n)) for i in range(n)) for ref in ins))
            for i, row in enumerate(result):
                for j, element in enumerate(row):
                    out[i, j] = element

        padding = ((0, -batch % (block * LANES)), (0, 0), (0, 0))
        lanes = [jnp.pad(a, padding).transpose(1, 2, 0).reshape(n, n, -1, LANES) for a in arrays]
        spec = pl.BlockSpec((n, n, block, LANES), lambda b: (0, 0, b, 0))
        result = launched(
            kernel,
            grid=(lanes[0].shape[2] // block,),
            in_specs=[spec] * len(lanes),
            out_specs=spec,
            out_shape=jax.ShapeDtypeStruct(lanes[0].shape, lanes[0].dtype),
            cost_estimate=cost(flops * lanes[0].size, *lanes, lanes[0], transcendentals=lanes[0].size),
            name=name,
            **options,
        )(*lanes)
        return result.reshape(n, n, -1).transpose(2, 0, 1)[:batch]

    return on_every_platform(run, *arguments, tpu=TPU_ROWS, gpu=GPU_ROWS).reshape(shape)


def _forward(logits: Matrix, *, iterations: int, epsilon: float) -> Matrix:
    _, first = _first(logits, epsilon)
    return _iterated(first, iterations - 1, epsilon)


def _backward(logits: Matrix, cotangent: Matrix, *, iterations: int, epsilon: float) -> Matrix:
    columns, first = _first(logits, epsilon)

    def undo(k: Array, log_cotangent: Matrix) -> Matrix:
        between = _columns_normalized(_iterated(first, iterations - 2 - k, epsilon), epsilon)
        return _undo_columns(between, _undo_rows(_rows_normalized(between, epsilon), log_cotangent))

    # Cotangents are of the logarithm of the matrix: there a normalization subtracts a weighted sum and never divides.
    last = _iterated(first, iterations - 1, epsilon)
    log_cotangent = lax.fori_loop(0, iterations - 1, undo, _each(lambda p, d: p * d, last, cotangent))
    log_cotangent = _undo_rows(first, log_cotangent)
    if epsilon:
        log_cotangent = _each(lambda p, d: d * (p / (p + epsilon)), columns, log_cotangent)
    return _undo_columns(columns, log_cotangent)


def _first(logits: Matrix, epsilon: float) -> tuple[Matrix, Matrix]:
    """The column softmax, and what the first row normalization makes of it."""
    log_columns = _transposed(_log_softmax(_transposed(logits)))
    columns = _each(jnp.exp, log_columns)
    if epsilon:
        return columns, _rows_normalized(_each(lambda p: p + epsilon, columns), epsilon)
    return columns, _each(jnp.exp, _log_softmax(log_columns))


def _iterated(matrix: Matrix, times: int | Array, epsilon: float) -> Matrix:
    def iterate(_: Array, matrix: Matrix) -> Matrix:
        return _rows_normalized(_columns_normalized(matrix, epsilon), epsilon)

    return lax.fori_loop(0, times, iterate, matrix)


def _rows_normalized(matrix: Matrix, epsilon: float) -> Matrix:
    scales = [1 / (reduce(add, row) + epsilon) for row in matrix]
    return tuple(tuple(x * scale for x in row) for row, scale in zip(matrix, scales, strict=True))


def _columns_normalized(matrix: Matrix, epsilon: float) -> Matrix:
    return _transposed(_rows_normalized(_transposed(matrix), epsilon))


def _undo_rows(normalized: Matrix, log_cotangent: Matrix) -> Matrix:
    totals = [reduce(add, row) for row in log_cotangent]
    return tuple(
        tuple(d - p * total for p, d in zip(ps, ds, strict=True))
        for ps, ds, total in zip(normalized, log_cotangent, totals, strict=True)
    )


def _undo_columns(normalized: Matrix, log_cotangent: Matrix) -> Matrix:
    return _transposed(_undo_rows(_transposed(normalized), _transposed(log_cotangent)))


def _log_softmax(matrix: Matrix) -> Matrix:
    def of_row(row: tuple[Array, ...]) -> tuple[Array, ...]:
        largest = reduce(jnp.maximum, row)
        total = jnp.log(reduce(add, [jnp.exp(x - largest) for x in row]))
        return tuple(x - largest - total for x in row)

    return tuple(of_row(row) for row in matrix)


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _each(function: Callable[..., Array], *matrices: Matrix) -> Matrix:
    return tuple(tuple(function(*xs) for xs in zip(*rows, strict=True)) for rows in zip(*matrices, strict=True))
