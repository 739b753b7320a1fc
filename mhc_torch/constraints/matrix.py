"""An import path of the `mhc` package; see `mhc_torch.projections`."""

from mhc_torch.projections import project_doubly_stochastic

__all__ = ["project_doubly_stochastic"]
