"""The options of history mixing, each kind in one hashable value."""

import dataclasses
from collections.abc import Callable

from mhc_jax.options import check_choice, check_types
from mhc_jax.projections import PROJECTIONS, Projection, check_temperature

MODES = ("mhc", "hc", "residual")
# The logit that older states start with, where that of the latest is 0.
INITS: dict[str, Callable[["MHCConfig"], float]] = {
    "identity": lambda config: -10.0,
    "uniform": lambda config: 0.0,
    "mixed": lambda config: config.projection.mixed * config.temperature,
}


@dataclasses.dataclass(frozen=True)
class MHCConfig:
    """How a layer mixes its history: ``x_{l+1} = f_l(x_l) + g_l * sum_k alpha_{l,k} x_k``.

    Hashable, so it can be a static argument of a jitted function. Names and defaults are those of the
    PyTorch front end; a config means the same function in both.

    Attributes:
        max_history: Window size H, at least 1: the last ``min(l + 1, H)`` states are mixed, ``x_0`` included.
        mode: ``"mhc"`` (weights under ``constraint``), ``"hc"`` (softmax), ``"residual"`` (``x_l`` alone, weight 1;
            neither logits nor gate are used).
        constraint: A name in ``PROJECTIONS``: ``"simplex"``, ``"identity"`` (at least ``epsilon`` on the latest state)
            or ``"sparse"`` (Euclidean projection on the simplex, with exact zeros).
        epsilon: Least weight of the latest state under ``"identity"``, in [0, 1).
        temperature: Positive, a normal number of float32; the logits are divided by it.
        init: ``"identity"`` starts as a residual connection (logits -10, latest 0), ``"uniform"`` as a mean (zeros),
            ``"mixed"`` with most weight on the latest state (0.71 of four) and a gradient for every logit.
        detach_history: Whether gradients stop at the mixed states, and flow through the branches only.
        auto_project: Whether a module may project states of another shape to the branch's shape.
        use_gating: Whether a layer scales its mixture by ``sigmoid(gate_logit)``.
        prune_threshold: Weights below it count as zero, in [0, 1]. The rest is not renormalised.
        stochastic: Whether Gumbel noise is added to the logits when a key is given, which is in training only.

    Raises:
        TypeError: On construction, for a value of the wrong type.
        ValueError: On construction, for a value outside these ranges.
    """

    max_history: int = 4
    mode: str = "mhc"
    constraint: str = "simplex"
    epsilon: float = 0.1
    temperature: float = 1.0
    init: str = "identity"
    detach_history: bool = False
    auto_project: bool = False
    use_gating: bool = False
    prune_threshold: float = 0.0
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("mode", self.mode, MODES)
        check_choice("constraint", self.constraint, PROJECTIONS)
        check_choice("init", self.init, INITS)
        if self.max_history < 1:
            raise ValueError(f"max_history must be at least 1, got {self.max_history}")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon must be in [0, 1), got {self.epsilon}")
        check_temperature(self.temperature)
        if not 0 <= self.prune_threshold <= 1:
            raise ValueError(f"prune_threshold must be in [0, 1], got {self.prune_threshold}")

    @property
    def projection(self) -> Projection:
        """How logits become weights: the constraint of mode "mhc", the plain softmax of mode "hc"."""
        return PROJECTIONS["simplex" if self.mode == "hc" else self.constraint]


DEFAULTS = MHCConfig()
"""What functions use when they are given no config."""


@dataclasses.dataclass(frozen=True)
class MatrixConfig:
    """What a skip is that mixes by a matrix.

    Attributes:
        max_history: Window size H, at least 1.
        doubly_stochastic: Project to doubly stochastic matrices by Sinkhorn-Knopp; else softmax over each row.
        iterations: Sinkhorn iterations, at least 1.

    Raises:
        TypeError: On construction, for a value of the wrong type.
        ValueError: On construction, for a value outside these ranges.
    """

    max_history: int = 4
    doubly_stochastic: bool = True
    iterations: int = 10

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_history", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


MATRIX_DEFAULTS = MatrixConfig()
"""What a MatrixMHCSkip uses for the options that it is not given."""
