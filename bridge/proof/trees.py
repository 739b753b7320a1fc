"""Arguments and results as models take and give them: arrays inside tuples, dicts, dataclasses, in any nesting."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

_ARRAYS = (jax.Array, np.ndarray, torch.Tensor)


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, _ARRAYS)


def is_float(array: Any) -> bool:
    return array.is_floating_point() if isinstance(array, torch.Tensor) else jnp.issubdtype(array.dtype, jnp.floating)


def double(array: np.ndarray) -> np.ndarray:
    """The array in float64 if it is floating-point."""
    return array.astype(np.float64) if is_float(array) else array


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """What hangs below a node, with names; None if the node is no container that we know."""
    if isinstance(node, Mapping):  # first: a ModelOutput is a dataclass too, and leaves out what is None
        return [(str(name), child) for name, child in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (list, tuple)):
        return [(str(i), child) for i, child in enumerate(node)]
    if is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in fields(node) if f.init]
    return None


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree with their dotted names, in order."""
    if isinstance(tree, _ARRAYS):
        yield name, tree
        return
    below = _children(tree)
    if below is None:  # what JAX or nobody knows
        below = [(str(i), leaf) for i, leaf in enumerate(jax.tree.leaves(tree))]
        if len(below) == 1 and below[0][1] is tree:
            yield name, tree
            return
    for key, child in below:
        path = f"{name}.{key}" if name else key
        if isinstance(child, _ARRAYS):  # as most are
            yield path, child
        else:
            yield from leaves(child, path)


def transform(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with `function(leaf)` in place of every leaf, in the order of `leaves`."""
    below = None if is_array(tree) else _children(tree)
    if below is None:
        return function(tree) if is_array(tree) else jax.tree.map(function, tree)
    new = [transform(function, child) for _, child in below]
    if isinstance(tree, Mapping):
        content = dict(zip(tree, new, strict=True))
        kind: Callable[..., Any] = type(tree)
        return kind(**content) if is_dataclass(tree) else kind(content)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*new)
    if isinstance(tree, (list, tuple)):
        return type(tree)(new)
    return type(tree)(**dict(zip([name for name, _ in below], new, strict=True)))


def arrays(tree: Any) -> list[Any]:
    """The distinct arrays in a tree of arguments or results, in order; one that is passed three times counts once."""
    return list({id(leaf): leaf for _, leaf in leaves(tree) if isinstance(leaf, _ARRAYS)}.values())


def floats(tree: Any) -> list[Any]:
    """The distinct floating-point arrays in a tree."""
    return [leaf for leaf in arrays(tree) if is_float(leaf)]


def named_floats(tree: Any) -> dict[str, Any]:
    """The distinct floating-point arrays in a tree by their first name: "logits", "hidden.0"; "" for a bare array."""
    found: dict[int, tuple[str, Any]] = {}
    for name, leaf in leaves(tree):
        if isinstance(leaf, _ARRAYS) and is_float(leaf):
            found.setdefault(id(leaf), (name, leaf))
    return dict(found.values())
