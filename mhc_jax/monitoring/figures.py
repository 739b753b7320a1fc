"""Figures of mixing weights and residual maps, from arrays alone: cheap, jittable, differentiable."""

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array, Float


def entropy(weights: Float[Array, "*layers K"]) -> Float[Array, "*layers"]:
    """Shannon entropy `-sum_k alpha_k log alpha_k` in nats, with 0 log 0 = 0: 0 for one state, log K for their mean.

    Example:
        >>> entropy(jnp.array([[0.0, 1.0], [0.5, 0.5]])).round(4)
        Array([-0.    ,  0.6931], dtype=float32)
    """
    return -xlogy(weights, weights).sum(axis=-1)


def shares(weights: Float[Array, "*layers K"]) -> Float[Array, "*layers K"]:
    """`|w_k| / sum_k |w_k|`: weights that do not sum to 1, or are negative, as a distribution whose entropy exists.

    Example:
        >>> shares(jnp.array([1.0, -3.0]))
        Array([0.25, 0.75], dtype=float32)
    """
    sizes = abs(weights)
    return sizes / sizes.sum(axis=-1, keepdims=True)


def effective_window(weights: Float[Array, "*layers K"]) -> Float[Array, "*layers"]:
    """How far back a layer reaches on average, `sum_k alpha_k (K - k) / sum_k alpha_k`, in layers.

    1 is a residual connection, K all weight on the oldest state, (K + 1) / 2 their mean.

    Example:
        >>> effective_window(jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
        Array([1., 3.], dtype=float32)
    """
    ages = jnp.arange(weights.shape[-1], 0, -1)
    return weights @ ages.astype(weights.dtype) / weights.sum(axis=-1)


def sum_errors(matrices: Float[Array, "*layers N N"]) -> tuple[Float[Array, "*layers"], Float[Array, "*layers"]]:
    """How far matrices are from doubly stochastic: the largest `|sum - 1|` over rows, and over columns.

    Example:
        >>> rows, columns = sum_errors(jnp.array([[0.5, 0.5], [1.0, 0.0]]))
        >>> float(rows), float(columns)
        (0.0, 0.5)
    """
    return abs(matrices.sum(axis=-1) - 1).max(axis=-1), abs(matrices.sum(axis=-2) - 1).max(axis=-1)


def composite_gain(matrices: Float[Array, "L N N"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """By how much the skips alone can amplify a signal and a gradient through all layers.

    The largest absolute row sum (forward) and column sum (backward) of `M_{L-1} ... M_0`: the "Amax gain magnitude" of
    the paper (arXiv 2512.24880, section 3.1). 1 and 1 for doubly stochastic matrices.

    Args:
        matrices: the residual map of every layer, which acts on columns: `H_res`, or `window_matrices`.

    Example:
        >>> forward, backward = composite_gain(jnp.array([[[0.0, 1.0], [0.5, 0.5]]] * 8))
        >>> round(float(forward), 4), round(float(backward), 4)
        (1.0, 1.332)
    """
    start = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    product, _ = lax.scan(lambda product, matrix: (matrix @ product, None), start, matrices)
    return abs(product).sum(axis=-1).max(), abs(product).sum(axis=-2).max()


def window_matrices(weights: Float[Array, "*layers H"]) -> Float[Array, "*layers H H"]:
    """History mixing as a linear map of the window: the oldest state drops out, the weighted sum comes in last.

    Example:
        >>> window_matrices(jnp.array([0.25, 0.75]))
        Array([[0.  , 1.  ],
               [0.25, 0.75]], dtype=float32)
    """
    shift = jnp.eye(weights.shape[-1], k=1, dtype=weights.dtype)[:-1]
    shift = jnp.broadcast_to(shift, (*weights.shape[:-1], *shift.shape))
    return jnp.concatenate([shift, weights[..., None, :]], axis=-2)


def history_figures(
    weights: Float[Array, "*layers H"], gated: Float[Array, "*layers H"] | None = None
) -> dict[str, Array]:
    """What `diagnose` reports of the weights of the L layers of a connection.

    Args:
        weights: the latest state last, 0 where there is none yet; for one layer, a vector.
        gated: the same times the gates, for the composite gain; without it there is none.
    """
    weights = jnp.atleast_2d(weights)
    figures = {"weights": weights, "entropy": entropy(weights), "effective_window": effective_window(weights)}
    if gated is not None:
        figures["gain_forward"], figures["gain_backward"] = composite_gain(window_matrices(jnp.atleast_2d(gated)))
    return figures
