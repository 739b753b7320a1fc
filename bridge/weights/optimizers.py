"""The state of an optimizer, from optax to torch.optim or back, so that training goes on along the same trajectory.

    optax                                torch.optim
    scale_by_adam: count, mu, nu         Adam, AdamW: step, exp_avg, exp_avg_sq
    trace: trace                         SGD: momentum_buffer
    scale_by_schedule: count             (a learning rate scheduler is an object of its own)

Moments have the shape of their parameters and follow the same rules. Hyperparameters are part of the program, not of
the state, and defaults differ: `optax.adamw` decays weights by 1e-4, `torch.optim.AdamW` by 1e-2.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from bridge.weights.arrays import copy_into, dtype_name, to_jax, to_numpy
from bridge.weights.convert import jax_values, torch_values
from bridge.weights.leaves import aliases, value
from bridge.weights.match import Link, Match, match

_TREES = {"mu", "nu", "trace"}  # the moments in the states of optax


def convert_optimizer(
    source: Any, target: Any, jax_model: nnx.Module, torch_model: torch.nn.Module, *, steps: int | None = None
) -> Any:
    """Carries the moments and the step count of one optimizer into another of the same kind. The weights: `convert`.

    Args:
        source: a torch.optim.Adam, AdamW or SGD; or an nnx.Optimizer, or an optax state (`TrainState.opt_state`) of
            `nnx.state(jax_model, nnx.Param)`, made of adam, adamw or sgd and of what keeps no state, such as clipping.
        target: one of the other framework. A torch optimizer or nnx.Optimizer is changed, an optax state is not.
        jax_model, torch_model: the two models, whose parameters the optimizers hold.
        steps: the number of steps made, where the source is SGD, which does not count, and the target has a schedule.

    Returns:
        `target`, or the new optax state.

    Raises:
        TypeError: the two are not one optimizer of each framework.
        ValueError: the models do not correspond, or an optimizer keeps what the other has no place for.

    Example:
        >>> import optax, torch
        >>> torch_model, jax_model = torch.nn.Linear(4, 2), nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> optimizer = torch.optim.Adam(torch_model.parameters())
        >>> torch_model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> state = optax.adam(1e-3).init(nnx.state(jax_model, nnx.Param))
        >>> state = convert_optimizer(optimizer, state, jax_model, torch_model)
        >>> int(state[0].count), float(state[0].mu["bias"][0])
        (1, 0.10000000149011612)
    """
    found = match(jax_model, torch_model)
    if isinstance(target, torch.optim.Optimizer) and not isinstance(source, torch.optim.Optimizer):
        _into_torch(found, source.opt_state if isinstance(source, nnx.Optimizer) else source, target)
        return target
    if isinstance(source, torch.optim.Optimizer) and not isinstance(target, torch.optim.Optimizer):
        steps = _steps(source, steps)
        old = target.opt_state if isinstance(target, nnx.Optimizer) else target
        new = _into_optax(found, source, jax.tree.map(lambda x: x, old), steps)  # into a copy, variables included
        if not isinstance(target, nnx.Optimizer):
            return new
        for variable, filled in zip(_variables(old), _variables(new), strict=True):
            variable.set_value(filled.get_value())
        if steps is not None:
            _count(target.step, steps)
        return target
    kinds = f"{type(source).__name__} and {type(target).__name__}"
    raise TypeError(
        f"source and target must be a torch.optim.Optimizer and an nnx.Optimizer or optax state; got {kinds}"
    )


def _variables(tree: Any) -> list[nnx.Variable]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What the optimizer keeps for each parameter: optax's name -> torch's."""
    options = optimizer.defaults
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
        if options["amsgrad"]:
            raise ValueError("the torch optimizer has amsgrad=True, which is not converted")
        return {"mu": "exp_avg", "nu": "exp_avg_sq"}
    if isinstance(optimizer, torch.optim.SGD):
        if options["dampening"]:
            raise ValueError(f"the torch optimizer has dampening={options['dampening']}, which optax does not know")
        return {"trace": "momentum_buffer"} if options["momentum"] else {}
    raise ValueError(f"{type(optimizer).__name__} is not converted; Adam, AdamW and SGD are")


def _into_torch(found: Match, state: Any, optimizer: torch.optim.Optimizer) -> None:
    counts: set[int] = set()
    trees: dict[str, dict[str, nnx.Variable]] = {}

    def collect(part: Any) -> Any:
        if "count" in part._fields:
            counts.add(int(value(part.count)))
        for name in _TREES & set(part._fields):
            trees.setdefault(name, {}).update(_flat(getattr(part, name)))
        return part

    _visit(state, collect)
    moments = _moments(optimizer)
    if trees.keys() != moments.keys() or len(counts) > 1:
        kept = f"{sorted(trees)} and step counts {sorted(counts)}"
        raise ValueError(
            f"the optax state has {kept}, {type(optimizer).__name__} needs {sorted(moments)} and one count"
        )
    new: dict[str, dict[str, torch.Tensor]] = {}
    for name, tree in trees.items():
        links = _links(found, optimizer, tree)
        arrays = {path: to_numpy(value(leaf)) for path, leaf in tree.items()}
        for link, values in torch_values(links, arrays.__getitem__):
            buffers = new.setdefault(link.torch.path, {})
            empty = torch.empty_like(found.torch[link.torch.path], requires_grad=False)
            buffer = buffers.setdefault(moments[name], empty)
            copy_into(link.torch.of(buffer), values)
    for path, buffers in new.items():
        if isinstance(optimizer, torch.optim.Adam):
            # torch counts in floats, by default of 32 bits.
            wide = torch.get_default_dtype() == torch.float64
            buffers["step"] = torch.tensor(max(counts), dtype=torch.float64 if wide else torch.float32)
        optimizer.state[found.torch[path]] = buffers


