"""An import path of the `mhc` package; see `mhc_torch.nn.sequential`."""

from mhc_torch.nn.sequential import MHCSequential

__all__ = ["MHCSequential"]
