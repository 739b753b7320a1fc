"""Manifold-constrained hyper-connections (mHC): n parallel residual streams X around every branch F.

    X_{l+1} = H_res X_l + H_post^T F(H_pre X_l)                                       arXiv 2512.24880, equation 3

The three maps are computed from the streams of the same token, by one projection of all their entries:

    logits = alpha * (RMSNorm(vec X) phi) + bias,    H_pre = sigmoid,  H_post = 2 sigmoid,  H_res = Sinkhorn(exp)

Which side an index is on: `res[i, j]` is the weight of the OLD stream j in the NEW stream i, so rows belong to new
streams and it is applied as `res @ X`. Streams are stacked on the axis before the features: X has shape (..., n, C).
Maps are float32 whatever the dtype of the streams (float64 for float64 streams), also under autocast.

Expand once before the first layer and reduce once after the last: doing both around every branch gives n equal
streams to every layer, and the method is off.
"""

from mhc_torch.sinkhorn import sinkhorn
from mhc_torch.streams.boundary import boundary
from mhc_torch.streams.config import MAX_STREAMS, StreamConfig
from mhc_torch.streams.connect import collapse, expand, first_read, read, reduce, write
from mhc_torch.streams.conventions import CONVENTIONS, Convention
from mhc_torch.streams.depth import Connected, apply_branches, optimal_block_length
from mhc_torch.streams.maps import Maps, check_streams, initial_bias, maps, normalized_logits

__all__ = [
    "CONVENTIONS",
    "MAX_STREAMS",
    "Connected",
    "Convention",
    "Maps",
    "StreamConfig",
    "apply_branches",
    "boundary",
    "check_streams",
    "collapse",
    "expand",
    "first_read",
    "initial_bias",
    "maps",
    "normalized_logits",
    "optimal_block_length",
    "read",
    "reduce",
    "sinkhorn",
    "write",
]
