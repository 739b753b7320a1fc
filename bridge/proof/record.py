"""Runs a model, or one of its modules, on either side, and writes down what went in and came out of every module."""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from bridge.proof import precision
from bridge.proof.exact_jax import Lift, Program, widened
from bridge.proof.exact_torch import Exact
from bridge.proof.precision import TorchPrecision
from bridge.proof.trees import arrays, double, floats, is_array, is_float, leaves, transform
from bridge.weights import rules
from bridge.weights.arrays import to_numpy, to_torch
from bridge.weights.leaves import submodule
from bridge.weights.match import jax_leaves, value
from mhc_torch.retrofitting import CHILD, called_otherwise

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class NoReferenceError(Exception):
    """A model could not be run in float64."""


@dataclass
class Call:
    """One call of a module: its arguments, its result, and when it was entered and left in the order of all events.

    `autocast` is the dtype to which torch's autocast, where it was on, took the arguments of its operations.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    entered: int = 0
    left: int = 0
    autocast: torch.dtype | None = None

    @property
    def given(self) -> _Arguments:
        return self.args, self.kwargs

    def map(self, function: Callable[[Any], Any]) -> "Call":
        """The same call with `function(array)` in place of each distinct array."""
        new = {id(x): function(x) for x in arrays(self.given)}
        args, kwargs = transform(lambda leaf: new.get(id(leaf), leaf), self.given)
        return Call(args, kwargs, autocast=self.autocast)

    def with_floats(self, new: Sequence[Any]) -> "Call":
        """The same call, its distinct floating-point arrays replaced in order; masks and the like stay."""
        by_id = {id(old): replacement for old, replacement in zip(floats(self.given), new, strict=True)}
        return self.map(lambda x: by_id.get(id(x), x))

    def double(self) -> "Call":
        """The same call of numpy arrays in float64."""
        return self.map(double)


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


def depends_on(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """The arguments of a call or, of a module that tells itself what its call depends on, those."""
    return (module.recorded(*args, **kwargs), {}) if hasattr(module, "recorded") else (args, kwargs)


def by_itself(module: Any) -> Any:
    """How an nnx module is called by itself; of a retrofitted model, without its part in it."""
    return getattr(module, "plain_call", module)


def told_float64(model: nnx.Module) -> nnx.Module:
    """A copy of an nnx module, on the same arrays, that is told to compute in float64."""
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if vars(module).get("dtype") is not None:
            setattr(module, "dtype", jnp.float64)  # noqa: B010 - nnx.Module declares no such attribute
    return model


def jax_float64(model: nnx.Module) -> nnx.Module:
    """The same with float64 leaves. Use it with x64 enabled."""
    model = told_float64(model)
    nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.float64) if is_float(a) else a, nnx.state(model)))
    return model


@contextmanager
def watch_jax(modules: dict[str, nnx.Module]) -> Iterator[Recording]:
    """Records the calls of these modules (path -> module) while the context lasts.

    Python looks `__call__` up on the class, so the classes are patched, and given back as they were.
    """
    recording = Recording()
    level = jex.get_opaque_trace_state(convention="nnx")
    paths = {id(module): path for path, module in reversed(modules.items())}
    active: list[int] = []

    def watched(call: Callable) -> Callable:
        def wrapper(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or id(self) in active[-1:]:  # the latter: a __call__ that calls its parent class's
                return call(self, *args, **kwargs)
            if jex.get_opaque_trace_state(convention="nnx") != level:
                recording.traced.add(path)
                return call(self, *args, **kwargs)
            active.append(id(self))
            try:
                entry = recording.enter(path, *depends_on(self, args, kwargs))
                output = call(self, *args, **kwargs)
                recording.leave(entry, output)
            finally:
                active.pop()
            return output

        return wrapper

    def method(cls: type) -> str:
        return "plain_call" if hasattr(cls, "plain_call") else "__call__"

    originals = {cls: cls.__dict__.get(method(cls)) for cls in {type(module) for module in modules.values()}}
    for cls, original in originals.items():
        if any(method(cls) in base.__dict__ for base in cls.__mro__):  # nnx.List has none
            setattr(cls, method(cls), watched(original or getattr(cls, method(cls))))
    try:
        yield recording
    finally:
        for cls, original in originals.items():
            if original is not None:
                setattr(cls, method(cls), original)
            elif method(cls) in cls.__dict__:
                delattr(cls, method(cls))


@contextmanager
def watch_torch(modules: dict[str, torch.nn.Module]) -> Iterator[Recording]:
    """Records the calls of these modules (path -> module) while the context lasts, safe from in-place changes.

    Of a retrofitted model, modules are seen as they are by themselves.
    """
    recording = Recording()
    stack: list[Call] = []

    def frozen(tree: Any) -> Any:
        copies: dict[int, torch.Tensor] = {}
        return transform(
            lambda leaf: copies.setdefault(id(leaf), leaf.detach().clone()) if is_array(leaf) else leaf, tree
        )

    def enter(path: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = recording.enter(path, *frozen(depends_on(module, args, kwargs)))
        kind = device_of(module).type
        call.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        stack.append(call)

    def leave(output: Any) -> None:
        recording.leave(stack.pop(), frozen(output))

    handles = []
    others = set[torch.nn.Module]().union(*map(called_otherwise, modules.values()))
    for path, module in modules.items():
        is_block = hasattr(module, CHILD)
        handles.append(module.register_forward_pre_hook(partial(enter, path), prepend=is_block, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _, args, output: leave(output), prepend=module in others))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Pull:
    """A module's answer to given inputs and cotangents.

    Attributes:
        outputs: its floating-point results.
        inputs: the gradients of its floating-point inputs, in order.
        parameters: the gradients of its parameters, by path.
        state: its other leaves after the call, by path.
        precision: epsilon of the coarsest floating-point type that it computed in.
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


