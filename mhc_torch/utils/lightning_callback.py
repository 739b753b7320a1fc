"""An import path of the `mhc` package; see `mhc_torch.lightning.dashboard`."""

from mhc_torch.lightning.dashboard import MHCLightningCallback

__all__ = ["MHCLightningCallback"]
