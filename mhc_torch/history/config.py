"""Settings of the hyper-connections: a validated dataclass, process-wide defaults, the `[tool.mhc]` TOML table."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable
from typing import Any

from mhc_torch.options import check_choice, check_types, refuse_unknown, resolve
from mhc_torch.projections import PROJECTIONS, Projection, check_temperature

MODES = ("mhc", "hc", "residual")
# The logit that older states start with, where that of the latest is 0.
INITS: dict[str, Callable[["MHCConfig"], float]] = {
    "identity": lambda config: -10.0,
    "uniform": lambda config: 0.0,
    "mixed": lambda config: config.projection.mixed * config.temperature,
}
SCOPES = ("global", "module")


@dataclasses.dataclass(frozen=True)
class MHCConfig:
    """Everything a hyper-connection layer can be told; every keyword of a layer that is left out is looked up here.

    Args:
        max_history: window H, the number of past states that are mixed; at least 1.
        mode: "mhc" mixes with constrained weights, "hc" with softmax(logits / temperature), "residual" adds the last
            state.
        constraint: manifold of the weights in mode "mhc", a name in `PROJECTIONS`: "simplex", "identity" or "sparse".
        epsilon: least weight of the latest state under "identity", in [0, 1).
        temperature: divides the logits; positive.
        init: "identity" starts with (almost) all weight on the latest state, as a residual network: the logits then
            have next to no gradient, and none under "sparse". "mixed" has most weight on the latest state (0.71 of
            four) and a gradient for every logit. "uniform" has equal weights.
        detach_history: mix the states without gradient through them. The layers then have no gradient highway.
        clear_history_each_forward: containers begin every forward with an empty history.
        auto_project: map past states of another width to the width of the present one by a learned linear map.
        history_scope: injected layers share one history per forward ("global") or keep one each ("module").
        use_gating: multiply the history by a learned sigmoid(gate_logit).
        prune_threshold: weights below it count as 0; in [0, 1].
        stochastic: Gumbel noise on the logits while training.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside its range.
    """

    max_history: int = 4
    mode: str = "mhc"
    constraint: str = "simplex"
    epsilon: float = 0.1
    temperature: float = 1.0
    init: str = "identity"
    detach_history: bool = False
    clear_history_each_forward: bool = True
    auto_project: bool = False
    history_scope: str = "global"
    use_gating: bool = False
    prune_threshold: float = 0.0
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("mode", self.mode, MODES)
        check_choice("constraint", self.constraint, PROJECTIONS)
        check_choice("init", self.init, INITS)
        check_choice("history_scope", self.history_scope, SCOPES)
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


@dataclasses.dataclass(frozen=True)
class MatrixConfig:
    """What a skip is that mixes by a matrix.

    Args:
        max_history: window H, the number of past states that are mixed; at least 1.
        doubly_stochastic: project to doubly stochastic matrices by Sinkhorn-Knopp; else softmax over each row.
        iterations: Sinkhorn iterations; at least 1.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside its range.
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

_default = MHCConfig()


def get_default_config() -> MHCConfig:
    """The settings that layers use for the keywords they are not given."""
    return _default


def set_default_config(config: MHCConfig | None = None, **fields: Any) -> None:
    """Replace the defaults by `config`, or change single fields of them: `set_default_config(max_history=8)`.

    Raises:
        TypeError: both or neither were given, `config` is no MHCConfig, or a field is unknown.
        ValueError: a field has a value outside its range.
    """
    global _default
    if (config is None) == (not fields):
        raise TypeError("set_default_config takes either a config or fields of it")
    if config is None:
        config = resolve_config(**fields)
    if not isinstance(config, MHCConfig):
        raise TypeError(f"config must be an MHCConfig, got {type(config).__name__}")
    _default = config


def resolve_default(value: Any, field: str) -> Any:
    """`value`, or the default of `field` where value is None."""
    return getattr(get_default_config(), field) if value is None else value


def resolve_config(config: MHCConfig | None = None, **fields: Any) -> MHCConfig:
    """`config`, by default the default config, with the fields that are not None replaced; raises as MHCConfig does."""
    return resolve(_default, config, **fields)


def load_config_from_toml(path: str | os.PathLike[str]) -> MHCConfig:
    """Read the table `[tool.mhc]` of a TOML file; fields that it leaves out keep the values of a plain MHCConfig.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the table has an unknown key or a value of the wrong type.
        ValueError: a value is outside its range.
    """
    with open(path, "rb") as file:
        table = tomllib.load(file).get("tool", {}).get("mhc", {})
    refuse_unknown(MHCConfig, table, f" in [tool.mhc] of {path}")
    return MHCConfig(**table)


def load_config_from_toml_optional(path: str | os.PathLike[str]) -> MHCConfig | None:
    """As load_config_from_toml, but None where the file does not exist."""
    try:
        return load_config_from_toml(path)
    except FileNotFoundError:
        return None
