"""Projections from free logits to the manifolds of mixing weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def check_temperature(temperature: float) -> None:
    """Raises a ValueError for what float32 cannot divide by: below its smallest normal number it may hold 0."""
    if not 2.0**-126 <= temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}; the least in float32 is 2**-126")


def _scale(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in float32 at least: a handful of coefficients steers a whole stream."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    check_temperature(temperature)
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


def project_doubly_stochastic(
    logits: Float[Tensor, "*batch k k"], iterations: int = 10, temperature: float = 1.0
) -> Float[Tensor, "*batch k k"]:
    """Sinkhorn-Knopp: scale exp(logits / temperature) until rows and columns sum to 1.

    Each iteration normalises the rows (last axis), then the columns, so that after the last one the columns sum to 1
    exactly and the rows as nearly as the iterations brought them. It runs on logarithms: no finite logits overflow or
    leave an empty row.

    Returns:
        Matrices of the shape of `logits`, float32 or float64.

    Raises:
        TypeError: logits are not floating point.
        ValueError: the last two axes differ, iterations is below 1, or temperature is not positive.
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be square in their last two axes, got shape {tuple(logits.shape)}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    log_matrix = _scale(logits, temperature)
    for _ in range(iterations):
        log_matrix = torch.log_softmax(log_matrix, dim=-1)
        log_matrix = torch.log_softmax(log_matrix, dim=-2)
    return log_matrix.exp()


@dataclass(frozen=True)
class Projection:
    """A manifold that mixing weights may lie on, as `MHCConfig.constraint` names it.

    Attributes:
        function: (logits (*batch, K), **options) -> weights (*batch, K), float32 or float64, differentiable; a logit
            of -inf, a state that does not exist, must get weight 0.
        options: the fields of `MHCConfig` that `function` takes as keywords; no others change what it computes.
        mixed: logit of older states, at temperature 1, under init "mixed": most weight is on the latest state, whose
            logit is 0, and every logit has a gradient.
    """

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ("temperature",)
    mixed: float = -2.0

    def __call__(self, logits: Float[Tensor, "*batch K"], config: Any) -> Float[Tensor, "*batch K"]:
        """The weights of `logits` under the options of `config`."""
        return self.function(logits, **{name: getattr(config, name) for name in self.options})


PROJECTIONS: dict[str, Projection] = {
    "simplex": Projection(project_simplex),
    "identity": Projection(project_identity_preserving, ("epsilon", "temperature")),
    # From -1 downwards the older states are cut off, and get no gradient.
    "sparse": Projection(project_sparse_simplex, mixed=-0.5),
}
"""The manifolds that `MHCConfig.constraint` may name. One entry adds one."""
