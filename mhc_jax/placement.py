"""Where states of a model live on a mesh: their batch is split, whatever parameters are.

XLA's partitioner takes the way of a state from what it meets, and where parameters are split, it may split the features
of a state and leave its batch whole: every device then computes for all rows. So a model says what it wants, where
there is a mesh around it (`jax.set_mesh`; `make_train_step` does so where it is given shardings).
"""

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

BATCH = "data"
"""The axis of the mesh that batches are split over."""


def gather(x: Array) -> Array:
    """A parameter, whole on every device of such a mesh: less is moved than of states that it is multiplied with.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.training.sharding import data_mesh
        >>> with jax.set_mesh(data_mesh()):
        ...     x = jax.jit(gather)(jnp.ones((4, 3)))
        >>> x.sharding.is_fully_replicated
        True
    """
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if _is_ours() else x


def splits_batch(x: Array) -> bool:
    """Whether the mesh around has an axis `BATCH`, left to XLA's partitioner, that divides the leading axis of x."""
    return _is_ours() and x.shape[0] % jax.sharding.get_abstract_mesh().shape[BATCH] == 0


def split_batch(x: Array) -> Array:
    """x, (B, ...), with its batch split over the mesh around and all else whole; as it is where there is no such mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.training.sharding import data_mesh
        >>> with jax.set_mesh(data_mesh()):
        ...     x = jax.jit(split_batch)(jnp.ones((2 * jax.device_count(), 3)))
        >>> x.addressable_shards[0].data.shape
        (2, 3)
    """
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH)) if splits_batch(x) else x


def _is_ours() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(BATCH) == AxisType.Auto
