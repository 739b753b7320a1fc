"""An import path of the `mhc` package; see `mhc_torch.injection`."""

from mhc_torch.injection import inject_mhc, inject_mhc_default

__all__ = ["inject_mhc", "inject_mhc_default"]
