"""An import path of the `mhc` package, whose documentation takes the buffer from here; see `mhc_torch.nn`."""

from mhc_torch.history.window import HistoryBuffer
from mhc_torch.nn.sequential import MHCSequential
from mhc_torch.nn.skip import MHCSkip

__all__ = ["HistoryBuffer", "MHCSequential", "MHCSkip"]
