"""An import path of the `mhc` package; see `mhc_torch.history.lists`."""

from mhc_torch.history.lists import ensure_list, get_last_k

__all__ = ["ensure_list", "get_last_k"]
