"""The mixing step itself, and the checks on what is mixed."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from mhc_torch.history import ways
from mhc_torch.history.ways import Way
from mhc_torch.kernels import history_mix as kernels


def mix(
    x: Inexact[Tensor, "*shape"], states: Sequence[Inexact[Tensor, "*shape"]], weights: Sequence[Float[Tensor, ""]]
) -> Inexact[Tensor, "*shape"]:
    """x + sum_k weights[k] * states[k], in the dtype of x; under autocast in the widest one. Weights do not widen it.

    Raises:
        ValueError, TypeError: as check_window.
    """
    of_one_dtype = check_window(states, x)
    check_arithmetic(x)
    if not of_one_dtype and not autocasts(x.device.type):
        states, of_one_dtype = [state.to(x.dtype) for state in states], True
    if ways.of_sum(x, of_one_dtype) is Way.SEPARATE:
        return _SeparateSum.apply(x, *weights, *states)
    for state, weight in zip(states, weights, strict=True):
        x = x + weight * state
    return x


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; for devices that do not know it ("meta") it is not."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def accumulate(x: Tensor, states: Sequence[Tensor], weights: Sequence[Any]) -> Tensor:
    """x + sum_k weights[k] * states[k] in one new tensor; the weights are numbers, or tensors of one element."""
    if kernels.mixes(x, states, weights):
        return kernels.mix(x, states, torch.stack([*weights]))
    if isinstance(weights[0], float):
        mixed = torch.add(x, states[0], alpha=weights[0])
        for state, weight in zip(states[1:], weights[1:], strict=True):
            mixed.add_(state, alpha=weight)
    else:
        mixed = torch.addcmul(x, states[0], weights[0])
        for state, weight in zip(states[1:], weights[1:], strict=True):
            mixed.addcmul_(state, weight)
    return mixed


class _SeparateSum(torch.autograd.Function):
    """`Way.SEPARATE`: one node, which keeps references to the states and no product."""

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
        wanted = ctx.needs_input_grad
        if all(wanted[1:]) and not torch.is_grad_enabled() and kernels.mixes(gradient, states, weights):
            of_states, of_weights = kernels.mix_backward(gradient, states, torch.stack(weights))
            return gradient, *of_weights.to(weights[0].dtype).unbind(), *of_states
        flat = in_single(gradient.reshape(-1))
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
    """Every state must have the shape and device of `x`, and a dtype that does not widen it unless autocast is on.

    Returns:
        Whether all have the dtype of `x`.

    Raises:
        ValueError: a shape or a device differs.
        TypeError: a dtype is wider than that of `x`, or no floating one.
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
            if not autocasts(device.type) and not _fits(state.dtype, dtype):
                raise TypeError(
                    f"history has a state of {state.dtype}, x is {dtype}; convert it or call clear_history()"
                )
    return of_one_dtype


def _fits(narrow: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the first dtype is a floating one whose numbers are all in the second; eight bits are for storage."""
    return (
        (narrow.is_floating_point or narrow.is_complex)
        and narrow.itemsize > 1
        and torch.promote_types(narrow, dtype) == dtype
    )
