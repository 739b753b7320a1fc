"""How the leaves of one module type map to those of its partner: one declared rule, both directions derived from it.

A rule pairs a JAX module type with a PyTorch module type and names what differs. Leaves and submodules that a rule does
not mention are matched by equal names, so that `register(MyJaxBlock, MyTorchBlock)` is needed only where names or
layouts differ:

    register(nnx.Linear, torch.nn.Linear, Leaf("kernel", "weight", "in out -> out in"))
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flax import nnx
from torch import nn

SAME = "... -> ..."


@dataclass(frozen=True)
class Layout:
    """An invertible rearrangement, written `jax axes -> torch axes`.

    Names are axes, `...` any further axes, `(a b)` merges two axes into one and `~` reverses an axis:
    `"... in out -> in out ~..."` turns a kernel of shape (*spatial, in, out) into one of shape (in, out, *spatial),
    spatially mirrored.
    """

    pattern: str = SAME

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Array of the JAX layout -> a view (a copy where axes merge) of the torch layout."""
        order, groups, mirrored = _parse(self.pattern, array.ndim)
        moved = np.flip(array.transpose(order), mirrored) if mirrored else array.transpose(order)
        return moved.reshape(_merged(moved.shape, groups))

    def to_jax(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Array of the torch layout -> a view (or copy) of the JAX layout, of the given shape."""
        order, _, mirrored = _parse(self.pattern, len(shape))
        split = array.reshape([shape[axis] for axis in order])
        return (np.flip(split, mirrored) if mirrored else split).transpose(np.argsort(order))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on the torch side of an array that has `shape` on the JAX side."""
        order, groups, _ = _parse(self.pattern, len(shape))
        return _merged(tuple(shape[axis] for axis in order), groups)

    def fits(self, ndim: int) -> bool:
        """Whether an array with `ndim` axes can have this layout."""
        axes = self.pattern.split("->")[0].split()
        return ndim == len(axes) or ("..." in axes and ndim >= len(axes) - 1)


def _merged(shape: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, ...]:
    sizes = iter(shape)
    return tuple(int(np.prod([next(sizes) for _ in range(group)])) for group in groups)


@lru_cache
def _parse(pattern: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The jax axes in torch's order, how many of them each torch axis merges, and which of them are reversed."""
    left, right = (side.replace("(", " ( ").replace(")", " ) ").split() for side in pattern.split("->"))
    rest = [f"axis{i}" for i in range(ndim - len(left) + 1)]
    axes = [name for token in left for name in (rest if token == "..." else [token])]
    names: list[str] = []  # the axes in torch's order
    groups: list[int] = []
    mirrored: list[int] = []
    merging = False
    for token in right:
        if token in "()":
            merging = token == "("
            groups += [0] * merging
            continue
        for name in rest if token.lstrip("~") == "..." else [token.lstrip("~")]:
            mirrored += [len(names)] * token.startswith("~")
            names.append(name)
            if merging:
                groups[-1] += 1
            else:
                groups.append(1)
    if sorted(names) != sorted(axes) or len(axes) != ndim:
        raise ValueError(f"layout {pattern!r} must name the same axes on both sides, and {ndim} of them here")
    return tuple(map(axes.index, names)), tuple(groups), tuple(mirrored)


@dataclass(frozen=True)
class Leaf:
    """One array on each side: dotted names below the two modules, and the layout between them.

    Attributes:
        jax: name on the JAX side, such as "kernel" or "query.kernel".
        torch: name on the torch side; `*` in it stands for the list index that is the leading axis of the JAX array.
        layout: see `Layout`; without one the arrays are equal.
        part: (i, n) when the JAX array is the i-th of n equal blocks of rows of the torch array.

    Example:
        >>> Leaf("kernel", "weight", "in out -> out in").jax
        'kernel'
    """

    jax: str
    torch: str
    layout: str = SAME
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Child:
    """A submodule on each side under dotted names that differ; `*` in `torch` as in `Leaf`: JAX leaves are stacked.

    Example:
        >>> Child("layers", "wrapped_modules.*").torch
        'wrapped_modules.*'
    """

    jax: str
    torch: str


@dataclass(frozen=True)
class Zero:
    """A leaf of one side that has no counterpart, because the other module computes what it would with zeros.

    Conversion writes zeros there, and refuses to convert from other values.

    Attributes:
        why: what the error says.
        jax, torch: the name, on one of the sides; `*` as in `Leaf`.

    Example:
        >>> Zero("the other module has no bias", torch="bias").torch
        'bias'
    """

    why: str
    jax: str = ""
    torch: str = ""


@dataclass(frozen=True)
class Refused:
    """Says that two modules cannot be the same function, and why.

    Example:
        >>> Refused("the other one draws random numbers").why
        'the other one draws random numbers'
    """

    why: str
    jax: str = ""
    torch: str = ""


Entry = Leaf | Child | Zero | Refused
Terms = Callable[[Any, Sequence[np.ndarray], Sequence[np.ndarray]], float]


@dataclass(frozen=True)
class Setting:
    """A hyperparameter that both modules must agree on for the same weights to mean the same function.

    Attributes:
        name: how to call it in a message.
        jax: reads it from the JAX module.
        torch: reads it from the torch module, in the JAX module's convention.

    Example:
        >>> momentum = Setting("momentum", lambda m: m.momentum, lambda m: 1 - m.momentum)
        >>> momentum.torch(nn.BatchNorm1d(4))
        0.9
    """

    name: str
    jax: Callable[[Any], Any]
    torch: Callable[[Any], Any]


def equal(ours: str, theirs: str) -> Setting:
    """The setting that is the attribute `ours` of the JAX module and `theirs` of the torch module."""
    return Setting(ours, lambda module: getattr(module, ours), lambda module: getattr(module, theirs))


Names = tuple[str, ...] | Callable[[Any, Any], tuple[str, ...]]


@dataclass(frozen=True)
class Rule:
    """How a pair of module types maps. What it does not name is matched by equal names.

    Attributes:
        entries: leaves and children whose names or layouts differ, leaves that must be zero, or why the two cannot be
            the same; or a function of the two modules that gives them.
        settings: hyperparameters that must agree.
        jax_only, torch_only: leaves without a counterpart that carry no weight, such as a counter of batches; or a
            function of the two modules that gives them.
        cancellation, terms: where the module subtracts numbers that are nearly equal, or None; see `register`.
    """

    entries: tuple[Entry, ...] | Callable[[Any, Any], tuple[Entry, ...]] = ()
    settings: tuple[Setting, ...] = ()
    jax_only: Names = ()
    torch_only: Names = ()
    cancellation: Callable[[Any, Any], float] | None = None
    terms: Terms | None = None

    def of(self, what: str, jax_module: Any, torch_module: Any) -> tuple[Any, ...]:
        """The entries, or the names that are on one side only, for this very pair."""
        found = getattr(self, what)
        return found(jax_module, torch_module) if callable(found) else found


_rules: dict[tuple[type, type], Rule] = {}


def cancellation(module: nn.Module, args: tuple[Any, ...]) -> float:
    """How much less exact than its first argument the result of a torch module is, by the rules of its type."""
    rule = _that_tells(module, "cancellation")
    return max(1.0, rule.cancellation(module, args[0])) if rule and rule.cancellation and args else 1.0


def terms(module: nn.Module, inputs: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> float:
    """How large the terms are that nearly cancel in the gradients of a torch module's parameters; 0 by default."""
    rule = _that_tells(module, "terms")
    return rule.terms(module, inputs, cotangents) if rule and rule.terms else 0.0


def _that_tells(module: nn.Module, name: str) -> Rule | None:
    """The rule of the nearest of a torch module's types that has an attribute of this name."""
    told = {torch_type: rule for (_, torch_type), rule in _rules.items() if getattr(rule, name) is not None}
    return next((told[base] for base in type(module).__mro__ if base in told), None)


@contextmanager
def trial(proposed: Mapping[tuple[type, type], Rule]) -> Iterator[None]:
    """With these rules beside those declared, or instead of them."""
    kept = dict(_rules)
    _rules.update(proposed)
    try:
        yield
    finally:
        _rules.clear()
        _rules.update(kept)


def declare(jax_type: type, torch_type: type, rule: Rule) -> None:
    """As `register`, of a rule that stands."""
    _rules[jax_type, torch_type] = rule


def find(jax_type: type, torch_type: type) -> Rule | None:
    """The rule of the nearest pair of base classes; None if there is none.

    Raises:
        ValueError: of two rules one is nearer on the JAX side, the other on the torch side.
    """
    applying = [(j, t) for j in jax_type.__mro__ for t in torch_type.__mro__ if (j, t) in _rules]
    if not applying:
        return None
    first, order = applying[0], torch_type.__mro__
    for other in applying[1:]:
        if order.index(other[1]) < order.index(first[1]):
            pair, one, two = (f"({j.__name__}, {t.__name__})" for j, t in ((jax_type, torch_type), first, other))
            raise ValueError(
                f"the rules of {one} and {two} apply to {pair} with equal right: register a rule of {pair} itself"
            )
    return _rules[first]


def register(
    jax_type: type,
    torch_type: type,
    *entries: Entry,
    by: Callable[[Any, Any], tuple[Entry, ...]] | None = None,
    settings: tuple[Setting, ...] = (),
    jax_only: Names = (),
    torch_only: Names = (),
    cancellation: Callable[[Any, Any], float] | None = None,
    terms: Terms | None = None,
) -> None:
    """Declares how `jax_type` (an nnx.Module) and `torch_type` (a torch.nn.Module) map, replacing an earlier rule.

    Args:
        entries: the `Leaf`s and `Child`ren whose names or layouts differ, and the `Zero`s; the rest is matched by equal
            names.
        by: instead of `entries`, a function (jax_module, torch_module) -> entries, where they depend on the modules.
        settings: hyperparameters that must agree for the same weights to mean the same function.
        jax_only, torch_only: names of leaves that have no counterpart and carry no weight, or functions as `by`.
        cancellation: function (torch_module, its first argument) -> by which factor its result is less exact than that
            argument, where nearly equal numbers are subtracted. Flax takes variances as E[x²] - E[x]²: so a
            normalization over the last axis has `1 + max(mean² / (var + eps))`.
        terms: function (torch_module, its inputs, cotangents of its results, all in float64) -> how large the terms
            are of which the gradients of its parameters are differences, where they are nearly equal, so that what
            is left says nothing of the rounding.

    Raises:
        TypeError: a type is not a module type of its framework.
        ValueError: both `entries` and `by` are given. Where the rule is used: another one applies with equal right,
            since it is of a nearer base class on one side and of a further one on the other.

    Example:
        >>> class JaxScale(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.factors = nnx.Param(rngs.normal((3, 5)))
        >>> class TorchScale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(nn.Linear(3, 5).weight)
        >>> register(JaxScale, TorchScale, Leaf("factors", "weight", "in out -> out in"))
        >>> find(JaxScale, TorchScale).entries[0].torch
        'weight'
    """
    if not (isinstance(jax_type, type) and issubclass(jax_type, nnx.Module)):
        raise TypeError(f"jax_type must be a subclass of flax.nnx.Module, not {jax_type!r}")
    if not (isinstance(torch_type, type) and issubclass(torch_type, nn.Module)):
        raise TypeError(f"torch_type must be a subclass of torch.nn.Module, not {torch_type!r}")
    if entries and by is not None:
        raise ValueError("give either entries or by=, not both")
    rule = Rule(by or entries, settings, jax_only, torch_only, cancellation, terms)
    declare(jax_type, torch_type, rule)
