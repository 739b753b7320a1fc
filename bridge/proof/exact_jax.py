"""A JAX program in float64, whatever its steps are fixed to: casts inside are lifted.

A model that computes a softmax in float32 or a norm in bfloat16 has no float64 run of its own. So its program is traced
and evaluated operation by operation with every floating-point number in float64. What cannot be lifted, because its
meaning depends on the bits of a number or because we cannot see into it, runs as it is, and is named.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from bridge.proof import precision
from bridge.proof.precision import epsilon


@dataclass
class Lift:
    """What one evaluation in float64 met.

    Attributes:
        seed: None, or for random numbers: constants that the program holds rounded are then off by one more rounding.
        rounded: whether there were such constants: a literal in a step that is fixed to float32.
        unlifted: operations that ran in their own precision.
    """

    seed: int | None = None
    rounded: bool = False
    unlifted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(self.seed)

    def constant(self, value: Any) -> Any:
        """A constant of the program in float64."""
        if not _is_float(value.dtype):
            return value
        exact = np.asarray(value).astype(np.float64)
        off = inexact(np.asarray(value))
        self.rounded |= bool(off.any())
        if self.seed is not None:
            exact = blurred(exact, off * epsilon(value.dtype) / 2, self.generator)
        return jnp.asarray(exact)


def inexact(array: np.ndarray) -> np.ndarray:
    """Where numbers look rounded: neither whole nor short in binary (0.5), and of less than float64."""
    if array.dtype == np.float64:
        return np.zeros(array.shape, bool)
    wide = array.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        mantissa = np.ldexp(np.frexp(wide)[0], int(-np.log2(epsilon(array.dtype))) // 2)  # whole: the lower bits are 0
        short = (mantissa == np.rint(mantissa)) | (wide == np.rint(wide))
    return np.asarray(~short & np.isfinite(wide))  # numpy makes numbers of arrays without axes


def blurred(array: np.ndarray, amplitude: Any, generator: np.random.Generator) -> np.ndarray:
    """The array with every number off by plus or minus `amplitude`, relatively."""
    return np.asarray(array * (1 + amplitude * generator.choice([-1.0, 1.0], array.shape)))


_compilations: dict[Any, Any] = {}
_KEPT = 512
# A reduction names the function that it was made from beside the program of it, which is all that counts.
_MADE_FROM = re.compile(r"computation=<function .*? at 0x\w+>")
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Program:
    """A JAX function as traced now, with nothing kept from earlier traces; called, it runs as it is.

    Programs that are equal to the letter are compiled once in a process.

    Args:
        function: takes and gives trees of arrays.
        args: arguments of the shapes and dtypes to trace it for.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        self.tree = jax.tree.structure(shapes)
        self.text = _MADE_FROM.sub("", str(self.closed.jaxpr))

    def __call__(self, *args: Any) -> Any:
        given, step = self._given(args), partial(jax.core.eval_jaxpr, self.closed.jaxpr)
        run = step if _is_large(given) else self._compiled(None, lambda: (jax.jit(step), Lift()))[0]
        return jax.tree.unflatten(self.tree, run(self.closed.consts, *given))

    def exact(self, lift: Lift, *args: Any) -> Any:
        """The same in float64. Call it, and use what it returns, with x64 enabled."""
        consts = [lift.constant(c) if hasattr(c, "dtype") else c for c in self.closed.consts]
        given = self._given(args)
        if _is_large(given):
            return jax.tree.unflatten(self.tree, _evaluate(self.closed.jaxpr, consts, given, lift))

        def make() -> tuple[Callable[..., Any], Lift]:
            inside = Lift(lift.seed)

            def run(consts: list[Any], *given: Any) -> list[Any]:
                return _evaluate(self.closed.jaxpr, consts, given, inside)

            return jax.jit(run, compiler_options=_FAST), inside

        run, inside = self._compiled(("float64", lift.seed), make)
        results = run(consts, *given)
        lift.rounded |= inside.rounded
        lift.unlifted |= inside.unlifted
        return jax.tree.unflatten(self.tree, results)

    def _compiled(self, kind: Any, make: Callable[[], Any]) -> Any:
        if " at 0x" in self.text:  # it calls a function that no text describes
            return make()
        key = (self.text, kind)
        if key not in _compilations:
            _compilations[key] = make()
            if len(_compilations) > _KEPT:
                _compilations.pop(next(iter(_compilations)))
        return _compilations[key]

    def coarsest(self) -> float:
        """Epsilon of the coarsest floating-point type that it computes in."""
        return _coarsest(self.closed.jaxpr)

    def _given(self, args: Any) -> list[Any]:
        # A program that was traced without x64 takes 32-bit integers.
        return [
            x if _is_float(x.dtype) or not isinstance(x.dtype, np.dtype) else jnp.asarray(x, aval.dtype)
            for x, aval in zip(map(_array, jax.tree.leaves(args)), self.closed.in_avals, strict=True)
        ]


