"""Parameters of public models, in the convention of this library."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def from_deepseek_v4(
    fn: Float[Tensor, "m nC"], base: Float[Tensor, " m"], scale: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "nC m"], Float[Tensor, "3"], Float[Tensor, " m"]]:
    """phi, alpha and bias from the parameters of a `DeepseekV4HyperConnection` of transformers.

    Its `comb` is applied as comb^T X: it is our H_res transposed, and so are its logits. Use them with
    StreamConfig(hc_mult, iterations=hc_sinkhorn_iters, epsilon=hc_eps, norm_epsilon=rms_norm_eps).

    Raises:
        ValueError: if `fn` and `base` have not m = n * (n + 2) rows for any n.
    """
    n = math.isqrt(len(base) + 1) - 1
    if n * (n + 2) != len(base) or len(fn) != len(base):
        raise ValueError(f"fn and base must have n * (n + 2) rows, got {len(fn)} and {len(base)}")
    order = torch.arange(len(base))
    order[2 * n :] = order[2 * n :].reshape(n, n).T.flatten()
    return fn[order].T.contiguous(), scale.clone(), base[order]
