"""Where arrays of a model live on a mesh: their axes have names, and one table says what splits an axis of a name.

XLA's partitioner takes the way of a state from what it meets, and where parameters are split, it may split the features
of a state and leave its batch whole: every device then computes for all rows. So a model says what it wants, where
there is a mesh with an Auto axis "data" around it (`jax.set_mesh`; `make_train_step` does so where it is given
shardings). What its mesh has not, or what does not divide an axis, splits nothing.
"""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

BATCH, SEQUENCE, TENSOR = "data", "sequence", "tensor"
"""The axes of a mesh: over rows, over the tokens of a row, and over heads, MLP features and vocabulary."""

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": (BATCH,),
    # Of states between branches. All that is done with them is local to tokens, so nothing is done or kept twice.
    "sequence": (SEQUENCE, TENSOR),
    # Inside a branch, where the features are split.
    "context": (SEQUENCE,),
    "heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
    # Of parameters that are fully sharded.
    "embed": (SEQUENCE, BATCH),
    # Of embeddings looked up in such ones: devices exchange rows first, and then tokens.
    "looked_up": (SEQUENCE,),
}
"""Which axes of the mesh split an axis of this name."""

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "embed_tokens/embedding": ("vocab", "embed"),
    "q_proj/kernel": ("embed", "heads"),
    "k_proj/kernel": ("embed", "heads"),
    "v_proj/kernel": ("embed", "heads"),
    "o_proj/kernel": ("heads", "embed"),
    "gate_proj/kernel": ("embed", "mlp"),
    "up_proj/kernel": ("embed", "mlp"),
    "down_proj/kernel": ("mlp", "embed"),
    "lm_head/kernel": ("embed", "vocab"),
}
"""The names of the last axes of a `Decoder`'s parameters, by the end of their paths. All others are small."""


def partition(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Any) -> PartitionSpec:
    """How `RULES` split an array of this shape over a mesh, whose first axes have these names; None splits nothing.

    Example:
        >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
        >>> partition((6, 5, 8), ("batch", "context", "heads"), mesh) == PartitionSpec("data", None, "tensor")
        True
    """
    entries: list[Any] = []
    for length, name in zip(shape, names, strict=False):
        over = () if name is None else tuple(axis for axis in RULES[name] if axis in mesh.shape)
        divides = length % prod(mesh.shape[axis] for axis in over) == 0
        entries.append((over if len(over) > 1 else over[0]) if over and divides else None)
    return PartitionSpec(*entries)


def mesh_here() -> AbstractMesh | None:
    """The mesh around, if it has an Auto axis "data", whose arrays are split as `RULES` say."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if BATCH in auto_axes(mesh) else None


def auto_axes(mesh: AbstractMesh) -> frozenset[str]:
    """The axes that are left to XLA's partitioner."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == AxisType.Auto)


def part_shape(shape: tuple[int, ...], *names: str | None) -> tuple[int, ...]:
    """What a device of the mesh around has of an array of this shape."""
    mesh = mesh_here()
    return shape if mesh is None else NamedSharding(mesh, partition(shape, names, mesh)).shard_shape(shape)


def split(x: Array, *names: str | None) -> Array:
    """x, split over the mesh around as `RULES` say of axes of these names, all else whole; as it is without a mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.training.sharding import data_mesh
        >>> with jax.set_mesh(data_mesh()):
        ...     x = jax.jit(lambda x: split(x, "batch"))(jnp.ones((2 * jax.device_count(), 3)))
        >>> x.addressable_shards[0].data.shape
        (2, 3)
    """
    mesh = mesh_here()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition(x.shape, names, mesh))


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
    return split(x)


def at_hand(parameter: Array, *names: str) -> Array:
    """A parameter of axes with these names, where it is used; its gradient is summed before it is split by "embed".

    Where both rows and tokens are split. Left to itself, XLA gathers the rows of all devices there, and each device
    computes its part of the gradient from them.
    """
    return _at_hand(parameter, tuple(None if name == "embed" else name for name in names))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _at_hand(parameter: Array, names: tuple[str | None, ...]) -> Array:
    return parameter


def _at_hand_fwd(parameter: Array, names: tuple[str | None, ...]) -> tuple[Array, None]:
    return parameter, None


def _at_hand_bwd(names: tuple[str | None, ...], _: None, gradient: Array) -> tuple[Array]:
    mesh = mesh_here()
    return (gradient if mesh is None or SEQUENCE not in mesh.shape else split(gradient, *names),)


_at_hand.defvjp(_at_hand_fwd, _at_hand_bwd)
