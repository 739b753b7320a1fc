"""Pairs the leaves of a JAX model with those of a PyTorch model, and accounts for every one of them."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from flax import nnx
from torch import Tensor, nn

from bridge.weights import rules, table  # noqa: F401 - declares the rules
from bridge.weights.arrays import dtype_name, is_floating
from bridge.weights.leaves import jax_items, jax_leaves, join, submodule, torch_leaves, value


@dataclass(frozen=True)
class Slot:
    """A leaf, or a block of its leading axes: `leaf[index]`, and of that the rows `start:stop`."""

    path: str
    index: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None

    def of(self, array: Any) -> Any:
        """The view of `array` (numpy, jax or torch) that this slot is."""
        view = array[(*self.index, ...)]  # with the ellipsis an element is a view of shape (), not a number
        return view[self.rows[0] : self.rows[1]] if self.rows else view

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the slot in a leaf of the given shape."""
        shape = tuple(shape)[len(self.index) :]
        return (self.rows[1] - self.rows[0], *shape[1:]) if self.rows else shape

    def start(self, shape: tuple[int, ...]) -> int:
        """Where the slot begins among the elements of a leaf of the given shape, in C order."""
        index = (*self.index, self.rows[0]) if self.rows else self.index
        return sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(index))

    def __str__(self) -> str:
        index = "".join(f"[{i}]" for i in self.index)
        return f"{self.path}{index}" + (f"[{self.rows[0]}:{self.rows[1]}]" if self.rows else "")


@dataclass(frozen=True)
class Link:
    """A slot on each side that hold the same values, and the layout between them."""

    jax: Slot
    torch: Slot
    layout: rules.Layout

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Whole leaf of the JAX side -> the values of the torch slot."""
        return self.layout.to_torch(self.jax.of(array))

    def to_jax(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Whole leaf of the torch side -> the values of the JAX slot, in a leaf of the given shape."""
        return self.layout.to_jax(self.torch.of(array), self.jax.shape(shape))


@dataclass(frozen=True)
class ModulePair:
    """Two modules that match; `index` is the position on the leading axis of a stacked JAX module."""

    jax: str
    torch: str
    index: tuple[int, ...]


@dataclass
class Match:
    """How two models correspond.

    Attributes:
        links: every pair of slots; between them they cover every leaf of both models.
        modules: the pairs of modules, parents first.
        jax, torch: the leaves of each side by path.
        settings: one line per hyperparameter that differs, so that equal weights will not mean equal functions.
        own: arrays that only one side has, and that are no weights: "jax mask", "torch steps".
        zeros: (side, path) of a leaf that must be zero, since its counterpart does not exist -> why.
    """

    links: list[Link] = field(default_factory=list)
    modules: list[ModulePair] = field(default_factory=list)
    jax: dict[str, Any] = field(default_factory=dict)
    torch: dict[str, Tensor] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    zeros: dict[tuple[str, str], str] = field(default_factory=dict)

    def check_zeros(self, side: str, read: Callable[[str], np.ndarray]) -> None:
        """ValueError if a leaf of this side that must be zero is not, by `read`, which gives the array of a path."""
        wrong = {path: why for (of, path), why in self.zeros.items() if of == side and np.any(read(path))}
        if wrong:
            lines = "\n".join(f"  {side} {path} must be zero: {why}" for path, why in wrong.items())
            raise ValueError(f"the models cannot compute the same:\n{lines}")


Dtypes = Literal["equal", "cast"]


