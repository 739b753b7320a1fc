"""Depth as a scan over equal layers of streams."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.traced import Shared, Traced, trace


def scan_layers(
    layer: Callable[[Any, Array], Array],
    params: Any,
    streams: Float[Array, "*tokens n C"],
    *,
    block_length: int = 1,
) -> Float[Array, "*tokens n C"]:
    """`streams = layer(params_l, streams)` for every l, as a scan: compile time does not grow with depth.

    Args:
        layer: maps streams to streams of the same shape and dtype.
        params: a pytree whose leaves have a leading axis of length L, the depth.
        block_length: of how many layers the streams are kept once for the backward pass. With 1 they are kept for
            every layer. With more, those inside a block are computed again from the outputs of its branches, which
            are kept: the branches themselves never run twice. `optimal_block_length` needs the least memory.

    Raises:
        ValueError: if block_length does not divide L.

    Source: arXiv 2512.24880, section 4.3.2.
    """
    return scan_any(layer, params, streams, block_length, (streams.shape,))


def depth_of(params: Any) -> int:
    """The length of the leading axis of all leaves.

    Raises:
        ValueError: if they have not one.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(lengths) != 1 or () in lengths:
        shapes = jax.tree.map(jnp.shape, params)
        raise ValueError(f"params must hold arrays with one leading axis, the depth, got shapes {shapes}")
    ((depth,),) = lengths
    return depth


Carry = TypeVar("Carry")


def scan_any(
    layer: Callable[[Any, Carry], Carry],
    params: Any,
    carry: Carry,
    block_length: int,
    wide: tuple[tuple[int, ...], ...],
    source: Any = None,
) -> Carry:
    """`scan_layers` of layers that carry any arrays; those of the shapes `wide` are what a block keeps once.

    Args:
        source: as of `trace`.
    """
    depth = depth_of(params)
    if block_length < 1 or depth % block_length:
        raise ValueError(f"block_length must divide the depth {depth}, got {block_length}")
    if depth == 0:
        return carry
    first = jax.eval_shape(lambda params: jax.tree.map(lambda leaf: leaf[0], params), params)
    function, shared = trace(layer, first, carry, source=source)
    return _scan(function, block_length, wide, shared, params, carry)


# Compiled, so that a call outside jit finds what an earlier one compiled; not inline, so that its derivative does too.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _scan(
    function: Traced,
    block_length: int,
    wide: tuple[tuple[int, ...], ...],
    shared: Shared,
    params: Any,
    carry: Any,
) -> Any:
    def step(carry: Any, params: Any) -> tuple[Any, None]:
        return function(shared, params, carry), None

    if block_length == 1:
        return jax.lax.scan(step, carry, params)[0]

    def block(carry: Any, params: Any) -> tuple[Any, None]:
        return jax.lax.scan(step, carry, params)

    def keep(_: Any, *inputs: Any, **options: Any) -> bool:
        # Everything but what has the shape of the streams, which only connections handle.
        shapes = [value.shape for value in inputs] + [options.get("shape")]
        return not any(shape in wide for shape in shapes)

    recomputed = jax.checkpoint(block, policy=keep, prevent_cse=False)
    blocks = jax.tree.map(lambda p: p.reshape(-1, block_length, *p.shape[1:]), params)
    return jax.lax.scan(recomputed, carry, blocks)[0]


def optimal_block_length(streams: int, depth: int) -> int:
    """The divisor of `depth` nearest to sqrt(n L / (n + 2)), where keeping the streams of L layers costs least.

    Source: arXiv 2512.24880, equation 20.
    """
    best = math.sqrt(streams * depth / (streams + 2))
    return min((d for d in range(1, depth + 1) if depth % d == 0), key=lambda d: abs(d - best))
