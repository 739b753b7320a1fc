"""Parameters of public models, in the convention of this library."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax.streams.maps import StreamParams


def from_deepseek_v4(fn: Float[Array, "m nC"], base: Float[Array, " m"], scale: Float[Array, "3"]) -> StreamParams:
    """Parameters from those of a `DeepseekV4HyperConnection` of transformers.

    Its `comb` is applied as comb^T X: it is our H_res transposed, and so are its logits. Use them with
    StreamConfig(hc_mult, iterations=hc_sinkhorn_iters, epsilon=hc_eps, norm_epsilon=rms_norm_eps). The parameters of
    its head need no change but `HeadParams(hc_fn.T, hc_scale, hc_base)`.

    Raises:
        ValueError: if `fn` and `base` have not m = n * (n + 2) rows for any n.
    """
    fn, base, scale = jnp.asarray(fn), jnp.asarray(base), jnp.asarray(scale)
    n = math.isqrt(len(base) + 1) - 1
    if n * (n + 2) != len(base) or len(fn) != len(base):
        raise ValueError(f"fn and base must have n * (n + 2) rows, got {len(fn)} and {len(base)}")
    order = np.arange(len(base))
    order[2 * n :] = order[2 * n :].reshape(n, n).T.ravel()
    return StreamParams(fn[order].T, scale, base[order])
