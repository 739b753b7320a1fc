"""Rotary positions: Su et al. 2021, arXiv 2104.09864."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mhc_jax.models.config import DecoderConfig


def rotary(
    config: DecoderConfig, positions: Int[Array, "B T"], dtype: Any
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of the rotary angles, in float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies = config.rope_theta ** -(np.arange(0, config.head_width, 2) / config.head_width)
    if scaling := config.rope_scaling:
        turns = scaling.length * frequencies / (2 * math.pi)
        fast = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        fast = np.clip(fast, 0, 1)
        frequencies = frequencies * (fast + (1 - fast) / scaling.factor)
    angles = positions[..., None, None].astype(wide) * jnp.asarray(frequencies, wide)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N D"], cos: Array, sin: Array) -> Float[Array, "B T N D"]:
    """Each feature of the first half of a head and its partner in the second, turned by the angle of the position."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
