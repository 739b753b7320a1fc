"""Which form of an operation runs, a kernel or plain JAX operations. Either has derivatives of any order."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
from jax import lax
from jaxtyping import Array

from mhc_jax import meshes

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
#     write     v5e 151 over 151, v5p 164 over 152, H100 151 over 152  v5e 185 over 185, v5p 67 over 62, H100 45 over 45
#      derived  v5e 370 over 235, v5p 340 over 236                      v5e 452 over 287, v5p 138 over 96
#     read      v5e 151 over 151, H100 251 over 160                     v5e 193 over 242, H100 75 over 48
#     boundary  v5p 9405 over 5121, H100 10092 over 5276                H100 3011 over 1574
#               (4 layers, forward and backward, of which scan and copies are 3570 MB on H100)
#
# On one GPU that would be reason enough for the boundary's kernel. It is not None's choice there because nobody has run
# it on a card, what the cache loses between its two looks at a tile is in no figure of a compiler, and phi's derivative
# is summed in no fixed order, which whoever has chosen nothing may not expect.
CHOICES: Mapping[str, Mapping[str, Literal["xla", "pallas"]]] = {
    "mix": {},
    "sinkhorn": {},
    "stream_boundary": {},
    "stream_read": {},
    "stream_write": {},
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
            return _kernel(kernel, xla, tuple(sorted(options.items())), arrays)

        # No numbers are no block to work on.
        some = all(array.size for array in jax.tree.leaves(arrays))
        arrays = meshes.alike(*arrays)
        return chosen(operation, implementation if some else "xla", by_kernel, plain)(*arrays)

    return call


# Compiled, so that a call outside jit finds what an earlier one compiled; inside, the kernel stands as it is.
@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _kernel(
    kernel: Callable[..., Any], xla: Callable[..., Any], options: Options, arrays: tuple[Array | None, ...]
) -> Any:
    return kernel(*arrays, **dict(options))


@_kernel.defjvp
def _kernel_jvp(
    kernel: Callable[..., Any], xla: Callable[..., Any], options: Options, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    plain = partial(xla, **dict(options))
    return _kernel(kernel, xla, options, *primals), jax.jvp(plain, *primals, *tangents)[1]


def apart(implementation: Implementation) -> bool:
    """Whether branches in turn are better written and read apart, not by boundaries: on a CPU, if no form is asked for.

    To write the streams again in the backward pass costs it more than to load them: a step of `benchmarks.streams`
    takes 1.44 times the residual decoder's with boundaries, 1.31 with a write and a read in the place of each, and 1.22
    where no scan carries a branch's output and its maps either. While tracing, not by
    `jax.lax.platform_dependent`: there, what one form keeps for its derivative all forms keep. To compile for another
    machine, name the form.
    """
    return implementation is None and jax.default_backend() == "cpu"
