"""1 / rms(x) over the whole range of the dtype, though squares leave it halfway: 1e20 squared is infinite in float32.

Squares are summed thrice: of the numbers as they are, and of large and of small ones scaled by a power of two, which
changes no digit. One of the three sums is sound. For the dtype float32, where exponents end at 128,

    sum (2^-72 x)^2 for sum x^2 above 2^120,      sum (2^72 x)^2 for sum x^2 below 2^-76.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# In units of the largest exponent of the dtype over 128.
_SHIFT, _LARGE, _SMALL = 72, 120, -76


def scales(dtype: Any) -> tuple[float, float, float]:
    """What numbers are multiplied with before they are squared, for each of the three sums."""
    return 1.0, _power(dtype, -_SHIFT), _power(dtype, _SHIFT)


def sound(plain: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Whether a sum of squares as they are is sound; the scaled ones then differ from it by their factor alone."""
    return (plain < _power(plain.dtype, _LARGE)) & (plain > _power(plain.dtype, _SMALL))


def inverse_rms_of_squares(squares: Float[Array, "*batch 3"], size: int, epsilon: float) -> Float[Array, "*batch 1"]:
    """``1 / sqrt(mean(x^2) + epsilon)`` from the sums of squares with each of the `scales`, of `size` numbers x."""
    dtype = squares.dtype
    plain, of_large, of_small = jnp.split(squares, 3, axis=-1)
    candidates = [
        lax.rsqrt(total / size + _scaled(epsilon, dtype, scale)) * scale
        for total, scale in zip((plain, of_large, of_small), scales(dtype), strict=True)
    ]
    result = jnp.where(plain > _power(dtype, _LARGE), candidates[1], candidates[0])
    # Where epsilon is what counts, the sum may well be rounded to zero.
    if epsilon < _power(dtype, _SMALL) / size:
        result = jnp.where((plain < _power(dtype, _SMALL)) & (of_small > 0), candidates[2], result)
    return result


@partial(jax.custom_jvp, nondiff_argnums=(1,))
@partial(jax.jit, static_argnums=1, inline=True)
def inverse_rms(x: Float[Array, "*batch size"], epsilon: float) -> Float[Array, "*batch 1"]:
    """``1 / sqrt(mean(x^2) + epsilon)`` over the last axis."""

    def of_scales(count: int, x: Array) -> Array:
        sums = [jnp.sum(x * scale * (x * scale), axis=-1) for scale in scales(x.dtype)[:count]]
        return jnp.stack(sums, axis=-1)

    def on_demand(x: Array) -> Array:
        # Here every sum is a pass over memory, where others take all three in one.
        plain = of_scales(1, x)
        sound = plain < _power(x.dtype, _LARGE)
        if epsilon < _power(x.dtype, _SMALL) / x.shape[-1]:
            sound &= plain > _power(x.dtype, _SMALL)
        return lax.cond(
            sound.all(), lambda: jnp.pad(plain, [(0, 0)] * (plain.ndim - 1) + [(0, 2)]), lambda: of_scales(3, x)
        )

    squares = lax.platform_dependent(x, cpu=on_demand, default=partial(of_scales, 3))
    return inverse_rms_of_squares(squares, x.shape[-1], epsilon)


@inverse_rms.defjvp
def _inverse_rms_jvp(epsilon: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    inverse = inverse_rms(x, epsilon)
    # In this order every product stays in range: x * inverse is about 1.
    return inverse, -inverse * jnp.mean((x * inverse) * (dx * inverse), axis=-1, keepdims=True)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _normed(x: Float[Array, "*batch size"], epsilon: float) -> Float[Array, "*batch size"]:
    """``x / sqrt(mean(x^2) + epsilon)`` over the last axis."""
    return x * inverse_rms(x, epsilon)


@_normed.defjvp
def _normed_jvp(epsilon: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    inverse = inverse_rms(x, epsilon)
    # In this order every product stays in range: nothing is multiplied by a stream that is not normed.
    normed, along = x * inverse, dx * inverse
    return normed, along - normed * jnp.mean(normed * along, axis=-1, keepdims=True)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _normed_outside(x: Float[Array, "*batch size"], epsilon: float) -> Float[Array, "*batch size"]:
    """``x / (sqrt(mean(x^2)) + epsilon)`` over the last axis; the derivative of the root at 0 is taken to be 0."""
    return x / (1 / inverse_rms(x, 0.0) + epsilon)


@_normed_outside.defjvp
def _normed_outside_jvp(epsilon: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    rms = 1 / inverse_rms(x, 0.0)
    unit, normed, along = x / jnp.where(rms == 0, 1, rms), x / (rms + epsilon), dx / (rms + epsilon)
    return normed, along - normed * jnp.mean(unit * along, axis=-1, keepdims=True)


def _together(normed: Callable[[Array, float], Array]) -> Callable[[Array, float], Array]:
    return lambda streams, epsilon: normed(streams.reshape(*streams.shape[:-2], -1), epsilon).reshape(streams.shape)


NORMS: dict[str, Callable[[Array, float], Array]] = {
    # RMSNorm of vec X: equation 5 of arXiv 2512.24880.
    "rms": _together(_normed),
    # As Megatron-LM.
    "rms_outside": _together(_normed_outside),
    # As lucidrains' hyper-connections, and HC (arXiv 2409.19606).
    "streams": _normed,
}
"""(streams (..., n, C), epsilon) -> normed streams, as they are projected, each way under its name."""


def _power(dtype: Any, exponent: int) -> float:
    return 2.0 ** (exponent * (jnp.finfo(dtype).maxexp // 128))


def _scaled(epsilon: float, dtype: Any, scale: float) -> float:
    # As a product of numbers in range; what is too large for the dtype is never asked for.
    return min(epsilon * scale * scale, float(jnp.finfo(dtype).max))
