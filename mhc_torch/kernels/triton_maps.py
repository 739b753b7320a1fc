"""H_post and H_res of the projected streams in Triton, Sinkhorn-Knopp with all of its iterations inside.

A program has the matrices of a few tokens, (tokens, N, N) with N the next power of two of n, in registers. Backward
runs the iterations again, keeps their sums, and undoes one after the other: see `mhc_torch.sinkhorn`.

This file needs Triton alone, so that the lab compiles it where no torch is.
"""

from typing import Any

import triton
import triton.language as tl

NUMBERS = 512  # of the matrices of a program
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def programs(tokens: int, n: int) -> int:
    """How many programs there are."""
    return triton.cdiv(tokens, _tokens(n))


def constants(n: int, epsilon: bool, rows_first: bool) -> dict[str, Any]:
    """What the kernels are compiled for."""
    line = triton.next_power_of_2(n)
    return {
        "n": n,
        "m": n * n + 2 * n,
        "N": line,
        "TOKENS": _tokens(n),
        "EPSILON": epsilon,
        "ROWS_FIRST": rows_first,
    }


def _tokens(n: int) -> int:
    return int(NUMBERS // triton.next_power_of_2(n) ** 2)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _divisor(total, epsilon):
    # Rows and columns that fill up a matrix are 0, and stay it.
    total += epsilon
    return tl.where(total > 0, total, 1.0)


@triton.jit
def _start(logits, live, epsilon, EPSILON: tl.constexpr):
    """The column softmax, and what the first row normalization makes of it: in the log domain, for any logits."""
    low = tl.where(live, logits, -3e38)
    shifted = low - tl.max(low, 1)[:, None, :]
    columns = tl.where(live, tl.exp(shifted), 0.0)
    sums = _divisor(tl.sum(columns, 1), 0.0)[:, None, :]
    columns /= sums
    if EPSILON:
        first = tl.where(live, columns + epsilon, 0.0)
    else:
        logs = tl.where(live, shifted - tl.log(sums), -3e38)
        first = tl.where(live, tl.exp(logs - tl.max(logs, 2)[:, :, None]), 0.0)
    return columns, first / _divisor(tl.sum(first, 2), epsilon)[:, :, None]


@triton.jit
def _positions(tokens, n: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """Tokens, and of the matrices which numbers are live, and where they lie. Rows first is the transpose."""
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    line = tl.arange(0, N)
    i, j = line[None, :, None], line[None, None, :]
    at = j * n + i if ROWS_FIRST else i * n + j
    return row.to(tl.int64), row < tokens, (i < n) & (j < n), at


@triton.jit
def _residual(raw, scale, alpha, bias, t, live, inside, at, n: tl.constexpr, m: tl.constexpr):
    """The logits of H_res."""
    normalized = tl.load(raw + (t * m)[:, None, None] + 2 * n + at, mask=live[:, None, None] & inside, other=0)
    own = tl.load(bias + 2 * n + at, mask=inside, other=0).to(tl.float32)
    return tl.load(alpha + 2).to(tl.float32) * normalized * scale[:, None, None] + own


@triton.jit
def _post(raw, scale, alpha, bias, t, known, n: tl.constexpr, m: tl.constexpr, N: tl.constexpr):
    """The sigmoid of the logits of H_post."""
    line = tl.arange(0, N)[None, :]
    normalized = tl.load(raw + t[:, None] * m + n + line, mask=known, other=0) * scale[:, None]
    own = tl.load(bias + n + line, mask=line < n, other=0).to(tl.float32)
    return _sigmoid(tl.load(alpha + 1).to(tl.float32) * normalized + own)


@triton.jit
def maps_forward(
    raw,
    inverse_rms,
    alpha,
    bias,
    post,
    res,
    tokens,
    iterations,
    epsilon,
    post_scale,
    post_epsilon,
    n: tl.constexpr,
    m: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """H_post (T, n) and H_res (T, n, n) of raw logits (T, m)."""
    t, live, inside, at = _positions(tokens, n, N, TOKENS, ROWS_FIRST)
    scale = tl.load(inverse_rms + t, mask=live, other=0)
    line = tl.arange(0, N)[None, :]
    known = live[:, None] & (line < n)
    weights = post_scale * _post(raw, scale, alpha, bias, t, known, n, m, N) + post_epsilon
    tl.store(post + t[:, None] * n + line, weights, mask=known)
    logits = _residual(raw, scale, alpha, bias, t, live, inside, at, n, m)
    _, matrix = _start(logits, inside, epsilon, EPSILON)
    for _ in range(1, iterations):
        matrix /= _divisor(tl.sum(matrix, 1), epsilon)[:, None, :]
        matrix /= _divisor(tl.sum(matrix, 2), epsilon)[:, :, None]
    tl.store(res + (t * (n * n))[:, None, None] + at, matrix, mask=live[:, None, None] & inside)


@triton.jit
def maps_backward(
    raw,
    inverse_rms,
    alpha,
    bias,
    d_post,
    d_res,
    sums,
    d_logits,
    tokens,
    iterations,
    epsilon,
    post_scale,
    n: tl.constexpr,
    m: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """The derivatives of the logits of H_post and H_res.

    sums (T, iterations, 2, N) are those by which each iteration divides columns and rows; nobody else reads them.
    """
    t, live, inside, at = _positions(tokens, n, N, TOKENS, ROWS_FIRST)
    scale = tl.load(inverse_rms + t, mask=live, other=0)
    line = tl.arange(0, N)[None, :]
    known = live[:, None] & (line < n)
    weights = _post(raw, scale, alpha, bias, t, known, n, m, N)
    arrived = tl.load(d_post + t[:, None] * n + line, mask=known, other=0)
    tl.store(d_logits + t[:, None] * m + n + line, arrived * post_scale * weights * (1 - weights), mask=known)
    columns, first = _start(_residual(raw, scale, alpha, bias, t, live, inside, at, n, m), inside, epsilon, EPSILON)
    matrix = first
    of_token = sums + (t * (2 * N * iterations))[:, None] + line
    for k in range(1, iterations):
        of_columns = _divisor(tl.sum(matrix, 1), epsilon)
        matrix /= of_columns[:, None, :]
        of_rows = _divisor(tl.sum(matrix, 2), epsilon)
        matrix /= of_rows[:, :, None]
        tl.store(of_token + 2 * N * k, of_columns, mask=live[:, None])
        tl.store(of_token + 2 * N * k + N, of_rows, mask=live[:, None])
    # What one thread of the program wrote another may read.
    tl.debug_barrier()
    everywhere = live[:, None, None] & inside
    # Of the logarithm of the matrix: there a normalization subtracts a weighted sum. matrix = next * sums.
    d = matrix * tl.load(d_res + (t * (n * n))[:, None, None] + at, mask=everywhere, other=0)
    for back in range(1, iterations):
        k = iterations - back
        d -= matrix * tl.sum(d, 2)[:, :, None]
        matrix *= tl.load(of_token + 2 * N * k + N, mask=live[:, None], other=1)[:, :, None]
        d -= matrix * tl.sum(d, 1)[:, None, :]
        matrix *= tl.load(of_token + 2 * N * k, mask=live[:, None], other=1)[:, None, :]
    d -= first * tl.sum(d, 2)[:, :, None]
    if EPSILON:
        d *= columns / (columns + epsilon)
    d -= columns * tl.sum(d, 1)[:, None, :]
    tl.store(d_logits + (t * m)[:, None, None] + 2 * n + at, d, mask=everywhere)
