"""An import path of the `mhc` package; see `mhc_torch.monitoring.profiling`."""

from mhc_torch.monitoring.profiling import ForwardProfiler

__all__ = ["ForwardProfiler"]