def picked(tree: Any, names: Sequence[str]) -> list[Any]:
    """The arrays of these names in a tree of results."""
    found = dict(leaves(tree))
    return [found[name] for name in names]


class Programs:
    """The programs of one verification. Equal layers share one trace; nothing of an earlier verification is kept."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Program] = {}

    def of(self, same: Hashable, function: Callable[..., Any], *args: Any) -> Program:
        """The program of `function`; calls with an equal `same` and arguments of equal shapes share it."""
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(args))
        try:
            key = hash(same) and (same, jax.tree.structure(args), shapes)
        except TypeError:  # a model that holds a dict or the like
            key = None
        if key is None:
            return Program(function, *args)
        if key not in self._known:
            self._known[key] = Program(function, *args)
        return self._known[key]

    def widest(self, wide: tuple[Any, ...], plain: tuple[Any, ...]) -> Program:
        """The program (same, function, *args) to evaluate in float64.

        It is `wide` traced for float64 arguments, whose constants are exact, or the `plain` one if that has steps that
        insist on float32 and cannot be traced otherwise.
        """
        with jax.enable_x64(True):
            try:
                return self.of(*wide[:2], *jax.tree.map(widened, wide[2:]))
            except Exception:
                pass
        return self.of(*plain)


def evaluated(program: Program, lift: Lift, *args: Any) -> Any:
    """What a program gives in float64; use it with x64 enabled.

    Raises:
        NoReferenceError: a step cannot be run in float64.
    """
    try:
        with jax.enable_x64(True):
            return program.exact(lift, *args)
    except Exception as error:
        raise NoReferenceError(f"jax_model cannot be run in float64: {type(error).__name__}: {error}") from error


def _signature(call: Call) -> Hashable:
    """What a call fixes but its arrays."""
    places = {id(x): i for i, x in enumerate(arrays(call.given))}
    return tuple(
        (name, places[id(leaf)] if is_array(leaf) else (type(leaf), leaf)) for name, leaf in leaves(call.given)
    )


def pull_program(
    module: nnx.Module, call: Call, inputs: Sequence[Any], cotangents: Sequence[Any], names: list[str], back: bool
) -> tuple[Any, ...]:
    """(what makes it the same as another, function, *arguments) of a module forward and, if wanted, back."""
    graph, parameters, rest = split(module)
    others = [jnp.asarray(x) for x in arrays(call.given) if not is_float(x)]

    def run(parameters: nnx.State, values: list[Any], rest: nnx.State, others: list[Any]) -> Any:
        fresh = nnx.merge(graph, parameters, rest, copy=True)
        left = {id(x): new for x, new in zip(floats(call.given), values, strict=True)}
        kept = [x for x in arrays(call.given) if not is_float(x)]
        left |= {id(x): o for x, o in zip(kept, others, strict=True)}
        args, kwargs = transform(lambda leaf: left.get(id(leaf), own(leaf)), call.given)
        return picked(by_itself(fresh)(*args, **kwargs), names), split(fresh)[2]

    def pull(
        parameters: nnx.State, rest: nnx.State, others: list[Any], values: list[Any], cotangents: list[Any]
    ) -> Any:
        if not back:
            outputs, after = run(parameters, values, rest, others)
            return outputs, None, [], after
        outputs, pullback, after = jax.vjp(lambda p, v: run(p, v, rest, others), parameters, values, has_aux=True)
        gradients = pullback([c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
        return outputs, *gradients, after

    same = (graph, _signature(call), tuple(names), back)
    return same, pull, parameters, rest, others, list(map(jnp.asarray, inputs)), list(map(jnp.asarray, cotangents))


def own(leaf: Any) -> Any:
    """An argument that a call may change: random streams and caches, as a copy."""
    return nnx.clone(leaf) if isinstance(leaf, nnx.Pytree) else leaf


def as_pull(module: nnx.Module, found: Any, precision: float = 0.0) -> Pull:
    """What the function of `pull_program` gave, as numpy arrays by path."""
    graph, parameters, rest = split(module)
    outputs, by_parameters, by_inputs, after = found
    return Pull(
        outputs=[to_numpy(o) for o in outputs],
        inputs=[to_numpy(g) for g in by_inputs],
        parameters={} if by_parameters is None else leaf_values(nnx.merge(graph, by_parameters, rest)),
        state=leaf_values(nnx.merge(graph, parameters, after)),
        precision=precision,
    )


def record_jax(model: nnx.Module, paths: dict[str, str], call: Call) -> Recording:
    """The calls of the modules (key -> path) in an eager run of a copy of the model."""
    model = nnx.clone(model)  # a call may change statistics
    with watch_jax({key: submodule(model, path) for key, path in paths.items()}) as recording:
        given = call.map(jnp.asarray)
        model(*given.args, **given.kwargs)
    return recording


def record_exact(
    programs: Programs, wide: nnx.Module, plain: nnx.Module, paths: dict[str, str], call: Call, lift: Lift
) -> "Seen":
    """The same in float64."""

    def program(model: nnx.Module, call: Call) -> tuple[Any, ...]:
        graph, state = nnx.split(model)

        def run(state: nnx.State, given: list[Any]) -> Any:
            model = nnx.merge(graph, state, copy=True)
            new = {id(x): y for x, y in zip(arrays(call.given), given, strict=True)}
            args, kwargs = transform(lambda leaf: new.get(id(leaf), own(leaf)), call.given)
            with watch_jax({key: submodule(model, path) for key, path in paths.items()}) as recording:
                model(*args, **kwargs)
            return {
                key: [(_all_floats(c.given), _all_floats(c.output)) for c in calls]
                for key, calls in recording.calls.items()
            }  # as `seen` does, of traced arrays

        return object(), run, state, list(map(jnp.asarray, arrays(call.given)))

    with jax.enable_x64(True):
        exact = program(wide, call.double())
    return jax.tree.map(np.asarray, evaluated(programs.widest(exact, program(plain, call)), lift, *exact[2:]))


# The floating-point arrays, by name, that went into and came out of each call of each module.
Seen = dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]


def seen(recording: Recording) -> Seen:
    """The numbers of a recording."""

    def numbers(tree: Any) -> dict[str, np.ndarray]:
        return {name: to_numpy(x) for name, x in _all_floats(tree).items()}

    return {key: [(numbers(c.given), numbers(c.output)) for c in calls] for key, calls in recording.calls.items()}


def _all_floats(tree: Any) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves(tree) if is_array(leaf) and is_float(leaf)}


def pull_torch(
    module: torch.nn.Module,
    call: Call,
    inputs: Sequence[np.ndarray],
    cotangents: Sequence[np.ndarray],
    names: list[str],
    exact: Exact | None = None,
    noise: "Noise | None" = None,
    *,
    alone: bool,
    back: bool,
) -> Pull:
    """A copy of a torch module forward and back; `inputs` replace the floating-point arrays of `call` in order.

    Args:
        alone: without what a retrofitted model does around it.
        back: whether to go back; otherwise weights are in float64 only while they are used.
    """
    module = copied(module, exact, noise) if back else lent(module, exact)
    device = device_of(module)
    sources = [to_torch(array).to(device).requires_grad_() for array in inputs]
    # A module may change its input in place, which autograd allows for everything but leaves.
    given = call.with_floats([tensor * 1 for tensor in sources])
    autocast = torch.autocast(device.type, call.autocast, enabled=call.autocast is not None)
    lazily = nullcontext() if back or exact is None else widening(module, noise)
    with autocast, torch.set_grad_enabled(back), lazily, exact or TorchPrecision() as seen:
        outputs = picked((module.forward if alone else module)(*given.args, **given.kwargs), names)
        parameters = {
            name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad and back
        }
        wanted = [*sources, *parameters.values()] if back else []
        found = gradients(outputs, [to_torch(c).to(o) for c, o in zip(cotangents, outputs, strict=True)], wanted)
    return Pull(
        outputs=[to_numpy(o) for o in outputs],
        inputs=found[: len(sources)],
        parameters=dict(zip(parameters, found[len(sources) :], strict=True)) if back else {},
        state={name: to_numpy(b) for name, b in module.named_buffers(remove_duplicate=False)},
        precision=seen.coarsest if isinstance(seen, TorchPrecision) else 0.0,
    )


def record_torch(
    model: torch.nn.Module, paths: Sequence[str], call: Call, exact: Exact | None = None, noise: "Noise | None" = None
) -> Recording:
    """The calls of the modules at these paths in a run of a copy of the model, with `exact` in float64."""
    model = lent(model, exact)
    lazily = nullcontext() if exact is None else widening(model, noise)
    device = device_of(model)
    tensors = call.map(lambda x: to_torch(x).to(device))
    if noise:
        tensors = tensors.map(lambda x: noise(x) if is_float(x) else x)
    watched = watch_torch({path: model.get_submodule(path) for path in paths})
    with watched as recording, torch.no_grad(), lazily, exact or nullcontext():
        model(*tensors.args, **tensors.kwargs)
    return recording


def device_of(model: torch.nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def sharing(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a torch module on the memory of its parameters, which must not be written to; buffers are its own."""
    memo = {id(p): torch.nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def copied(model: torch.nn.Module, exact: Exact | None = None, noise: "Noise | None" = None) -> torch.nn.Module:
    """A copy of a torch module; with `exact` in float64, its weights off by the noise."""
    if exact is None:
        return copy.deepcopy(model)
    model = lent(model, exact)
    for parameter in model.parameters():
        if is_float(parameter):
            parameter.data = _wide(parameter, noise)
    return model


def _wide(parameter: torch.Tensor, noise: "Noise | None") -> torch.Tensor:
    return noise.weight(parameter) if noise else parameter.detach().to(torch.float64, copy=True)


def wide_bytes(model: torch.nn.Module) -> int:
    """How much memory the floating-point weights of a module take in float64."""
    return sum(8 * p.numel() for p in model.parameters() if is_float(p))


@contextmanager
def widening(model: torch.nn.Module, noise: "Noise | None") -> Iterator[None]:
    """While the context lasts, the weights of a `sharing` copy are in float64 while the module that has them runs.

    What a module takes from another one without calling it is lifted by `Exact` at each use.
    """
    narrow = {p: p.data for p in model.parameters()}  # now: in float64 runs what is read is widened
    running: Counter[torch.nn.Parameter] = Counter()
    handles = []

    def watch(module: torch.nn.Module) -> None:
        whole = wide_bytes(module) <= precision.LARGEST
        own = [p for p in module.parameters(recurse=whole) if is_float(p)]

        def enter(*_: Any) -> None:
            for p in own:
                if not running[p]:
                    p.data = _wide(narrow[p], noise)
                running[p] += 1

        def leave(*_: Any) -> None:
            for p in own:
                running[p] -= 1
                if not running[p]:
                    p.data = narrow[p]

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
        for child in () if whole else module.children():
            watch(child)

    watch(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lent(model: torch.nn.Module, exact: Exact | None) -> torch.nn.Module:
    """A `sharing` copy; with `exact`, its buffers are float64, and what it holds beside its leaves counts as constant.

    In training a model may write into anything: then nothing is shared.
    """
    model = copy.deepcopy(model) if exact is None and model.training else sharing(model)
    if exact is not None:
        for buffer in model.buffers():
            if is_float(buffer):
                buffer.data = buffer.double()
        kept = {id(x) for x in model.state_dict(keep_vars=True).values()}
        for module in model.modules():
            for name, tensor in {
                **vars(module),
                **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
            }.items():
                if isinstance(tensor, torch.Tensor) and id(tensor) not in kept:
                    # `double()` has widened it, but it was computed and rounded in float32: a table of frequencies.
                    narrow = tensor.float() if is_float(tensor) else tensor
                    computed = narrow if torch.equal(narrow.to(tensor), tensor) else tensor
                    setattr(module, name, exact.constant(computed.detach()))
    return model


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
    """Simulated rounding: a copy of a torch model with every buffer and module output off by ±`amplitude`.

    So are its weights, `weight`, when it runs in float64. What a run of it differs from the clean run, divided by
    `amplitude`, is how strongly each value answers to rounding (Monte Carlo arithmetic, D. S. Parker 1997). Calling it
    blurs a tensor.
    """

    def __init__(self, model: torch.nn.Module, amplitude: float, seed: int) -> None:
        self.amplitude = amplitude
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.model = sharing(model)
        # By their memory, which copies share: each time that a weight is asked for, it has the same noise.
        self.numbers = {p.data_ptr(): i for i, p in enumerate(self.model.parameters())}
        for buffer in self.model.buffers():
            if is_float(buffer):
                buffer.data = self(buffer.double())
        for module in self.model.modules():
            # Not the bound method: a copy of the model would copy this object with it.
            module.register_forward_hook(lambda *call: self._blur(*call))

    def _blur(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        factor = rules.cancellation(module, args)
        if factor > 1 and args[0].requires_grad:
            args[0].register_hook(lambda gradient: self(gradient, factor))
        return transform(lambda leaf: self(leaf, factor) if is_array(leaf) and is_float(leaf) else leaf, output)

    def weight(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter of the model, or of a copy that shares it, in float64 and blurred."""
        own = torch.Generator().manual_seed((self.seed * 2**32 + self.numbers[parameter.data_ptr()]) % 2**63)
        return self(parameter.detach().double(), generator=own)

    def __call__(
        self, tensor: torch.Tensor, factor: float = 1.0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        signs = torch.randint(2, tensor.shape, generator=generator or self.generator, dtype=torch.float64)
        signs.mul_(2 * factor * self.amplitude).add_(1 - factor * self.amplitude)
        return tensor * signs.to(tensor.device)
