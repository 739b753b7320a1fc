"""Proposes the rules of two models whose names differ, from types, shapes, names, values and order."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np
from flax import nnx
from torch import nn

from bridge.weights import rules
from bridge.weights.arrays import dtype_name, is_floating, to_numpy
from bridge.weights.leaves import jax_items, jax_leaves, join, torch_leaves, value
from bridge.weights.match import JAX_LISTS, TORCH_LISTS, match

# What the parts of names are called, in one word. A name is compared as the set of its words.
_WORDS = {
    **dict.fromkeys(("q", "wq", "query"), "query"),
    **dict.fromkeys(("k", "wk", "key"), "key"),
    **dict.fromkeys(("v", "wv", "value"), "value"),
    **dict.fromkeys(("o", "wo", "out", "output"), "out"),
    **dict.fromkeys(("ln", "layernorm", "norm", "rmsnorm", "bn", "batchnorm"), "norm"),
    **dict.fromkeys(("attn", "attention"), "attention"),
    **dict.fromkeys(("embed", "embedding", "embeddings", "embedder", "emb"), "embedding"),
    **dict.fromkeys(("mlp", "ffn", "feedforward"), "mlp"),
    **dict.fromkeys(("pos", "position"), "position"),
    **dict.fromkeys(("proj", "projection", "layer", "weight", "kernel", "dense", "linear", "self"), ""),
}


@dataclass(frozen=True)
class _Node:
    """A module or a leaf of either side.

    Attributes:
        name: below the model.
        thing: the module or the array.
        shape: of a leaf, without the axes of a stack; None for a module.
        children: in order.
    """

    name: str
    thing: Any
    shape: tuple[int, ...] | None
    children: tuple["_Node", ...] = ()

    @cached_property
    def leaves(self) -> tuple["_Node", ...]:
        below = tuple(leaf for child in self.children for leaf in child.leaves)
        return (self,) if self.shape is not None else below

    @cached_property
    def sizes(self) -> list[int]:
        """Of the leaves that can be weights, from the smallest."""
        return sorted(math.prod(leaf.shape or ()) for leaf in self.leaves if leaf.is_weight)

    @property
    def is_weight(self) -> bool:
        return isinstance(self.thing, nnx.Variable) or (
            hasattr(self.thing, "is_floating_point") and self.thing.is_floating_point()
        )

    @cached_property
    def prints(self) -> set[tuple[int, ...]]:
        """Of the leaves whose values tell them apart: sums over their bits, which no rearrangement changes."""
        arrays = (to_numpy(value(leaf.thing)).ravel() for leaf in self.leaves if leaf.is_weight)
        return {_print(array) for array in arrays if len(array) and (array != array[0]).any()}

    def below(self) -> Iterator["_Node"]:
        for child in self.children:
            yield child
            yield from child.below()

    def relative(self, parent: "_Node") -> str:
        return self.name[len(parent.name) + bool(parent.name) :]

    def sliced(self) -> "_Node":
        """One layer of a stack."""
        shape = None if self.shape is None else self.shape[1:]
        return _Node(self.name, self.thing, shape, tuple(child.sliced() for child in self.children))


@dataclass
class Proposal:
    """One `register` line of a `Suggestion`.

    Attributes:
        jax_type, torch_type: the pair of types.
        entries: by JAX name (torch name, of what is excused): the entry, and what is doubtful about it, or "".
        jax_only, torch_only: leaves that seem to carry no weight.
    """

    jax_type: type
    torch_type: type
    entries: dict[str, tuple[rules.Leaf | rules.Child, str]] = field(default_factory=dict)
    jax_only: list[str] = field(default_factory=list)
    torch_only: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.entries or self.jax_only or self.torch_only)

    def lines(self, names: Mapping[type, str]) -> list[str]:
        found = ["bridge.register(", f"    {names[self.jax_type]},", f"    {names[self.torch_type]},"]
        for entry, doubt in self.entries.values():
            layout = entry.layout if isinstance(entry, rules.Leaf) and entry.layout != rules.SAME else None
            arguments = ", ".join(f'"{text}"' for text in (entry.jax, entry.torch, layout) if text is not None)
            found.append(f"    bridge.{type(entry).__name__}({arguments})," + (f"  # CHECK: {doubt}" if doubt else ""))
        for side in ("jax_only", "torch_only"):
            if listed := getattr(self, side):
                listed = ", ".join(f'"{name}"' for name in listed)
                found.append(f"    {side}=({listed},),  # CHECK: no weights?")
        return [*found, ")"]

    def rule(self) -> rules.Rule:
        entries = tuple(entry for entry, _ in self.entries.values())
        return rules.Rule(entries, (), tuple(self.jax_only), tuple(self.torch_only))


@dataclass
class Suggestion:
    """What `suggest` found. Its `str` is Python to read, check and paste.

    Example:
        >>> from bridge import suggest
        >>> print(suggest(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nn.Linear(3, 5)))
        # No rule is needed.

    Attributes:
        proposals: the rules, whole models first.
        problems: what `match` still finds with these rules, a line each.
    """

    proposals: list[Proposal]
    problems: list[str]

    def entries(self) -> Iterator[tuple[Proposal, rules.Leaf | rules.Child, str]]:
        """Each entry of each proposal, and what is doubtful about it, or ""."""
        for proposal in self.proposals:
            for entry, doubt in proposal.entries.values():
                yield proposal, entry, doubt

    @property
    def doubts(self) -> list[str]:
        """What was decided by order alone, or seems to carry no weight: a line each."""
        return [line.strip() for line in str(self).splitlines() if "# CHECK" in line]

    def __str__(self) -> str:
        names, imports = _named([kind for p in self.proposals for kind in (p.jax_type, p.torch_type)])
        lines = ["import bridge", *imports, ""] if self.proposals else ["# No rule is needed."]
        lines += [line for proposal in self.proposals for line in proposal.lines(names)]
        if self.problems:
            lines += ["# With these rules, what is left:", *(f"# {problem}" for problem in self.problems)]
        elif self.proposals:
            lines += ["# With these rules every leaf of both models has its counterpart."]
        return "\n".join(lines)


def _named(kinds: list[type]) -> tuple[dict[type, str], list[str]]:
    """How to write each type, and the imports for that."""
    names, imports = {}, []
    for kind in dict.fromkeys(kinds):
        twin = any(other.__name__ == kind.__name__ for other in kinds if other is not kind)
        prefix = "Jax" if issubclass(kind, nnx.Module) else "Torch"
        names[kind] = prefix + kind.__name__ if twin else kind.__name__
        if kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__:
            alias = f" as {names[kind]}" if twin else ""
            imports.append(f"from {kind.__module__} import {kind.__name__}{alias}")
    return names, sorted(imports)


def suggest(
    jax_model: nnx.Module, torch_model: nn.Module, *, names: Mapping[str, tuple[str, ...]] | None = None
) -> Suggestion:
    """Proposes the rules by which two models correspond, as lines to check and paste.

    What pairs is decided, in this order: by equal names; by values, where both models hold the same; by `names`; by
    there being one that fits in shape and type; by names that mean the same (`q_proj`, `query`); and last by order,
    which is marked `CHECK` in the lines, as is everything that another reading would fit as well. Nothing is declared:
    paste, convert, then let `bridge.verify` prove it.

    Args:
        jax_model, torch_model: the two. With the same weights, by whatever way they came there, values decide.
        names: the ends of names on the torch side -> what they may be called on the JAX side, as in `bridge.families`.

    Returns:
        A `Suggestion`: print it. `doubts` are the lines that are marked; `problems` is what has no counterpart.

    Raises:
        TypeError: they are not one model of each framework.

    Example:
        >>> import bridge
        >>> class Ours(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.up, self.down = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        >>> class Theirs(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 3)
        >>> print("\\n".join(str(bridge.suggest(Ours(nnx.Rngs(0)), Theirs())).splitlines()[-7:]))
        bridge.register(
            Ours,
            Theirs,
            bridge.Child("up", "fc1"),
            bridge.Child("down", "fc2"),
        )
        # With these rules every leaf of both models has its counterpart.
    """
    for name, model, kind in (("jax_model", jax_model, nnx.Module), ("torch_model", torch_model, nn.Module)):
        if not isinstance(model, kind):
            raise TypeError(f"{name} must be of type {kind.__module__}.{kind.__name__}, got {type(model).__name__}")
    ours, theirs = _jax_tree(jax_model), _torch_tree(torch_model)
    search = _Search(ours, theirs, names or {})
    search.pair(ours, theirs)
    proposals = [proposal for proposal in search.proposals.values() if proposal]
    with rules.trial({(p.jax_type, p.torch_type): p.rule() for p in proposals}):
        try:
            match(jax_model, torch_model, dtype="cast")
            problems = []
        except ValueError as error:
            problems = [line.strip() for line in str(error).splitlines()[1:]]
    return Suggestion(proposals, problems)


def _jax_tree(model: nnx.Module) -> _Node:
    leaves, seen = jax_leaves(model), set()

    def node(name: str, thing: Any) -> _Node | None:
        if name in leaves:
            if id(thing) in seen:  # tied: once is enough
                return None
            seen.add(id(thing))
            return _Node(name, thing, tuple(value(thing).shape))
        children = [node(join(name, key), child) for key, child in jax_items(thing)]
        found = tuple(child for child in children if child is not None)
        return _Node(name, thing, None, found) if found or not name else None

    root = node("", model)
    assert root is not None
    return root


def _torch_tree(model: nn.Module) -> _Node:
    leaves, seen = torch_leaves(model), set()

    def node(name: str, module: nn.Module) -> _Node | None:
        children: list[_Node | None] = []
        for key, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            path = join(name, key)
            if path in leaves and id(leaves[path]) not in seen:
                seen.add(id(leaves[path]))
                children.append(_Node(path, leaves[path], tuple(leaves[path].shape)))
        children += [node(join(name, key), child) for key, child in module.named_children()]
        found = tuple(child for child in children if child is not None)
        return _Node(name, module, None, found) if found or not name else None

    root = node("", model)
    assert root is not None
    return root


def _layouts(ours: tuple[int, ...], theirs: tuple[int, ...], transposed: bool) -> list[str]:
    """The layouts that turn one shape into the other, the likeliest first; axes may merge."""
    count = len(ours)
    found: dict[bytes, str] = {}
    if count > 5 or math.prod(ours) != math.prod(theirs):
        return []
    letters = "abcde"[:count]
    numbers = np.arange(math.prod(ours)).reshape(ours)
    orders = list(permutations(range(count)))
    if transposed:  # inputs and outputs change places, each in its order
        turns = [(*range(turn, count), *range(turn)) for turn in range(1, count)]
        orders.sort(key=lambda order: order not in turns)
    for order in orders:
        groups = _merges([ours[axis] for axis in order], theirs)
        if groups is None:
            continue
        right, axes = [], iter(order)
        for group in groups:
            merged = " ".join(letters[next(axes)] for _ in range(group))
            right.append(merged if group == 1 else f"({merged})")
        layout = f"{' '.join(letters)} -> {' '.join(right)}"
        layout = rules.SAME if order == tuple(range(count)) and ours == theirs else layout
        found.setdefault(rules.Layout(layout).to_torch(numbers).tobytes(), layout)
    return list(found.values())


def _merges(sizes: list[int], theirs: tuple[int, ...]) -> list[int] | None:
    """How many of the axes in a row make each of the other side's axes."""
    groups, at = [], 0
    for size in theirs:
        start, product = at, 1
        while at < len(sizes) and product < size:
            product *= sizes[at]
            at += 1
        if product != size:
            return None
        if at == start and at < len(sizes) and sizes[at] == 1:
            at += 1
        groups.append(at - start)
    return groups if at == len(sizes) else None


def _words(name: str) -> frozenset[str]:
    parts = name.replace(".", "_").lower().split("_")
    return frozenset(word for part in parts if (word := _WORDS.get(part, part)))


class _Search:
    def __init__(self, ours: _Node, theirs: _Node, names: Mapping[str, tuple[str, ...]]) -> None:
        self.names = names
        self.proposals: dict[tuple[type, type], Proposal] = {}
        abstract = any(not hasattr(value(leaf.thing), "__array__") for leaf in (*ours.leaves, *theirs.leaves))
        self.by_value = False if abstract or _meta(theirs) else bool(ours.prints & theirs.prints)
        self.fitting: dict[tuple[str, str], int] = {}

    def pair(self, ours: _Node, theirs: _Node) -> None:
        """Proposes what two modules need, and all below."""
        kinds = type(ours.thing), type(theirs.thing)
        if rules.find(*kinds) or ours.shape is not None:
            return
        if isinstance(ours.thing, JAX_LISTS) and isinstance(theirs.thing, TORCH_LISTS):
            layers = ours.children[0] if isinstance(ours.thing, nnx.Sequential) else ours
            if len(layers.children) == len(theirs.children):
                for one, other in zip(layers.children, theirs.children, strict=True):
                    self.pair(one, other)
                return
        proposal = self.proposals.setdefault(kinds, Proposal(*kinds))
        taken: list[tuple[_Node, _Node, str, bool]] = []  # and what is doubtful, and whether it must be said
        rest = []
        for child in ours.children:
            same = next((t for t in theirs.children if t.relative(theirs) == child.relative(ours)), None)
            if same is not None and self.fit(child, same) and not self._contradicted(child, same):
                taken.append((child, same, "", False))
            else:
                rest.append(child)
        while rest:
            rest = self._assign(ours, theirs, rest, taken)
            opened: list[_Node] = []
            for child in rest:
                if child.shape is None:
                    opened += child.children
                elif not child.is_weight or not isinstance(child.thing, nnx.Param):
                    _note(proposal.jax_only, child.relative(ours))
            rest = opened
        place = {node.name: i for i, node in enumerate(ours.below())}
        for one, other, doubt, said in sorted(taken, key=lambda pair: place[pair[0].name]):
            self._propose(proposal, ours, theirs, one, other, doubt, said)
        for leaf in theirs.leaves:
            free = not any(_inside(leaf.name, other.name) for _, other, _, _ in taken)
            if free and not is_floating(dtype_name(leaf.thing.dtype)):
                _note(proposal.torch_only, leaf.relative(theirs))

    def _propose(
        self, proposal: Proposal, ours: _Node, theirs: _Node, one: _Node, other: _Node, doubt: str, said: bool
    ) -> None:
        names = one.relative(ours), other.relative(theirs)
        entry: rules.Leaf | rules.Child
        if one.shape is not None:
            layout, others = self._layout(one, other)
            if others:
                doubt = "; ".join(filter(None, [doubt, f"the layout could be {' or '.join(map(repr, others))}"]))
            entry, said = rules.Leaf(*names, layout), said or layout != rules.SAME
            if not said and names[0] == names[1]:
                return
        elif self._stacked(one, other):
            entry, said = rules.Child(names[0], f"{names[1]}.*"), True
            self.pair(one.sliced(), other.children[0])
        else:
            entry = rules.Child(*names)
            self.pair(one, other)
        if said or names[0] != names[1]:
            before = proposal.entries.get(names[0])
            if before and before[0] != entry:
                doubt = f"elsewhere it is {before[0].torch!r}: one rule cannot say both"
            proposal.entries[names[0]] = entry, doubt

    def _assign(
        self, ours: _Node, theirs: _Node, rest: list[_Node], taken: list[tuple[_Node, _Node, str, bool]]
    ) -> list[_Node]:
        """Pairs what it can of `rest` with what is free below `theirs`; what fits nothing is left."""

        def candidates(child: _Node) -> list[_Node]:
            free = [t for t in theirs.below() if not any(_near(t.name, other.name) for _, other, _, _ in taken)]
            fits = [(self.fit(child, t), t) for t in free]
            best = [t for fit, t in fits if fit and fit == max(f for f, _ in fits)]
            return [t for t in best if not any(t is not up and _inside(t.name, up.name) for up in best)]

        open_ = list(rest)
        for decide in (self._by_value, self._by_table, self._by_being_alone, self._by_name, self._by_order):
            changed = True
            while changed:
                changed = False
                fits = {child.name: candidates(child) for child in open_}
                for child in list(open_):
                    found = decide(ours, theirs, child, fits, open_)
                    if found is None:
                        continue
                    other, doubt = found
                    above = child.relative(ours).partition(".")[2]
                    taken.append((child, other, doubt, bool(above)))
                    open_.remove(child)
                    changed = True
                    break
        return open_

    def _by_value(self, ours: _Node, theirs: _Node, child: _Node, fits: dict, open_: list) -> tuple[_Node, str] | None:
        if not self.by_value:
            return None
        found = [t for t in fits[child.name] if child.prints and child.prints == t.prints]
        return (found[0], "") if len(found) == 1 else None

    def _by_table(self, ours: _Node, theirs: _Node, child: _Node, fits: dict, open_: list) -> tuple[_Node, str] | None:
        name = child.relative(ours)
        ends = [end for end, others in self.names.items() if any(_ends(name, other) for other in others)]
        found = [t for t in fits[child.name] if t.relative(theirs) in ends]
        found = found or [t for t in fits[child.name] if any(_ends(t.relative(theirs), end) for end in ends)]
        return (found[0], "") if len(found) == 1 else None

    def _by_being_alone(
        self, ours: _Node, theirs: _Node, child: _Node, fits: dict, open_: list
    ) -> tuple[_Node, str] | None:
        found = fits[child.name]
        rivals = [other for other in open_ if other is not child and any(t in found for t in fits[other.name])]
        return (found[0], "") if len(found) == 1 and not rivals else None

    def _by_name(self, ours: _Node, theirs: _Node, child: _Node, fits: dict, open_: list) -> tuple[_Node, str] | None:
        words = _words(child.relative(ours))
        found = [t for t in fits[child.name] if _words(t.relative(theirs)) == words]
        if not found:
            last = _words(child.name.rpartition(".")[2])
            found = [t for t in fits[child.name] if _words(t.name.rpartition(".")[2]) == last]
            rivals = [c for c in open_ if c is not child and _words(c.name.rpartition(".")[2]) == last]
            found = [] if rivals else found
        return (found[0], "") if len(found) == 1 and words else None

    def _by_order(self, ours: _Node, theirs: _Node, child: _Node, fits: dict, open_: list) -> tuple[_Node, str] | None:
        found = fits[child.name]
        if not found:
            return None
        others = ", ".join(t.relative(theirs) for t in found[1:4])
        rivals = ", ".join(c.relative(ours) for c in open_ if c is not child and found[0] in fits[c.name])
        fit = [f"{others} would fit as well"] * bool(others) or [f"{rivals} would fit there as well"] * bool(rivals)
        return found[0], ", ".join(["by order", *fit])

    def _contradicted(self, one: _Node, other: _Node) -> bool:
        """Whether the values say that two of equal names are not the same."""
        return self.by_value and bool(one.prints) and one.prints != other.prints

    def fit(self, one: _Node, other: _Node) -> int:
        """How well two nodes may correspond: 0 not, 3 by a rule or by all leaves."""
        key = f"{one.name}{one.leaves[0].shape if one.leaves else ''}", other.name
        if key not in self.fitting:
            self.fitting[key] = self._fit(one, other)
        return self.fitting[key]

    def _fit(self, one: _Node, other: _Node) -> int:
        if (one.shape is None) != (other.shape is None):
            return 0
        if one.shape is not None and other.shape is not None:
            return 3 if one.is_weight and other.is_weight and _layouts(one.shape, other.shape, False) else 0
        if sum(one.sizes) != sum(other.sizes):
            return 0
        if rules.find(type(one.thing), type(other.thing)):
            if _plain(one):
                try:
                    match(one.thing, other.thing, dtype="cast")
                except ValueError:
                    return 0
            return 3
        if type(one.thing).__module__.startswith("flax.") and not isinstance(one.thing, JAX_LISTS):
            return 0  # whose layouts only a rule can tell
        if self._stacked(one, other):
            return 2
        if isinstance(one.thing, JAX_LISTS) != isinstance(other.thing, TORCH_LISTS):
            return 0
        return 2 if one.sizes == other.sizes else 1

    def _stacked(self, one: _Node, other: _Node) -> bool:
        """Whether the layers of a torch list are stacked in one JAX module."""
        if not isinstance(other.thing, TORCH_LISTS) or isinstance(one.thing, JAX_LISTS):
            return False
        count = len(other.children)
        return all(leaf.shape is not None and leaf.shape[:1] == (count,) for leaf in one.leaves)

    def _layout(self, one: _Node, other: _Node) -> tuple[str, list[str]]:
        """The likeliest layout of two leaves, and the others, unless the values tell."""
        assert one.shape is not None
        assert other.shape is not None
        transposed = "kernel" in one.name and "weight" in other.name
        found = _layouts(one.shape, other.shape, transposed)
        if self.by_value and one.prints and len(value(one.thing).shape) == len(one.shape):
            arrays = to_numpy(value(one.thing)), to_numpy(value(other.thing))
            equal = [layout for layout in found if np.array_equal(rules.Layout(layout).to_torch(arrays[0]), arrays[1])]
            found = equal or found
        if one.name.rpartition(".")[2] == other.name.rpartition(".")[2] and rules.SAME in found:
            return rules.SAME, []
        return found[0], found[1:3]


def _print(array: np.ndarray) -> tuple[int, ...]:
    bits = np.ascontiguousarray(array).view(f"u{min(array.itemsize, 8)}").astype(np.uint64)
    return array.itemsize, len(bits), int(bits.sum()), int((bits * bits).sum())  # modulo 2⁶⁴


def _plain(node: _Node) -> bool:
    """Whether the shapes are those of the module itself, and not of one layer of a stack."""
    return all(leaf.shape == tuple(value(leaf.thing).shape) for leaf in node.leaves)


def _meta(node: _Node) -> bool:
    return any(leaf.thing.is_meta for leaf in node.leaves)


def _inside(name: str, above: str) -> bool:
    return name == above or name.startswith(f"{above}.")


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _near(name: str, other: str) -> bool:
    """Whether one is the other, or inside of it."""
    return _inside(name, other) or _inside(other, name)


def _note(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)
