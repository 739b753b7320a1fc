"""From unconstrained logits to weights on a manifold, with derivatives that neither overflow nor store iterations.

Every projection computes in float32, or in float64 for float64 logits, and returns that dtype.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mhc_jax.sinkhorn import log_sinkhorn


def project_simplex(logits: Float[Array, "*batch K"], temperature: float = 1.0) -> Float[Array, "*batch K"]:
    """``softmax(logits / temperature)`` over the last axis: positive weights that sum to 1."""
    return jax.nn.softmax(_scaled(logits, temperature), axis=-1)


def project_identity_preserving(
    logits: Float[Array, "*batch K"], epsilon: float = 0.1, temperature: float = 1.0
) -> Float[Array, "*batch K"]:
    """``(1 - epsilon) * softmax(logits / temperature)``, plus ``epsilon`` on the latest (last) state.

    Raises:
        ValueError: If ``epsilon`` is not in [0, 1) or ``temperature`` is not positive.
    """
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"epsilon must be in [0, 1), got {epsilon!r}")
    weights = (1.0 - epsilon) * project_simplex(logits, temperature)
    return weights.at[..., -1].add(epsilon)


def project_sparse_simplex(logits: Float[Array, "*batch K"], temperature: float = 1.0) -> Float[Array, "*batch K"]:
    """Euclidean projection of ``logits / temperature`` on the simplex (sparsemax): far-off states get exactly 0.

    ``max(z - tau, 0)``, with the threshold ``tau`` for which the weights sum to 1; the derivative is the exact
    Jacobian ``diag(s) - s s^T / |s|`` of the support ``s``.

    Source: Martins and Astudillo, arXiv:1602.02068, algorithm 1 and equation 9.
    """
    return _sparsemax(_scaled(logits, temperature))


@jax.custom_jvp
def _sparsemax(z: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    # Weights do not change when all logits move together; the largest at 0 keeps the sums below exact enough.
    z = z - z.max(axis=-1, keepdims=True)
    descending = -jnp.sort(-z, axis=-1)
    rank = jnp.arange(1, z.shape[-1] + 1)
    excess = jnp.cumsum(descending, axis=-1) - 1.0
    support = jnp.sum(rank * descending > excess, axis=-1, keepdims=True)
    tau = jnp.take_along_axis(excess, support - 1, axis=-1) / support
    return jnp.maximum(z - tau, 0.0)


@_sparsemax.defjvp
def _sparsemax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    weights, (dz,) = _sparsemax(*primals), tangents
    support = weights > 0
    mean = jnp.sum(jnp.where(support, dz, 0.0), axis=-1, keepdims=True) / support.sum(axis=-1, keepdims=True)
    return weights, jnp.where(support, dz - mean, 0.0)


@overload
def project_doubly_stochastic(
    logits: Float[Array, "*batch N N"],
    iterations: int = ...,
    temperature: float = ...,
    *,
    last: Literal["columns", "rows"] = ...,
    tolerance: float | None = ...,
    return_residual: Literal[False] = ...,
) -> Float[Array, "*batch N N"]: ...
@overload
def project_doubly_stochastic(
    logits: Float[Array, "*batch N N"],
    iterations: int = ...,
    temperature: float = ...,
    *,
    last: Literal["columns", "rows"] = ...,
    tolerance: float | None = ...,
    return_residual: Literal[True],
) -> tuple[Float[Array, "*batch N N"], Float[Array, "*batch"]]: ...
def project_doubly_stochastic(
    logits: Float[Array, "*batch N N"],
    iterations: int = 10,
    temperature: float = 1.0,
    *,
    last: Literal["columns", "rows"] = "columns",
    tolerance: float | None = None,
    return_residual: bool = False,
) -> Float[Array, "*batch N N"] | tuple[Float[Array, "*batch N N"], Float[Array, "*batch"]]:
    """Sinkhorn-Knopp: ``exp(logits / temperature)`` with rows and columns scaled in turn until both sum to 1.

    Runs in the log domain, so no finite logits give a zero row or an overflow. The side named by ``last`` sums to 1
    up to rounding; the other does at convergence only, which is slow (the error falls like 1/iterations) for a
    matrix whose mass tends to a triangular one: ask for the residual when it matters.

    Args:
        logits: Square matrices. A row is the last axis: "rows" sum to 1 means ``weights.sum(-1) == 1``.
        iterations: How often both sides are normalized; the largest number of times when ``tolerance`` is given.
        temperature: Positive; the logits are divided by it.
        last: The side normalized last. ``"columns"`` is the published package's order, ``"rows"`` the mHC paper's.
        tolerance: Stop once the side not yet normalized is within this of 1 in every matrix.
            The gradient is then the implicit one at the fixed point; without a tolerance it is the
            gradient of exactly ``iterations`` iterations. In both the backward memory does not depend on their number.
        return_residual: Also return ``max |sum - 1|`` of the side that was not normalized last, per matrix, not
            differentiated.

    Raises:
        ValueError: If the matrices are not square, or an option is out of range.

    Source: Sinkhorn and Knopp 1967; arXiv:2512.24880, equation 9.
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must hold square matrices in the last two axes, got shape {logits.shape}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations!r}")
    if last not in ("columns", "rows"):
        raise ValueError(f"last must be 'columns' or 'rows', got {last!r}")
    if tolerance is not None and not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive or None, got {tolerance!r}")
    if not logits.shape[-1]:
        raise ValueError(f"logits must hold at least one row, got shape {logits.shape}")
    z = _scaled(logits, temperature, axis=(-2, -1))
    # log_sinkhorn normalizes columns (axis -2) last.
    weights = log_sinkhorn(z if last == "columns" else z.mT, iterations, tolerance)
    residual = lax.stop_gradient(jnp.max(jnp.abs(weights.sum(axis=-1) - 1.0), axis=-1))
    weights = weights if last == "columns" else weights.mT
    return (weights, residual) if return_residual else weights


def computed_in(dtype: Any) -> Any:
    """The dtype that weights from logits of `dtype` are computed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def check_temperature(temperature: float) -> None:
    """Raises a ValueError for what float32 cannot divide by: below its smallest normal number it may hold 0."""
    if not 2.0**-126 <= temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}; the least in float32 is 2**-126")


def _scaled(logits: Array, temperature: float, axis: int | tuple[int, int] = -1) -> Array:
    check_temperature(temperature)
    logits = logits.astype(computed_in(logits.dtype))
    # Weights do not change when all logits move together. The largest at 0, what overflows is minus infinity.
    return (logits - lax.stop_gradient(logits.max(axis=axis, keepdims=True))) / temperature


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

    function: Callable[..., Array]
    options: tuple[str, ...] = ("temperature",)
    mixed: float = -2.0

    def __call__(self, logits: Float[Array, "*batch K"], config: Any) -> Float[Array, "*batch K"]:
        """The weights of `logits` under the options of `config`."""
        return self.function(logits, **{name: getattr(config, name) for name in self.options})


PROJECTIONS: dict[str, Projection] = {
    "simplex": Projection(project_simplex),
    "identity": Projection(project_identity_preserving, ("epsilon", "temperature")),
    # From -1 downwards the older states are cut off, and get no gradient.
    "sparse": Projection(project_sparse_simplex, mixed=-0.5),
}
"""The manifolds that `MHCConfig.constraint` may name. One entry adds one."""
