"""An import path of the `mhc` package; see `mhc_torch.projections`."""

from mhc_torch.projections import project_identity_preserving

__all__ = ["project_identity_preserving"]
