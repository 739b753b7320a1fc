"""The mixing step itself, and the checks on what is mixed."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mhc_torch import _private


def mix(
    x: Float[Tensor, "*shape"], states: Sequence[Float[Tensor, "*shape"]], weights: Sequence[Float[Tensor, ""]]
) -> Float[Tensor, "*shape"]:
    """x + sum_k weights[k] * states[k], in the widest dtype of x and the states; the weights do not widen it.

    Raises:
        ValueError, TypeError: as check_window.
    """
    of_one_dtype = check_window(states, x)
    check_arithmetic(x)
    if of_one_dtype and x.is_floating_point() and not transformed() and not _private.holds_tensors(x):
        return _Mix.apply(x, *weights, *states)
    for state, weight in zip(states, weights, strict=True):
        x = x + weight * state
    return x


def transformed() -> bool:
    """Whether a compiler, a tracer, a mode, a transform of torch.func or a dual number follows each operation.

    They find out by themselves what a node of ours would tell the backward pass, and cannot look into it.
    """
    return (
        torch.compiler.is_compiling()
        or _private.transforms_are_active()
        or _private.count_modes() > 0
        or _private.is_tracing()
        or _private.dual_numbers_exist()
    )


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; for devices that do not know it ("meta") it is not."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def accumulate(x: Tensor, states: Sequence[Tensor], weights: Sequence[Any]) -> Tensor:
    """x + sum_k weights[k] * states[k] in one new tensor; the weights are numbers, or tensors of one element."""
    if isinstance(weights[0], float):
        mixed = torch.add(x, states[0], alpha=weights[0])
        for state, weight in zip(states[1:], weights[1:], strict=True):
            mixed.add_(state, alpha=weight)
    else:
        mixed = torch.addcmul(x, states[0], weights[0])
        for state, weight in zip(states[1:], weights[1:], strict=True):
            mixed.addcmul_(state, weight)
    return mixed


class _Mix(torch.autograd.Function):
    """The same sum as one node of the graph, which keeps references to the states and no product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights_and_states: Tensor) -> Tensor:
        ctx.save_for_backward(*weights_and_states)
        k = len(weights_and_states) // 2
        return accumulate(x, weights_and_states[k:], weights_and_states[:k])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them again, and then forgets them
        k = len(saved) // 2
        weights, states = saved[:k], saved[k:]
        wanted, flat = ctx.needs_input_grad, in_single(gradient.reshape(-1))
        return (
            gradient,
            *(
                flat.dot(in_single(s.reshape(-1))) if w else None
                for s, w in zip(states, wanted[1 : k + 1], strict=True)
            ),
            *(gradient * a if w else None for a, w in zip(weights, wanted[k + 1 :], strict=True)),
        )


def in_single(x: Tensor) -> Tensor:
    """`x`, in float32 if its dtype is a narrower one: a sum of products of float16 soon leaves its range."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_arithmetic(x: Tensor, name: str = "x") -> None:
    """That torch can add tensors of the dtype of `x`, the argument `name`.

    Raises:
        TypeError: it is one of eight bits or less, which are for storage.
    """
    if x.dtype.itemsize == 1 and x.is_floating_point():
        raise TypeError(f"{name} must be bfloat16 or wider, got {x.dtype}, in which torch cannot add")


def check_window(states: Sequence[Tensor], x: Tensor) -> bool:
    """Every state must have the shape and device of `x`, and its dtype too unless autocast is on.

    Returns:
        Whether all have the dtype of `x`.

    Raises:
        ValueError: a shape or a device differs.
        TypeError: a dtype differs.
    """
    shape, device, dtype, of_one_dtype = x.shape, x.device, x.dtype, True
    for state in states:
        if not isinstance(state, Tensor):
            raise TypeError(f"history must be a list of tensors, got a {type(state).__name__} in it")
        if state.shape != shape:
            hint = "set auto_project=True to map the width of past states"
            if state.shape[:1] != shape[:1] and state.shape[1:] == shape[1:]:
                hint = "the history is from another batch: call clear_history() between batches"
            raise ValueError(f"history has a state of shape {tuple(state.shape)}, x has {tuple(shape)}; {hint}")
        if state.device != device:
            raise ValueError(
                f"history has a state on {state.device}, x is on {device}; move it or call clear_history()"
            )
        if state.dtype != dtype:
            of_one_dtype = False
            if not autocasts(device.type):
                raise TypeError(
                    f"history has a state of {state.dtype}, x is {dtype}; convert it or call clear_history()"
                )
    return of_one_dtype
