"""What happens around the calls of the modules of a retrofitted model: each has a part, told by its class.

A module keeps its attributes and its place. It gets a subclass of its class, of the same name, whose method does what
the part says beside the method of old. The subclass is part of the graph of a model, so that `nnx.split` and
`nnx.merge`, and with them every transformation of NNX, keep it.
"""

import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from mhc_jax.nn.connected import BlockConnections, Kind

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Frame:
    """A block that runs: its connections, and what the branch that runs in it has read."""

    connections: BlockConnections
    branch: str = ""
    read: tuple[Any, ...] = ()


class _Running(threading.local):
    frame: _Frame | None = None


_running = _Running()


@contextmanager
def _framed(frame: _Frame) -> Iterator[None]:
    outer, _running.frame = _running.frame, frame
    try:
        yield
    finally:
        _running.frame = outer


@dataclass(frozen=True)
class Call:
    """A call of a module, as it was before it was retrofitted."""

    module: Any
    run: Callable[..., Any]
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def state(self) -> Any:
        """The first array among the arguments, in the order of the signature.

        Raises:
            TypeError: there is none.
        """
        order = sorted(self.kwargs, key=lambda name: self.names.index(name) if name in self.names else len(self.names))
        given = (*self.args, *(self.kwargs[name] for name in order))
        found = next((value for value in given if _is_array(value)), None)
        if found is None:
            raise TypeError(
                f"{type(self.module).__name__} must be called with an array, its state; got {_shown(given)}"
            )
        return found

    def __call__(self) -> Any:
        return self.run(*self.args, **self.kwargs)

    def on(self, old: Any, new: Any) -> Any:
        """Its result for `new` where `old` is given."""
        kwargs = {name: new if value is old else value for name, value in self.kwargs.items()}
        return self.run(*(new if value is old else value for value in self.args), **kwargs)


@runtime_checkable
class Role(Protocol):
    """The part of a module; a hashable value. One that `stays` is played by a module that is called by itself, too."""

    stays: ClassVar[bool]

    def around(self, call: Call) -> Any:
        """What a call gives in place of what it gave."""


@dataclass(frozen=True)
class Runs:
    """A block. The first one of a stack makes the states (`opens`), and the last one gives one again (`closes`)."""

    stays: ClassVar[bool] = True

    kind: Kind
    opens: bool
    closes: bool

    def around(self, call: Call) -> Any:
        state = call.state()
        states = self.kind.expand(state) if self.opens else state
        frame = _Frame(call.module.hyper_connections)
        with _framed(frame):
            output = call.on(state, states)
        if frame.read:
            raise RuntimeError(f"branch {frame.branch!r} of a {type(call.module).__name__} has begun, and not ended")
        return _with_array(call.module, output, states.shape, self.kind.reduce) if self.closes else output


@dataclass(frozen=True)
class Begins:
    """Where a branch begins: with what it reads in place of the states. By itself, a call is what it was."""

    stays: ClassVar[bool] = False

    branch: str

    def around(self, call: Call) -> Any:
        frame = _running.frame
        if frame is None:
            return call()
        if frame.read:
            raise RuntimeError(f"branch {self.branch!r} has begun before the end of {frame.branch!r}")
        states = call.state()
        state, *rest = getattr(frame.connections, self.branch)(states)
        frame.branch, frame.read = self.branch, (states, *rest)
        return call.on(states, state)


@dataclass(frozen=True)
class Ends:
    """Where a branch ends: with what the block is to add to the states in place of the output."""

    stays: ClassVar[bool] = False

    def around(self, call: Call) -> Any:
        output = call()
        frame = _running.frame
        if frame is None:
            return output
        if not frame.read:
            raise RuntimeError(f"a branch has ended, in a {type(call.module).__name__}, that has not begun")
        (states, *rest), frame.read = frame.read, ()
        added = getattr(frame.connections, frame.branch).added
        shape = (*states.shape[:-2], states.shape[-1])
        return _with_array(call.module, output, shape, lambda y: added(states, y, *rest))


@dataclass(frozen=True)
class Opens:
    """What puts out the first state of a scan: it puts out the states."""

    stays: ClassVar[bool] = False

    kind: Kind

    def around(self, call: Call) -> Any:
        return _with_array(call.module, call(), None, self.kind.expand)


@dataclass(frozen=True)
class Closes:
    """What takes the last state of a scan: it is given one out of the states."""

    stays: ClassVar[bool] = False

    kind: Kind

    def around(self, call: Call) -> Any:
        states = call.state()
        return call.on(states, self.kind.reduce(states))


def _shown(tree: Any) -> str:
    """A tree with the types of its arrays in the place of these."""
    return str(jax.tree.map(lambda leaf: str(jax.typeof(leaf)) if _is_array(leaf) else leaf, tree))


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _with_array(module: Any, output: Any, shape: tuple[int, ...] | None, change: Callable[[Any], Any]) -> Any:
    """An output like `output` with another array in place of its first one of that shape.

    Raises:
        TypeError: it is no such array, and no tuple, list or dict that holds one.
    """

    def fits(value: Any) -> bool:
        return _is_array(value) and shape in (None, value.shape)

    if fits(output):
        return change(output)
    items = (
        output.items() if isinstance(output, dict) else enumerate(output if isinstance(output, tuple | list) else ())
    )
    key = next((key for key, value in items if fits(value)), None)
    if key is None:
        wanted = "an array" if shape is None else f"an array of shape {shape}"
        raise TypeError(
            f"{type(module).__name__} must put out {wanted}, alone or in a tuple, list or dict; got {_shown(output)}"
        )
    if isinstance(output, dict):
        return output | {key: change(output[key])}
    values = [change(value) if i == key else value for i, value in enumerate(output)]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


@cache
def intercept(kind: Any, method: str, roles: tuple[Role, ...]) -> Any:
    """A subclass of `kind` whose `method` does what the roles say, the last one outermost.

    By itself, without a part, a module is called by `plain_call`; it has that where its part does not stay.
    """
    own: Callable[..., Any] = getattr(kind, method)
    names = tuple(inspect.signature(own).parameters)[1:]
    stays = any(role.stays for role in roles)

    def plain_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = partial(own, self) if stays else self.plain_call
        for role in roles:
            run = partial(_around, role, self, run, names)
        return run(*args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        # A pickle names the class by what it is made of.
        function, arguments, *rest = kind.__reduce_ex__(self, protocol)
        return _rebuilt, (function, kind, method, roles, arguments[1:]), *rest

    body: dict[str, Any] = {method: called, "changed_from": kind, "__reduce_ex__": reduce_ex}
    body |= {} if stays else {"plain_call": plain_call}
    body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return types.new_class(
        kind.__name__, (kind,), {"pytree": kind._pytree__is_pytree}, lambda space: space.update(body)
    )


def _around(role: Role, module: Any, run: Callable[..., Any], names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    return role.around(Call(module, run, names, args, kwargs))


def _rebuilt(function: Any, kind: type, method: str, roles: tuple[Role, ...], args: Any) -> Any:
    return function(intercept(kind, method, roles), *args)


def changed(module: Any) -> bool:
    """Whether a module has a part."""
    return "changed_from" in vars(type(module))


def given_back(module: Any) -> None:
    """Its own class."""
    object.__setattr__(module, "__class__", type(module).changed_from)
