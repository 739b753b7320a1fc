"""Runs a model, or one of its modules, on either side, and writes down what went in and came out of every module."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import mhc_jax.nn
import mhc_torch
from bridge.proof.precision import TorchPrecision, jax_precision
from bridge.weights.arrays import to_numpy, to_torch
from bridge.weights.match import jax_leaves, value
from mhc_jax.history import History

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_SKIPS = (mhc_jax.nn.MHCSkip, mhc_jax.nn.MatrixMHCSkip, mhc_torch.MHCSkip, mhc_torch.MatrixMHCSkip)


@dataclass
class Call:
    """One call of a module: its arguments, its result, and when it was entered and left in the order of all events."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    entered: int = 0
    left: int = 0


@dataclass
class Recording:
    """The calls of every watched module by path, and the paths of those that were traced and so stayed unseen."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    traced: set[str] = field(default_factory=set)
    events: int = 0

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = Call(args, kwargs, entered=self._tick())
        self.calls.setdefault(path, []).append(call)
        return call

    def leave(self, call: Call, output: Any) -> None:
        call.output, call.left = output, self._tick()

    def _tick(self) -> int:
        self.events += 1
        return self.events


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, torch.Tensor))


def is_float(array: Any) -> bool:
    return array.is_floating_point() if isinstance(array, torch.Tensor) else jnp.issubdtype(array.dtype, jnp.floating)


def double(array: np.ndarray) -> np.ndarray:
    """The array in float64 if it is floating-point."""
    return array.astype(np.float64) if is_float(array) else array


def arrays(tree: Any) -> list[Any]:
    """The distinct arrays in a tree of arguments or results, in order; one that is passed three times counts once."""
    return list({id(leaf): leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)}.values())


def floats(tree: Any) -> list[Any]:
    """The distinct floating-point arrays in a tree."""
    return [leaf for leaf in arrays(tree) if is_float(leaf)]


def skip_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """The arguments of a call; those of a history skip as (branch output, the states it looks at)."""
    if not isinstance(module, _SKIPS):
        return args, kwargs
    given = dict(zip(("x", "history"), args, strict=False)) | kwargs
    history = given["history"]
    if isinstance(history, History):
        history = list(history.window)[-int(history.count) :]
    window = module.config.max_history if isinstance(module, mhc_jax.nn.MHCSkip) else module.max_history
    return (given["x"], list(history[-window:])), {}


def jax_float64(model: nnx.Module) -> nnx.Module:
    """A copy of an nnx module that computes in float64. Call it, and use what it returns, with x64 enabled."""
    model = nnx.clone(model)
    nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.float64) if is_float(a) else a, nnx.state(model)))
    for _, module in nnx.iter_modules(model):
        if getattr(module, "dtype", None) is not None:
            setattr(module, "dtype", jnp.float64)  # noqa: B010 - nnx.Module declares no such attribute
    return model


@contextmanager
def watch_jax(modules: dict[str, nnx.Module]) -> Iterator[Recording]:
    """Records the calls of these modules (path -> module) while the context lasts.

    Python looks `__call__` up on the class, so the classes are patched, and given back as they were.
    """
    recording = Recording()
    paths = {id(module): path for path, module in reversed(modules.items())}
    active: list[int] = []

    def watched(call: Callable) -> Callable:
        def wrapper(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or id(self) in active[-1:]:  # the latter: a __call__ that calls its parent class's
                return call(self, *args, **kwargs)
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
                recording.traced.add(path)
                return call(self, *args, **kwargs)
            active.append(id(self))
            try:
                entry = recording.enter(path, *skip_arguments(self, args, kwargs))
                output = call(self, *args, **kwargs)
                recording.leave(entry, output)
            finally:
                active.pop()
            return output

        return wrapper

    originals = {cls: cls.__dict__.get("__call__") for cls in {type(module) for module in modules.values()}}
    for cls, original in originals.items():
        if any("__call__" in base.__dict__ for base in cls.__mro__):  # nnx.List has none
            setattr(cls, "__call__", watched(original or cls.__call__))  # noqa: B010 - mypy
    try:
        yield recording
    finally:
        for cls, original in originals.items():
            if original is not None:
                setattr(cls, "__call__", original)  # noqa: B010 - mypy
            elif "__call__" in cls.__dict__:
                del cls.__call__


@contextmanager
def watch_torch(modules: dict[str, torch.nn.Module]) -> Iterator[Recording]:
    """Records the calls of these modules (path -> module) while the context lasts, safe from in-place changes."""
    recording = Recording()
    stack: list[Call] = []

    def frozen(tree: Any) -> Any:
        copies: dict[int, torch.Tensor] = {}
        return jax.tree.map(
            lambda leaf: copies.setdefault(id(leaf), leaf.detach().clone()) if is_array(leaf) else leaf, tree
        )

    def enter(path: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(recording.enter(path, *frozen(skip_arguments(module, args, kwargs))))

    def leave(output: Any) -> None:
        recording.leave(stack.pop(), frozen(output))

    handles = []
    for path, module in modules.items():
        handles.append(module.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _, args, output: leave(output)))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def with_arrays(call: Call, new: Sequence[Any]) -> _Arguments:
    """The arguments of a call, its distinct floating-point arrays replaced in order; masks and the like stay."""
    by_id = {id(old): replacement for old, replacement in zip(floats((call.args, call.kwargs)), new, strict=True)}
    return jax.tree.map(lambda leaf: by_id.get(id(leaf), leaf), (call.args, call.kwargs))


@dataclass
class Pull:
    """A module's answer to given inputs and cotangents.

    Attributes:
        outputs: its floating-point results.
        inputs: the gradients of its floating-point inputs, in order.
        parameters: the gradients of its parameters, by path.
        state: its other leaves after the call, by path.
        precision: epsilon of the coarsest floating-point type that it computed in, if it was asked for.
    """

    outputs: list[np.ndarray]
    inputs: list[np.ndarray]
    parameters: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    precision: float = 0.0


def leaf_values(model: nnx.Module) -> dict[str, np.ndarray]:
    """The leaves of an nnx module by path, tied ones under each of their paths."""
    return {path: to_numpy(value(leaf)) for path, leaf in jax_leaves(model).items()}


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """Structure, parameters and all other state of an nnx module, for `nnx.merge`."""
    return nnx.split(model, nnx.Param, ...)  # type: ignore[return-value]


def pull_jax(
    module: nnx.Module,
    call: Call,
    inputs: Sequence[np.ndarray],
    cotangents: Sequence[np.ndarray],
    traced: bool = False,
) -> Pull:
    """Runs `module` forward and back; `inputs` replace the floating-point arrays of `call` in order.

    With `traced`, also finds out its precision.
    """
    graph, parameters, rest = split(module)
    frame, others = _frame(call)
    given = [jnp.asarray(array) for array in inputs]
    outputs, by_parameters, by_inputs, after = _pull(
        graph, frame, parameters, rest, others, given, [jnp.asarray(c) for c in cotangents]
    )
    run = partial(_run, graph, frame, rest, others)
    return Pull(
        outputs=[to_numpy(o) for o in outputs],
        inputs=[to_numpy(g) for g in by_inputs],
        parameters=leaf_values(nnx.merge(graph, by_parameters, rest)),
        state=leaf_values(nnx.merge(graph, parameters, after)),
        precision=jax_precision(lambda *a: run(*a)[0], parameters, given) if traced else 0.0,
    )


@dataclass(frozen=True)
class _Frame:
    """What stays the same in calls that can share one compiled program: the arguments without their arrays.

    Attributes:
        structure: of the arguments as a tree.
        slots: for each leaf of it, ("value", which floating-point array), ("other", which array) or ("constant", it).
    """

    structure: Any
    slots: tuple[tuple[str, Any], ...]

    def fill(self, values: Sequence[Any], others: Sequence[Any]) -> _Arguments:
        source = {"value": values, "other": others}
        leaves = [content if kind == "constant" else source[kind][content] for kind, content in self.slots]
        return jax.tree.unflatten(self.structure, leaves)


def _frame(call: Call) -> tuple[_Frame, list[Any]]:
    """The frame of a call, and its arrays that are not floating-point."""
    leaves, structure = jax.tree.flatten((call.args, call.kwargs))
    values = {id(leaf): i for i, leaf in enumerate(floats(leaves))}
    others: list[Any] = []
    slots: list[tuple[str, Any]] = []
    for leaf in leaves:
        if id(leaf) in values:
            slots.append(("value", values[id(leaf)]))
        elif is_array(leaf):
            slots.append(("other", len(others)))
            others.append(leaf)
        else:
            slots.append(("constant", leaf))
    return _Frame(structure, tuple(slots)), others


def _run(
    graph: nnx.GraphDef, frame: _Frame, rest: nnx.State, others: list[Any], parameters: nnx.State, values: list[Any]
) -> tuple[list[jax.Array], nnx.State]:
    fresh = nnx.merge(graph, parameters, rest, copy=True)
    args, kwargs = frame.fill(values, others)
    return floats(fresh(*args, **kwargs)), split(fresh)[2]


# Compiled, so that the fifty equal layers of a model cost one trace and not fifty.
@partial(jax.jit, static_argnames=("graph", "frame"))
def _pull(
    graph: nnx.GraphDef,
    frame: _Frame,
    parameters: nnx.State,
    rest: nnx.State,
    others: list[Any],
    values: list[jax.Array],
    cotangents: list[jax.Array],
) -> tuple[list[jax.Array], nnx.State, list[jax.Array], nnx.State]:
    run = partial(_run, graph, frame, rest, others)
    outputs, pullback, after = jax.vjp(run, parameters, values, has_aux=True)
    by_parameters, by_inputs = pullback([c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    return outputs, by_parameters, by_inputs, after


def pull_torch(
    module: torch.nn.Module, call: Call, inputs: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]
) -> Pull:
    """As `pull_jax`, on a copy of a torch module."""
    module = copy.deepcopy(module)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    sources = [to_torch(array).to(device).requires_grad_() for array in inputs]
    # A module may change its input in place, which autograd allows for everything but leaves.
    args, kwargs = with_arrays(call, [tensor * 1 for tensor in sources])
    with TorchPrecision() as seen:
        outputs = floats(module(*args, **kwargs))
    parameters = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    wanted = [*sources, *parameters.values()]
    found = gradients(outputs, [to_torch(c).to(o) for c, o in zip(cotangents, outputs, strict=True)], wanted)
    return Pull(
        outputs=[to_numpy(o) for o in outputs],
        inputs=found[: len(sources)],
        parameters=dict(zip(parameters, found[len(sources) :], strict=True)),
        state={name: to_numpy(b) for name, b in module.named_buffers(remove_duplicate=False)},
        precision=seen.coarsest,
    )


def gradients(
    outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
) -> list[np.ndarray]:
    """Vector-Jacobian products; what no output depends on has gradient 0, as in JAX."""
    reached = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found: Sequence[torch.Tensor | None] = [None] * len(wanted)
    if reached and wanted:
        found = torch.autograd.grad([o for o, _ in reached], wanted, [c for _, c in reached], allow_unused=True)
    return [to_numpy(torch.zeros_like(w) if g is None else g) for w, g in zip(wanted, found, strict=True)]


# Two noises, of which the larger answer counts: optimizers that divide by a gradient's size answer to large ones less.
AMPLITUDES = (2.0**-26, 2.0**-40)


class Noise:
    """Simulated rounding: a copy of a float64 torch model with every weight and module output off by ±`amplitude`.

    What a run of it differs from the clean run, divided by `amplitude`, is how strongly each value answers to rounding
    (Monte Carlo arithmetic, D. S. Parker 1997). Calling it blurs a tensor.
    """

    def __init__(self, model: torch.nn.Module, amplitude: float, seed: int) -> None:
        self.amplitude = amplitude
        self.generator = torch.Generator().manual_seed(seed)
        self.model = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                if is_float(tensor):
                    tensor.copy_(self(tensor))
        for module in self.model.modules():
            # Not the bound method: a copy of the model would copy this object with it.
            module.register_forward_hook(lambda *call: self._blur(*call))

    def _blur(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        factor = _cancellation(module, args)
        if factor > 1 and args[0].requires_grad:
            args[0].register_hook(lambda gradient: self(gradient, factor))
        return jax.tree.map(lambda leaf: self(leaf, factor) if is_array(leaf) and is_float(leaf) else leaf, output)

    def __call__(self, tensor: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        signs = 2 * torch.randint(2, tensor.shape, generator=self.generator, dtype=torch.float64) - 1
        return tensor * (1 + factor * self.amplitude * signs.to(tensor.device))


def _cancellation(module: torch.nn.Module, args: tuple[Any, ...]) -> float:
    """How much less exact than its inputs a normalization is: Flax takes the variance as E[x²] - E[x]²."""
    if isinstance(module, torch.nn.LayerNorm):
        groups = args[0].reshape(-1, math.prod(module.normalized_shape))
    elif isinstance(module, torch.nn.GroupNorm):
        groups = args[0].reshape(len(args[0]) * module.num_groups, -1)
    elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
        groups = args[0].transpose(0, 1).flatten(1)
    else:
        return 1.0
    ratio = groups.mean(-1).square() / (groups.var(-1, unbiased=False) + module.eps)
    return 1.0 + ratio.max().item()
