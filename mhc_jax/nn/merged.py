"""One layer of a stack as a value, and the variables of a stack that its calls change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.nn.parameters import Place
from mhc_jax.streams import Connected

# All that a layer reads only.
GIVEN = nnx.Any(nnx.Param, Place)
# All that a layer writes while it runs: statistics, caches, what it sows.
CARRIED = nnx.Not(nnx.Any(GIVEN, nnx.RngState))


class Carries(Exception):
    """A layer has written variables, and was called as if it could not."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """The module that `graphdef` describes, and the further arguments of its call.

    Equal to another of the same graph and arguments, but for the arrays among them.
    """

    graphdef: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def _key(self) -> Any:
        leaves, structure = jax.tree.flatten((self.args, self.kwargs))
        static = tuple(None if isinstance(leaf, jax.Array) else (type(leaf), _hashable(leaf)) for leaf in leaves)
        return type(self), self.graphdef, structure, static

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Layer) and self._key() == other._key()


@dataclass(frozen=True, eq=False)
class Merged(_Layer):
    """`layer(variables, x, *more)`, with the further arguments of the call.

    Args:
        carries: whether the result is (output, the variables after the call that are no parameters).

    Raises:
        Carries: there are such variables, and `carries` is not set.
        TypeError: the layer writes a parameter, or makes one.
    """

    carries: bool = False

    def _key(self) -> Any:
        return *super()._key(), self.carries

    def __call__(self, variables: nnx.State, x: Any, *more: nnx.State) -> Any:
        layer = nnx.merge(self.graphdef, variables, *more)
        before = _parameters(layer)
        y = layer(x, *self.args, **self.kwargs)
        carried = _written(layer, before)
        if self.carries:
            return y, carried
        if jax.tree.leaves(carried):
            raise Carries
        return y


class MergedBranches(_Layer):
    """The branches of a layer that is a chain of them, for `streams.apply_branches`; errors as of `Merged`."""

    def __call__(self, variables: nnx.State) -> Iterator[Connected]:
        layer = nnx.merge(self.graphdef, variables)
        before = _parameters(layer)
        yield from layer.connected(*self.args, **self.kwargs)
        # Whoever asks for one more branch has run the last one.
        if jax.tree.leaves(_written(layer, before)):
            raise Carries


def _parameters(layer: Any) -> list[Any]:
    return jax.tree.leaves(nnx.state(layer, nnx.Param))


def _written(layer: Any, before: list[Any]) -> nnx.State:
    """What `layer` holds beside its parameters, now that it has run; `before` are these as they were."""
    after = _parameters(layer)
    if len(before) != len(after) or any(one is not other for one, other in zip(before, after, strict=True)):
        raise TypeError(f"{type(layer).__name__} writes its parameters while it runs, which a stack cannot keep")
    return nnx.state(layer, CARRIED)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def stacked(make_layer: Callable[..., nnx.Module], depth: int, *args: Any) -> Any:
    """`depth` layers as one module, whose variables have a leading axis of depth, in their partition metadata too."""
    return nnx.vmap(make_layer, axis_size=depth, transform_metadata={nnx.PARTITION_NAME: None})(*args)


def drawn_streams(layers: nnx.Module, deterministic: bool) -> nnx.State:
    """The `nnx.State` of the layers' random streams, each at a place where no other call has drawn or will."""
    drawn = nnx.merge(*nnx.split(layers), copy=True)
    for mine, theirs in zip(_streams(layers), _streams(drawn), strict=True):
        theirs.key[...] = jax.vmap(jax.random.fold_in)(mine.key[...], mine.count[...])
        theirs.count[...] = jnp.zeros_like(mine.count[...])
        if not deterministic:
            mine.count[...] += 1
    return nnx.state(drawn, nnx.RngState)


def _streams(module: nnx.Module) -> list[nnx.RngStream]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]


def keep(layers: Any, carried: nnx.State) -> None:
    """Writes the variables that came out of a scan over `layers`, with a leading axis of depth, back into them."""
    for path, variable in nnx.to_flat_state(carried):
        node = layers
        for name in path[:-1]:
            node = _child(node, name)
        held = _child(node, path[-1])
        if isinstance(held, nnx.Variable):
            held.set_value(variable.get_value())
        else:  # the first call of the layer made it
            made = type(variable)(variable.get_value())
            if isinstance(node, dict):
                node[path[-1]] = made
            else:
                setattr(node, str(path[-1]), made)


def _child(node: Any, name: Any) -> Any:
    if isinstance(node, dict):  # as linen's variables are kept
        return node.get(name)
    return node[name] if isinstance(name, int) else getattr(node, name, None)
