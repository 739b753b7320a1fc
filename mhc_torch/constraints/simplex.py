"""Projections of mixing logits to the probability simplex. All act on the last axis and broadcast over the others."""

import torch
from jaxtyping import Float
from torch import Tensor

from mhc_torch.config import LEAST_TEMPERATURE


def _scale(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in float32 at least: a handful of coefficients steers a whole stream."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if not temperature >= LEAST_TEMPERATURE:
        raise ValueError(f"temperature must be positive, got {temperature}; the least in float32 is 2**-126")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 1:
        return logits
    # No projection sees a shift; below 0, division by a tiny temperature cannot end in inf - inf.
    return (logits - logits.detach().amax(dim=-1, keepdim=True)) / temperature


def project_simplex(logits: Float[Tensor, "*batch k"], temperature: float = 1.0) -> Float[Tensor, "*batch k"]:
    """softmax(logits / temperature): positive weights that sum to 1.

    Returns:
        Weights of the shape of `logits`, float32 or float64.

    Raises:
        TypeError: logits are not floating point.
        ValueError: temperature is not positive.
    """
    return torch.softmax(_scale(logits, temperature), dim=-1)


def project_identity_preserving(
    logits: Float[Tensor, "*batch k"], epsilon: float = 0.1, temperature: float = 1.0
) -> Float[Tensor, "*batch k"]:
    """(1 - epsilon) softmax(logits / temperature) + epsilon on the last entry, the latest state.

    The latest state so keeps a weight of at least epsilon, and the weights sum to 1.

    Returns:
        Weights of the shape of `logits`, float32 or float64.

    Raises:
        TypeError: logits are not floating point.
        ValueError: temperature is not positive, or epsilon is outside [0, 1).
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon must be in [0, 1), got {epsilon}")
    weights = (1 - epsilon) * project_simplex(logits, temperature)
    return torch.cat((weights[..., :-1], weights[..., -1:] + epsilon), dim=-1)


def project_sparse_simplex(logits: Float[Tensor, "*batch k"], temperature: float = 1.0) -> Float[Tensor, "*batch k"]:
    """The point of the simplex nearest to logits / temperature: argmin_p |p - logits/temperature|^2, with exact zeros.

    Also known as sparsemax (Martins and Astudillo, arXiv 1602.02068). p = max(z - tau, 0), where tau makes p sum to 1;
    the entries that stay positive are the s largest, s found from the sorted logits. The gradient is exact wherever the
    set of positive entries does not change.

    Returns:
        Weights of the shape of `logits`, float32 or float64.

    Raises:
        TypeError: logits are not floating point.
        ValueError: temperature is not positive.
    """
    z = _scale(logits, temperature)
    z = z - z.detach().amax(dim=-1, keepdim=True)  # the projection does not see a shift; large logits keep their digits
    ordered = z.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(dim=-1)
    rank = torch.ones_like(z).cumsum(dim=-1)  # 1, 2, ..., and sharded as z is
    support = (1 + rank * ordered > sums).sum(dim=-1, keepdim=True)
    tau = (sums.gather(-1, support - 1) - 1) / support
    return torch.relu(z - tau)
