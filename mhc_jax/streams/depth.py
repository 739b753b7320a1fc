"""Depth as a scan over equal layers of streams."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.traced import Traced, trace


def apply_layers(
    layer: Callable[[Any, Array], Array],
    params: Any,
    streams: Float[Array, "*tokens n C"],
    *,
    block_length: int = 1,
    policy: Callable[..., bool] | None = None,
    carries: bool = False,
) -> Any:
    """`streams = layer(params_l, streams)` for every l, as a scan: compile time does not grow with depth.

    Args:
        layer: maps streams to streams of the same shape and dtype.
        params: a pytree whose leaves have a leading axis of length L, the depth.
        block_length: of how many layers the streams are kept once for the backward pass. With 1 they are kept for
            every layer. With more, those inside a block are computed again from the outputs of its branches, which
            are kept: the branches themselves never run twice. `optimal_block_length` needs the least memory.
        policy: what of a layer to keep beside its streams (`jax.checkpoint_policies`); the rest is computed again, too.
        carries: whether a layer gives (streams, beside), for caches, statistics and losses of single layers.

    Returns:
        The streams after the last layer; with `carries` (streams, what the layers gave beside, with a leading axis L).

    Raises:
        ValueError: if block_length does not divide L.

    Source: arXiv 2512.24880, section 4.3.2.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(lengths) != 1 or () in lengths:
        shapes = jax.tree.map(jnp.shape, params)
        raise ValueError(f"params must hold arrays with one leading axis, the depth, got shapes {shapes}")
    ((depth,),) = lengths
    if block_length < 1 or depth % block_length:
        raise ValueError(f"block_length must divide the depth {depth}, got {block_length}")
    if depth == 0:
        return (streams, None) if carries else streams
    first = jax.eval_shape(lambda params: jax.tree.map(lambda leaf: leaf[0], params), params)
    function, shared = trace(layer, first, streams)
    streams, beside = _scan(function, block_length, policy, carries, shared, params, streams)
    return (streams, beside) if carries else streams


# Compiled, so that a call outside jit finds what an earlier one compiled; not inline, so that its derivative does too.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _scan(
    function: Traced,
    block_length: int,
    policy: Callable[..., bool] | None,
    carries: bool,
    shared: list[Array],
    params: Any,
    streams: Array,
) -> tuple[Array, Any]:
    def step(streams: Array, params: Any) -> tuple[Array, Any]:
        result = function(shared, params, streams)
        return result if carries else (result, None)

    if block_length == 1:
        if policy is not None:
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        return jax.lax.scan(step, streams, params)

    def block(streams: Array, params: Any) -> tuple[Array, Any]:
        return jax.lax.scan(step, streams, params)

    def keep(operation: Any, *inputs: Any, **options: Any) -> bool:
        # Nothing that has the shape of the streams, which only `read` and `write` handle.
        shapes = [value.shape for value in inputs] + [options.get("shape")]
        return streams.shape not in shapes and (policy is None or policy(operation, *inputs, **options))

    recomputed = jax.checkpoint(block, policy=keep, prevent_cse=False)
    blocks = jax.tree.map(lambda p: p.reshape(-1, block_length, *p.shape[1:]), params)
    streams, beside = jax.lax.scan(recomputed, streams, blocks)
    return streams, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), beside)


def optimal_block_length(streams: int, depth: int) -> int:
    """The divisor of `depth` nearest to sqrt(n L / (n + 2)), where keeping the streams of L layers costs least.

    Source: arXiv 2512.24880, equation 20.
    """
    best = math.sqrt(streams * depth / (streams + 2))
    return min((d for d in range(1, depth + 1) if depth % d == 0), key=lambda d: abs(d - best))
