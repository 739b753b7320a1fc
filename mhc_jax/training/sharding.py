"""Where arrays live on several devices or processes: data-parallel and fully sharded placement of a training state.

    mesh = data_mesh()                                # every device of every process
    shardings = fully_sharded(state, mesh)            # or replicated(state, mesh)
    state = jax.device_put(state, shardings)
    train_step = make_train_step(loss_fn, optimizer, shardings=shardings)
    state, metrics = train_step(state, shard_batch(batch, mesh))

On several processes call `jax.distributed.initialize()` first and give `shard_batch` what this process has loaded.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mhc_jax.placement import BATCH


def data_mesh() -> Mesh:
    """A one-dimensional mesh of all devices, whose axis `"data"` splits batches and, if asked, parameters.

    Example:
        >>> dict(data_mesh().shape) == {"data": jax.device_count()}
        True
    """
    return jax.make_mesh((jax.device_count(),), (BATCH,), axis_types=(AxisType.Auto,))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Data-parallel placement: every device holds all of every array of `tree`.

    Returns:
        A `NamedSharding` for every leaf, in the structure of `tree`.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), tree)


def fully_sharded(tree: Any, mesh: Mesh) -> Any:
    """FSDP-style placement: every array is split along its longest axis that the mesh size divides.

    Arrays without such an axis (scalars, small biases) are replicated. The compiler gathers parameters where a layer
    uses them and scatters their gradients.

    Returns:
        A `NamedSharding` for every leaf, in the structure of `tree`.

    Example:
        >>> mesh = data_mesh()
        >>> kernel = jax.ShapeDtypeStruct((3, 4 * mesh.size), "float32")
        >>> fully_sharded({"kernel": kernel}, mesh)["kernel"].spec == PartitionSpec(None, "data")
        True
    """

    def place(leaf: Any) -> NamedSharding:
        lengths = [length if length % mesh.size == 0 else 0 for length in leaf.shape]
        if not any(lengths):
            return NamedSharding(mesh, PartitionSpec())
        longest = int(np.argmax(lengths))
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, BATCH))

    return jax.tree.map(place, tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits the leading axis of every array of `batch` over the devices of `mesh`.

    Args:
        batch: a pytree of host arrays. On several processes, each gives the part it has loaded; the parts follow one
            another in the order of the processes.

    Raises:
        ValueError: the number of rows is not a multiple of the devices of this process.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))

    def place(keys: Any, leaf: Any) -> jax.Array:
        local = len(mesh.local_devices)
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] % local:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ValueError(f"batch: {name!r} of shape {np.shape(leaf)} must have a multiple of {local} rows")
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree_util.tree_map_with_path(place, batch)