def match(
    jax_model: nnx.Module,
    torch_model: nn.Module,
    *,
    dtype: Dtypes = "equal",
    untie: Literal["jax", "torch"] | None = None,
    own: bool = False,
) -> Match:
    """Pairs every leaf of the two models.

    Submodules pair by attribute name, lists (nnx.List, nnx.Sequential; ModuleList, Sequential) by order, passing over
    entries without parameters; the leaves of a pair of modules follow its rule (see `bridge.register`).

    Args:
        jax_model, torch_model: the two; they may be abstract (`nnx.eval_shape`, `torch.device("meta")`).
        dtype: "equal", or "cast" if floating-point leaves may have other dtypes on the two sides.
        untie: the side on which leaves may be tied, though those that they go to on the other side are not.
        own: whether each side may have arrays of its own that are no weights (bare arrays in JAX, buffers in torch).

    Raises:
        ValueError: leaves without a counterpart, of another shape or dtype, or tied on one side only; all are listed.
            `dtype` or `untie` is something else.

    Example:
        >>> import torch
        >>> found = match(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(4, 2))
        >>> [f"{link.jax} is {link.torch}" for link in found.links]
        ['kernel is weight', 'bias is bias']
    """
    check_dtypes(dtype)
    if untie not in ("jax", "torch", None):
        raise ValueError(f"untie must be 'jax', 'torch' or None, got {untie!r}")
    matcher = _Matcher(jax_leaves(jax_model), torch_leaves(torch_model), dtype, own)
    matcher.modules("", jax_model, "", torch_model, ())
    problems = [*matcher.problems, *matcher.untied(untie), *matcher.uncovered()]
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        lines = [f"the models do not correspond, {count}:", *matcher.hints, *problems]
        if any("has no counterpart" in problem for problem in problems):
            lines.append(
                "bridge.suggest(jax_model, torch_model) prints the rules that would pair what belongs together"
            )
        raise ValueError("\n  ".join(lines))
    return matcher.match


def check_dtypes(dtype: Dtypes) -> None:
    """ValueError if it is none of `Dtypes`."""
    if dtype not in ("equal", "cast"):
        raise ValueError(f"dtype must be 'equal' or 'cast', got {dtype!r}")


def fits(one: str, other: str, dtype: Dtypes) -> bool:
    """Whether values of the dtype `one` may go where there are those of `other`."""
    return one == other or (dtype == "cast" and is_floating(one) and is_floating(other))


_EQUAL = rules.Leaf("", "")
JAX_LISTS = (nnx.List, nnx.Sequential, list, tuple)
TORCH_LISTS = (nn.ModuleList, nn.Sequential, nn.ParameterList)


