"""Manifold-constrained hyper-connections in PyTorch, with the names that the `mhc` documentation describes."""

from typing import TYPE_CHECKING, Any

from mhc_torch import utils
from mhc_torch.history.config import (
    MHCConfig,
    get_default_config,
    load_config_from_toml,
    load_config_from_toml_optional,
    resolve_default,
    set_default_config,
)
from mhc_torch.nn import (
    HistoryBuffer,
    HyperConnections,
    MatrixMHCSkip,
    MHCBasicBlock,
    MHCBottleneck,
    MHCConv2d,
    MHCSequential,
    MHCSkip,
    StreamHead,
    StreamStack,
    share_history,
)
from mhc_torch.presets import get_preset
from mhc_torch.projections import (
    project_doubly_stochastic,
    project_identity_preserving,
    project_simplex,
    project_sparse_simplex,
)
from mhc_torch.utils import (
    OPTIONAL,
    ForwardProfiler,
    autocast_context,
    check_model_stability,
    compile_model,
    ensure_list,
    extract_mixing_weights,
    get_last_k,
    get_logger,
    inject_mhc,
    inject_mhc_default,
    mhc_compatible,
    set_seed,
)

if TYPE_CHECKING:
    from mhc_torch.utils import (
        MHCLightningCallback,
        create_training_dashboard,
        plot_gradient_flow,
        plot_history_contribution,
        plot_mixing_weights,
    )


def __getattr__(name: str) -> Any:
    if name in OPTIONAL:
        return getattr(utils, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ForwardProfiler",
    "HistoryBuffer",
    "HyperConnections",
    "MHCBasicBlock",
    "MHCBottleneck",
    "MHCConfig",
    "MHCConv2d",
    "MHCLightningCallback",
    "MHCSequential",
    "MHCSkip",
    "MatrixMHCSkip",
    "StreamHead",
    "StreamStack",
    "autocast_context",
    "check_model_stability",
    "compile_model",
    "create_training_dashboard",
    "ensure_list",
    "extract_mixing_weights",
    "get_default_config",
    "get_last_k",
    "get_logger",
    "get_preset",
    "inject_mhc",
    "inject_mhc_default",
    "load_config_from_toml",
    "load_config_from_toml_optional",
    "mhc_compatible",
    "plot_gradient_flow",
    "plot_history_contribution",
    "plot_mixing_weights",
    "project_doubly_stochastic",
    "project_identity_preserving",
    "project_simplex",
    "project_sparse_simplex",
    "resolve_default",
    "set_default_config",
    "set_seed",
    "share_history",
]