def _into_optax(found: Match, optimizer: torch.optim.Optimizer, state: Any, steps: int | None) -> Any:
    moments = _moments(optimizer)
    seen: set[str] = set()

    def fill(part: Any) -> Any:
        for name in _TREES & set(part._fields):
            if name not in moments:
                raise ValueError(f"the optax state has {name}, which {type(optimizer).__name__} does not keep")
            seen.add(name)
            tree = _flat(getattr(part, name))

            def read(path: str, name: str = name) -> np.ndarray:
                parameter = found.torch[path]
                # Where there was no gradient so far, torch has nothing, and the moments are zero.
                buffer = optimizer.state.get(parameter, {}).get(moments[name])
                return to_numpy(torch.zeros_like(parameter) if buffer is None else buffer)

            likes = {path: value(leaf) for path, leaf in tree.items()}
            for path, values in jax_values(_links(found, optimizer, tree), read, likes):
                tree[path].set_value(to_jax(values, getattr(likes[path], "sharding", None)))
        if "count" not in part._fields:
            return part
        if steps is None:
            raise ValueError("steps: SGD does not count its steps, and the schedule of the optax state needs them")
        return part._replace(count=_count(part.count, steps))

    filled = _visit(state, fill)
    if seen != moments.keys():
        raise ValueError(f"{type(optimizer).__name__} keeps {sorted(moments.values())}, the optax state does not")
    return filled


def _steps(optimizer: torch.optim.Optimizer, given: int | None) -> int | None:
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    counts |= {given} if given is not None else set()
    if len(counts) > 1:
        raise ValueError(f"steps: several numbers of steps, {sorted(counts)}, and optax keeps one")
    return max(counts, default=0 if isinstance(optimizer, torch.optim.Adam) else None)


def _count(old: Any, steps: int) -> Any:
    """The counter set to `steps`: a variable in place, an array anew."""
    new = jnp.asarray(steps, value(old).dtype)
    if isinstance(old, nnx.Variable):
        old.set_value(new)
        return old
    return new


def _visit(state: Any, function: Callable[[Any], Any]) -> Any:
    """The optax state with `function` applied to each part that has moments or a count."""
    if isinstance(state, (optax.ScaleByAdamState, optax.TraceState, optax.ScaleByScheduleState)):
        return function(state)
    if type(state) is tuple:
        return tuple(_visit(part, function) for part in state)
    if state == optax.EmptyState():
        return state
    raise ValueError(f"the optax state holds a {type(state).__name__}, which has no counterpart in torch.optim")


def _flat(tree: Any) -> dict[str, nnx.Variable]:
    """path -> moment. Where a mask freezes a parameter there is none."""
    if not isinstance(tree, nnx.State):
        raise ValueError(f"moments must be an nnx.State, as optimizer.init(nnx.state(model)) gives, not {type(tree)}")
    flat = nnx.to_flat_state(tree)
    return {".".join(map(str, path)): leaf for path, leaf in flat if isinstance(leaf, nnx.Variable)}


def _links(found: Match, optimizer: torch.optim.Optimizer, tree: dict[str, nnx.Variable]) -> list[Link]:
    """The links between the moments and the parameters of the torch optimizer; ValueError if these are others."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = aliases(found.jax)
    for side, zero in found.zeros:
        if side == "torch" and found.torch[zero].requires_grad and id(found.torch[zero]) in held:
            raise ValueError(f"torch {zero} is trained, and has no counterpart in JAX: bridge.fold_biases freezes it")
    links: dict[tuple, Link] = {}
    for link in found.links:
        # A tied parameter has its moments under the first of its paths.
        path = next((name for name in names[link.jax.path] if name in tree), None)
        parameter = found.torch[link.torch.path]
        if (path is not None) != (id(parameter) in held):
            holder = "torch optimizer" if path is None else "optax state"
            raise ValueError(f"only the {holder} holds the parameter jax {link.jax}, torch {link.torch}")
        if path is not None:
            dtype = value(tree[path]).dtype
            if dtype_name(dtype) != dtype_name(parameter.dtype):
                raise ValueError(f"the moments of jax {link.jax} are {dtype}, those of torch {parameter.dtype}")
            slot = replace(link.jax, path=path)
            links[slot, link.torch.rows, id(parameter)] = replace(link, jax=slot)
    return list(links.values())
