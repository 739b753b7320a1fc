"""An import path of the `mhc` package; see `mhc_torch.nn.compatible`."""

from mhc_torch.nn.compatible import is_mhc_compatible, mhc_compatible

__all__ = ["is_mhc_compatible", "mhc_compatible"]
