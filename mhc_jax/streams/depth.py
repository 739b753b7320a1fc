"""Depth as a scan over equal layers of streams."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.meshes import placed_like, same_type
from mhc_jax.traced import Shared, Traced, trace


def scan_layers(
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
    return scan_any(layer, params, streams, block_length, (streams.shape,), policy=policy, carries=carries)


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


def scan_any(
    layer: Callable[[Any, Any], Any],
    params: Any,
    carry: Any,
    block_length: int,
    wide: tuple[tuple[int, ...], ...],
    *,
    source: Any = None,
    policy: Callable[..., bool] | None = None,
    carries: bool = False,
) -> Any:
    """`scan_layers` of layers that carry any arrays; those of the shapes `wide` are what a block keeps once.

    Args:
        source: as of `trace`.
        policy, carries: as of `scan_layers`.
    """
    depth = depth_of(params)
    if block_length < 1 or depth % block_length:
        raise ValueError(f"block_length must divide the depth {depth}, got {block_length}")
    if depth == 0:
        return (carry, None) if carries else carry
    first = jax.eval_shape(lambda params: jax.tree.map(lambda leaf: leaf[0], params), params)
    function, shared = trace(layer, first, carry, source=source)
    # On a mesh, layers may split what came whole, or make it vary.
    if not same_type(carry, types := function.out[0] if carries else function.out):
        carry = placed_like(carry, types)
        function, shared = trace(layer, first, carry, source=source)
    carry, beside = _scan(function, block_length, wide, policy, carries, shared, params, carry)
    return (carry, beside) if carries else carry


# Compiled, so that a call outside jit finds what an earlier one compiled; not inline, so that its derivative does too.
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _scan(
    function: Traced,
    block_length: int,
    wide: tuple[tuple[int, ...], ...],
    policy: Callable[..., bool] | None,
    carries: bool,
    shared: Shared,
    params: Any,
    carry: Any,
) -> tuple[Any, Any]:
    def step(carry: Any, params: Any) -> tuple[Any, Any]:
        result = function(shared, params, carry)
        return result if carries else (result, None)

    if policy is not None:
        # Of a layer inside a block, too: or all that the derivatives of its layers need would be there at once.
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    if block_length == 1:
        return jax.lax.scan(step, carry, params)

    def block(carry: Any, params: Any) -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, params)

    def keep(operation: Any, *inputs: Any, **options: Any) -> bool:
        # Nothing that has the shape of the streams, which only connections handle.
        shapes = [value.shape for value in inputs] + [options.get("shape")]
        is_wide = any(shape in wide for shape in shapes)
        return not is_wide and (policy is None or policy(operation, *inputs, **options))

    recomputed = jax.checkpoint(block, policy=keep, prevent_cse=False)
    blocks = jax.tree.map(lambda p: p.reshape(-1, block_length, *p.shape[1:]), params)
    carry, beside = jax.lax.scan(recomputed, carry, blocks)
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), beside)


def optimal_block_length(streams: int, depth: int) -> int:
    """The divisor of `depth` nearest to sqrt(n L / (n + 2)), where keeping the streams of L layers costs least.

    Source: arXiv 2512.24880, equation 20.
    """
    best = math.sqrt(streams * depth / (streams + 2))
    return min((d for d in range(1, depth + 1) if depth % d == 0), key=lambda d: abs(d - best))
