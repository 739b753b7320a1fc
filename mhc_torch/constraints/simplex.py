"""An import path of the `mhc` package; see `mhc_torch.projections`."""

from mhc_torch.projections import project_simplex, project_sparse_simplex

__all__ = ["project_simplex", "project_sparse_simplex"]
