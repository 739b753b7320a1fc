"""An import path of the `mhc` package; see `mhc_torch.history.window`."""

from mhc_torch.history.window import HistoryBuffer

__all__ = ["HistoryBuffer"]
