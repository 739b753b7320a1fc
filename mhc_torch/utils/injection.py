"""An import path of the `mhc` package; see `mhc_torch.injection`."""

from typing import Any

from mhc_torch.absent import refuse
from mhc_torch.injection import inject_mhc, inject_mhc_default


def __getattr__(name: str) -> Any:
    refuse(__name__, name)


__all__ = ["inject_mhc", "inject_mhc_default"]
