"""The arrays of a model by path: what conversion has to account for, and what files hold."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from torch import Tensor, nn

_JAX_LEAVES = (nnx.Variable, jax.Array, jax.ShapeDtypeStruct, np.ndarray)
# What a model makes anew by itself: streams of random numbers, caches and records of one call.
_TRANSIENT = (nnx.RngState, nnx.Intermediate, nnx.Cache, nnx.Perturbation)


def jax_leaves(model: nnx.Module) -> dict[str, Any]:
    """Every leaf below an nnx module: path -> nnx.Variable (or bare array). Tied leaves appear under each path."""
    return {path: leaf for path, leaf in _walk(model) if not isinstance(leaf, _TRANSIENT)}


def jax_transients(model: nnx.Module) -> set[str]:
    """The paths of what a model makes anew by itself: random streams, caches and records of one call."""
    return {path for path, leaf in _walk(model) if isinstance(leaf, _TRANSIENT)}


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, _JAX_LEAVES):
        if value(node) is not None:
            yield path, node
    else:
        for name, child in jax_items(node):
            yield from _walk(child, join(path, name))


def torch_leaves(model: nn.Module) -> dict[str, Tensor]:
    """The entries of `model.state_dict()`, as the parameters and buffers themselves."""
    return model.state_dict(keep_vars=True)


def value(leaf: Any) -> Any:
    """The array of a leaf of `jax_leaves` (of an abstract model: its ShapeDtypeStruct)."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def aliases(leaves: Mapping[str, Any]) -> dict[str, list[str]]:
    """name -> all names of the same leaf."""
    groups: dict[int, list[str]] = {}
    for name, leaf in leaves.items():
        groups.setdefault(id(leaf), []).append(name)
    return {name: groups[id(leaf)] for name, leaf in leaves.items()}


def jax_items(node: Any) -> list[tuple[str, Any]]:
    """What hangs below a node of an nnx module, in the order of assignment."""
    if isinstance(node, nnx.Module):
        return list(vars(node).items())
    if isinstance(node, Mapping):
        return [(str(k), v) for k, v in node.items()]
    if isinstance(node, (list, tuple)):
        return [(str(i), v) for i, v in enumerate(node)]
    return []


def join(path: str, name: str) -> str:
    """The dotted path of what is called `name` below `path`."""
    return f"{path}.{name}" if path else name


def submodule(model: Any, path: str) -> Any:
    """The node of an nnx module at a dotted path."""
    for name in path.split(".") if path else ():
        if isinstance(model, Mapping) and not isinstance(model, nnx.Module):
            model = dict(jax_items(model))[name]
        else:
            model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def put(model: nnx.Module, leaves: Mapping[str, Any], path: str, array: jax.Array) -> None:
    """Gives a leaf of a model, one of its `jax_leaves`, another value. A bare array is replaced wherever it hangs."""
    leaf = leaves[path]
    if isinstance(leaf, nnx.Variable):
        leaf.set_value(array)
        return
    for name in aliases(leaves)[path]:
        above, _, last = name.rpartition(".")
        holder = submodule(model, above)
        if isinstance(holder, Mapping):
            key = next(key for key in holder if str(key) == last)
            cast(MutableMapping[Any, Any], holder)[key] = array
        elif isinstance(holder, nnx.Module) and not last.isdigit():
            setattr(holder, last, array)
        else:
            holder[int(last)] = array
