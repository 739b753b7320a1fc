"""History mixing: the weights of a window, and one mixing step.

    x_{l+1} = f_l(x_l) + g_l * sum_{k in window} alpha_{l,k} x_k

The window of layer l is the last ``K = min(l + 1, H)`` states, ``x_0`` included, ``x_l`` last.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mhc_jax.history.config import DEFAULTS, MHCConfig
from mhc_jax.history.window import State
from mhc_jax.kernels.choice import Implementation, check_implementation, chosen
from mhc_jax.kernels.history_mix import mix as kernel_mix
from mhc_jax.meshes import Axes, alike, on_parts
from mhc_jax.projections import computed_in


def mixing_weights(
    logits: Float[Array, "*layers H"],
    config: MHCConfig = DEFAULTS,
    *,
    live: int | Int[Array, "*layers"] | None = None,
    gate_logit: Float[Array, "*layers"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*layers H"]:
    """The weights ``g * alpha`` of the states in a window, the latest last.

    Args:
        logits: Mixing logits, for one layer or for many at once.
        config: The constraint, temperature and so on.
        live: How many states the window holds, 1 to H; default all. The projection acts on the last ``live`` logits
            alone, and the others get weight 0.
        gate_logit: Required if and only if ``config.use_gating``; ignored in mode ``"residual"``.
        key: Draws the Gumbel noise of ``config.stochastic``. Without a key (evaluation) there is none.

    Returns:
        Weights in float32, or float64 for float64 logits.

    Raises:
        ValueError: If a key or gate is given that the config has no use for, or a gate is missing.
    """
    size = logits.shape[-1]
    if size < 1:
        raise ValueError(f"logits must hold at least one position, got shape {logits.shape}")
    if isinstance(live, int) and not 1 <= live <= size:
        raise ValueError(f"live must be between 1 and the window size {size}, got {live}")
    dtype = computed_in(logits.dtype)
    if config.mode == "residual":
        return jnp.zeros(logits.shape, dtype).at[..., -1].set(1.0)
    if (gate_logit is not None) != config.use_gating:
        raise ValueError(f"gate_logit must be given if and only if use_gating is set; use_gating={config.use_gating}")
    if key is not None and not config.stochastic:
        raise ValueError("key draws the noise of stochastic mixing, but the config has stochastic=False")

    logits = logits.astype(dtype)
    if key is not None:
        logits = logits + jax.random.gumbel(key, logits.shape, dtype)
    if live is not None:
        logits = jnp.where(jnp.arange(size) >= size - jnp.asarray(live)[..., None], logits, -jnp.inf)

    weights = config.projection(logits, config)
    weights = jnp.where(weights < config.prune_threshold, 0.0, weights)
    if gate_logit is not None:
        weights = weights * jax.nn.sigmoid(gate_logit.astype(dtype))[..., None]
    return weights


def mix(
    x: State,
    states: State | Sequence[State],
    weights: Float[Array, "K"],
    *,
    implementation: Implementation = None,
) -> State:
    """One mixing step ``x + sum_k weights[k] * states[k]``.

    Args:
        x: The branch's output.
        states: K states like ``x``: a sequence, or one pytree whose leaves have a leading axis of length K
            (``History.window``).
        weights: One weight for each state.
        implementation: ``"pallas"`` for the kernels of ``mhc_jax.kernels``, ``"xla"`` for what XLA fuses with what
            made ``x``, None for the choice of ``mhc_jax.kernels.choice``.

    Returns:
        A state with the dtypes of ``x``; sums are taken in float32 at least.

    Raises:
        ValueError: If the numbers of weights and states, or the shapes of ``x`` and the states, differ.
    """
    x = floating(x)
    like_x: Any = jax.tree.structure(x)
    if like_x != jax.tree.structure(states):
        states = jax.tree.map(lambda *rows: jnp.stack(rows), *states)
    expected = jax.tree.map(lambda leaf: (weights.size, *leaf.shape), x)
    given = jax.tree.map(jnp.shape, states)
    if given != expected:
        raise ValueError(f"states must be {weights.size} states like x, with shapes {expected}, got {given}")
    check_implementation(implementation)
    return chosen("mix", implementation, _by_kernel, _by_xla)(x, states, weights)


def _by_kernel(x: State, states: State, weights: Array) -> State:
    def of_part(*arrays: Array, over: Axes) -> Array:
        return kernel_mix(*alike(*arrays))

    mixed = partial(on_parts, of_part, "... k... k -> ...", implementation="pallas")
    return jax.tree.map(lambda leaf, rows: mixed(leaf, rows, weights), x, states)


def _by_xla(x: State, states: State, weights: Array) -> State:
    rows = [jax.tree.map(lambda leaf, k=k: leaf[k], states) for k in range(weights.size)]
    return weighted_sum(x, rows, weights)


def weighted_sum(x: State, rows: list[State], weights: Float[Array, "K"]) -> State:
    # Written out term by term: the compiler fuses that with what made x, which it does not do with a contraction.
    def leaf_sum(x: Array, *rows: Array) -> Array:
        total = x.astype(jnp.promote_types(x.dtype, weights.dtype))
        for weight, row in zip(weights, rows, strict=True):
            total = total + weight * row.astype(total.dtype)
        return total.astype(x.dtype)

    return jax.tree.map(leaf_sum, x, *rows)


def floating(x: State) -> State:
    """x as arrays, if they are of numbers that can be summed."""

    def array(path: Any, leaf: Any) -> Array:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            raise TypeError(f"x{jax.tree_util.keystr(path)} must be floating-point, got {dtype}: 16 bits at least")
        return jnp.asarray(leaf, dtype)

    return jax.tree.map_with_path(array, x)
