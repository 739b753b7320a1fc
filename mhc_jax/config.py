"""The options of history mixing, in one hashable value."""

import dataclasses
from typing import Literal, get_args

from mhc_jax.projections import check_temperature

Mode = Literal["mhc", "hc", "residual"]
Constraint = Literal["simplex", "identity", "sparse"]
Init = Literal["identity", "uniform"]


@dataclasses.dataclass(frozen=True)
class MHCConfig:
    """How a layer mixes its history: ``x_{l+1} = f_l(x_l) + g_l * sum_k alpha_{l,k} x_k``.

    Hashable, so it can be a static argument of a jitted function. Names and defaults are those of the
    PyTorch front end; a config means the same function in both.

    Attributes:
        max_history: Window size H, at least 1: the last ``min(l + 1, H)`` states are mixed, ``x_0`` included.
        mode: ``"mhc"`` (weights under ``constraint``), ``"hc"`` (softmax), ``"residual"`` (``x_l`` alone, weight 1;
            neither logits nor gate are used).
        constraint: ``"simplex"``, ``"identity"`` (at least ``epsilon`` on the latest state) or ``"sparse"``
            (Euclidean projection on the simplex, with exact zeros).
        epsilon: Least weight of the latest state under ``"identity"``, in [0, 1).
        temperature: Positive, a normal number of float32; the logits are divided by it.
        init: ``"identity"`` starts as a residual connection (logits -10, latest 0), ``"uniform"`` as a mean (zeros).
        detach_history: Whether gradients stop at the mixed states, and flow through the branches only.
        use_gating: Whether a layer scales its mixture by ``sigmoid(gate_logit)``.
        prune_threshold: Weights below it count as zero, in [0, 1). The rest is not renormalised.
        stochastic: Whether Gumbel noise is added to the logits when a key is given, which is in training only.
        auto_project: Whether a module may project states of another shape to the branch's shape.

    Raises:
        ValueError: On construction, for a value outside these ranges.
    """

    max_history: int = 4
    mode: Mode = "mhc"
    constraint: Constraint = "simplex"
    epsilon: float = 0.1
    temperature: float = 1.0
    init: Init = "identity"
    detach_history: bool = False
    use_gating: bool = False
    prune_threshold: float = 0.0
    stochastic: bool = False
    auto_project: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.max_history, bool) or not isinstance(self.max_history, int) or self.max_history < 1:
            raise ValueError(f"max_history must be an integer of at least 1, got {self.max_history!r}")
        for name, choices in (("mode", Mode), ("constraint", Constraint), ("init", Init)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        for name in ("epsilon", "prune_threshold"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        check_temperature(self.temperature)
        for name in ("detach_history", "use_gating", "stochastic", "auto_project"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
