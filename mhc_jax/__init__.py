"""Manifold-constrained hyper-connections in JAX: pure functions first, Flax NNX modules as a thin skin on them."""

from mhc_jax.history import History, apply_layers, apply_layers_carrying, apply_layers_reference, mix, mixing_weights
from mhc_jax.history.config import MatrixConfig, MHCConfig
from mhc_jax.projections import (
    project_doubly_stochastic,
    project_identity_preserving,
    project_simplex,
    project_sparse_simplex,
)

__all__ = [
    "History",
    "MHCConfig",
    "MatrixConfig",
    "apply_layers",
    "apply_layers_carrying",
    "apply_layers_reference",
    "mix",
    "mixing_weights",
    "project_doubly_stochastic",
    "project_identity_preserving",
    "project_simplex",
    "project_sparse_simplex",
]