def _is_large(arrays: list[Any]) -> bool:
    """Whether to run step by step: compiled, a program has all its arguments in float64 at once."""
    return sum(8 * x.size for x in arrays if _is_float(x.dtype)) > precision.LARGEST


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _dtype(variable: Any) -> Any:
    return getattr(variable.aval, "dtype", np.dtype(bool))  # a token has none


def _double(dtype: Any) -> Any:
    if not _is_float(dtype):
        return dtype
    return np.dtype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)


def widened(x: Any) -> jax.ShapeDtypeStruct:
    """What an array is in float64, without its values."""
    return jax.ShapeDtypeStruct(x.shape, _double(x.dtype))


def _up(x: Any) -> Any:
    dtype = getattr(x, "dtype", np.dtype(bool))
    return x if _double(dtype) == dtype else jnp.asarray(x).astype(_double(dtype))


def _coarsest(jaxpr: Any) -> float:
    found = 0.0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            # A cotangent of type float0 and a random key are no numbers.
            if jnp.issubdtype(_dtype(variable), jnp.floating):
                found = max(found, epsilon(_dtype(variable)))
        for inner in jaxprs_in_params(equation.params):
            found = max(found, _coarsest(inner))
    return found


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Any, lift: Lift) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    last = {v: i for i, equation in enumerate(jaxpr.eqns) for v in equation.invars if not isinstance(v, jex.Literal)}
    kept = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}

    def read(variable: Any) -> Any:
        if isinstance(variable, jex.Literal):
            return lift.constant(np.asarray(variable.val, _dtype(variable)))
        return _up(values[variable])

    for i, equation in enumerate(jaxpr.eqns):
        rule = _RULES.get(equation.primitive.name, _plain)
        # What hands its arguments on to a program inside does so as they are: they are widened where they are used.
        given = [
            values[v] if rule in _HANDING_ON and not isinstance(v, jex.Literal) else read(v) for v in equation.invars
        ]
        results = rule(equation, given, lift)
        if any(hasattr(r, "dtype") and _double(r.dtype) != r.dtype for r in results):
            lift.unlifted.add(equation.primitive.name)
        values.update(zip(equation.outvars, results, strict=True))
        for v in {v for v in equation.invars if not isinstance(v, jex.Literal)}:
            if last[v] == i and v not in kept:
                values.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def _closed(inner: Any, args: Sequence[Any], lift: Lift) -> list[Any]:
    if isinstance(inner, jex.ClosedJaxpr):
        return _evaluate(
            inner.jaxpr, [lift.constant(c) if hasattr(c, "dtype") else c for c in inner.consts], args, lift
        )
    return _evaluate(inner, (), args, lift)


def _inline(name: str) -> Callable[..., list[Any]]:
    return lambda equation, given, lift: _closed(equation.params[name], given, lift)


def _scan(equation: Any, given: list[Any], lift: Lift) -> list[Any]:
    p = equation.params
    carried = p["num_consts"] + p["num_carry"]
    consts = given[: p["num_consts"]]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        out = _closed(p["jaxpr"], [*consts, *carry, *xs], lift)
        return out[: p["num_carry"]], out[p["num_carry"] :]

    start = list(map(_up, given[p["num_consts"] : carried]))
    carry, ys = jax.lax.scan(body, start, given[carried:], length=p["length"], reverse=p["reverse"])
    return [*carry, *ys]


