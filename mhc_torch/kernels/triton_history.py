"""The mix of a window of states in Triton: one pass over the states forward, and one backward.

States are flat, `size` numbers each, and a program has BLOCK of them. What is a sum over all numbers a program stores
as a part of its own, so that parts are added up in one order. This file needs Triton alone.
"""

from typing import Any

import triton
import triton.language as tl

BLOCK = 1024  # numbers of a program: a thread has 8 of each state
OPTIONS = {"num_warps": 4, "num_stages": 2}


def programs(size: int) -> int:
    """How many programs a kernel has."""
    return triton.cdiv(size, BLOCK)


def constants(**sizes: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {**sizes, "BLOCK": BLOCK}


@triton.jit
def mix_forward(x, states, weights, result, size, K: tl.constexpr, BLOCK: tl.constexpr):
    """x + sum_k weights[k] states[k]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    total = tl.load(x + at, live).to(tl.float32)
    for k in tl.static_range(K):
        total += tl.load(weights + k).to(tl.float32) * tl.load(states[k] + at, live).to(tl.float32)
    tl.store(result + at, total.to(result.dtype.element_ty), live)


@triton.jit
def mix_backward(gradient, states, weights, d_states, parts, size, K: tl.constexpr, BLOCK: tl.constexpr):
    """Of a sum by itself: weights[k] gradient for every state, and parts (programs, K) of <gradient, states[k]>."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    arrived = tl.load(gradient + at, live, 0).to(tl.float32)
    for k in tl.static_range(K):
        state = tl.load(states[k] + at, live, 0).to(tl.float32)
        passed = tl.load(weights + k).to(tl.float32) * arrived
        tl.store(d_states[k] + at, passed.to(d_states[k].dtype.element_ty), live)
        tl.store(parts + tl.program_id(0) * K + k, tl.sum(arrived * state))


@triton.jit
def window_backward(cotangents, column, latest, result, parts, size, H, BLOCK: tl.constexpr):
    """Of a stack: the sum of the last H cotangents (H, size) by their weights, and parts (programs, H) of their inner
    products with the latest state."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    state = tl.load(latest + at, live, 0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    row = cotangents + at
    for h in range(H):
        arrived = tl.load(row, live, 0).to(tl.float32)
        row += size
        total += tl.load(column + h).to(tl.float32) * arrived
        tl.store(parts + tl.program_id(0) * H + h, tl.sum(arrived * state))
    tl.store(result + at, total.to(result.dtype.element_ty), live)
