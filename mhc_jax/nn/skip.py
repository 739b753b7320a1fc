"""A skip connection that adds a weighted sum of past states to the output of a branch."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mhc_jax.history import History, mix, mixing_weights
from mhc_jax.history.config import DEFAULTS, INITS, MHCConfig
from mhc_jax.kernels.choice import Implementation, check_implementation
from mhc_jax.monitoring.connection import Shown, show_history
from mhc_jax.monitoring.figures import history_figures
from mhc_jax.nn.parameters import ConnectionParam
from mhc_jax.options import check_change, resolve, settable

GATE_INIT = 2.0
# What parameters are made for.
FIXED = ("max_history", "auto_project", "use_gating")


def initial_logits(config: MHCConfig, *layers: int) -> Float[Array, "*layers H"]:
    """Mixing logits at the start (`INITS`), 0 for the latest state."""
    logits = jnp.full((*layers, config.max_history), INITS[config.init](config))
    return logits.at[..., -1].set(0.0)


def stack_weights(skips: Iterable["MHCSkip"], gated: bool = False) -> Float[Array, "L H"]:
    """The weights of skips that follow one another from an empty history, 0 where no state exists yet."""
    rows = []
    for layer, skip in enumerate(skips):
        size = skip.config.max_history
        live = min(layer + 1, size)
        rows.append(jnp.pad(skip.mixing_weights(live, gated=gated), (size - live, 0)))
    return jnp.stack(rows)


def window_of(history: Sequence[Array] | History, max_history: int) -> list[Array]:
    """The states that a skip looks at, oldest first. Their number must be known: outside of jit."""
    states = list(history.window)[-int(history.count) :] if isinstance(history, History) else list(history)
    return states[-max_history:]


def skip_gradient_norms(grads: Iterable[Any], layers: Iterable[Any]) -> dict[str, Float[Array, "L"]]:
    """Norms of the gradients of the logits of each skip, and of each layer's parameters."""
    norm = optax.tree.norm
    return {
        "logits_grad_norm": jnp.stack([norm(skip["mixing_logits"]) for skip in grads]),
        "grad_norm": jnp.stack([jnp.asarray(norm(layer), float) for layer in layers]),
    }


class MHCSkip(nnx.Module):
    """`x + g * sum_k alpha_k x_k` over the last `max_history` states `x_k`.

    The weights alpha are the projection of the live logits, so that none goes to a state that does not exist; g is
    sigmoid(gate_logit) when gating is on, else 1. States are arrays of floats of any shape, channels last.

    Args:
        max_history: window H, 4 by default.
        config: all options in one value; keywords, the fields of `MHCConfig`, change single ones.
        history_features, features: with `auto_project`, the width (last axis) of past states that differ from the
            branch's output, and that of the output.
        implementation: as of `mhc_jax.history.mix`.
        rngs: needed for `stochastic` (stream `mixing`) and for `auto_project` (stream `params`).

    Attributes:
        mixing_logits: (max_history,) parameter, the latest state last. Unused in mode "residual".
        gate_logit: () parameter, only with use_gating; starts at 2.
        projection: `nnx.Linear` without bias, only with auto_project.
        deterministic: no noise is drawn; set by `model.eval()` and `model.train()`.
        config: the options, read-only. Single ones can be set: `skip.temperature = 0.5`, and so mode, constraint,
            epsilon, prune_threshold, detach_history and stochastic; they are checked as at construction.
            A compiled function is then compiled anew.

    Raises:
        TypeError, ValueError: as MHCConfig, or what an option needs is missing; on setting an option too, and for one
            that parameters were made for.

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
        implementation: Implementation = None,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> None:
        self.config = resolve(DEFAULTS, config, max_history=max_history, **options)
        check_implementation(implementation)
        self.implementation = implementation
        self.mixing_logits = ConnectionParam(initial_logits(self.config))
        if self.config.use_gating:
            self.gate_logit = ConnectionParam(jnp.array(GATE_INIT))
        if self.config.auto_project:
            if history_features is None or features is None or rngs is None:
                raise ValueError("auto_project needs history_features, features and rngs")
            self.projection = nnx.Linear(history_features, features, use_bias=False, rngs=rngs)
        if self.config.stochastic:
            if rngs is None:
                raise ValueError("stochastic needs rngs, for its noise")
            self.rngs = rngs.mixing.fork()
        self.deterministic = False

    @property
    def config(self) -> MHCConfig:
        return self._config

    @config.setter
    def config(self, config: MHCConfig) -> None:
        before = getattr(self, "_config", None)
        check_change("MHCSkip", before, config, FIXED)
        if before is not None and config.stochastic and not hasattr(self, "rngs"):
            raise ValueError("stochastic needs rngs, for its noise; make a new MHCSkip with it")
        self._config = config

    mode = settable("mode")
    max_history = settable("max_history")
    constraint = settable("constraint")
    epsilon = settable("epsilon")
    temperature = settable("temperature")
    detach_history = settable("detach_history")
    auto_project = settable("auto_project")
    use_gating = settable("use_gating")
    prune_threshold = settable("prune_threshold")
    stochastic = settable("stochastic")

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
        self, x: Float[Array, "*shape"], history: Sequence[Float[Array, "..."]] | History
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
        return mix(x, states, weights, implementation=self.implementation)

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `mhc_jax.monitoring.diagnostics.diagnose` reports."""
        figures = history_figures(self.mixing_weights(), self.mixing_weights(gated=True))
        return figures | {"logits_grad_norm": optax.tree.norm(grads["mixing_logits"])[None]}

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of the figures."""
        return show_history(figures, {"": self.config.max_history}, container=False)

    def recorded(self, x: Array, history: Sequence[Array] | History) -> tuple[Array, list[Array]]:
        """What a call depends on: the branch's output, and the states in the window."""
        return x, window_of(history, self.config.max_history)

    def _fit(self, state: Array, x: Array) -> Array:
        if state.shape == x.shape:
            return state
        if not self.config.auto_project:
            raise ValueError(
                f"history has a state of shape {state.shape}, x has {x.shape}; "
                "set auto_project=True to map the width of past states"
            )
        projection = self.projection
        if state.shape != (*x.shape[:-1], projection.in_features) or x.shape[-1] != projection.out_features:
            raise ValueError(
                f"history has a state of shape {state.shape}, x has {x.shape}: auto_project maps the "
                f"last axis, from {projection.in_features} to {projection.out_features}"
            )
        return projection(state)
