"""An import path of the `mhc` package; see `mhc_torch.monitoring.logging`."""

from mhc_torch.monitoring.logging import get_logger

__all__ = ["get_logger"]
