"""Which form of an operation runs, a kernel or plain JAX operations. Either has derivatives of any order."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
from jax import lax
from jaxtyping import Array

from mhc_jax import meshes
from mhc_jax.kernels.refusal import refused

Implementation = Literal["xla", "pallas"] | None
Options = tuple[tuple[str, Any], ...]

# What `None` means, by operation and platform ("cpu", "tpu", "cuda", "rocm"); what is not here is XLA's. XLA's forms
# run on any mesh. A program that XLA splits over several TPUs, by Auto axes, does not compile with a kernel in it
# ("Mosaic kernels cannot be automatically partitioned"), and libtpu 0.0.42 does not know the call of
# `jax.experimental.custom_partitioning`. How many devices there will be is not known when a choice is made, so a kernel
# has to be asked for, even where it moves less.
#
# What the lab says, XLA over kernel (compiled for, bfloat16, 4096 tokens, n = 4, C = 2048):
#
#               MB that cross the memory                                 estimated time, us
#     mix       the same, but XLA makes one pass of it and the branch
#     write     v5e 151 over 151, H100 151 over 152                      v5e 185 over 245, H100 45 over 45
#     read      v5e 151 over 151, H100 251 over 160                      v5e 193 over 682, H100 75 over 48
#     boundary  v5p 9405 over 5121 (4 layers, forward and backward); there is no kernel of it for a GPU
CHOICES: Mapping[str, Mapping[str, Literal["xla", "pallas"]]] = {
    "mix": {},
    "sinkhorn": {},
    "stream_boundary": {},
    "stream_read": {},
    "stream_write": {},
}

# Where an operation has no kernel, which is an error of whoever asks for one there: what does have one.
MISSING: Mapping[str, Mapping[str, str]] = {
    "stream_boundary": {"cuda": "TPUs", "rocm": "TPUs"},
}


def check_implementation(implementation: Implementation) -> None:
    """Raises a ValueError for what is no implementation."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be 'xla', 'pallas' or None, got {implementation!r}")


def refuse_kernels(implementation: Implementation, option: str, value: object, able: str) -> None:
    """Raises a ValueError if kernels are asked for, which cannot do what an option says, and names what they can."""
    if implementation == "pallas":
        raise ValueError(
            f"implementation='pallas' has no kernels for {option}={value!r}, only for {able}: use implementation='xla'"
        )


def chosen(
    operation: str, implementation: Implementation, kernel: Callable[..., Any], xla: Callable[..., Any]
) -> Callable[..., Any]:
    """The form that is asked for; of None that of `CHOICES`, for the platform that the program is compiled for.

    Args:
        operation: a name in `CHOICES`.
        kernel, xla: functions of the same arrays that compute the same.
    """
    if implementation is not None:
        return kernel if implementation == "pallas" else xla
    kernels = {platform: kernel for platform, form in CHOICES[operation].items() if form == "pallas"}
    return partial(lax.platform_dependent, default=xla, **kernels) if kernels else xla


def implemented(
    operation: str, implementation: Implementation, kernel: Callable[..., Any], xla: Callable[..., Any]
) -> Any:
    """`chosen` of two functions `(*arrays, **options)`, of which JAX cannot differentiate the kernel. None is no array.

    What is not given a rule of its own (second derivatives, then) is differentiated as `xla`. In `jax.shard_map` the
    results vary over all axes of the mesh over which any of the arrays does.
    """

    def call(*arrays: Array | None, **options: Any) -> Any:
        plain = partial(xla, **options)

        def by_kernel(*arrays: Array | None) -> Any:
            return _kernel(operation, kernel, xla, tuple(sorted(options.items())), arrays)

        # No numbers are no block to work on.
        some = all(array.size for array in jax.tree.leaves(arrays))
        arrays = meshes.alike(*arrays)
        return chosen(operation, implementation if some else "xla", by_kernel, plain)(*arrays)

    return call


# Compiled, so that a call outside jit finds what an earlier one compiled; inside, the kernel stands as it is.
@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
@partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _kernel(
    operation: str,
    kernel: Callable[..., Any],
    xla: Callable[..., Any],
    options: Options,
    arrays: tuple[Array | None, ...],
) -> Any:
    by_kernel, plain = partial(kernel, **dict(options)), partial(xla, **dict(options))
    refusals = {
        platform: partial(
            refused,
            f"implementation='pallas' has no kernel of {operation} for {platform}, only for {able}: use 'xla' or None",
            plain,
        )
        for platform, able in MISSING.get(operation, {}).items()
    }
    return lax.platform_dependent(*arrays, default=by_kernel, **refusals) if refusals else by_kernel(*arrays)


@_kernel.defjvp
def _kernel_jvp(
    operation: str,
    kernel: Callable[..., Any],
    xla: Callable[..., Any],
    options: Options,
    primals: Any,
    tangents: Any,
) -> tuple[Any, Any]:
    plain = partial(xla, **dict(options))
    return _kernel(operation, kernel, xla, options, *primals), jax.jvp(plain, *primals, *tangents)[1]
