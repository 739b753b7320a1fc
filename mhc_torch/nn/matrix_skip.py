"""MatrixMHCSkip: mix past states by the last row of a learned matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn

from mhc_torch.history.config import MATRIX_DEFAULTS, MatrixConfig
from mhc_torch.history.mixing import mix
from mhc_torch.nn.compatible import mhc_compatible
from mhc_torch.options import check_change, resolve, settable
from mhc_torch.projections import project_doubly_stochastic, project_simplex


@mhc_compatible
class MatrixMHCSkip(nn.Module):
    """x + (W h)_K for the window h of K past states and a (K, K) matrix W projected from the live logits.

    The skip takes the row of the latest state; under `doubly_stochastic` the other rows shape it through the columns.

    Args:
        max_history: window H, the number of past states that are mixed; 4 by default.
        doubly_stochastic: project to doubly stochastic matrices by Sinkhorn-Knopp (default), else softmax each row.
        iterations: Sinkhorn iterations, 10 by default.
        config: all of them in one value; the arguments change single ones.

    Attributes:
        config: the options, read-only. `iterations` and `doubly_stochastic` can be set: `skip.iterations = 20`.
        mixing_logits: (max_history, max_history) parameter, the latest state last in both axes.

    Raises:
        TypeError, ValueError: as MatrixConfig; on setting an option too, and for max_history, which has its logits.
    """

    def __init__(
        self,
        max_history: int | None = None,
        doubly_stochastic: bool | None = None,
        iterations: int | None = None,
        *,
        config: MatrixConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options |= {"max_history": max_history, "doubly_stochastic": doubly_stochastic, "iterations": iterations}
        self.config = resolve(MATRIX_DEFAULTS, config, **options)
        self.live = self.max_history  # how many states the last forward mixed
        self.mixing_logits = nn.Parameter(torch.randn(self.max_history, self.max_history) * 0.01)

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

    @property
    def logits(self) -> nn.Parameter:
        """The same parameter as `mixing_logits`."""
        return self.mixing_logits

    def mixing_matrix(self, k: int | None = None) -> Float[Tensor, "k k"]:
        """The projected matrix of `k` live states; by default of as many as the last forward mixed.

        Raises:
            ValueError: k is not in 1..max_history.
        """
        k = self.live if k is None else k
        if not 1 <= k <= self.max_history:
            raise ValueError(f"k must be in 1..{self.max_history}, got {k}")
        logits = self.mixing_logits[-k:, -k:]
        return project_doubly_stochastic(logits, self.iterations) if self.doubly_stochastic else project_simplex(logits)

    def mixing_weights(self, k: int | None = None) -> Float[Tensor, "k"]:
        """The weights that `k` live states get, the latest last: the last row of the matrix."""
        k = self.live if k is None else k
        return self.mixing_matrix(k)[-1] if k else self.mixing_logits.new_empty(0)

    def forward(
        self, x: Inexact[Tensor, "*shape"], history: Sequence[Inexact[Tensor, "*shape"]]
    ) -> Inexact[Tensor, "*shape"]:
        """Add the mixed history to the branch output `x`; with an empty history the output equals `x`.

        Raises:
            ValueError: shapes or devices of the states differ from those of x.
            TypeError: their dtype is wider than that of x, outside of autocast; x is no tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x, the output of the branch, must be a tensor, got {type(x).__name__}")
        window = history[-self.max_history :]
        self.live = len(window)
        if not window:
            # Nothing to mix, but DDP wants every parameter in the graph.
            return x + 0 * self.mixing_matrix(1).sum()
        return mix(x, window, self.mixing_weights(len(window)).unbind())

    def mixed_states(self, x: Tensor, history: Sequence[Tensor], *_: Any) -> list[Tensor]:
        """The states that a call mixes."""
        return list(history[-self.max_history :])

    def recorded(self, x: Tensor, history: Sequence[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
        """What a call depends on: the branch's output, and the states in the window."""
        return x, self.mixed_states(x, history)

    def extra_repr(self) -> str:
        return (
            f"max_history={self.max_history}, doubly_stochastic={self.doubly_stochastic}, iterations={self.iterations}"
        )
