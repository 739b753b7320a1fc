"""Manifold-constrained hyper-connections (mHC): n parallel residual streams X around every branch F.

    X_{l+1} = H_res X_l + H_post^T F(H_pre X_l)                                       arXiv 2512.24880, equation 3

The three maps are computed from the streams of the same token, by one projection of all their entries:

    logits = alpha * (RMSNorm(vec X) phi) + bias,    H_pre = sigmoid,  H_post = 2 sigmoid,  H_res = Sinkhorn(exp)

Which side an index is on: `res[i, j]` is the weight of the OLD stream j in the NEW stream i, so rows belong to new
streams and it is applied as `res @ X`. Streams are stacked on the axis before the features: X has shape (..., n, C).
Maps are float32 whatever the dtype of the streams (float64 for float64 streams).

Expand once before the first layer and reduce once after the last: doing both around every branch gives n equal
streams to every layer, and the method is off.
"""

from mhc_jax.kernels.choice import Implementation
from mhc_jax.streams.boundary import Connected, apply_branches, boundary, flat_boundary
from mhc_jax.streams.config import MAX_STREAMS, StreamConfig
from mhc_jax.streams.connect import collapse, expand, first_read, head, read, reduce, single_pass, wrap, write
from mhc_jax.streams.conventions import CONVENTIONS, Convention
from mhc_jax.streams.depth import optimal_block_length, scan_layers
from mhc_jax.streams.maps import HeadParams, Maps, StreamParams, init_head_params, init_params, maps

__all__ = [
    "CONVENTIONS",
    "MAX_STREAMS",
    "Connected",
    "Convention",
    "HeadParams",
    "Implementation",
    "Maps",
    "StreamConfig",
    "StreamParams",
    "apply_branches",
    "boundary",
    "collapse",
    "expand",
    "first_read",
    "flat_boundary",
    "head",
    "init_head_params",
    "init_params",
    "maps",
    "optimal_block_length",
    "read",
    "reduce",
    "scan_layers",
    "single_pass",
    "wrap",
    "write",
]
