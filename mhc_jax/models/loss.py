"""Cross-entropy of a language model, in chunks of positions: the logits of all tokens are never in memory at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc_jax.meshes import explicit_sharding


def cross_entropy(
    hidden: Float[Array, "B T C"],
    kernel: Float[Array, "C V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 512,
) -> Float[Array, ""]:
    """Mean of -log softmax(hidden kernel)[target], in nats, over the targets that count.

    The gradients of `hidden` and `kernel` are taken in the forward pass, chunk by chunk, while the logits of the chunk
    are there: three matrix products in all, as if the logits had been kept, and none of them is.

    Args:
        hidden: what the output layer reads.
        kernel: of the output layer; it is cast to the dtype of `hidden`, its gradient is summed in float32 at least.
        targets: the right tokens; negative ones do not count, as padding.
        chunk: positions of every sequence whose logits live at a time, (B, chunk, V) in float32.

    Returns:
        The mean in float32 (float64 for float64); 0 if no target counts, NaN if one is V or more.

    Raises:
        ValueError: shapes do not fit, or chunk is below 1.

    Source: for the gradients in the forward pass, Hsu et al. 2024, arXiv 2410.10989, section 3.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.models.loss import cross_entropy
        >>> loss = cross_entropy(jnp.ones((2, 6, 8)), jnp.ones((8, 50)), jnp.zeros((2, 6), int), chunk=4)
        >>> round(float(loss), 4)  # ln 50
        3.912
    """
    if hidden.shape[:-1] != targets.shape or hidden.ndim != 3:
        raise ValueError(f"targets must have the shape {hidden.shape[:-1]} of hidden's tokens, got {targets.shape}")
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
        raise ValueError(f"kernel must have shape ({hidden.shape[-1]}, V), got {kernel.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    total = _total(hidden, kernel, targets, min(chunk, hidden.shape[1]))
    return total / jnp.maximum((targets >= 0).sum(), 1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _total(hidden: Array, kernel: Array, targets: Array, chunk: int) -> Array:
    weight = kernel.astype(hidden.dtype)

    def step(total: Array, chunks: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _of_chunk(*chunks, weight)[0], None

    return jax.lax.scan(step, _zero(hidden), _split(hidden, targets, chunk))[0]


def _total_fwd(hidden: Array, kernel: Array, targets: Array, chunk: int) -> tuple[Array, tuple[Array, Array]]:
    weight = kernel.astype(hidden.dtype)
    wide = _zero(hidden).dtype

    def step(carry: tuple[Array, Array], chunks: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, d_kernel = carry
        here, d_logits = _of_chunk(*chunks, weight)
        d_kernel += jnp.einsum(
            "btc,btv->cv", chunks[0], d_logits, preferred_element_type=wide, out_sharding=explicit_sharding(kernel)
        )
        return (total + here, d_kernel), jnp.einsum("btv,cv->btc", d_logits, weight)

    start = (_zero(hidden), jnp.zeros(kernel.shape, wide))
    (total, d_kernel), d_hidden = jax.lax.scan(step, start, _split(hidden, targets, chunk))
    d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
    return total, (d_hidden, d_kernel.astype(kernel.dtype))


def _total_bwd(chunk: int, gradients: tuple[Array, Array], cotangent: Array) -> tuple[Any, Any, None]:
    d_hidden, d_kernel = ((gradient * cotangent).astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_kernel, None


_total.defvjp(_total_fwd, _total_bwd)


def _of_chunk(hidden: Array, targets: Array, weight: Array) -> tuple[Array, Array]:
    """The sum over the tokens of a chunk, and its derivative by their logits."""
    logits = jnp.einsum("btc,cv->btv", hidden, weight, preferred_element_type=_zero(hidden).dtype)
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A comparison, and no gather: it fuses, and stays where the vocabulary is split over devices.
    right = jnp.arange(logits.shape[-1]) == targets[..., None]
    counts = targets[..., None] >= 0
    losses = jnp.where(counts, log_sum, 0) - jnp.sum(logits, axis=-1, keepdims=True, where=right)
    losses = jnp.where(targets[..., None] < logits.shape[-1], losses, jnp.nan)
    d_logits = jnp.where(counts, jnp.exp(logits - log_sum) - right, 0)
    return losses.sum(), d_logits.astype(hidden.dtype)


def _split(hidden: Array, targets: Array, chunk: int) -> tuple[Array, Array]:
    """As (chunks, B, chunk, ...): each chunk has every so many-th position.

    Batch and positions may be split over devices; so each of them has its part of every chunk, and nothing moves. What
    fills the positions up does not count.
    """
    missing = -hidden.shape[1] % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, missing)), constant_values=-1)
    parts = (array.reshape(len(array), chunk, -1, *array.shape[2:]) for array in (hidden, targets))
    one, other = (jnp.moveaxis(array, 2, 0) for array in parts)
    return one, other


def _zero(hidden: Array) -> Array:
    return jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
