"""The products of streams and maps as XLA gets them, in the form of which the compiler of each platform makes most.

Streams are (..., n, C). A TPU keeps the n rows of a token together in one tile: to take one stream out, or to put all
of them into one axis, is a copy of everything, and a product of small matrices is none. For a CPU or a GPU such a
product is a call of a library, which nothing fuses with, and a reshape is free. docs/performance.md has what the lab
counted and what a CPU took.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def _merged(streams: Array, output: Array, post: Array, res: Array | None) -> Array:
    old, new = streams.astype(post.dtype), output.astype(post.dtype)
    # A sum over streams rather than a product of tiny matrices: it fuses into one pass over the streams.
    mixed = post[..., None] * new[..., None, :]
    if res is None:
        return (old + mixed).astype(streams.dtype)
    for j in range(res.shape[-1]):
        mixed += res[..., j, None] * old[..., None, j, :]
    return mixed.astype(streams.dtype)


def _merged_on_tpu(streams: Array, output: Array, post: Array, res: Array | None) -> Array:
    if res is None:
        return _merged(streams, output, post, res)
    # Unless told otherwise a TPU rounds the weights to bfloat16.
    exact = lax.Precision.HIGHEST
    mixed = jnp.einsum("...ij,...jc->...ic", res, streams.astype(res.dtype), precision=exact)
    return (mixed + post[..., None] * output.astype(res.dtype)[..., None, :]).astype(streams.dtype)


def _merged_on_platform(streams: Array, output: Array, post: Array, res: Array | None) -> Array:
    def kept(form: Callable[..., Array], *arguments: Array | None) -> Array:
        return lax.optimization_barrier(form(*arguments))

    # Kept, or an accelerator stores it once more in float32, for whoever goes on in that.
    on_tpu, by_sums = partial(kept, _merged_on_tpu), partial(kept, _merged)
    return lax.platform_dependent(streams, output, post, res, cpu=_merged, tpu=on_tpu, default=by_sums)


@jax.custom_jvp
def merged(
    streams: Float[Array, "*tokens n C"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"] | None,
) -> Float[Array, "*tokens n C"]:
    """res X + post y, summed in the dtype of the maps. A res of None is the identity."""
    return _merged_on_platform(streams, output, post, res)


# One piece to the policy of `scan_layers`, which would keep the products inside, whose factors are not streams.
merged.defjvp(lambda primals, tangents: jax.jvp(_merged_on_platform, primals, tangents))


def mixed_back(res: Float[Array, "*tokens n n"] | None, d: Float[Array, "*tokens n C"]) -> Float[Array, "*tokens n C"]:
    """res^T d. A res of None is the identity."""
    if res is None:
        return d

    def by_sums(res: Array, d: Array) -> Array:
        total = jnp.zeros_like(d)
        for i in range(res.shape[-1]):
            total += res[..., i, :, None] * d[..., i, None, :]
        return total

    def by_product(res: Array, d: Array) -> Array:
        return jnp.einsum("...ij,...ic->...jc", res, d, precision=lax.Precision.HIGHEST)

    # A CPU's compiler fuses the sums with what made d, and computes that again for each of the n sums that d is in. If
    # d comes from such sums itself, as between two branches of a layer, that is n times n. A product needs d whole.
    return lax.platform_dependent(res, d, cpu=by_product, tpu=by_product, default=by_sums)


def projected(streams: Float[Array, "*tokens n C"], phi: Float[Array, "nC m"]) -> Float[Array, "*tokens m"]:
    """vec(X) phi, of streams in the dtype of phi."""

    def flat(streams: Array, phi: Array) -> Array:
        return jnp.matmul(flattened(streams), phi)

    def on_tpu(streams: Array, phi: Array) -> Array:
        return jnp.einsum("...jc,jcm->...m", streams, phi.reshape(*streams.shape[-2:], -1))

    return lax.platform_dependent(streams, phi, tpu=on_tpu, default=flat)


def projected_back(
    streams: Float[Array, "*tokens n C"], phi: Float[Array, "nC m"], d_raw: Float[Array, "*tokens m"]
) -> tuple[Float[Array, "*tokens n C"], Float[Array, "nC m"]]:
    """The derivatives of both arguments of `projected`: d_raw phi^T, and vec(X)^T d_raw."""

    def flat(streams: Array, phi: Array, d_raw: Array) -> tuple[Array, Array]:
        tokens = tuple(range(d_raw.ndim - 1))
        # Transposed on the way: the tall result (nC, m) directly is the slow side of a CPU's matrix product.
        d_phi = jnp.tensordot(d_raw, flattened(streams), (tokens, tokens)).T
        return jnp.matmul(d_raw, phi.T).reshape(streams.shape), d_phi

    def on_tpu(streams: Array, phi: Array, d_raw: Array) -> tuple[Array, Array]:
        d_phi = jnp.einsum("...m,...jc->jcm", d_raw, streams).reshape(phi.shape)
        return jnp.einsum("...m,jcm->...jc", d_raw, phi.reshape(*streams.shape[-2:], -1)), d_phi

    return lax.platform_dependent(streams, phi, d_raw, tpu=on_tpu, default=flat)


def mixing(res: Float[Array, "*tokens n n"] | None, post: Float[Array, "*tokens n"]) -> Float[Array, "*tokens n n"]:
    """res as a matrix, for who needs one."""
    n = post.shape[-1]
    return jnp.broadcast_to(jnp.eye(n, dtype=post.dtype), (*post.shape, n)) if res is None else res


def in_memory(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x, which an accelerator makes once and for all before anything reads it; a CPU fuses as it likes."""
    return lax.platform_dependent(x, cpu=lambda x: x, default=lax.optimization_barrier)


def flattened(streams: Float[Array, "*tokens n C"]) -> Float[Array, "*tokens nC"]:
    """vec(X)."""
    *tokens, n, width = streams.shape
    return streams.reshape(*tokens, n * width)
