"""A function as the operations it is made of, so that JAX finds again what it has compiled for the same ones.

JAX looks for compiled code under the function object it is given. A branch that is wrapped anew at every call, or a
`lambda`, is never found again; and one that is, may have closed over arrays that were replaced since.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jaxtyping import Array

Shared = list[Array | np.ndarray]
"""What a function closed over: arrays, and tables of numbers that JAX leaves to numpy."""

_SMALL = 1024


class Traced:
    """`function(shared, *args)`: equal, and of equal hash, to every other of the same operations.

    It is called with arrays like those it was traced with, and holds none itself.

    Attributes:
        out: the types of what it gives, in their tree.
    """

    def __init__(self, jaxpr: core.Jaxpr, out: Any, key: Any) -> None:
        self._jaxpr, self.out, self._key = jaxpr, out, key
        self._hash = hash(key)

    def __call__(self, shared: Shared, *args: Any) -> Any:
        leaves = jax.core.eval_jaxpr(self._jaxpr, shared, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(self.out), leaves)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traced) and self._key == other._key


def trace(function: Callable[..., Any], *args: Any, source: Any = None) -> tuple[Traced, Shared]:
    """`function` for arguments like `args`, and the arrays that it closed over, which are the `shared` of its calls.

    Traced anew at each call, so that what is closed over is what it is now.

    Args:
        source: what `function` was made from, `function` itself if it is None. Functions with derivative rules inside
            derivative rules, such as `jax.nn.relu`, are equal only if their sources are.
    """
    source = function if source is None else source
    # A function of its own, since JAX would remember what it found for one that it has seen.
    closed, out = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    rules: list[Any] = []
    key: tuple[Any, ...] = (jax.tree.structure(out), _jaxpr_key(closed.jaxpr, rules))
    if rules:
        key = (*key, _derivative_key(Traced(closed.jaxpr, out, None), closed.consts, args, out, source))
    return Traced(closed.jaxpr, out, key), closed.consts


def _derivative_key(traced: Traced, shared: Shared, args: Any, out: Any, source: Any) -> Any:
    """Stands for the derivative rules in `traced`, which are functions and cannot be compared: what they compute."""

    def pullback(function: Callable[..., Any]) -> Callable[..., list[Any]]:
        def gradients(cotangent: Any, *given: Any) -> list[Any]:
            leaves = jax.tree.leaves(jax.vjp(function, *given)[1](cotangent))
            return [leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0]

        return gradients

    try:
        closed = jax.make_jaxpr(pullback(traced))(out, shared, *args)
    except Exception:
        # A rule has no derivative by a table that it closed over; JAX's error for that has no public class.
        try:
            closed = jax.make_jaxpr(pullback(lambda *args: traced(shared, *args)))(out, *args)
        except (TypeError, ValueError, NotImplementedError):
            return None  # a function without a reverse derivative is its operations alone
    rules: list[Any] = []
    # The arrays that a rule closed over are no arguments: they are part of what it computes.
    key = _jaxpr_key(closed.jaxpr, rules), tuple(map(_constant_key, closed.consts))
    # Rules of rules matter to second derivatives only; there, the same source has to do.
    return (*key, _value_key(source, [])) if rules else key


class _Same:
    """Equal to what stands for the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _jaxpr_key(jaxpr: core.Jaxpr, rules: list[Any]) -> tuple[Any, ...]:
    """All of a jaxpr that decides what it computes; appends the derivative rules, which are left out, to `rules`."""
    numbers: dict[core.Var, int] = {}

    def atom(a: Any) -> Any:
        return _value_key(a.val, rules) if isinstance(a, core.Literal) else numbers.setdefault(a, len(numbers))

    def variables(atoms: Any) -> tuple[Any, ...]:
        return tuple((atom(a), a.aval) for a in atoms)

    def equation(eqn: core.JaxprEqn) -> tuple[Any, ...]:
        params = tuple(_params(eqn, rules))
        return eqn.primitive, variables(eqn.invars), variables(eqn.outvars), params, eqn.ctx, frozenset(eqn.effects)

    given = variables(jaxpr.constvars), variables(jaxpr.invars)
    return (*given, tuple(map(equation, jaxpr.eqns)), variables(jaxpr.outvars))


def _params(eqn: core.JaxprEqn, rules: list[Any]) -> Iterator[tuple[str, Any]]:
    custom = eqn.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call"))
    for name, value in sorted(eqn.params.items()):
        if custom and not isinstance(value, (core.Jaxpr, core.ClosedJaxpr, int)):
            rules.append(value)
        else:
            yield name, _value_key(value, rules)


def _value_key(value: Any, rules: list[Any]) -> Any:
    if isinstance(value, core.ClosedJaxpr):
        return _jaxpr_key(value.jaxpr, rules), tuple(map(_constant_key, value.consts))
    if isinstance(value, core.Jaxpr):
        return _jaxpr_key(value, rules)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value), tuple(_value_key(each, rules) for each in value)
    if isinstance(value, (float, np.generic)):
        return type(value), np.asarray(value).tobytes()  # 0.0 == -0.0, and NaN is not NaN
    if isinstance(value, np.ndarray):
        return _constant_key(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value  # True == 1 == 1.0


def _constant_key(value: Any) -> Any:
    # Tables that an operation makes for itself are new at each call; what is large, or elsewhere, is not looked into.
    here = isinstance(value, np.ndarray) or (
        isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_fully_addressable
    )
    if not here or value.size > _SMALL or jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        return _Same(value)
    return value.shape, value.dtype, getattr(value, "weak_type", False), np.asarray(value).tobytes()
