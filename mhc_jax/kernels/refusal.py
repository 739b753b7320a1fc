"""A kernel that does not exist for a platform: an error where a program is lowered for it, and on no other."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array


def refused(message: str, function: Callable[..., Any], *arrays: Array | None) -> Any:
    """In place of `function(*arrays)`: a NotImplementedError with this message as soon as it is lowered.

    Which platform a program is for is known no earlier, and `jax.lax.platform_dependent` traces what it has for all.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*arrays)
    given = jax.tree.leaves(arrays)
    results = _refused.bind(*given, message=message, avals=tuple(closed.out_avals))
    return jax.tree.unflatten(jax.tree.structure(out), results)


_refused = Primitive("kernel_refused")
_refused.multiple_results = True


@_refused.def_abstract_eval
def _(*_: Any, message: str, avals: tuple[Any, ...]) -> list[Any]:
    return list(avals)


def _batched(arrays: Any, axes: Any, *, message: str, avals: tuple[Any, ...]) -> tuple[list[Any], list[int]]:
    (size,) = {array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None}
    many = tuple(aval.update(shape=(size, *aval.shape), sharding=None) for aval in avals)
    return _refused.bind(*arrays, message=message, avals=many), [0] * len(many)


def _lowered(context: Any, *_: Any, message: str, avals: tuple[Any, ...]) -> Any:
    raise NotImplementedError(message)


batching.primitive_batchers[_refused] = _batched
mlir.register_lowering(_refused, _lowered)
