"""Rotary positions: Su et al. 2021, arXiv 2104.09864."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mhc_torch.models.config import DecoderConfig


def rotary(
    config: DecoderConfig, positions: Int[Tensor, "B T"], dtype: torch.dtype
) -> tuple[Float[Tensor, "B 1 T half"], Float[Tensor, "B 1 T half"]]:
    """Cosine and sine of the rotary angles, in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    halves = torch.arange(0, config.head_width, 2, dtype=torch.float64, device=positions.device)
    frequencies = config.rope_theta ** -(halves / config.head_width)
    if scaling := config.rope_scaling:
        turns = scaling.length * frequencies / (2 * math.pi)
        fast = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        fast = fast.clamp(0, 1)
        frequencies = frequencies * (fast + (1 - fast) / scaling.factor)
    angles = positions[:, None, :, None].to(wide) * frequencies.to(wide)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B N T D"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B N T D"]:
    """Each feature of the first half of a head and its partner in the second, turned by the angle of the position."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
