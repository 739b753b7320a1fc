"""Three quick checks that a network with history is wired well and stays in bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhc_torch.monitoring.diagnostics import without_compile_prefix
from mhc_torch.monitoring.probe import dummy_input, floating_tensors, mapped, probe

# Furthest that a state's spread, or its say in the output, may be from that of another: beyond it half precision is at
# its end.
MAX_DRIFT = 1e4


@dataclass(frozen=True)
class Check:
    """One figure, whether it is in bounds, and the layer where it is worst."""

    name: str
    value: float
    bound: str
    holds: bool
    layer: str


@dataclass(frozen=True)
class StabilityReport:
    """The verdicts of :func:`check_model_stability`: true when every check holds, a table when printed."""

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.holds for check in self.checks)

    def __str__(self) -> str:
        rows = [(c.name, f"{c.value:.3g}", c.bound, "ok" if c.holds else f"FAILED at {c.layer}") for c in self.checks]
        table = [("check", "figure", "bound", "verdict"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        )


class _Call(NamedTuple):
    """What was seen of one call of a mixing layer."""

    layer: str
    keeper: Any  # what keeps its history: layers of one keeper grow one window
    found: int  # states in its window
    expected: int  # how many there could be
    first: Tensor | None  # the latest state in the window
    state: Tensor  # what the layer made of it


def check_model_stability(model: nn.Module, example_input: Any = None) -> StabilityReport:
    """Push an input through ``model`` and check its history, its gradient and its activations.

    - *buffer growth*: the states that a mixing layer received in the second of two forwards; at least one. Where its
      latest state is what another mixing layer of the same history made, it must have one more than that one had, up
      to its ``max_history``. The layer that lacks most is shown.
    - *gradient path*: how much the output depends on each state, relative to the last one, as a factor in either
      direction: of ``spread of the state x norm of the gradient of a random projection of the output``, which no
      scaling of a layer changes. The states are the input of ``model``, if it is of floating-point tensors, and the
      outputs of all mixing layers. At most 10 and a factor of 2 for each mixing layer in between, and at most
      ``MAX_DRIFT``. The worst one is shown; or, where it is zero or not finite, the norm of the gradient itself.
    - *spectral drift*: how far the standard deviation of a state is from that of the first state, as a factor in
      either direction; at most 2 for each mixing layer in between, and at most ``MAX_DRIFT``. The worst one is shown.

    A check that fails names its layer. The model runs in evaluation mode. Its mode, ``.grad``, buffers and the random
    state are afterwards as before; its history is empty.

    Args:
        example_input: one argument of the model, a tuple of arguments, or a dict of keyword arguments; None makes one
            up (see :func:`~mhc_torch.monitoring.probe.dummy_input`).

    Raises:
        ValueError: ``model`` has no mixing layer, or no input could be made up; one of them is never called.
    """
    skips = {name: module for name, module in model.named_modules() if hasattr(module, "mixed_states")}
    if not skips:
        raise ValueError(
            f"model: {type(model).__name__} holds no MHCSkip, MatrixMHCSkip or HyperConnections; "
            "there is no history and no stream to check"
        )
    inputs = mapped(_differentiable, dummy_input(model) if example_input is None else example_input)
    calls: list[_Call] = []

    def watch(name: str) -> Any:
        layer, keeper = without_compile_prefix(name) or type(model).__name__, _keeper(model, name)

        def hook(skip: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            history = skip.mixed_states(*arguments, **keywords)
            # Maps of streams put out no state; the streams are written elsewhere.
            state = output if isinstance(output, Tensor) else history[-1]
            expected = min(
                _age([call for call in calls if call.keeper == keeper], history), getattr(skip, "max_history", 1)
            )
            calls.append(_Call(layer, keeper, len(history), expected, history[-1] if history else None, state))

        return hook

    modes = [(module, module.training) for module in model.modules()]
    # Only the last forward counts.
    hooks = [model.register_forward_pre_hook(lambda *_: calls.clear())]
    hooks += [skip.register_forward_hook(watch(name), with_kwargs=True) for name, skip in skips.items()]
    try:
        output = probe(model.eval(), inputs, passes=2)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    if not calls:
        raise ValueError(f"model: none of its mixing layers is called, {', '.join(skips)}")
    return StabilityReport(
        (_buffer_growth(calls), _gradient_path(model, output, inputs, calls), _spectral_drift(calls))
    )


def _differentiable(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if floating else value


def _keeper(model: nn.Module, name: str) -> Any:
    """The nearest buffer around a skip of this name; else what holds the list that it, or its layer, is in."""
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        if (buffer := getattr(model.get_submodule(".".join(parts[:end])), "history_buffer", None)) is not None:
            return buffer
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: max(numbers[-1] - 1, 0)]) if numbers else ""


def _age(calls: Sequence[_Call], history: Sequence[Tensor]) -> int:
    """How many states there are up to the latest one in `history`; 1 where it is not known where that comes from."""
    latest = history[-1] if history else torch.empty(0)
    # A detached state is another tensor, on the same memory.
    makers = (c for c in calls if c.state.data_ptr() == latest.data_ptr() and c.state.shape == latest.shape)
    return next((1 + max(maker.found, maker.expected) for maker in makers if latest.numel()), 1)


def _buffer_growth(calls: Sequence[_Call]) -> Check:
    worst = min(calls, key=lambda call: call.found / call.expected)
    bound = f"states in the window >= {worst.expected}"
    return Check("buffer growth", worst.found, bound, worst.found >= worst.expected, worst.layer)


def _gradient_path(model: nn.Module, output: Tensor, inputs: Any, calls: Sequence[_Call]) -> Check:
    given = floating_tensors(inputs)
    wanted = given or [p for p in model.parameters() if p.requires_grad]
    asked = [*wanted, *(call.state for call in calls if call.state.requires_grad)]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    found = torch.autograd.grad(output, asked, direction, allow_unused=True) if output.requires_grad else ()
    norms = {
        id(tensor): gradient.double().norm().item()
        for tensor, gradient in zip(asked, found, strict=False)
        if gradient is not None
    }

    def say(tensors: Sequence[Tensor]) -> float:
        return math.hypot(*(norms.get(id(t), 0.0) * t.detach().double().square().mean().sqrt().item() for t in tensors))

    # From the output backwards: of layers that get no gradient, the nearest to the output is the one to look at.
    path = [(call.layer, [call.state]) for call in reversed(calls)] + [("the input", given)] * bool(given)
    norm = math.hypot(*(norms.get(id(tensor), 0.0) for tensor in wanted))
    if not 0 < norm < math.inf:
        broken = (layer for layer, tensors in path if not 0 < say(tensors) < math.inf)
        return Check("gradient path", norm, "0 < norm < inf", False, next(broken, calls[0].layer))
    while len(path) > 1 and all(id(tensor) not in norms for tensor in path[0][1]):  # no part of this output
        del path[0]
    says = [say(tensors) for _, tensors in path]
    limits = [min(10 * 2.0**distance, MAX_DRIFT) for distance in range(len(path))]
    return _worst("gradient path", [_factor(one, says[0]) for one in says], limits, [layer for layer, _ in path])


def _spectral_drift(calls: Sequence[_Call]) -> Check:
    states = [(call.layer, call.state) for call in calls]
    if calls[0].first is not None:
        states.insert(0, (calls[0].layer, calls[0].first))
    spreads = [state.detach().double().std(unbiased=False).item() for _, state in states]
    limits = [min(2.0**depth, MAX_DRIFT) for depth in range(len(states))]
    factors = [_factor(spread, spreads[0]) for spread in spreads]
    return _worst("spectral drift", factors, limits, [layer for layer, _ in states])


def _worst(name: str, factors: Sequence[float], limits: Sequence[float], layers: Sequence[str]) -> Check:
    """The worst of a row of states, the first of which the others are compared with."""
    worst = max(range(1, len(factors)), key=lambda i: factors[i] / limits[i], default=0)
    bound = f"factor <= {limits[worst]:g}"
    return Check(name, factors[worst], bound, factors[worst] <= limits[worst], layers[worst])


def _factor(a: float, b: float) -> float:
    in_bounds = 0 < a < math.inf and 0 < b < math.inf
    return max(a / b, b / a) if in_bounds else math.inf
