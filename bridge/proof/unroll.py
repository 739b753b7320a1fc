"""The layers of a stack one by one, so that each of them can be watched and run alone."""

from typing import Any

import jax
from flax import nnx

from bridge.weights.leaves import jax_leaves, submodule, value
from bridge.weights.match import ModulePair


def unrolled(model: nnx.Module) -> nnx.Module:
    """A copy of `model` in which what has a method `unrolled()`, a scanned stack, stands as what that gives."""
    return _unroll(nnx.clone(model))


def _unroll(node: Any) -> Any:
    if hasattr(node, "unrolled"):
        node = node.unrolled()
    if isinstance(node, nnx.List):
        for i, child in enumerate(node):
            node[i] = _unroll(child)
    elif isinstance(node, nnx.Module):
        for name, child in vars(node).items():
            if isinstance(child, nnx.Module):
                setattr(node, name, _unroll(child))
    return node


def taken(model: nnx.Module, pair: ModulePair) -> nnx.Module:
    """The JAX module of a pair; of a stack, whatever class scans or maps it, a copy of the one layer that is meant."""
    module = submodule(model, pair.jax)
    if not pair.index:
        return module
    sizes = {tuple(value(leaf).shape[: len(pair.index)]) for leaf in jax_leaves(module).values()}
    if len(sizes) > 1:
        raise ValueError(f"its arrays are stacked to different lengths: {sorted(sizes)}")
    length = next(iter(sizes), ())
    graph, state = nnx.split(module)

    def layer(array: Any) -> Any:  # of a random stream there may be one for all
        return array[pair.index] if tuple(array.shape[: len(pair.index)]) == length else array

    return nnx.merge(graph, jax.tree.map(layer, state), copy=True)
