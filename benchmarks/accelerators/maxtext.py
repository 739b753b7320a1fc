"""The kernels of MaxText's mHC-lite for TPUs, as programs for the shapes of ours; its package needs Python 3.12.

H_res is a softmax of weights of all n! permutations in place of Sinkhorn's matrix; all else is the work of our cases.
"""

import itertools
import math
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def kernels() -> ModuleType:
    """`maxtext.kernels.mhc`.

    Raises:
        ModuleNotFoundError: it is not installed, or not for this Python.
    """
    if find_spec("maxtext") is None:
        here = ".".join(map(str, sys.version_info[:2]))
        raise ModuleNotFoundError(f"maxtext is not installed, and needs Python 3.12, here is {here}: make accelerators")
    import maxtext.kernels.mhc

    return maxtext.kernels.mhc


def parameters(n: int, width: int) -> Any:
    """The shapes of the parameters of a layer, in float32."""
    shapes: dict[str, tuple[int, ...]] = {"norm_scale": (n * width,)}
    for name, maps in (("pre", n), ("post", n), ("res", math.factorial(n))):
        shapes |= {f"{name}_alpha": (n * width, maps), f"{name}_bias": (maps,), f"{name}_scale": (1,)}
    return kernels().MhcWeights(**{name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})


def read(params: Any, x: Array) -> tuple[Array, Array, Array]:
    """The branch's input, H_post and H_res of streams (tokens, n, C)."""
    n = x.shape[-2]
    permutations = np.eye(n, dtype=np.float32)[np.array(list(itertools.permutations(range(n))))]
    # Below `pre`, which makes the matrices a traced array, and its kernels take none under jit.
    branch, (_, post, res) = kernels().api.mhc_kernels_fwd.pre(x[None], params, permutations)
    return branch[0], post[0], res[0]


def write(x: Array, y: Array, post: Array, res: Array) -> Array:
    """The merge of the branch's output into streams (tokens, n, C)."""
    context = kernels().MhcContext(x=x[None], h_post=post[None], residual=res[None], implementation="mosaic")
    return kernels().post(y[None], context)[0]


def layer(params: Any, x: Array) -> Array:
    """A layer whose branch does nothing, but is none the less not fused."""
    branch, post, res = read(params, x)
    return write(x, jax.lax.optimization_barrier(branch), post, res)


def stack(params: Any, x: Array) -> Array:
    """Layers one after the other, as a scan."""
    return jax.lax.scan(lambda x, params: (layer(params, x), None), x, params)[0]
