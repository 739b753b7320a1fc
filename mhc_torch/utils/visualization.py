"""An import path of the `mhc` package; see `mhc_torch.monitoring.dashboard`."""

from mhc_torch.monitoring.dashboard import (
    create_training_dashboard,
    plot_gradient_flow,
    plot_history_contribution,
    plot_mixing_weights,
)

__all__ = ["create_training_dashboard", "plot_gradient_flow", "plot_history_contribution", "plot_mixing_weights"]
