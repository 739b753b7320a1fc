"""wip"""
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

GROUP = 16
LANES = 128


def parts(x, count):
    """`count` bfloat16 arrays whose sum is x."""
    out = []
    for _ in range(count):
        p = x.astype(jnp.bfloat16)
        x = x - p.astype(x.dtype)
        out.append(p)
    return out


def ceil(a, b):
    return -(-a // b) * b


def rows_of_groups(table):
    """(T, rows, blocks) to (T / GROUP, rows * lanes): token t of a group is at lane GROUP * block + t, twice."""
    t, r, b = table.shape
    x = table.reshape(-1, GROUP, r, b).transpose(0, 2, 3, 1).reshape(-1, r, b * GROUP)
    lanes = ceil(x.shape[-1], LANES)
    return jnp.pad(x, ((0, 0), (0, 0), (0, lanes - x.shape[-1]))).reshape(-1, r * lanes)


def diagonals(row, blocks):
    """A row of GROUP-wide blocks to (GROUP, .): the blocks' diagonals."""
    wide = jnp.broadcast_to(row, (GROUP, row.shape[1]))
    t = lax.broadcasted_iota(jnp.int32, wide.shape, 0)
    lane = lax.broadcasted_iota(jnp.int32, wide.shape, 1)
    return jnp.where(lane % GROUP == t, wide, 0)


def dot(a, b, dims=((1,), (0,))):
    return lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=jnp.float32)


def forward(X, y, post, res, phi, scale, *, norm_epsilon, activation, B=128, W=512, interpret=False):
    T, C = y.shape
    n = X.shape[1] // C
    m = phi.shape[1]
    mp = ceil(m, 8)
    coefs = rows_of_groups(jnp.concatenate([res, post[..., None]], -1))
    cols = jnp.concatenate([jnp.pad(p, ((0, mp - m), (0, 0))) for p in parts(phi.T, 2)], 0)
    P = ceil(2 * mp, 16)
    cols = jnp.pad(cols, ((0, P - 2 * mp), (0, 0)))
    K = (n + 1) * GROUP
    KL = ceil(K, LANES)
    G = B // GROUP

    def kernel(x, yr, coef, phir, scaler, xo, inp, rawo, L, raw, sq):
        for q in range(G):
            d = [diagonals(coef[q : q + 1, o * KL : (o + 1) * KL], None) for o in range(n)]
            f = jnp.concatenate(d, 0)[:, :K]
            hi = f.astype(jnp.bfloat16).astype(jnp.float32)
            L[q, :, : 2 * K] = jnp.concatenate([hi, f - hi], 1).astype(jnp.bfloat16)
        raw[...] = jnp.zeros(raw.shape, raw.dtype)
        sq[...] = jnp.zeros(sq.shape, sq.dtype)

        def chunk(k, _):
            for q in range(G):
                at = pl.ds(q * GROUP, GROUP)
                blocks = [x[at, pl.ds(pl.multiple_of(j * C + k * W, W), W)] for j in range(n)]
                blocks.append(yr[at, pl.ds(pl.multiple_of(k * W, W), W)])
                z = dot(L[q, :, : 2 * K], jnp.concatenate(blocks * 2, 0))
                zb = z.astype(jnp.bfloat16)
                total = jnp.zeros((GROUP, LANES), jnp.float32)
                for i in range(n):
                    zi = zb[i * GROUP : (i + 1) * GROUP]
                    xo[at, pl.ds(pl.multiple_of(i * C + k * W, W), W)] = zi
                    zf = zi.astype(jnp.float32)
                    zz = zf * zf
                    for w in range(W // LANES):
                        total += zz[:, w * LANES : (w + 1) * LANES]
                sq[at, :] += total
            r = jnp.zeros((B, P), jnp.float32)
            for i in range(n):
                s = pl.ds(pl.multiple_of(i * C + k * W, W), W)
                r += dot(xo[:, s], phir[:, s], ((1,), (1,)))
            raw[...] += r
            return 0

        lax.fori_loop(0, C // W, chunk, 0)
        rt = raw[...].T
        rt = rt[:mp] + rt[mp : 2 * mp]
        ss = jnp.sum(sq[...].T, 0, keepdims=True)
        rawo[0, :mp] = rt
        rawo[0, mp:] = jnp.broadcast_to(ss, (8, B))
        inv = lax.rsqrt(ss / (n * C) + norm_epsilon)
        r8 = rt[:ceil(n, 8)]
        pre = activation(r8 * inv, scaler[:, 0:1], scaler[:, 1:2])
        pre = jnp.concatenate([pre, jnp.zeros((LANES - pre.shape[0], B), jnp.float32)], 0).T  # (B, LANES)
        def collapse(k, _):
            for q in range(G):
                at = pl.ds(q * GROUP, GROUP)
                total = jnp.zeros((GROUP, W), jnp.float32)
                for i in range(n):
                    p = pre[q * GROUP : (q + 1) * GROUP, i : i + 1]
                    total += p * xo[at, pl.ds(pl.multiple_of(i * C + k * W, W), W)].astype(jnp.float32)
                inp[at, pl.ds(pl.multiple_of(k * W, W), W)] = total.astype(jnp.bfloat16)
            return 0

        lax.fori_loop(0, C // W, collapse, 0)

    row = lambda w: pl.BlockSpec((B, w), lambda i: (i, 0))
    full = lambda a: pl.BlockSpec(a.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1))
    by = 2 * T * (2 * n * C + 2 * C) + coefs.size * 4 + cols.size * 2 + T * (mp + 8) * 4
    return pl.pallas_call(
        kernel,
        grid=(T // B,),
        in_specs=[row(n * C), row(C), pl.BlockSpec((G, n * KL), lambda i: (i, 0)), full(cols), full(scale)],
        out_specs=[row(n * C), row(C), pl.BlockSpec((1, mp + 8, B), lambda i: (i, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(X.shape, X.dtype),
            jax.ShapeDtypeStruct(y.shape, X.dtype),
            jax.ShapeDtypeStruct((T // B, mp + 8, B), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((G, n * GROUP, ceil(2 * K, LANES)), jnp.bfloat16),
            pltpu.VMEM((B, P), jnp.float32),
            pltpu.VMEM((B, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=60 * 2**20, dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * n * C * (n + 1 + m), transcendentals=T * n, bytes_accessed=by
        ),
        interpret=interpret,
        name="boundary_forward",
    )(X, y, coefs, cols, scale)
