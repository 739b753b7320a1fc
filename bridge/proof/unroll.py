"""A scanned stack as the chain of its layers, so that each of them can be watched and run alone."""

from typing import Any

from flax import nnx


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
