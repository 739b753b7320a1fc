"""Projections from free logits to the manifolds of mixing weights."""

from mhc_torch.constraints.matrix import project_doubly_stochastic
from mhc_torch.projections import project_identity_preserving, project_simplex, project_sparse_simplex

__all__ = [
    "project_doubly_stochastic",
    "project_identity_preserving",
    "project_simplex",
    "project_sparse_simplex",
]
