"""Three quick checks that a network with history is wired well and stays in bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_torch.monitoring.probe import dummy_input, floating_tensors, mapped, probe

# Furthest that the spread of any state may drift from that of the first: beyond it half precision is at its end.
MAX_DRIFT = 1e4


@dataclass(frozen=True)
class Check:
    """One figure and whether it is in bounds."""

    name: str
    value: float
    bound: str
    holds: bool


@dataclass(frozen=True)
class StabilityReport:
    """The verdicts of :func:`check_model_stability`: true when every check holds, a table when printed."""

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.holds for check in self.checks)

    def __str__(self) -> str:
        rows = [(c.name, f"{c.value:.3g}", c.bound, "ok" if c.holds else "FAILED") for c in self.checks]
        table = [("check", "figure", "bound", "verdict"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        )


def check_model_stability(model: nn.Module, example_input: Any = None) -> StabilityReport:
    """Push an input through ``model`` and check its history, its gradient and its activations.

    - *buffer growth*: the fewest states that a mixing layer received in the second of two forwards; at least one.
    - *gradient path*: the norm of the gradient of a random projection of the output with respect to the input, or to
      the parameters where the input holds no floating-point tensor; finite and above zero.
    - *spectral drift*: how far the standard deviation of a state is from that of the first state, as a factor in
      either direction; at most 2 for each mixing layer in between, and at most ``MAX_DRIFT``. The worst one is shown.

    The model runs in evaluation mode. Its mode, ``.grad``, buffers and the random state are afterwards as before; its
    history is empty.

    Args:
        example_input: one argument of the model, a tuple of arguments, or a dict of keyword arguments; None makes one
            up (see :func:`~mhc_torch.monitoring.probe.dummy_input`).

    Raises:
        ValueError: ``model`` has no mixing layer, or no input could be made up.
    """
    skips: list[Any] = [module for module in model.modules() if hasattr(module, "mixed_states")]
    if not skips:
        raise ValueError(
            f"model: {type(model).__name__} holds no MHCSkip, MatrixMHCSkip or HyperConnections; "
            "there is no history and no stream to check"
        )
    inputs = mapped(_differentiable, dummy_input(model) if example_input is None else example_input)
    windows: dict[nn.Module, int] = dict.fromkeys(skips, 0)
    states: list[Tensor] = []

    def watch(skip: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        history = skip.mixed_states(*arguments, **keywords)
        windows[skip] = len(history)
        if not states and history:
            states.append(history[-1])
        states.append(output)

    modes = [(module, module.training) for module in model.modules()]
    hooks = [skip.register_forward_hook(watch, with_kwargs=True) for skip in skips]
    try:
        output = probe(model.eval(), inputs, passes=2)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    wanted = floating_tensors(inputs) or [p for p in model.parameters() if p.requires_grad]
    return StabilityReport((_buffer_growth(windows.values()), _gradient_path(output, wanted), _spectral_drift(states)))


def _differentiable(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if floating else value


def _buffer_growth(windows: Iterable[int]) -> Check:
    fewest = min(windows)
    return Check("buffer growth", fewest, "states in every window >= 1", fewest >= 1)


def _gradient_path(output: Tensor, wanted: Sequence[Tensor]) -> Check:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    gradients = torch.autograd.grad(output, wanted, direction, allow_unused=True) if output.requires_grad else ()
    norms = [gradient.double().norm() for gradient in gradients if gradient is not None]
    norm = torch.stack(norms).norm().item() if norms else 0.0
    return Check("gradient path", norm, "0 < norm < inf", 0 < norm < math.inf)


def _spectral_drift(states: Sequence[Tensor]) -> Check:
    first, *later = (state.detach().double().std(unbiased=False).item() for state in states)
    drifts = [_factor(spread, first) for spread in later] or [1.0]
    limits = [min(2.0**depth, MAX_DRIFT) for depth in range(1, len(drifts) + 1)]
    worst = max(range(len(drifts)), key=lambda depth: drifts[depth] / limits[depth])
    return Check("spectral drift", drifts[worst], f"factor <= {limits[worst]:g}", drifts[worst] <= limits[worst])


def _factor(a: float, b: float) -> float:
    in_bounds = 0 < a < math.inf and 0 < b < math.inf
    return max(a / b, b / a) if in_bounds else math.inf
