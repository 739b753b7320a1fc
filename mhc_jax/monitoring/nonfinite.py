"""Checks for NaN and infinity, paid for only when asked.

Layers state what must be finite with `expect_finite`, which compiles to nothing. `report_nonfinite` turns these
statements into an error that names the first layer where one fails, as does `chex.chexify`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array

Result = TypeVar("Result")

# Part of the key under which compiled functions are found: one that was compiled without the checks gets them.
_asked = jax.make_user_context(default_value=False)


def expect_finite(value: Any, name: str, **where: int | Array) -> None:
    """States that all floats of the pytree `value` are finite; nothing is traced unless `report_nonfinite` asks.

    Args:
        value: arrays; those of other dtypes are passed over.
        name: what the message says of it, with the names of `where` in braces: `"state of layer {layer}"`.
        where: integers known now or only when the program runs.
    """
    if not _asked.value:
        return
    floats = [leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    finite = jnp.array([jnp.isfinite(leaf).all() for leaf in floats]).all()
    checkify.debug_check(finite, name + " is not finite", **where)


def report_nonfinite(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, compiled with the checks inside it: for finding where a NaN comes from, not for every day.

    Every call waits for its result. Buffers that `function` donates are kept, so that the state that led to an error
    can be looked at.

    Args:
        function: of pytrees or NNX modules; a function under `jax.jit`, such as a train step, is fine.

    Returns:
        A function with the same arguments and result, which raises a FloatingPointError with the name of the first
        thing that was not finite. Changes it makes to an NNX module in place are not kept.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import MHCStack
        >>> stack = MHCStack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), depth=9, rngs=nnx.Rngs(0))
        >>> stack.layers.bias[...] = stack.layers.bias.at[6, 0].set(jnp.nan)
        >>> report_nonfinite(lambda stack, x: stack(x))(stack, jnp.ones((2, 4)))
        Traceback (most recent call last):
        FloatingPointError: branch of layer 6 is not finite
    """
    checked = jax.jit(checkify.checkify(function))

    @functools.wraps(function)
    def call(*args: Any) -> Result:
        with _asked(True):
            error, result = checked(*args)
        if message := error.get():
            raise FloatingPointError(message.removesuffix(" (`check` failed)"))
        return result

    return call
