"""Copies the weights of a JAX model into a PyTorch model, or back, bit for bit."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flax import nnx

from bridge.weights.arrays import assign, copy_into, to_jax, to_numpy
from bridge.weights.leaves import put, value
from bridge.weights.match import Dtypes, Link, Match, match

Model = TypeVar("Model", bound=nnx.Module | torch.nn.Module)


def convert(
    source: nnx.Module | torch.nn.Module, target: Model, *, dtype: Dtypes = "equal", untie: bool = False
) -> Model:
    """Copies every weight and every running statistic of `source` into `target`, in place.

    Nothing is written unless every leaf of both models is accounted for (see `bridge.match`).

    Args:
        source: an nnx.Module or a torch.nn.Module.
        target: a model of the other framework with the same structure, shapes and dtypes, on any device or sharding.
        dtype: "equal", or "cast" to round floating-point values to the dtypes of `target` where it has others.
        untie: leaves that are tied in `source` may be several in `target`.

    Returns:
        `target`.

    Raises:
        TypeError: the two are not one model of each framework, or `untie` is no bool.
        ValueError: the models do not correspond; the message lists all that is missing, left over or different. Or a
            leaf of `source` must be zero for the two to compute the same, and is not (see `bridge.fold_biases`).

    Warns:
        UserWarning: a hyperparameter differs (an epsilon, a stride), so that equal weights do not mean equal functions.

    Example:
        >>> import torch
        >>> from flax import nnx
        >>> source = torch.nn.Linear(4, 2)
        >>> target = convert(source, nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        >>> bool((target.kernel[...] == source.weight.detach().numpy().T).all())
        True
    """
    if not isinstance(untie, bool):
        raise TypeError(f"untie must be of type bool, got {untie!r}")
    if isinstance(source, nnx.Module) and isinstance(target, torch.nn.Module):
        found = match(source, target, dtype=dtype, untie="jax" if untie else None)
        warn(found)
        _into_torch(found)
    elif isinstance(source, torch.nn.Module) and isinstance(target, nnx.Module):
        found = match(target, source, dtype=dtype, untie="torch" if untie else None)
        warn(found)
        _into_jax(found, target)
    else:
        kinds = f"{type(source).__name__} and {type(target).__name__}"
        raise TypeError(f"source and target must be an nnx.Module and a torch.nn.Module, in either order; got {kinds}")
    return target


def warn(found: Match) -> None:
    """Tells whoever called the caller which settings differ."""
    if found.settings:
        lines = "\n".join(f"  {line}" for line in found.settings)
        warnings.warn(f"the weights are converted, but these settings differ:\n{lines}", UserWarning, stacklevel=3)


def _into_torch(found: Match) -> None:
    def read(path: str) -> np.ndarray:
        return to_numpy(value(found.jax[path]))

    found.check_zeros("jax", read)
    with torch.no_grad():
        for link, values in torch_values(found.links, read):
            copy_into(link.torch.of(found.torch[link.torch.path]), values)
        for side, path in found.zeros:
            if side == "torch":
                found.torch[path].zero_()


def _into_jax(found: Match, model: nnx.Module) -> None:
    def read(path: str) -> np.ndarray:
        return to_numpy(found.torch[path])

    found.check_zeros("torch", read)
    likes = {path: value(leaf) for path, leaf in found.jax.items()}
    for path, values in jax_values(found.links, read, likes):
        put(model, found.jax, path, to_jax(values, getattr(likes[path], "sharding", None)))
    for side, path in found.zeros:
        if side == "jax":
            zeros = np.zeros(likes[path].shape, likes[path].dtype)
            put(model, found.jax, path, to_jax(zeros, getattr(likes[path], "sharding", None)))


def torch_values(links: Iterable[Link], read: Callable[[str], np.ndarray]) -> Iterator[tuple[Link, np.ndarray]]:
    """The values for each slot of the torch side, from `read`, which gives the JAX array of a path."""
    for link in links:
        yield link, link.to_torch(read(link.jax.path))


def jax_values(
    links: Iterable[Link], read: Callable[[str], np.ndarray], likes: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The values for each path of the JAX side, from `read`, which gives the torch array of a path.

    A leaf is gathered from all its links (one per layer of a stack) into a new array of the shape and dtype of its
    like: arrays of jax cannot be written to.
    """
    by_leaf: dict[str, list[Link]] = {}
    for link in links:
        by_leaf.setdefault(link.jax.path, []).append(link)
    for path, parts in by_leaf.items():
        values = np.empty(likes[path].shape, likes[path].dtype)
        for link in parts:
            assign(link.jax.of(values), link.to_jax(read(link.torch.path), values.shape))
        yield path, values
