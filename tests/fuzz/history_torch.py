"""Stacks and skips of mhc_torch against the sums of tests/reference.py: any settings, dtype, size and kind of nodes."""

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from mhc_torch import MatrixMHCSkip, MHCConfig, MHCSequential, native
from tests import reference

with contextlib.suppress(RuntimeError):  # without a compiler the nodes in Python are all there is
    native.build()

ERRORS = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
STEP = 1e-6
# sparsemax bends. So near to a bend, a float32 may lie on the other side of it.
BEND = 1e-4


class Branch(nn.Module):
    """tanh(W x + b) along the last axis, of numbers that the reference reads."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight))
        self.bias = nn.Parameter(torch.from_numpy(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight.T + self.bias)


def trial(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    dtype = list(ERRORS)[rng.choice(4, p=[0.4, 0.2, 0.3, 0.1])]
    compiled = native.nodes if rng.random() < 0.5 else lambda: None
    with mock.patch.object(native, "nodes", compiled):
        if rng.random() < 0.15:
            _matrix(rng, dtype)
        else:
            _stack(rng, dtype)


def _stack(rng: np.random.Generator, dtype: torch.dtype) -> None:
    depth, width = int(rng.integers(0, 9)), int(rng.integers(1, 6))
    config = MHCConfig(
        max_history=int(rng.integers(1, 7)),
        mode=str(rng.choice(["mhc", "mhc", "hc", "residual"])),
        constraint=str(rng.choice(["simplex", "identity", "sparse"])),
        epsilon=float(rng.uniform(0, 0.9)),
        temperature=float(rng.choice([1.0, 0.5, 3.0])),
        use_gating=bool(rng.random() < 0.3),
        prune_threshold=float(rng.choice([0.0, 0.0, 0.15])),
        detach_history=bool(rng.random() < 0.15),
    )
    fields = ("max_history", "mode", "constraint", "epsilon", "temperature", "use_gating")
    settings = {name: getattr(config, name) for name in (*fields, "prune_threshold", "detach_history")}
    branches = [Branch(rng.normal(size=(width, width)), rng.normal(size=width)) for _ in range(depth)]
    use_checkpointing = bool(rng.random() < 0.2)
    stack = MHCSequential(branches, use_checkpointing=use_checkpointing, **settings).to(dtype)
    # Logits may be wider than states, as those of injected models are.
    for skip in stack.skip_layers:
        skip.to(torch.promote_types(dtype, torch.float32) if rng.random() < 0.5 else dtype)
        nn.init.normal_(skip.mixing_logits, std=float(rng.choice([0.5, 2.0])))
    shape = (*rng.integers(1, 4, size=int(rng.integers(0, 3))), width)
    # Products of states of this size leave the range of float16.
    x = torch.from_numpy(rng.normal(size=shape) * rng.choice([1.0, 1.0, 300.0])).to(dtype).requires_grad_()
    by_hand = bool(rng.random() < 0.2)

    output = _by_hand(stack, x) if by_hand else stack(x)
    leaves = {"x": x, **{name: p for name, p in stack.named_parameters() if p.requires_grad}}
    values = {name: leaf.detach().double().numpy() for name, leaf in leaves.items()}
    logits = [skip.mixing_logits.detach().double().numpy() for skip in stack.skip_layers]

    def expected(values: dict[str, np.ndarray]) -> list[np.ndarray]:
        def weights(layer: int, live: int) -> np.ndarray:
            own = values.get(f"skip_layers.{layer}.mixing_logits", logits[layer])
            return reference.mixing_weights(
                own[-live:],
                config.mode,
                config.constraint,
                config.epsilon,
                config.temperature,
                # In mode "residual" there is no gate.
                float(values[f"skip_layers.{layer}.gate_logit"])
                if config.use_gating and config.mode != "residual"
                else None,
                0.0 if config.mode == "residual" else config.prune_threshold,
            )

        def branch(layer: int) -> Any:
            weight, bias = (values[f"wrapped_modules.{layer}.{name}"] for name in ("weight", "bias"))
            return lambda x: np.tanh(x @ weight.T + bias)

        return reference.history_states([branch(k) for k in range(depth)], values["x"], weights, config.max_history)

    states = expected(values)
    size = max(np.abs(state).max() for state in states)
    _close(output, states[-1], size * (1 + depth), ERRORS[dtype], f"output of {stack} (by hand: {by_hand})")
    if config.detach_history and not by_hand:
        return  # the derivative is not that of the function
    cotangent = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    _derivatives(
        rng, output, cotangent, leaves, values, lambda v: expected(v)[-1], ERRORS[dtype] * (1 + depth), str(stack)
    )


def _by_hand(stack: MHCSequential, x: torch.Tensor) -> torch.Tensor:
    states = [x]
    for branch, skip in zip(stack.wrapped_modules, stack.skip_layers, strict=True):
        states.append(skip(branch(states[-1]), states))
    return states[-1]


def _matrix(rng: np.random.Generator, dtype: torch.dtype) -> None:
    skip = MatrixMHCSkip(int(rng.integers(1, 6)), bool(rng.random() < 0.6), int(rng.integers(1, 12)))
    nn.init.normal_(skip.mixing_logits)
    skip.to(dtype)
    live = int(rng.integers(1, 7))
    shape = tuple(rng.integers(1, 4, size=2))
    tensors = [torch.from_numpy(rng.normal(size=shape)).to(dtype).requires_grad_() for _ in range(live + 1)]
    output = skip(tensors[0], tensors[1:])
    leaves = {"logits": skip.mixing_logits, **{str(k): tensor for k, tensor in enumerate(tensors)}}
    values = {name: leaf.detach().double().numpy() for name, leaf in leaves.items()}

    def expected(values: dict[str, np.ndarray]) -> np.ndarray:
        k = min(live, skip.max_history)
        logits = values["logits"][-k:, -k:]
        row = (
            reference.sinkhorn(logits, skip.iterations)[-1] if skip.doubly_stochastic else reference.softmax(logits[-1])
        )
        window = [values[str(i)] for i in range(live + 1 - k, live + 1)]
        return values["0"] + sum(w * state for w, state in zip(row, window, strict=True))

    _close(output, expected(values), 10, ERRORS[dtype], str(skip))
    cotangent = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    _derivatives(rng, output, cotangent, leaves, values, expected, 5 * ERRORS[dtype], str(skip))


def _close(found: torch.Tensor, wanted: np.ndarray, size: float, error: float, what: str) -> None:
    difference = np.abs(found.detach().double().numpy() - wanted).max(initial=0)
    assert difference <= error * size, f"{what}, {found.dtype}: off by {difference:.3g}, states up to {size:.3g}"


def _derivatives(
    rng: np.random.Generator,
    output: torch.Tensor,
    cotangent: torch.Tensor,
    leaves: dict[str, torch.Tensor],
    values: dict[str, np.ndarray],
    function: Any,
    error: float,
    what: str,
) -> None:
    """The gradient along one random direction of each leaf, against finite differences of the reference."""
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True)
    weights = cotangent.double().numpy()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction = rng.normal(size=leaf.shape)

        def moved(step: float, name: str = name, direction: np.ndarray = direction) -> np.ndarray:
            return function({**values, name: values[name] + step * direction})

        change = weights * (moved(STEP) - moved(-STEP)) / (2 * STEP)
        along = gradient.double().numpy() * direction
        # 1 - tanh^2 is as exact as the 1, and a state as exact as its size; what they are multiplied with are states.
        of_states = name.endswith((".weight", ".mixing_logits", ".gate_logit"))
        states = max(1.0, np.abs(values["x"]).max(initial=0)) if of_states else 1.0
        allowed = (4 * error + 1e-5) * (np.abs(change).sum() + np.abs(along).sum() + states * np.abs(weights).sum())
        if abs(along.sum() - change.sum()) > allowed:
            slopes = [np.sum(weights * (moved(step) - moved(0))) / step for step in (BEND, -BEND)]
            bend = abs(slopes[0] - slopes[1]) if "mixing_logits" in name else 0.0
            assert abs(along.sum() - np.mean(slopes)) <= allowed + bend / 2, (
                f"gradient of {name} in {what}, {leaf.dtype}: {along.sum():.6g} along a direction, the reference has "
                f"{change.sum():.6g}"
            )
