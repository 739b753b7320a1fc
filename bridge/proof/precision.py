"""In which precision a program computes: a float32 model may hold steps in bfloat16, float32 products be TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from bridge._private import Mode
from bridge.weights.arrays import dtype_name, numpy_dtype

# Up to this size in bytes the weights of a module, or the arguments of a program, are brought to float64 as a whole; of
# larger ones each when it is used.
LARGEST = 2**30


def epsilon(dtype: Any) -> float:
    """Distance from 1 to the next number of a floating-point dtype of any of the three libraries; 0 for integers."""
    dtype = numpy_dtype(dtype_name(dtype)) if isinstance(dtype, torch.dtype) else np.dtype(dtype)
    return float(ml_dtypes.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def matmul_settings() -> str:
    """What the user has set for products of float32 matrices, which accelerators shorten to TF32 or bfloat16."""
    return (
        f"jax {jax.config.values['jax_default_matmul_precision'] or 'default'}, "
        f"torch {torch.get_float32_matmul_precision()}, TF32 in cuDNN {torch.backends.cudnn.allow_tf32}"
    )


@contextmanager
def full_matmul_precision() -> Iterator[None]:
    """While the context lasts, products of float32 matrices are products in float32, in both frameworks."""
    before = torch.get_float32_matmul_precision()
    with jax.default_matmul_precision("highest"), torch.backends.cudnn.flags(enabled=None, allow_tf32=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class TorchPrecision(Mode):
    """While the context lasts, `coarsest` is the epsilon of the coarsest floating-point type of any result."""

    def __init__(self) -> None:
        super().__init__()
        self.coarsest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in jax.tree.leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.coarsest = max(self.coarsest, epsilon(leaf.dtype))
        return output
