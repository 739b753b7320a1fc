"""1 / rms(x) for all of a dtype, though squares leave it halfway: 1e20 squared is infinite in float32."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mhc_torch.following import transformed


def normalizer(x: Tensor, dtype: torch.dtype, epsilon: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """x in `dtype`, 1 / RMS of each token, and the scale that both contain, if there is one."""
    wide = x.to(dtype)
    # A norm, squared again, is one pass; a mean of squares would write the squares.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # On the host a look at the norms is cheap, and nearly always they fit. On a GPU, reading them would wait.
    if type(x) is Tensor and x.device.type == "cpu" and not transformed() and _fits(norm).all():
        return wide, torch.rsqrt(norm.square() / x.shape[-1] + epsilon), None
    scale = scale_of(norm)
    wide, scaled_epsilon = scaled(wide, epsilon, scale)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide, torch.rsqrt(norm.square() / x.shape[-1] + scaled_epsilon), scale


def inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the last axis, which stays, of length 1."""
    _, inverse, scale = normalizer(x, x.dtype, epsilon)
    return inverse if scale is None else inverse * scale


def _fits(norm: Tensor) -> Tensor:
    """Whether the third power of `norm`, which derivatives divide by, is well inside of its dtype."""
    return norm < 2.0 ** (_exponent(norm.dtype) // 3 - 2)


def scale_of(norm: Tensor) -> Tensor:
    """A power of two for each token, 1 where `norm` fits, with which the others do. RMSNorm sees no scale."""
    largest = _exponent(norm.dtype)
    # Beyond half of the exponents squares overflow, and nothing is known of the norm but that.
    scale = torch.full_like(norm, 2.0 ** (-3 * largest // 4))
    scale = torch.where(norm < 2.0 ** (largest // 2), 2.0 ** (-13 * largest // 32), scale)
    return torch.where(_fits(norm), 1.0, scale)


def _exponent(dtype: torch.dtype) -> int:
    return round(math.log2(torch.finfo(dtype).max))


def _normed(x: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, by operations that torch can differentiate."""
    wide, epsilon_of = scaled(x, epsilon, scale_of(torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon_of)


def _normed_outside(x: Tensor, epsilon: float) -> Tensor:
    """x / (sqrt(mean(x^2)) + epsilon) over the last axis; the derivative of the root at 0 is taken to be 0."""
    scale = scale_of(torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True))
    wide = x * scale
    return wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + epsilon * scale)


def _together(normed: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
    return lambda streams, epsilon: normed(streams.flatten(-2), epsilon).reshape(streams.shape)


NORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    # RMSNorm of vec X: equation 5 of arXiv 2512.24880.
    "rms": _together(_normed),
    # As Megatron-LM.
    "rms_outside": _together(_normed_outside),
    # As lucidrains' hyper-connections, and HC (arXiv 2409.19606).
    "streams": _normed,
}
"""(streams (..., n, C), epsilon) -> normed streams, as they are projected, each way under its name."""


def scaled(x: Tensor, epsilon: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x` times scale, and the epsilon that gives its RMSNorm the value that x has."""
    return x * scale, epsilon * scale.square()
