"""Run a model once to look at it, and leave no trace: buffers, history and random state stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhc_torch.monitoring.diagnostics import reset_history


def dummy_input(model: nn.Module) -> Any:
    """An input that ``model`` accepts, told from its ``example_input_array`` or from its first layer with weights.

    Returns:
        ``(2, in_features)`` for a linear layer, ``(2, in_channels, 32, ...)`` for a convolution, ``(2, 8)`` token
        numbers for an embedding, ``(2, *normalized_shape)`` for a LayerNorm; normally distributed, always the same.

    Raises:
        ValueError: the first layer with weights is of another kind; pass an example input instead.
    """
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return example
    first = next((m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)), None)
    weight = getattr(first, "weight", torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    match first:
        case nn.Embedding():
            return torch.randint(first.num_embeddings, (2, 8), generator=generator).to(weight.device)
        case nn.Linear():
            shape: tuple[int, ...] = (2, first.in_features)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            shape = (2, first.in_channels, *[32] * len(first.kernel_size))
        case nn.LayerNorm():
            shape = (2, *first.normalized_shape)
        case _:
            raise ValueError(
                f"cannot make up an input for {type(model).__name__}: its first layer with weights is "
                f"{type(first).__name__ if first is not None else 'nowhere'}; pass an example input"
            )
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def probe(model: nn.Module, inputs: Any, passes: int = 1) -> Tensor:
    """The output of ``model`` on ``inputs``, with its graph, after ``passes`` forwards that began with no history.

    Args:
        inputs: one argument, a tuple of arguments, or a dict of keyword arguments.

    Returns:
        the first floating-point tensor in the output of the last forward.

    Raises:
        ValueError: the output holds no floating-point tensor.
    """
    arguments, keywords = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    # Running statistics are written to copies.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    reset_history(model)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            for _ in range(passes):
                output = torch.func.functional_call(model, buffers, arguments, keywords)
    finally:
        reset_history(model)
    floating = floating_tensors(output)
    if not floating:
        raise ValueError(f"the model returned {type(output).__name__}, which holds no floating-point tensor")
    return floating[0]


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of tuples, lists and dicts (outputs of transformers are dicts), with each leaf replaced by its image."""
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [mapped(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return function(tree)


def floating_tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    found: list[Tensor] = []

    def keep(leaf: Any) -> None:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            found.append(leaf)

    mapped(keep, tree)
    return found
