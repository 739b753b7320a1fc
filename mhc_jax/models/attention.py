"""Causal attention of grouped queries: the plain form, and a fused kernel where the platform has a well-kept one.

With a fused kernel no (T, T) array of scores is ever in memory. On TPU it is splash attention, which comes with JAX;
on NVIDIA GPUs it is cuDNN's, by `jax.nn.dot_product_attention`.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float

Attention = Literal["plain", "fused"] | None

_LANES = 128  # of a TPU: what the lengths of splash attention's blocks are multiples of
_BLOCKS = (512, 256, 128)


def attend(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Bool[Array, "B T S"] | None = None,
    *,
    implementation: Attention = None,
) -> Float[Array, "B T N D"]:
    """Softmax(q k^T / sqrt(D)) v; query head h reads the key and value head `h // (N / K)`.

    Args:
        q, k, v: queries, keys and values; N is a multiple of K.
        mask: which keys a query sees; None is causal, with T = S. With a mask the form is always plain.
        implementation: "plain" for einsum and softmax, "fused" for the platform's kernel where there is one that takes
            these arrays, the plain form elsewhere. None is "fused".

    Returns:
        In the dtype of `v`; the softmax is taken in float32 at least.

    Raises:
        ValueError: N is no multiple of K, or `implementation` is none of these.

    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped queries: Ainslie et al. 2023, arXiv 2305.13245.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.models.attention import attend
        >>> attend(jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 2, 8)), jnp.ones((1, 5, 2, 8))).shape
        (1, 5, 4, 8)
    """
    if implementation not in (None, "plain", "fused"):
        raise ValueError(f"implementation must be 'plain', 'fused' or None, got {implementation!r}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of the {k.shape[2]} heads of k and v, got {q.shape[2]}")
    if mask is not None or implementation == "plain":
        return _plain(q, k, v, mask)
    forms = {}
    if _splash_takes(q):
        forms["tpu"] = _splash
    if jax.default_backend() == "gpu" and q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[-1] % 8 == 0:
        # Only there: cuDNN's form cannot be traced on a machine without cuDNN.
        forms["cuda"] = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return jax.lax.platform_dependent(q, k, v, default=_plain, **forms) if forms else _plain(q, k, v)


def _plain(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    if mask is None:
        mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None]
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=dtype) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(dtype).min))
    return jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v).reshape(q.shape)


def _splash_takes(q: Array) -> bool:
    return q.shape[1] % _LANES == 0 and q.shape[-1] % 64 == 0 and q.dtype in (jnp.bfloat16, jnp.float32)


def _splash(q: Array, k: Array, v: Array) -> Array:
    length, heads = q.shape[1:3]
    block = next(size for size in _BLOCKS if length % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name="attention",
    )
    scaled = q * np.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    by_head = (jnp.swapaxes(array, 1, 2) for array in (scaled, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(*by_head), 1, 2)


def named(value: Array, name: str) -> Array:
    """`value`, under a name by which `Decoder(remat=...)` can ask to keep it for the backward pass."""
    return checkpoint_name(value, name)
