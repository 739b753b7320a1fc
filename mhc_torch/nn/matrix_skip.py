"""MatrixMHCSkip: mix past states by the last row of a learned matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.history.mixing import mix
from mhc_torch.nn.compatible import mhc_compatible
from mhc_torch.projections import project_doubly_stochastic, project_simplex


@mhc_compatible
class MatrixMHCSkip(nn.Module):
    """x + (W h)_K for the window h of K past states and a (K, K) matrix W projected from the live logits.

    The skip takes the row of the latest state; under `doubly_stochastic` the other rows shape it through the columns.

    Args:
        max_history: window H, the number of past states that are mixed.
        doubly_stochastic: project to doubly stochastic matrices by Sinkhorn-Knopp; else softmax over each row.
        iterations: Sinkhorn iterations.

    Attributes:
        mixing_logits: (max_history, max_history) parameter, the latest state last in both axes.

    Raises:
        ValueError: max_history or iterations is below 1.
    """

    def __init__(self, max_history: int = 4, doubly_stochastic: bool = True, iterations: int = 10) -> None:
        super().__init__()
        for name, value in (("max_history", max_history), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_history = max_history
        self.doubly_stochastic = doubly_stochastic
        self.iterations = iterations
        self.live = max_history  # how many states the last forward mixed
        self.mixing_logits = nn.Parameter(torch.randn(max_history, max_history) * 0.01)

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
        self, x: Float[Tensor, "*shape"], history: Sequence[Float[Tensor, "*shape"]]
    ) -> Float[Tensor, "*shape"]:
        """Add the mixed history to the branch output `x`; with an empty history the output equals `x`.

        Raises:
            ValueError: shapes or devices of the states differ from those of x.
            TypeError: their dtype differs outside of autocast; x is no tensor.
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
