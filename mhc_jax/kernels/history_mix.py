"""One mixing step as Pallas kernels: forward reads K + 1 states and writes one, backward reads K + 1 and writes K.

Both make a single pass over memory, which is all that a mixing step costs. XLA fuses the forward pass just as well;
backward, the kernel takes the gradients of states and weights from one reading of the states.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from mhc_jax.kernels.choice import implemented
from mhc_jax.kernels.launch import LANES, cost, launched

# Rows of 128 lanes that one program of the grid works on. A GPU holds them in registers, a TPU in its vector memory,
# where window and output together must stay within a few megabytes.
GPU_ROWS = 64
TPU_ROWS = 256


@jax.custom_vjp
def mix(x: Float[Array, "*S"], states: Float[Array, "K *S"], weights: Float[Array, "K"]) -> Float[Array, "*S"]:
    """``x + sum_k weights[k] * states[k]``, summed in the dtype of ``weights``, in the dtype of ``x``.

    Lowers to Mosaic for TPU and to Triton for CUDA and ROCm; on any other platform it is interpreted, for tests.
    """
    return _mix_fwd(x, states, weights)[0]


def _mix_fwd(x: Array, states: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    forward = implemented("mix", "pallas", _forward_kernel, _forward_by_xla)
    return forward(x, states, weights), (states, weights)


def _mix_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    backward = implemented("mix", "pallas", _backward_kernel, _backward_by_xla)
    d_states, d_weights = backward(g, *residuals)
    return g, d_states, d_weights


def _forward_by_xla(x: Array, states: Array, weights: Array) -> Array:
    wide = weights.dtype
    return (x.astype(wide) + jnp.tensordot(weights, states.astype(wide), 1)).astype(x.dtype)


def _backward_by_xla(g: Array, states: Array, weights: Array) -> tuple[Array, Array]:
    wide = weights.dtype
    d_states = jnp.tensordot(weights, g.astype(wide), 0).astype(states.dtype)
    return d_states, jnp.tensordot(states.astype(wide), g.astype(wide), g.ndim)


mix.defvjp(_mix_fwd, _mix_bwd)


def _forward_kernel(x: Array, states: Array, weights: Array) -> Array:
    return _on_every_platform(_forward, x, states, weights)


def _backward_kernel(g: Array, states: Array, weights: Array) -> tuple[Array, Array]:
    return _on_every_platform(_backward, g, states, weights)


def _on_every_platform(function: Any, *arguments: Array) -> Any:
    return lax.platform_dependent(
        *arguments,
        tpu=partial(function, rows=TPU_ROWS, options={}),
        cuda=partial(function, rows=GPU_ROWS, options={"compiler_params": triton.CompilerParams()}),
        rocm=partial(function, rows=GPU_ROWS, options={"compiler_params": triton.CompilerParams()}),
        default=partial(function, rows=GPU_ROWS, options={"interpret": True}),
    )


def _in_lanes(array: Array, size: int) -> Array:
    """The last ``size`` elements' axes as rows of lanes, filled up with zeros."""
    flat = array.reshape(-1, size)
    flat = jnp.pad(flat, ((0, 0), (0, -size % LANES)))
    return flat.reshape(-1, flat.shape[1] // LANES, LANES)


def _forward(x: Array, states: Array, weights: Array, *, rows: int, options: dict[str, Any]) -> Array:
    count = weights.size
    lanes = _in_lanes(x, x.size)

    def kernel(x_ref: Any, states_ref: Any, weights_ref: Any, out_ref: Any) -> None:
        total = x_ref[0].astype(weights.dtype)
        for k in range(count):
            total += weights_ref[k][None, :] * states_ref[k].astype(weights.dtype)
        out_ref[0] = total.astype(out_ref.dtype)

    window_lanes = _in_lanes(states, x.size)
    one, window, table = _blocks(count, rows)
    out = launched(
        kernel,
        grid=(pl.cdiv(lanes.shape[1], rows),),
        in_specs=[one, window, table],
        out_specs=one,
        out_shape=jax.ShapeDtypeStruct(lanes.shape, x.dtype),
        cost_estimate=cost(2 * window_lanes.size, lanes, window_lanes, lanes),
        name="history_mix",
        **options,
    )(lanes, window_lanes, _table(weights))
    return out.reshape(-1)[: x.size].reshape(x.shape)


def _backward(g: Array, states: Array, weights: Array, *, rows: int, options: dict[str, Any]) -> tuple[Array, Array]:
    count = weights.size
    lanes = _in_lanes(g, g.size)
    programs = pl.cdiv(lanes.shape[1], rows)

    def kernel(g_ref: Any, states_ref: Any, weights_ref: Any, d_states_ref: Any, partial_ref: Any) -> None:
        # The last block may reach beyond the array, and what is read there may be anything.
        row = pl.program_id(0) * rows + lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
        inside = row < lanes.shape[1]
        cotangent = jnp.where(inside, g_ref[0].astype(weights.dtype), 0.0)
        for k in range(count):
            state = jnp.where(inside, states_ref[k].astype(weights.dtype), 0.0)
            d_states_ref[k] = (weights_ref[k][None, :] * cotangent).astype(d_states_ref.dtype)
            partial_ref[0, k] = jnp.sum(cotangent * state, axis=0)

    window_lanes = _in_lanes(states, g.size)
    one, window, table = _blocks(count, rows)
    d_states, partials = launched(
        kernel,
        grid=(programs,),
        in_specs=[one, window, table],
        out_specs=[window, pl.BlockSpec((1, count, LANES), lambda i: (i, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((count, *lanes.shape[1:]), states.dtype),
            jax.ShapeDtypeStruct((programs, count, LANES), weights.dtype),
        ],
        cost_estimate=cost(3 * window_lanes.size, lanes, window_lanes, window_lanes),
        name="history_mix_backward",
        **options,
    )(lanes, window_lanes, _table(weights))
    d_states = d_states.reshape(count, -1)[:, : g.size].reshape(states.shape)
    return d_states, partials.sum(axis=(0, 2))


def _blocks(count: int, rows: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """What a program sees of one state, of the window, and of the weights."""
    return (
        pl.BlockSpec((1, rows, LANES), lambda i: (0, i, 0)),
        pl.BlockSpec((count, rows, LANES), lambda i: (0, i, 0)),
        pl.BlockSpec((count, LANES), lambda i: (0, 0)),
    )


def _table(weights: Array) -> Array:
    # Every lane gets its own copy of a weight: both compilers read that from the memory they read states from.
    return jnp.broadcast_to(weights[:, None], (weights.size, LANES))
