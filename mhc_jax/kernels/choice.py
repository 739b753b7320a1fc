"""One operation in two forms, a kernel and plain JAX operations, either of which has derivatives of any order."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from jaxtyping import Array

Implementation = Literal["xla", "pallas"] | None
Options = tuple[tuple[str, Any], ...]


def check_implementation(implementation: Implementation) -> None:
    """Raises a ValueError for what is no implementation."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be 'xla', 'pallas' or None, got {implementation!r}")


def implemented(implementation: Implementation, kernel: Callable[..., Any], xla: Callable[..., Any]) -> Any:
    """The form that is asked for, of two functions `(*arrays, **options)` that compute the same.

    JAX cannot differentiate a kernel. What is not given a rule of its own (second derivatives, then) is differentiated
    as `xla`.
    """

    def call(*arrays: Array, **options: Any) -> Any:
        # No numbers are no block to work on.
        if implementation == "pallas" and all(array.size for array in arrays):
            return _kernel(kernel, xla, tuple(sorted(options.items())), arrays)
        return xla(*arrays, **options)

    return call


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _kernel(kernel: Callable[..., Any], xla: Callable[..., Any], options: Options, arrays: tuple[Array, ...]) -> Any:
    return _launched(kernel, options, arrays)


@_kernel.defjvp
def _kernel_jvp(
    kernel: Callable[..., Any], xla: Callable[..., Any], options: Options, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    plain = partial(xla, **dict(options))
    return _kernel(kernel, xla, options, *primals), jax.jvp(plain, *primals, *tangents)[1]


# Compiled, so that a call outside jit finds what an earlier one compiled; inside, the kernel stands as it is.
@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _launched(kernel: Callable[..., Any], options: Options, arrays: tuple[Array, ...]) -> Any:
    return kernel(*arrays, **dict(options))
