"""Tools around the layers: injection, the compatibility mark, diagnostics, reproducibility."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhc_torch.history.lists import ensure_list, get_last_k
from mhc_torch.injection import inject_mhc, inject_mhc_default
from mhc_torch.monitoring.diagnostics import extract_mixing_weights
from mhc_torch.monitoring.logging import get_logger
from mhc_torch.monitoring.profiling import ForwardProfiler
from mhc_torch.monitoring.stability import StabilityReport, check_model_stability
from mhc_torch.training.compile import autocast_context, compile_model
from mhc_torch.training.seed import set_seed
from mhc_torch.utils.decorators import is_mhc_compatible, mhc_compatible

if TYPE_CHECKING:
    from mhc_torch.lightning.dashboard import MHCLightningCallback
    from mhc_torch.monitoring.dashboard import (
        create_training_dashboard,
        plot_gradient_flow,
        plot_history_contribution,
        plot_mixing_weights,
    )

# These need Lightning or matplotlib, which may not be installed: imported when first asked for.
OPTIONAL = {
    "MHCLightningCallback": "lightning_callback",
    "create_training_dashboard": "visualization",
    "plot_gradient_flow": "visualization",
    "plot_history_contribution": "visualization",
    "plot_mixing_weights": "visualization",
}


def __getattr__(name: str) -> Any:
    if name in OPTIONAL:
        return getattr(import_module(f"mhc_torch.utils.{OPTIONAL[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ForwardProfiler",
    "MHCLightningCallback",
    "StabilityReport",
    "autocast_context",
    "check_model_stability",
    "compile_model",
    "create_training_dashboard",
    "ensure_list",
    "extract_mixing_weights",
    "get_last_k",
    "get_logger",
    "inject_mhc",
    "inject_mhc_default",
    "is_mhc_compatible",
    "mhc_compatible",
    "plot_gradient_flow",
    "plot_history_contribution",
    "plot_mixing_weights",
    "set_seed",
]
