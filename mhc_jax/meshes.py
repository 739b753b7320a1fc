"""Operations that are local to tokens, where the devices of a mesh hold parts of the arrays.

What splits arrays decides who must know of it. On Auto axes it is XLA's partitioner, and nothing is to be done here but
for kernels, which it cannot split: they run on what `mhc_jax.placement` makes a device hold of states. On
Explicit axes (`jax.make_mesh`) the type of an array says how it is split: `on_parts` runs an operation in
`jax.shard_map`, each device on the tokens that it holds. There, and in a `jax.shard_map` of the caller's, a type says
over which axes of the mesh an array varies: `alike` makes arrays vary over the same ones before a function with
derivatives of its own sees them. So each cotangent has the type of its argument, and JAX sums up what belongs to an
argument that all devices share.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from mhc_jax.placement import auto_axes, mesh_here, partition

Axes = tuple[str, ...]


def varying(*trees: Any) -> Axes:
    """The manual axes of the mesh over which any of the arrays varies."""
    found = {axis for leaf in jax.tree.leaves(trees) for axis in jax.typeof(leaf).manual_axis_type.varying}
    return tuple(sorted(found))


def without(axes: Axes, others: Axes) -> Axes:
    return tuple(axis for axis in axes if axis not in others)


def vary(axes: Axes, tree: Any) -> Any:
    """The arrays, varying over `axes` besides what they vary over."""

    def cast(leaf: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in varying(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def alike(*trees: Any) -> Any:
    """The arrays, all varying over what any of them varies over."""
    return vary(varying(trees), trees)


def summed_like(x: Array, like: Array) -> Array:
    """x, summed over the axes of the mesh over which `like` does not vary."""
    return total(x, without(varying(x), varying(like)))


def same_type(tree: Any, like: Any) -> bool:
    """Whether arrays are split and vary as those of `like`, which are arrays or their types; True of other trees."""

    def places(tree: Any) -> list[Any]:
        leaves = jax.tree.leaves(tree)
        return [(jax.typeof(x).sharding if explicit_axes(x) else None, varying(x)) for x in leaves]

    form: Any = jax.tree.structure(tree)
    return form != jax.tree.structure(like) or places(tree) == places(like)


def placed_like(tree: Any, like: Any) -> Any:
    """The arrays, split and varying as those of `like`, which are arrays or their types."""

    def cast(leaf: Any, like: Any) -> Any:
        if explicit_axes(like):
            leaf = jax.sharding.reshard(leaf, jax.typeof(like).sharding)
        return vary(varying(like), leaf)

    return jax.tree.map(cast, tree, like)


def total(x: Any, over: Axes) -> Any:
    """Arrays summed over these axes of the mesh."""
    return lax.psum(x, over) if over else x


def whole_size(size: int, over: Axes) -> int:
    """The length of an axis that is split over these axes of the mesh, from that of a part."""
    return size * math.prod(lax.axis_size(axis) for axis in over)


def explicit_sharding(array: Any, *more: None) -> NamedSharding | None:
    """How an array is split on Explicit axes, or one with `more` axes behind its own; None where there are none."""
    sharding = jax.typeof(array).sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *more)) if explicit_axes(array) else None


def explicit_axes(array: Any) -> Axes:
    """The Explicit axes of the mesh that an array lies on."""
    mesh = jax.typeof(array).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def feature_axes(array: Any) -> Axes:
    """The Explicit axes that the last axis of an array is split over."""
    entry = jax.typeof(array).sharding.spec[-1] if explicit_axes(array) else None
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def on_parts(function: Callable[..., Any], layout: str, *arrays: Any, implementation: str | None = None) -> Any:
    """`function(*arrays, over=axes)`, on a mesh with Explicit axes each device on the tokens that it holds.

    Args:
        function: gives a tuple of arrays, or one array. `over` are the axes of the mesh that features are split over,
            over which it has to sum; on other meshes there are none.
        layout: the axes of arguments and results, as of an einsum: `"...nc nc,m -> ...m"`. The dots are the axes of
            tokens, split as those of the first argument that has them; `c` are features, split as its last axis is;
            what is split over no axis has any other letter. `nc,m` are n times c rows, a part of the features of each
            of n streams.
        arrays: arrays, or trees of arrays of one layout; None is passed on.
        implementation: that of the function; "pallas" is for parts on Auto axes, too.
    """
    given, made = (side.split() for side in layout.split("->"))
    first = next(i for i, names in enumerate(given) if names.startswith("..."))
    reference = jax.tree.leaves(arrays[first])[0]
    axes, sharding = explicit_axes(reference), jax.typeof(reference).sharding
    lead, auto = reference.ndim - len(given[first]) + 3, mesh_here()
    if axes:
        mesh, tokens = sharding.mesh, tuple(sharding.spec[:lead])
    elif implementation == "pallas" and auto is not None:
        mesh, axes = auto, tuple(auto_axes(auto))
        names = ("batch", "sequence", *[None] * lead)[:lead]
        tokens = tuple(partition(reference.shape, names, auto))
    else:
        return function(*arrays, over=())
    over = feature_axes(reference) if given[first].endswith("c") else ()

    def split(names: str) -> PartitionSpec:
        entries: list[Any] = []
        for name in names.replace("...", ".").replace(",", ""):
            entries += tokens if name == "." else [over or None] if name == "c" else [None]
        return PartitionSpec(*entries)

    def parted(names: str, array: Any) -> Any:
        if names != "nc,m" or array is None:
            return jax.tree.map(lambda leaf: _resharded(leaf, mesh, split(names)), array)
        whole = _resharded(array, mesh, PartitionSpec())
        n = reference.shape[-2]
        return _resharded(whole.reshape(n, -1, whole.shape[-1]), mesh, split(names))

    def local(*parts: Any) -> Any:
        joined = (
            part.reshape(-1, part.shape[-1]) if names == "nc,m" and part is not None else part
            for names, part in zip(given, parts, strict=True)
        )
        return function(*joined, over=over)

    results = tuple(map(split, made))
    # All axes go without saying, but for those that `jax.vmap` goes over: they are its own.
    some = set() if len(axes) == len(mesh.axis_names) else set(axes)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        axis_names=some,
        in_specs=tuple(map(split, given)),
        out_specs=results if len(results) > 1 else results[0],
    )
    return mapped(*map(parted, given, arrays))


def _resharded(array: Array, mesh: AbstractMesh, spec: PartitionSpec) -> Array:
    if AxisType.Explicit not in mesh.axis_types:
        return array  # `jax.shard_map` moves it
    return jax.sharding.reshard(array, jax.NamedSharding(mesh, spec))
