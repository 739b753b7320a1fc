"""An import path of the `mhc` package; see `mhc_torch.training.seed`."""

from mhc_torch.training.seed import set_seed

__all__ = ["set_seed"]
