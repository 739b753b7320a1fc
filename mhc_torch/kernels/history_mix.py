"""The mix of a window of states, and what goes back through it, as operators of torch: one launch each.

The nodes of `mhc_torch.history` call them, which know the derivatives; the kernels are in `triton_history`, which the
first call imports. Sums are float32, and their order is fixed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_torch.kernels.choice import by_kernels

MOST = 64
"""States of a window: more are for operations of torch."""


def mixes(x: Tensor, states: Sequence[Tensor], weights: Any) -> bool:
    """Whether kernels mix the states by weights that are tensors: see `by_kernels`. No numbers need no launch."""
    if not x.is_cuda or not x.numel():
        return False
    others = [weights] if isinstance(weights, Tensor) else weights
    unserved = f"a window of {len(states)}, only for {MOST}" if len(states) > MOST else None
    return by_kernels(None, [x, *states], others, unserved=unserved)


@torch.library.custom_op("mhc_torch::history_mix", mutates_args=())
def mix(x: Tensor, states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """x + sum_k weights[k] states[k], of K states of the shape and dtype of x, and weights (K,)."""
    from mhc_torch.kernels import triton_history as kernels

    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = x.contiguous(), _flat(states), weights.contiguous(), result, x.numel()
    with torch.cuda.device_of(x):
        kernels.mix_forward[kernels.programs(x.numel()),](
            *arguments, **kernels.constants(K=len(states)), **kernels.OPTIONS
        )
    return result


@mix.register_fake
def _(x: Tensor, states: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("mhc_torch::history_mix_backward", mutates_args=())
def mix_backward(gradient: Tensor, states: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """What arrives at the states, and at the weights (K,), in float32."""
    from mhc_torch.kernels import triton_history as kernels

    results = [torch.empty_like(state, memory_format=torch.contiguous_format) for state in states]
    size, count = gradient.numel(), len(states)
    parts = gradient.new_empty(kernels.programs(size), count, dtype=torch.float32)
    arguments = gradient.contiguous(), _flat(states), weights.contiguous(), tuple(results), parts, size
    with torch.cuda.device_of(gradient):
        kernels.mix_backward[len(parts),](*arguments, **kernels.constants(K=count), **kernels.OPTIONS)
    return results, parts.sum(0)


@mix_backward.register_fake
def _(gradient: Tensor, states: Sequence[Tensor], weights: Tensor) -> tuple[list[Tensor], Tensor]:
    results = [torch.empty_like(state, memory_format=torch.contiguous_format) for state in states]
    return results, gradient.new_empty(len(states), dtype=torch.float32)


@torch.library.custom_op("mhc_torch::history_window_backward", mutates_args=())
def window_backward(cotangents: Tensor, column: Tensor, latest: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of cotangents (H, size) with the weights (H,), as `latest` is, and each one's product with that (H,)."""
    from mhc_torch.kernels import triton_history as kernels

    result = torch.empty_like(latest, memory_format=torch.contiguous_format)
    count, size = cotangents.shape
    parts = latest.new_empty(kernels.programs(size), count, dtype=torch.float32)
    arguments = cotangents.contiguous(), column.contiguous(), latest.contiguous(), result, parts, size, count
    with torch.cuda.device_of(latest):
        kernels.window_backward[len(parts),](*arguments, **kernels.constants(), **kernels.OPTIONS)
    return result, parts.sum(0)


@window_backward.register_fake
def _(cotangents: Tensor, column: Tensor, latest: Tensor) -> tuple[Tensor, Tensor]:
    result = torch.empty_like(latest, memory_format=torch.contiguous_format)
    return result, latest.new_empty(len(cotangents), dtype=torch.float32)


def _flat(states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(state.contiguous() for state in states)