class _Matcher:
    def __init__(self, jax: dict[str, Any], torch: dict[str, Tensor], dtype: Dtypes, own: bool) -> None:
        self.match = Match(jax=jax, torch=torch)
        self.dtype, self.own = dtype, own
        self.arrays: dict[str, Mapping[str, Any]] = {"jax": {p: value(leaf) for p, leaf in jax.items()}, "torch": torch}
        self.problems: list[str] = []
        self.hints: list[str] = []
        self.expected: dict[str, str] = {}  # where a leaf without a counterpart would have had it
        self.excused: set[str] = set()  # leaves that a rule declares to have none
        self.parents = {side: _prefixes(leaves) for side, leaves in (("jax", jax), ("torch", torch))}

    def modules(self, jax_path: str, jax: Any, torch_path: str, torch: Any, index: tuple[int, ...]) -> None:
        """Pairs all that is below two modules; `index` is the position on the leading axes of stacked JAX leaves."""
        self.match.modules.append(ModulePair(jax_path, torch_path, index))
        rule = rules.find(type(jax), type(torch))
        if rule is None and isinstance(jax, JAX_LISTS) and isinstance(torch, TORCH_LISTS):
            if isinstance(jax, nnx.Sequential):
                jax_path, jax = join(jax_path, "layers"), jax.layers
            self._lists(jax_path, jax, torch_path, torch, index)
            return
        rule = rule or rules.Rule()
        entries = rule.of("entries", jax, torch)
        for entry in entries:
            self._entry(entry, jax_path, jax, torch_path, torch, index)
        self.excused.update(f"jax {join(jax_path, name)}" for name in rule.of("jax_only", jax, torch))
        self.excused.update(f"torch {join(torch_path, name)}" for name in rule.of("torch_only", jax, torch))
        for setting in rule.settings:
            ours, theirs = setting.jax(jax), setting.torch(torch)
            # 1 - 0.9 is not quite 0.1.
            close = isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs)
            if not close and ours != theirs:
                where = f"jax {jax_path or 'model'} has {ours!r}, torch {torch_path or 'model'} means {theirs!r}"
                self.match.settings.append(f"{setting.name}: {where}")
        renamed = {entry.jax.split(".")[0] for entry in entries}
        for name, node in jax_items(jax):
            if name not in renamed:
                other = getattr(torch, name, None)
                if _may_be_stacked(node, other):
                    types = f"{type(jax).__name__}, {type(torch).__name__}"
                    self.hints.append(
                        f"if jax {join(jax_path, name)} is a stack that JAX scans, and torch {join(torch_path, name)} "
                        f'the list of its layers: bridge.register({types}, bridge.Child("{name}", "{name}.*"))'
                    )
                self._node(join(jax_path, name), node, join(torch_path, name), other, index)

    def _lists(self, jax_path: str, jax: Any, torch_path: str, torch: Any, index: tuple[int, ...]) -> None:
        """Pairs the entries of two lists in order, passing over those that hold no leaf."""
        ours = [i for i in range(len(jax)) if join(jax_path, str(i)) in self.parents["jax"]]
        theirs = [i for i in range(len(torch)) if join(torch_path, str(i)) in self.parents["torch"]]
        if len(ours) != len(theirs):
            entries = f"{len(ours)} entries with parameters, torch {torch_path or 'model'} has {len(theirs)}"
            self.problems.append(f"jax {jax_path or 'model'} has {entries}")
        pairs = list(zip(ours, theirs, strict=False))
        for i in set(range(len(jax))).difference(ours):
            if i not in theirs and i < len(torch) and rules.find(type(jax[i]), type(torch[i])):
                pairs.append((i, i))
        for i, j in pairs:
            self._node(join(jax_path, str(i)), jax[i], join(torch_path, str(j)), torch[j], index)

    def _node(self, jax_path: str, jax: Any, torch_path: str, torch: Any, index: tuple[int, ...]) -> None:
        if jax_path in self.match.jax:
            self._leaf(jax_path, torch_path, index, _EQUAL)
        elif (jax_path in self.parents["jax"] and torch_path in self.parents["torch"]) or rules.find(
            type(jax), type(torch)
        ):
            self.modules(jax_path, jax, torch_path, torch, index)

    def _entry(
        self, entry: rules.Entry, jax_path: str, jax: Any, torch_path: str, torch: Any, index: tuple[int, ...]
    ) -> None:
        """Follows one declared entry; a `*` in its torch name stands for each entry of a list."""
        places = [(entry.torch, index)]
        if "*" in entry.torch:
            size = len(torch.get_submodule(entry.torch.partition("*")[0].rstrip(".")))
            places = [(entry.torch.replace("*", str(i)), (*index, i)) for i in range(size)]
        ours = join(jax_path, entry.jax)
        for name, place in places:
            theirs = join(torch_path, name)
            match entry:
                case rules.Leaf():
                    self._leaf(ours, theirs, place, entry)
                case rules.Child():
                    # What only one side has is reported with its leaves, what neither has is none of this pair's.
                    if ours in self.parents["jax"] and theirs in self.parents["torch"]:
                        self.modules(ours, submodule(jax, entry.jax), theirs, torch.get_submodule(name), place)
                case rules.Zero():
                    self._zero("jax" if entry.jax else "torch", ours if entry.jax else theirs, entry.why)
                case rules.Refused():
                    where = f"jax {ours or 'model'} and torch {theirs or 'model'} cannot be the same function"
                    self.problems.append(f"{where}: {entry.why}")
                    for side, path in (("jax", ours), ("torch", theirs)):
                        below = (p for p in getattr(self.match, side) if not path or p.startswith(f"{path}."))
                        self.excused.update(f"{side} {p}" for p in below)

    def _zero(self, side: str, path: str, why: str) -> None:
        if path in getattr(self.match, side):
            self.match.zeros[side, path] = why
            self.excused.add(f"{side} {path}")

    def _leaf(self, jax_path: str, torch_path: str, index: tuple[int, ...], rule: rules.Leaf) -> None:
        ours, theirs = self.match.jax.get(jax_path), self.match.torch.get(torch_path)
        if ours is None or theirs is None:
            self.expected.setdefault(f"jax {jax_path}", f"torch {torch_path}")
            self.expected.setdefault(f"torch {torch_path}", f"jax {jax_path}")
            return
        rows = None
        if rule.part is not None:
            i, n = rule.part
            rows = (i * theirs.shape[0] // n, (i + 1) * theirs.shape[0] // n)
        link = Link(Slot(jax_path, index), Slot(torch_path, (), rows), rules.Layout(rule.layout))
        self.match.links.append(link)
        array = self.arrays["jax"][jax_path]
        jax_shape, torch_shape = link.jax.shape(array.shape), link.torch.shape(theirs.shape)
        names = dtype_name(array.dtype), dtype_name(theirs.dtype)
        if not link.layout.fits(len(jax_shape)) or link.layout.torch_shape(jax_shape) != torch_shape:
            kind = f"shape {jax_shape} in layout {rule.layout!r}"
            self.problems.append(f"jax {link.jax} has {kind}, torch {link.torch} has shape {torch_shape}")
        elif not fits(*names, self.dtype):
            self.problems.append(f"jax {link.jax} has dtype {names[0]}, torch {link.torch} has dtype {names[1]}")

    def untied(self, allowed: str | None) -> Iterator[str]:
        """Leaves that are one on one side, which is not the `allowed` one, and several on the other."""
        for here, there in (("jax", "torch"), ("torch", "jax")):
            if here == allowed:
                continue
            partners: dict[tuple, Link] = {}
            for link in self.match.links:
                one, other = getattr(link, here), getattr(link, there)
                first = partners.setdefault(self._identity(here, one), link)
                if self._identity(there, other) != self._identity(there, getattr(first, there)):
                    ours, theirs = getattr(first, here), getattr(first, there)
                    yield f"{here} {ours} and {one} are tied, but {there} {theirs} and {other} are not"

    def uncovered(self) -> Iterator[str]:
        """Leaves that no link reaches, or not all of."""
        for side in ("jax", "torch"):
            leaves, arrays = getattr(self.match, side), self.arrays[side]
            covered: dict[int, dict[tuple, int]] = {}
            for link in self.match.links:
                slot = getattr(link, side)
                size = math.prod(slot.shape(arrays[slot.path].shape))
                covered.setdefault(id(leaves[slot.path]), {})[slot.index, slot.rows] = size
            for path, leaf in leaves.items():
                array, name = arrays[path], f"{side} {path}"
                sizes = covered.get(id(leaf), {}).values()
                if name in self.excused or (sizes and sum(sizes) == math.prod(array.shape)):
                    continue
                if self.own and not sizes and not isinstance(leaf, nnx.Variable | nn.Parameter):
                    self.match.own.append(name)
                    continue
                what = f"{name}, {dtype_name(array.dtype)}{tuple(array.shape)},"
                where = f"; it would be {self.expected[name]}" if name in self.expected else ""
                if sizes:
                    yield f"{what} has {math.prod(array.shape)} elements, and its counterparts {sum(sizes)}"
                else:
                    yield f"{what} has no counterpart{where}"

    def _identity(self, side: str, slot: Slot) -> tuple:
        return id(getattr(self.match, side)[slot.path]), slot.index, slot.rows


def _may_be_stacked(jax: Any, torch: Any) -> bool:
    """Whether one module stands where the other side has a list of them, and no rule says how."""
    one = isinstance(jax, nnx.Module) and not isinstance(jax, JAX_LISTS)
    return one and isinstance(torch, TORCH_LISTS) and rules.find(type(jax), type(torch)) is None


def _prefixes(paths: Mapping[str, Any]) -> set[str]:
    parts = (path.split(".") for path in paths)
    return {".".join(part[:i]) for part in parts for i in range(1, len(part) + 1)}
