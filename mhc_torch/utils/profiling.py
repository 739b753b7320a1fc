"""An import path of the `mhc` package; see `mhc_torch.monitoring.profiling`."""

from typing import Any

from mhc_torch.absent import refuse
from mhc_torch.monitoring.profiling import ForwardProfiler


def __getattr__(name: str) -> Any:
    refuse(__name__, name)


__all__ = ["ForwardProfiler"]
