"""Skip connections that add a weighted sum of past states to the output of a branch."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mhc_jax.config import MHCConfig
from mhc_jax.history import History
from mhc_jax.mixing import mix, mixing_weights
from mhc_jax.projections import project_doubly_stochastic, project_simplex

GATE_INIT = 2.0


def as_config(config: MHCConfig | None, max_history: int | None, options: dict[str, Any]) -> MHCConfig:
    """The config a module was given, or the one its keywords make.

    Raises:
        ValueError: both are given, or a value is out of range.
        TypeError: a keyword is not a field of `MHCConfig`.
    """
    if max_history is not None:
        options = {"max_history": max_history, **options}
    check_options(MHCConfig, options)
    if config is None:
        return MHCConfig(**options)
    if options:
        raise ValueError(f"config: give either a config or the keywords {sorted(options)}, not both")
    return config


def check_options(kind: type, options: dict[str, Any]) -> None:
    """A TypeError if a keyword is not a field of `kind`, the config that a module takes its options from."""
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"options must be among {known}, got {unknown}")


def initial_logits(config: MHCConfig, *layers: int) -> Float[Array, "*layers H"]:
    """Mixing logits at the start: zeros, or -10 except 0 on the latest state."""
    logits = jnp.full((*layers, config.max_history), -10.0 if config.init == "identity" else 0.0)
    return logits.at[..., -1].set(0.0)


def stack_weights(skips: Iterable["MHCSkip"], gated: bool = False) -> Float[Array, "L H"]:
    """The weights of skips that follow one another from an empty history, 0 where no state exists yet."""
    rows = []
    for layer, skip in enumerate(skips):
        size = skip.config.max_history
        live = min(layer + 1, size)
        rows.append(jnp.pad(skip.mixing_weights(live, gated=gated), (size - live, 0)))
    return jnp.stack(rows)


class MHCSkip(nnx.Module):
    """`x + g * sum_k alpha_k x_k` over the last `max_history` states `x_k`.

    The weights alpha are the projection of the live logits, so that none goes to a state that does not exist; g is
    sigmoid(gate_logit) when gating is on, else 1. States are arrays of floats of any shape, channels last.

    Args:
        max_history: window H, 4 by default.
        config: all options in one value; or give them as keywords, the fields of `MHCConfig`.
        history_features, features: with `auto_project`, the width (last axis) of past states that differ from the
            branch's output, and that of the output.
        rngs: needed for `stochastic` (stream `mixing`) and for `auto_project` (stream `params`).

    Attributes:
        mixing_logits: (max_history,) parameter, the latest state last. Unused in mode "residual".
        gate_logit: () parameter, only with use_gating; starts at 2.
        projection: `nnx.Linear` without bias, only with auto_project.
        deterministic: no noise is drawn; set by `model.eval()` and `model.train()`.

    Raises:
        ValueError: an option is out of range, or one that the others need is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.nn import MHCSkip
        >>> skip = MHCSkip(max_history=3, init="uniform")
        >>> x0, x1 = jnp.full((2, 4), 1.0), jnp.full((2, 4), 3.0)
        >>> skip(jnp.zeros((2, 4)), [x0, x1])[0]                    # the mean of both
        Array([2., 2., 2., 2.], dtype=float32)
        >>> skip.mixing_weights(2)
        Array([0.5, 0.5], dtype=float32)
    """

    def __init__(
        self,
        max_history: int | None = None,
        *,
        config: MHCConfig | None = None,
        history_features: int | None = None,
        features: int | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> None:
        self.config = as_config(config, max_history, options)
        self.mixing_logits = nnx.Param(initial_logits(self.config))
        if self.config.use_gating:
            self.gate_logit = nnx.Param(jnp.array(GATE_INIT))
        if self.config.auto_project:
            if history_features is None or features is None or rngs is None:
                raise ValueError("auto_project needs history_features, features and rngs")
            self.projection = nnx.Linear(history_features, features, use_bias=False, rngs=rngs)
        if self.config.stochastic:
            if rngs is None:
                raise ValueError("stochastic needs rngs, for its noise")
            self.rngs = rngs.mixing.fork()
        self.deterministic = False

    def mixing_weights(self, k: int | None = None, *, gated: bool = False) -> Float[Array, "k"]:
        """The weights of `k` live states (default: a full window), the latest last.

        They are the point on the manifold, pruned, without noise; `gated` multiplies them by the gate, if there is one.

        Raises:
            ValueError: k is not in 1..max_history.
        """
        k = self.config.max_history if k is None else k
        if not 1 <= k <= self.config.max_history:
            raise ValueError(f"k must be in 1..{self.config.max_history}, got {k}")
        gated = gated and self.config.use_gating
        return mixing_weights(
            self.mixing_logits[-k:],
            dataclasses.replace(self.config, use_gating=gated),
            gate_logit=self.gate_logit[...] if gated else None,
        )

    def __call__(
        self, x: Float[Array, "*shape"], history: Sequence[Float[Array, "*shape"]] | History
    ) -> Float[Array, "*shape"]:
        """Adds the mixed history to the branch output `x`.

        Args:
            x: output of the branch.
            history: past states, oldest first, of which the last `max_history` are used; empty leaves `x` as it is.
                Or a `History` of that window, for a scan or a loop under jit.

        Raises:
            ValueError: the shape of a state differs from that of x, or a `History` has another window.
        """
        if isinstance(history, History):
            if history.max_history != self.config.max_history:
                raise ValueError(f"history has a window of {history.max_history}, expected {self.config.max_history}")
            states, live = list(history.window), history.count
        else:
            states, live = list(history[-self.config.max_history :]), None
        if not states:
            return x
        states = [self._fit(state, x) for state in states]
        if self.config.detach_history:
            states = lax.stop_gradient(states)
        weights = mixing_weights(
            self.mixing_logits[-len(states) :],
            self.config,
            live=live,
            gate_logit=self.gate_logit[...] if self.config.use_gating else None,
            key=self.rngs() if self.config.stochastic and not self.deterministic else None,
        )
        return mix(x, states, weights)

    def _fit(self, state: Array, x: Array) -> Array:
        if state.shape == x.shape:
            return state
        if not self.config.auto_project:
            raise ValueError(
                f"history has a state of shape {state.shape}, and the branch gave {x.shape}: they must agree "
                "(auto_project=True maps the last axis)"
            )
        projection = self.projection
        if state.shape != (*x.shape[:-1], projection.in_features) or x.shape[-1] != projection.out_features:
            raise ValueError(
                f"history has a state of shape {state.shape}, and the branch gave {x.shape}: auto_project maps the "
                f"last axis, from {projection.in_features} to {projection.out_features}"
            )
        return projection(state)


class MatrixMHCSkip(nnx.Module):
    """`x + (W h)_K` for the window h of K past states and a (K, K) matrix W projected from the live logits.

    The skip takes the row of the latest state; under `doubly_stochastic` the other rows shape it through the columns.

    Args:
        max_history: window H.
        doubly_stochastic: project to doubly stochastic matrices by Sinkhorn-Knopp; else softmax over each row.
        iterations: Sinkhorn iterations.
        rngs: stream `params`, for the initial logits.

    Attributes:
        mixing_logits: (max_history, max_history) parameter, the latest state last in both axes; starts at N(0, 0.01²).

    Raises:
        ValueError: max_history or iterations is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import MatrixMHCSkip
        >>> skip = MatrixMHCSkip(max_history=2, rngs=nnx.Rngs(0))
        >>> skip(jnp.zeros(3), [jnp.ones(3), 3 * jnp.ones(3)]).round(1)
        Array([2., 2., 2.], dtype=float32)
        >>> skip.mixing_matrix().sum(axis=0).round(5)
        Array([1., 1.], dtype=float32)
    """

    def __init__(
        self, max_history: int = 4, doubly_stochastic: bool = True, iterations: int = 10, *, rngs: nnx.Rngs
    ) -> None:
        for name, value in (("max_history", max_history), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        self.max_history = max_history
        self.doubly_stochastic = doubly_stochastic
        self.iterations = iterations
        self.mixing_logits = nnx.Param(0.01 * jax.random.normal(rngs.params(), (max_history, max_history)))

    def mixing_matrix(self, k: int | None = None) -> Float[Array, "k k"]:
        """The projected matrix of `k` live states (default: a full window).

        Raises:
            ValueError: k is not in 1..max_history.
        """
        k = self.max_history if k is None else k
        if not 1 <= k <= self.max_history:
            raise ValueError(f"k must be in 1..{self.max_history}, got {k}")
        logits = self.mixing_logits[-k:, -k:]
        return project_doubly_stochastic(logits, self.iterations) if self.doubly_stochastic else project_simplex(logits)

    def mixing_weights(self, k: int | None = None) -> Float[Array, "k"]:
        """The weights that `k` live states get, the latest last: the last row of the matrix."""
        return self.mixing_matrix(k)[-1]

    def __call__(
        self, x: Float[Array, "*shape"], history: Sequence[Float[Array, "*shape"]] | History
    ) -> Float[Array, "*shape"]:
        """Adds the mixed history to the branch output `x`; an empty history leaves `x` as it is.

        Raises:
            ValueError: the shape of a state differs from that of x, or a `History` has another window.
        """
        if isinstance(history, History):
            if history.max_history != self.max_history:
                raise ValueError(f"history has a window of {history.max_history}, expected {self.max_history}")
            return mix(x, list(history.window), self._live_weights(history.count))
        states = list(history[-self.max_history :])
        for state in states:
            if state.shape != x.shape:
                raise ValueError(f"history has a state of shape {state.shape}, and the branch gave {x.shape}")
        return mix(x, states, self.mixing_weights(len(states))) if states else x

    def _live_weights(self, count: Int[Array, ""]) -> Float[Array, "H"]:
        # The number of live states is not known while tracing; what is known is that it is one of H.
        def padded(k: int) -> Array:
            return jnp.pad(self.mixing_weights(k), (self.max_history - k, 0))

        return lax.switch(count - 1, [lambda k=k: padded(k) for k in range(1, self.max_history + 1)])
