"""PyTorch functions inside JAX programs, differentiable, by a callback to the host."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bridge.weights.arrays import dtype_name, numpy_dtype, to_numpy, to_torch


def torch_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch tensors as a differentiable JAX function, which may be jitted.

    Limits: it runs on the host, so that arrays of an accelerator travel there and back; each call costs some hundred
    microseconds; under `jax.vmap` it runs once per element; only reverse-mode derivatives of first order exist, and the
    backward pass runs the function again; JAX may run it any number of times, so it must be pure; parameters of a
    module get gradients only as arguments:

        apply = torch_function(lambda params, x: torch.func.functional_call(module, params, (x,)))

    Args:
        function: takes positional pytrees of CPU tensors and gives a pytree of tensors, whose shapes and dtypes depend
            on those of the arguments alone. It is run once on zeros, while tracing, to learn them.

    Raises:
        TypeError: it gives something else than tensors, or 64-bit numbers while JAX's x64 is off.
    """

    def run(*arrays: Any) -> Any:
        with torch.no_grad():
            result = function(*_tensors(arrays))
        return jax.tree.map(_array, result)

    def pull(arrays: Any, cotangents: Any) -> Any:
        leaves, tree = jax.tree.flatten(_tensors(arrays))
        sources = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
        # A function may change its arguments in place, which autograd allows for everything but leaves.
        given = [leaf * 1 if leaf.is_floating_point() else leaf for leaf in leaves]
        outputs = jax.tree.leaves(function(*jax.tree.unflatten(tree, given)))
        reached = [(o, c) for o, c in zip(outputs, _tensors(cotangents), strict=True) if o.requires_grad]
        found = torch.autograd.grad([o for o, _ in reached], sources, [c for _, c in reached], allow_unused=True)
        return [_array(torch.zeros_like(s) if g is None else g) for s, g in zip(sources, found, strict=True)]

    @jax.custom_vjp
    def call(*arrays: Any) -> Any:
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, numpy_dtype(dtype_name(a.dtype))), arrays)
        specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), run(*zeros))
        return jax.pure_callback(run, specs, *arrays, vmap_method="sequential")

    def forward(*arrays: Any) -> tuple[Any, Any]:
        return call(*arrays), arrays

    def backward(arrays: Any, cotangents: Any) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        sources = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in sources]
        # What belongs to a result of integers has dtype float0, which no callback takes.
        given = [jnp.zeros(c.shape) if c.dtype == jax.dtypes.float0 else c for c in jax.tree.leaves(cotangents)]
        found = iter(jax.pure_callback(pull, specs, arrays, given, vmap_method="sequential"))
        gradients = [
            next(found) if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape, jax.dtypes.float0)
            for leaf in leaves
        ]
        return jax.tree.unflatten(tree, gradients)

    call.defvjp(forward, backward)
    return lambda *args: call(*jax.tree.map(jnp.asarray, args))


def _tensors(arrays: Any) -> Any:
    # A copy: the memory is JAX's, and nobody else may write to it.
    return jax.tree.map(lambda array: to_torch(np.array(array)), arrays)


def _array(tensor: Any) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"function must give tensors, got {type(tensor).__name__}")
    if tensor.dtype in (torch.int64, torch.float64) and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"function gives {tensor.dtype}, which JAX would truncate to 32 bits: convert it, or enable x64"
        )
    return to_numpy(tensor)
