"""Causal attention of grouped queries: the plain form, and a fused kernel where the platform has a well-kept one.

With a fused kernel no (T, T) array of scores is ever in memory. On TPU it is splash attention, which comes with JAX;
on NVIDIA GPUs it is cuDNN's, by `jax.nn.dot_product_attention`.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mhc_jax.placement import auto_axes, mesh_here, part_shape, partition, split

Attention = Literal["plain", "splash", "cudnn"] | None

_LANES = 128  # of a TPU: what the lengths of splash attention's blocks are multiples of
_BLOCKS = (512, 256, 128)
_QUERIES = ("batch", "context", "heads")
_KEYS = ("batch", None, "heads")


def attend(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "#B T S"] | None = None,
    *,
    segments: Int[Array, "B T"] | None = None,
    implementation: Attention = None,
) -> Float[Array, "B T N D"]:
    """Softmax(q k^T / sqrt(D)) v; query head h reads the key and value head `h // (N / K)`.

    Args:
        q, k, v: queries, keys and values; N is a multiple of K.
        mask: which keys a query sees; None is causal, with T = S. With a mask the form is always plain.
        segments: a number for each token, of which the query sees only those with its own number; not with a mask.
        implementation: "plain" for einsum and softmax, "splash" for the kernel of TPUs, "cudnn" for that of NVIDIA
            GPUs; None for the kernel of JAX's default device if it has one that takes these arrays, the plain form if
            not. To compile for another machine, name it.

    Returns:
        In the dtype of `v`; the softmax is taken in float32 at least.

    Raises:
        ValueError: N is no multiple of K; `implementation` is none of these, or a kernel that does not take the arrays.

    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped queries: Ainslie et al. 2023, arXiv 2305.13245.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.models.attention import attend
        >>> attend(jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 2, 8)), jnp.ones((1, 5, 2, 8))).shape
        (1, 5, 4, 8)
    """
    if implementation not in (None, "plain", *_KERNELS):
        raise ValueError(f"implementation must be one of {('plain', *_KERNELS)} or None, got {implementation!r}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of the {k.shape[2]} heads of k and v, got {q.shape[2]}")
    # While tracing, not by `jax.lax.platform_dependent`: there, what one form keeps for its derivative all forms keep.
    chosen = _BY_BACKEND.get(jax.default_backend(), "plain") if implementation is None else implementation
    if mask is not None or chosen == "plain":
        return _plain(q, k, v, _causal(q, segments) if mask is None else mask)
    kernel, takes, what = _KERNELS[chosen]
    part = jax.ShapeDtypeStruct(part_shape(q.shape, *_QUERIES), q.dtype)
    if takes(part, k):
        return kernel(q, k, v, segments)
    if implementation is not None:
        each = "" if part.shape == q.shape else f", on a device {list(part.shape)}"
        raise ValueError(f"implementation={chosen!r} takes {what}; q is {q.dtype}{list(q.shape)}{each}")
    return _plain(q, k, v, _causal(q, segments))


def _on_parts(kernel: Any, q: Array, k: Array, v: Array, segments: Array | None, made: Any, made_spec: Any) -> Array:
    """`kernel(made, q, k, v, segments of q, segments of k)`, each device on its rows, heads and queries, of all keys.

    XLA's partitioner cannot split a kernel.
    """
    mesh = mesh_here()
    if mesh is None:
        return kernel(made, q, k, v, segments, segments)
    queries, keys = (partition(array.shape, names, mesh) for array, names in ((q, _QUERIES), (k, _KEYS)))
    specs = made_spec, queries, keys, keys, PartitionSpec(*queries[:2]), PartitionSpec(*keys[:2])
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=queries, axis_names=auto_axes(mesh), check_vma=False)
    return mapped(made, q, k, v, segments, segments)


def _causal(q: Array, segments: Array | None) -> Bool[Array, "#B T T"]:
    mask = jnp.tril(jnp.ones((1, q.shape[1], q.shape[1]), bool))
    return mask if segments is None else mask & (segments[:, :, None] == segments[:, None, :])


def _plain(q: Array, k: Array, v: Array, mask: Array) -> Array:
    k, v = split(k, *_KEYS), split(v, *_KEYS)
    grouped = split(q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]), *_QUERIES)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=dtype) / math.sqrt(q.shape[-1])
    scores = split(scores, "batch", "heads", None, "context")
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(dtype).min))
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v)
    return named(split(mixed.reshape(q.shape), *_QUERIES), "attention")


def _splash(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    mesh, length = mesh_here(), q.shape[1]
    part = part_shape(q.shape, *_QUERIES)
    block = next(size for size in _BLOCKS if part[1] % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * part[2]),
        head_shards=1,
        q_seq_shards=length // part[1],
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name="attention",  # as it lies in the kernel; a name after it would keep a second copy
    )
    spec: Any = None
    if mesh is not None:
        queries = partition(q.shape, _QUERIES, mesh)[1]
        spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, queries)))
    return _on_parts(_splash_of_part, q, k, v, segments, kernel, spec)


def _splash_of_part(kernel: Any, q: Array, k: Array, v: Array, of_q: Array | None, of_k: Array | None) -> Array:
    scaled = q * np.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    by_head = (jnp.swapaxes(array, 1, 2) for array in (scaled, k, v))
    numbers = None if of_q is None or of_k is None else splash.SegmentIds(of_q, of_k)
    return jnp.swapaxes(jax.vmap(kernel)(*by_head, numbers), 1, 2)


def _cudnn(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    return named(_on_parts(_cudnn_of_part, q, k, v, segments, (), ()), "attention")


def _cudnn_of_part(_: Any, q: Array, k: Array, v: Array, of_q: Array | None, of_k: Array | None) -> Array:
    # The segments alone: that it is causal, cuDNN knows by itself.
    mask = None if of_q is None or of_k is None else (of_q[:, None, :, None] == of_k[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


# Whether a kernel takes a device's part of the queries and all keys.
_KERNELS: dict[str, Any] = {
    "splash": (
        _splash,
        lambda q, k: q.shape[1] % _LANES == 0 and q.shape[-1] % 64 == 0 and q.dtype in (jnp.bfloat16, jnp.float32),
        f"lengths that are a multiple of {_LANES}, heads of a multiple of 64, float32 or bfloat16",
    ),
    "cudnn": (
        _cudnn,
        lambda q, k: (
            q.shape[-1] % 8 == 0
            and q.shape[-1] <= 128
            and q.dtype in (jnp.float16, jnp.bfloat16)
            and q.shape[1] == k.shape[1]
        ),
        "heads of a multiple of 8 up to 128, float16 or bfloat16, and sequences that no mesh splits",
    ),
}
_BY_BACKEND = {"tpu": "splash", "gpu": "cudnn"}


def named(value: Array, name: str) -> Array:
    """`value`, under a name by which `Decoder(remat=...)` can ask to keep it for the backward pass."""
    return checkpoint_name(value, name)
