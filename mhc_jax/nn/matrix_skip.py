"""A skip connection that mixes past states by a doubly stochastic matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mhc_jax.history import History, mix
from mhc_jax.history.config import MATRIX_DEFAULTS, MatrixConfig
from mhc_jax.kernels.choice import Implementation, check_implementation
from mhc_jax.monitoring.connection import Shown, show_history
from mhc_jax.monitoring.figures import history_figures, sum_errors
from mhc_jax.nn.parameters import ConnectionParam
from mhc_jax.nn.skip import window_of
from mhc_jax.options import check_change, resolve, settable
from mhc_jax.projections import project_doubly_stochastic, project_simplex


class MatrixMHCSkip(nnx.Module):
    """`x + (W h)_K` for the window h of K past states and a (K, K) matrix W projected from the live logits.

    The skip takes the row of the latest state; under `doubly_stochastic` the other rows shape it through the columns.

    Args:
        max_history: window H, 4 by default.
        doubly_stochastic: project to doubly stochastic matrices by Sinkhorn-Knopp (default), else softmax each row.
        iterations: Sinkhorn iterations, 10 by default.
        config: all of them in one value; the arguments change single ones.
        implementation: as of `mhc_jax.history.mix`.
        rngs: stream `params`, for the initial logits.

    Attributes:
        mixing_logits: (max_history, max_history) parameter, the latest state last in both axes; starts at N(0, 0.01²).
        config: the options, read-only. `iterations` and `doubly_stochastic` can be set: `skip.iterations = 20`.

    Raises:
        TypeError, ValueError: as MatrixConfig; on setting an option too, and for max_history, which has its logits.

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
        self,
        max_history: int | None = None,
        doubly_stochastic: bool | None = None,
        iterations: int | None = None,
        *,
        config: MatrixConfig | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        check_implementation(implementation)
        self.implementation = implementation
        options |= {"max_history": max_history, "doubly_stochastic": doubly_stochastic, "iterations": iterations}
        self.config = resolve(MATRIX_DEFAULTS, config, **options)
        shape = (self.max_history, self.max_history)
        self.mixing_logits = ConnectionParam(0.01 * jax.random.normal(rngs.params(), shape))

    @property
    def config(self) -> MatrixConfig:
        return self._config

    @config.setter
    def config(self, config: MatrixConfig) -> None:
        check_change("MatrixMHCSkip", getattr(self, "_config", None), config, ("max_history",))
        self._config = config

    max_history = settable("max_history")
    doubly_stochastic = settable("doubly_stochastic")
    iterations = settable("iterations")

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
            states, weights = list(history.window), self._live_weights(history.count)
            return mix(x, states, weights, implementation=self.implementation)
        states = list(history[-self.max_history :])
        for state in states:
            if state.shape != x.shape:
                raise ValueError(f"history has a state of shape {state.shape}, x has {x.shape}")
        if not states:
            return x
        return mix(x, states, self.mixing_weights(len(states)), implementation=self.implementation)

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `mhc_jax.monitoring.diagnostics.diagnose` reports."""
        rows, columns = sum_errors(self.mixing_matrix())
        figures = history_figures(self.mixing_weights()) | {"row_sum_error": rows, "column_sum_error": columns}
        return figures | {"logits_grad_norm": optax.tree.norm(grads["mixing_logits"])[None]}

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of the figures."""
        return show_history(figures, {"": self.max_history}, container=False)

    def recorded(self, x: Array, history: Sequence[Array] | History) -> tuple[Array, list[Array]]:
        """What a call depends on: the branch's output, and the states in the window."""
        return x, window_of(history, self.max_history)

    def _live_weights(self, count: Int[Array, ""]) -> Float[Array, "H"]:
        # The number of live states is not known while tracing; what is known is that it is one of H.
        def padded(k: int) -> Array:
            return jnp.pad(self.mixing_weights(k), (self.max_history - k, 0))

        return lax.switch(count - 1, [lambda k=k: padded(k) for k in range(1, self.max_history + 1)])
