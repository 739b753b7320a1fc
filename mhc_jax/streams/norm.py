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

from mhc_jax.meshes import Axes, total, whole_size

Norm = Callable[[Array, float, Axes], Array]

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


@partial(jax.jit, static_argnums=1, inline=True)
def squares(x: Float[Array, "*batch size"], epsilon: float) -> Float[Array, "*batch 3"]:
    """The sums of squares over the last axis with each of the `scales`, those that `epsilon` leaves a need for.

    For `inverse_rms_of`, which knows the derivative: here there is none.
    """

    def of_scales(count: int, x: Array) -> Array:
        sums = [jnp.sum(x * scale * (x * scale), axis=-1) for scale in scales(x.dtype)[:count]]
        return jnp.stack(sums, axis=-1)

    def on_demand(x: Array) -> Array:
        # Here every sum is a pass over memory, where others take all three in one.
        plain = of_scales(1, x)
        sound = plain < _power(x.dtype, _LARGE)
        if epsilon < _power(x.dtype, _SMALL) / x.shape[-1]:
            sound &= plain > _power(x.dtype, _SMALL)
        # Whoever adds up the sums of several parts may need the one of large numbers for the sake of another part.
        scale = scales(x.dtype)[1]
        padded = jnp.concatenate([plain, plain * scale * scale, jnp.zeros_like(plain)], axis=-1)
        return lax.cond(sound.all(), lambda: padded, lambda: of_scales(3, x))

    return lax.platform_dependent(lax.stop_gradient(x), cpu=on_demand, default=partial(of_scales, 3))


def inverse_rms(x: Float[Array, "*batch size"], epsilon: float, over: Axes = ()) -> Float[Array, "*batch 1"]:
    """``1 / sqrt(mean(x^2) + epsilon)`` over the last axis, which may be split `over` axes of the mesh."""
    return inverse_rms_of(x, total(squares(x, epsilon), over), epsilon, over)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def inverse_rms_of(
    x: Float[Array, "*batch size"], squares: Float[Array, "*batch 3"], epsilon: float, over: Axes = ()
) -> Float[Array, "*batch 1"]:
    """`inverse_rms` of x, by its `squares`, whose derivative is left out.

    Args:
        over: axes of the mesh that x is split over along its last axis; `squares` are summed up over them.
    """
    return inverse_rms_of_squares(squares, whole_size(x.shape[-1], over), epsilon)


@inverse_rms_of.defjvp
def _inverse_rms_of_jvp(
    epsilon: float, over: Axes, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, squares), (dx, _) = primals, tangents
    inverse = inverse_rms_of(x, squares, epsilon, over)
    # In this order every product stays in range: x * inverse is about 1.
    return inverse, -inverse * _mean((x * inverse) * (dx * inverse), over)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _normed(x: Float[Array, "*batch size"], epsilon: float, over: Axes) -> Float[Array, "*batch size"]:
    """``x / sqrt(mean(x^2) + epsilon)`` over the last axis."""
    return x * inverse_rms(x, epsilon, over)


@_normed.defjvp
def _normed_jvp(epsilon: float, over: Axes, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    inverse = inverse_rms(x, epsilon, over)
    # In this order every product stays in range: nothing is multiplied by a stream that is not normed.
    normed, along = x * inverse, dx * inverse
    return normed, along - normed * _mean(normed * along, over)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _normed_outside(x: Float[Array, "*batch size"], epsilon: float, over: Axes) -> Float[Array, "*batch size"]:
    """``x / (sqrt(mean(x^2)) + epsilon)`` over the last axis; the derivative of the root at 0 is taken to be 0."""
    return x / (1 / inverse_rms(x, 0.0, over) + epsilon)


@_normed_outside.defjvp
def _normed_outside_jvp(
    epsilon: float, over: Axes, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    rms = 1 / inverse_rms(x, 0.0, over)
    unit, normed, along = x / jnp.where(rms == 0, 1, rms), x / (rms + epsilon), dx / (rms + epsilon)
    return normed, along - normed * _mean(unit * along, over)


def _mean(x: Array, over: Axes) -> Array:
    return total(jnp.sum(x, axis=-1, keepdims=True), over) / whole_size(x.shape[-1], over)


def _together(normed: Norm) -> Norm:
    def of_all(streams: Array, epsilon: float, over: Axes) -> Array:
        return normed(streams.reshape(*streams.shape[:-2], -1), epsilon, over).reshape(streams.shape)

    return of_all


NORMS: dict[str, Norm] = {
    # RMSNorm of vec X: equation 5 of arXiv 2512.24880.
    "rms": _together(_normed),
    # As Megatron-LM.
    "rms_outside": _together(_normed_outside),
    # As lucidrains' hyper-connections, and HC (arXiv 2409.19606).
    "streams": _normed,
}
"""(streams (..., n, C), epsilon, axes of the mesh that features are split over) -> normed streams, as they are
projected, each way under its name."""


def _power(dtype: Any, exponent: int) -> float:
    return 2.0 ** (exponent * (jnp.finfo(dtype).maxexp // 128))


def _scaled(epsilon: float, dtype: Any, scale: float) -> float:
    # As a product of numbers in range; what is too large for the dtype is never asked for.
    return min(epsilon * scale * scale, float(jnp.finfo(dtype).max))
