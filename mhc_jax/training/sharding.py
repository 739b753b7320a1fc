"""Where arrays live on several devices or processes: placements of a training state.

    mesh = data_mesh()                                # every device of every process; data_mesh(tensor=4) splits heads
    shardings = fully_sharded(state, mesh)            # or replicated(state, mesh)
    state = jax.device_put(state, shardings)
    train_step = make_train_step(loss_fn, optimizer, shardings=shardings)
    state, metrics = train_step(state, shard_batch(batch, mesh))

On several processes call `jax.distributed.initialize()` first and give `shard_batch` what this process has loaded.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mhc_jax.placement import BATCH, PARAMETERS, RULES, SEQUENCE, TENSOR, partition


def data_mesh(tensor: int = 1, sequence: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, whose axis `"data"` splits batches and, if asked, parameters.

    Args:
        tensor: devices that share heads, MLP features and vocabulary, the axis `"tensor"`. It is there if above 1.
        sequence: devices that share the tokens of a row, the axis `"sequence"`. It is there if above 1.
        devices: all by default; they may be absent, as those of a topology.

    Raises:
        ValueError: tensor times sequence does not divide the devices, or a row would lie on several processes.

    Example:
        >>> dict(data_mesh().shape) == {"data": jax.device_count()}
        True
    """
    devices = jax.devices() if devices is None else devices
    shared = tensor * sequence
    if len(devices) % shared:
        raise ValueError(f"tensor={tensor} times sequence={sequence} must divide the {len(devices)} devices")
    sizes = {BATCH: len(devices) // shared, SEQUENCE: sequence, TENSOR: tensor}
    sizes = {axis: size for axis, size in sizes.items() if size > 1 or axis == BATCH}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
    for row in mesh.devices.reshape(sizes[BATCH], -1):
        if len({device.process_index for device in row}) > 1:
            raise ValueError(
                f"tensor={tensor} times sequence={sequence} devices of a row must lie in one process, "
                f"which has {len(mesh.local_devices)}"
            )
    return mesh


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Data-parallel placement: devices that differ in their rows hold the same of every array of `tree`.

    The parameters of a `Decoder` are split over `"tensor"` where the mesh has it (`mhc_jax.placement.PARAMETERS`).

    Returns:
        A `NamedSharding` for every leaf, in the structure of `tree`.
    """
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: NamedSharding(mesh, _named(keys, leaf, mesh)[0]), tree)


def fully_sharded(tree: Any, mesh: Mesh) -> Any:
    """FSDP-style placement: every array is split over all devices.

    An axis is split over `"tensor"` as by `replicated`; another over all else: that of the name `"embed"`, or the
    longest one that they divide. Arrays without such an axis (scalars, small biases) are replicated. The compiler
    gathers parameters where a layer uses them and scatters their gradients.

    Returns:
        A `NamedSharding` for every leaf, in the structure of `tree`.

    Example:
        >>> mesh = data_mesh()
        >>> kernel = jax.ShapeDtypeStruct((3, 4 * mesh.size), "float32")
        >>> fully_sharded({"kernel": kernel}, mesh)["kernel"].spec == PartitionSpec(None, "data")
        True
    """
    over = tuple(axis for axis in RULES["embed"] if axis in mesh.shape)
    size = prod(mesh.shape[axis] for axis in over)

    def place(keys: Any, leaf: Any) -> NamedSharding:
        spec, names = _named(keys, leaf, mesh)
        entries = [*spec, *[None] * (len(leaf.shape) - len(spec))]
        free = [i for i, length in enumerate(leaf.shape) if entries[i] is None and length and length % size == 0]
        if free:
            chosen = max(free, key=lambda i: (names[i] == "embed", leaf.shape[i]))
            entries[chosen] = over if len(over) > 1 else over[0]
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree_util.tree_map_with_path(place, tree)


def _named(keys: Any, leaf: Any, mesh: Mesh) -> tuple[PartitionSpec, tuple[str | None, ...]]:
    """How an array of a state is split but for "embed", and the names of its axes."""
    path = f"/{jax.tree_util.keystr(keys, simple=True, separator='/')}/"
    known = next((names for end, names in PARAMETERS.items() if f"/{end}/" in path), ())
    known = known if len(known) <= len(leaf.shape) else ()  # optimizers keep other things under the same paths
    names = (*[None] * (len(leaf.shape) - len(known)), *known)
    return partition(leaf.shape, tuple(None if name == "embed" else name for name in names), mesh), names


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits the leading axis of every array of `batch` over the axis `"data"` of `mesh`.

    Args:
        batch: a pytree of host arrays. On several processes, each gives the part it has loaded; the parts follow one
            another in the order of the processes.

    Raises:
        ValueError: the number of rows is not a multiple of the parts that this process has.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))

    def place(keys: Any, leaf: Any) -> jax.Array:
        local = len(mesh.local_devices) * mesh.shape[BATCH] // mesh.size
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] % local:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ValueError(f"batch: {name!r} of shape {np.shape(leaf)} must have a multiple of {local} rows")
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree_util.tree_map_with_path(place, batch)
