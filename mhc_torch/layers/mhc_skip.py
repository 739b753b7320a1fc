"""An import path of the `mhc` package; see `mhc_torch.nn.skip`."""

from mhc_torch.nn.skip import MHCSkip

__all__ = ["MHCSkip"]
