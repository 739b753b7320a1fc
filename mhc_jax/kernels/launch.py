"""What the kernels of streams share: a choice of blocks for every platform, and arrays that fill whole blocks.

A block is (tokens, features): what one program of the grid works on at a time.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec
from jaxtyping import Array

from mhc_jax import meshes

LANES = 128
# Of the kernels that multiply no matrices: registers of a GPU.
GPU_BLOCK = (8, 128)


def launched(kernel: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call`; inside `jax.shard_map` the results vary over the axes of the mesh that an argument varies over.

    The interpreter cannot follow which axes that are, so it is not asked to, and JAX is told afterwards.
    """
    call = pl.pallas_call(kernel, **options)

    def of_parts(*arguments: Array) -> Any:
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        if not manual:
            return call(*arguments)
        whole = PartitionSpec()

        def untyped(*arguments: Array) -> Any:
            # Where nothing is checked, a reshape forgets the axes.
            return call(*(argument[None].reshape(argument.shape) for argument in arguments))

        unchecked = jax.shard_map(untyped, in_specs=whole, out_specs=whole, axis_names=manual, check_vma=False)
        return meshes.vary(meshes.varying(arguments), unchecked(*arguments))

    return of_parts


def by_platform(*arguments: Array, tpu: Callable[..., Any], gpu: Callable[..., Any]) -> Any:
    """`tpu(*arguments, options=)` or `gpu(*arguments, options=)`, for the platform that the program is compiled for.

    Lowers to Mosaic for TPU and to Triton for CUDA and ROCm. Any other platform interprets the latter, for tests.
    """
    triton_call = partial(gpu, options={"compiler_params": triton.CompilerParams()})
    return lax.platform_dependent(
        *arguments,
        tpu=partial(tpu, options={}),
        cuda=triton_call,
        rocm=triton_call,
        default=partial(gpu, options={"interpret": True}),
    )


def on_every_platform(function: Any, *arguments: Array, tpu: Any, gpu: Any) -> Any:
    """`by_platform` of one function `(*arguments, block=, options=)` that has a block for either."""
    return by_platform(*arguments, tpu=partial(function, block=tpu), gpu=partial(function, block=gpu))


def cost(flops: int, *arrays: Array | jax.ShapeDtypeStruct, transcendentals: int = 0) -> pl.CostEstimate:
    """Of a kernel that reads or writes each of these arrays once; XLA cannot look into a kernel, and plans by this."""
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=moved)


def rows(array: Array, axes: int) -> Array:
    """All tokens in one axis, before the last `axes`."""
    return array.reshape(-1, *array.shape[-axes:])


def filled(array: Array, block: tuple[int, int]) -> Array:
    """Tokens (first axis) and features (last axis) filled up with zeros to whole blocks."""
    widths = [(0, -array.shape[0] % block[0]), *[(0, 0)] * (array.ndim - 2), (0, -array.shape[-1] % block[1])]
    return jnp.pad(array, widths)


def common(size: int, unit: int, most: int) -> int:
    """The largest multiple of `unit`, at most `most` (itself one), that fills `size` up no further than `unit` does."""
    return unit * math.gcd(pl.cdiv(size, unit), most // unit)


def specs(n: int, width: int, block: tuple[int, int]) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """What a program sees of the streams (T, n, C), of one stream (T, C), and of a table of tokens (T, width)."""
    tokens, features = block
    return (
        pl.BlockSpec((tokens, n, features), lambda t, c: (t, 0, c)),
        pl.BlockSpec((tokens, features), lambda t, c: (t, c)),
        pl.BlockSpec((tokens, width), lambda t, c: (t, 0)),
    )