def _while(equation: Any, given: list[Any], lift: Lift) -> list[Any]:
    p = equation.params
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: _closed(p["cond_jaxpr"], [*given[:first], *carry], lift)[0],
        lambda carry: _closed(p["body_jaxpr"], [*given[first:second], *carry], lift),
        given[second:],
    )


def _cond(equation: Any, given: list[Any], lift: Lift) -> list[Any]:
    branches = [lambda *args, b=branch: _closed(b, args, lift) for branch in equation.params["branches"]]
    index = given[0].astype(jnp.int32) if given[0].dtype == bool else given[0]
    return jax.lax.switch(index, branches, *given[1:])


def _same(equation: Any, given: list[Any], lift: Lift) -> list[Any]:
    return given  # reduce_precision


def _bits(equation: Any, given: list[Any], lift: Lift) -> list[Any]:
    if _is_float(_dtype(equation.invars[0])):
        return _as_it_is(equation, given, lift)
    return [_up(r) for r in _bind(equation, given, equation.params)]  # the bits of an integer: exact


def _as_it_is(equation: Any, given: list[Any], lift: Lift) -> list[Any]:
    """In the precision that it is fixed to."""
    lift.unlifted.add(equation.primitive.name)
    own = [x.astype(_dtype(v)) if _is_float(_dtype(v)) else x for x, v in zip(given, equation.invars, strict=True)]
    return [_up(r) for r in _bind(equation, own, equation.params)]


_DTYPES = ("new_dtype", "dtype", "preferred_element_type", "out_dtype")
# Their rule of combination is a program of its own, which holds nothing but the operation.
_COMBINING = ("reduce", "reduce_window", "scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min")
# We cannot look into them.
_OPAQUE = ("pallas_call", "pure_callback", "io_callback", "ffi_call", "custom_call", "shard_map", "linear_solve")


def _plain(equation: Any, given: list[Any], lift: Lift) -> list[Any]:
    name, params = equation.primitive.name, dict(equation.params)
    opaque = name in _OPAQUE or any(True for _ in jaxprs_in_params(params))
    if opaque and not name.startswith(_COMBINING) and _computes(equation):
        return _as_it_is(equation, given, lift)
    for key in _DTYPES:
        if params.get(key) is not None:
            params[key] = _double(params[key])
    if not isinstance(params.get("precision"), (type(None), tuple, jax.lax.Precision)):
        params["precision"] = None  # an algorithm, which is one for a dtype
    for key, inner in params.items():
        if isinstance(inner, (jex.Jaxpr, jex.ClosedJaxpr)):
            params[key] = _lifted(inner, lift)
    return _bind(equation, given, params)


def _computes(equation: Any) -> bool:
    return any(_is_float(_dtype(v)) for v in equation.outvars)


def _lifted(inner: Any, lift: Lift) -> Any:
    avals = inner.in_avals if isinstance(inner, jex.ClosedJaxpr) else [v.aval for v in inner.invars]
    shapes = [jax.ShapeDtypeStruct(a.shape, _double(a.dtype)) for a in avals]
    made = jax.make_jaxpr(lambda *args: _closed(inner, args, lift))(*shapes)
    return made if isinstance(inner, jex.ClosedJaxpr) else made.jaxpr


def _bind(equation: Any, given: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    result = equation.primitive.bind(*given, **equation.primitive.get_bind_params(params))
    return list(result) if equation.primitive.multiple_results else [result]


_jaxpr, _call_jaxpr = _inline("jaxpr"), _inline("call_jaxpr")
_HANDING_ON = (_jaxpr, _call_jaxpr, _scan)
_RULES: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "remat2", "checkpoint"), _jaxpr),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "core_call"), _call_jaxpr),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "reduce_precision": _same,
    "bitcast_convert_type": _bits,
}
