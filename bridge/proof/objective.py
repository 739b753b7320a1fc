"""Loss, gradients and optimizer steps of a whole model, on either side, under the names of the torch side."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from bridge.proof.exact_jax import Lift, Program
from bridge.proof.exact_torch import Exact
from bridge.proof.record import (
    Call,
    Noise,
    Programs,
    copied,
    device_of,
    evaluated,
    gradients,
    jax_float64,
    leaf_values,
    own,
    picked,
    split,
)
from bridge.proof.trees import arrays, double, floats, is_float, transform
from bridge.weights.arrays import to_numpy, to_torch
from bridge.weights.match import Link

LEARNING_RATE = 1e-3
# Both with every hyperparameter spelled out: the two libraries' defaults differ (weight decay 1e-4 and 1e-2).
_HYPERPARAMETERS: dict[str, Any] = {"eps": 1e-8, "weight_decay": 1e-2}


def default_optimizer() -> tuple[optax.GradientTransformation, Callable[..., torch.optim.Optimizer]]:
    """AdamW on both sides."""
    return (
        optax.adamw(LEARNING_RATE, b1=0.9, b2=0.999, **_HYPERPARAMETERS),
        lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), **_HYPERPARAMETERS),
    )


@dataclass(frozen=True)
class Task:
    """What both models are trained on.

    Attributes:
        call, torch_call: arguments of the two models.
        names, torch_names: which of their results are compared.
        targets, torch_targets: random values for the default loss, half the mean square distance from them.
        loss: functions (jax output -> scalar, torch output -> scalar) instead.
        optimizer: (optax transformation, function of parameters -> torch optimizer).
        steps: how many steps to take.
    """

    call: Call
    torch_call: Call
    names: list[str]
    torch_names: list[str]
    targets: tuple[np.ndarray, ...]
    torch_targets: tuple[np.ndarray, ...]
    loss: tuple[Callable[[Any], jax.Array], Callable[[Any], torch.Tensor]] | None
    optimizer: tuple[optax.GradientTransformation, Callable[..., torch.optim.Optimizer]]
    steps: int

    def double(self) -> "Task":
        """The same in float64."""
        return replace(
            self,
            call=self.call.double(),
            torch_call=self.torch_call.double(),
            targets=tuple(map(double, self.targets)),
            torch_targets=tuple(map(double, self.torch_targets)),
        )


@dataclass(frozen=True)
class Training:
    """What came out. Gradients and final values are by torch name.

    Attributes:
        outputs: of the model in training mode.
        losses: before each step, and after the last.
        inputs: gradients by the floating-point inputs.
        gradients: by the parameters, before the first step.
        state: buffers after the first forward pass.
        final: every leaf after the last step, if any was taken.
    """

    outputs: list[np.ndarray]
    losses: list[np.ndarray]
    inputs: list[np.ndarray]
    gradients: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    final: dict[str, np.ndarray]


def torch_names(
    links: Sequence[Link], leaves: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """JAX leaves by path -> the same values in the layout and under the names of the torch side."""
    named: dict[str, np.ndarray] = {}
    for link in links:
        leaf = leaves[link.jax.path]
        whole = named.setdefault(link.torch.path, np.zeros(shapes[link.torch.path], leaf.dtype))
        link.torch.of(whole)[...] = link.to_torch(leaf)
    return named


def train_jax(
    model: nnx.Module, task: Task, links: Sequence[Link], shapes: dict[str, tuple[int, ...]], lift: Lift | None = None
) -> Training:
    """Runs the task on a copy of an nnx model: compiled as a whole or, with `lift`, in float64 (within x64)."""
    model, plain = nnx.clone(model), nnx.clone(model)
    if lift is None:
        program: Callable[..., Any] = Program(_objective(model, task), *_state(model, task))
    else:
        with jax.enable_x64(True):
            model = jax_float64(plain)
            wide = (object(), _objective(model, task.double()), *_state(model, task.double()))
        program = partial(
            evaluated, Programs().widest(wide, (object(), _objective(plain, task), *_state(plain, task))), lift
        )
    with jax.enable_x64(True) if lift else nullcontext():
        return _train_jax(model, task.double() if lift else task, program, links, shapes)


def _state(model: nnx.Module, task: Task) -> tuple[Any, ...]:
    """The arguments of `_objective`: parameters, other state, floating-point inputs, other inputs, targets."""
    _, parameters, rest = split(model)
    given = [jnp.asarray(x) for x in arrays(task.call.given)]
    floating = [x for x in given if is_float(x)], [x for x in given if not is_float(x)]
    return parameters, rest, *floating, [jnp.asarray(t) for t in task.targets]


def _objective(model: nnx.Module, task: Task) -> Callable[..., Any]:
    """The function of `_state` that gives the loss, results, state after the run, and gradients."""
    graph, _, _ = split(model)
    given, loss = task.call.given, task.loss

    def run(parameters: Any, rest: Any, values: list[Any], others: list[Any], targets: list[Any]) -> Any:
        def objective(parameters: Any, values: list[Any]) -> tuple[jax.Array, tuple[list[jax.Array], Any]]:
            fresh = nnx.merge(graph, parameters, rest, copy=True)  # or its statistics belong to the trace outside
            floating, fixed = iter(values), iter(others)
            new = {id(x): next(floating if is_float(x) else fixed) for x in arrays(given)}
            args, kwargs = transform(lambda leaf: new.get(id(leaf), own(leaf)), given)
            output = fresh(*args, **kwargs)
            outputs = picked(output, task.names)
            if loss is not None:
                total = loss[0](output)
            else:
                total = sum((jnp.mean(jnp.square(o - t)) for o, t in zip(outputs, targets, strict=True)), jnp.zeros(()))
                total = total / 2
            return total, (outputs, split(fresh)[2])

        (value, (outputs, after)), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
            parameters, values
        )
        return value, outputs, after, *gradients

    return run


def _train_jax(
    model: nnx.Module,
    task: Task,
    program: Callable[..., Any],
    links: Sequence[Link],
    shapes: dict[str, tuple[int, ...]],
) -> Training:
    graph, _, _ = split(model)
    parameters, rest, *given = _state(model, task)

    def named(parameters: nnx.State, rest: nnx.State) -> dict[str, np.ndarray]:
        return torch_names(links, leaf_values(nnx.merge(graph, parameters, rest)), shapes)

    optimizer = task.optimizer[0]
    state = optimizer.init(parameters)
    losses = []
    for step in range(task.steps + 1):
        run = program(parameters, rest, *given)
        if step == 0:
            first = run
        losses.append(to_numpy(run[0]))
        if step < task.steps:
            rest = run[2]
            updates, state = optimizer.update(run[3], state, parameters)
            parameters = optax.apply_updates(parameters, updates)
    _, outputs, after, by_parameters, by_inputs = first
    return Training(
        outputs=[to_numpy(o) for o in outputs],
        losses=losses,
        inputs=[to_numpy(g) for g in by_inputs],
        gradients=named(by_parameters, rest),
        state=named(parameters, after),
        final=named(parameters, rest) if task.steps else {},
    )


def train_torch(model: torch.nn.Module, task: Task, exact: Exact | None = None, noise: Noise | None = None) -> Training:
    """Runs the task on a copy of a torch model, with `exact` in float64, its weights and inputs blurred by `noise`."""
    model = copied(model, exact, noise)
    with exact or nullcontext():
        return _train_torch(model, task, noise)


def _train_torch(model: torch.nn.Module, task: Task, noise: Noise | None) -> Training:
    device = device_of(model)
    call = task.torch_call.map(lambda x: to_torch(x).to(device))
    call = call.map(lambda x: noise(x) if noise and is_float(x) else x)
    sources = [x.requires_grad_() for x in floats(call.given)]
    targets = [to_torch(array).to(device) for array in task.torch_targets]
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    unique = {id(p): p for p in parameters.values()}
    optimizer = task.optimizer[1](list(unique.values())) if task.steps else None

    def leaves() -> dict[str, np.ndarray]:
        return {name: to_numpy(leaf).copy() for name, leaf in model.state_dict().items()}

    losses = []
    first: dict[str, Any] = {}
    final: dict[str, np.ndarray] = {}
    for step in range(task.steps + 1):
        if 0 < step == task.steps:
            final = leaves()  # before the last forward pass moves running statistics once more
        # A module may change its input in place, which autograd allows for everything but leaves.
        given = call.with_floats([x * 1 for x in sources])
        output = model(*given.args, **given.kwargs)
        outputs = picked(output, task.torch_names)
        if task.loss is not None:
            loss = task.loss[1](output)
        else:
            loss = sum(((o - t).square().mean() for o, t in zip(outputs, targets, strict=True)), torch.zeros(())) / 2
        losses.append(to_numpy(loss))
        found = gradients([loss], [torch.ones_like(loss)], [*sources, *unique.values()])
        by_leaf = dict(zip(unique, found[len(sources) :], strict=True))
        if step == 0:
            first = {
                "outputs": [to_numpy(o) for o in outputs],
                "inputs": found[: len(sources)],
                "gradients": {name: by_leaf[id(p)] for name, p in parameters.items()},
                "state": leaves(),
            }
        if optimizer is not None and step < task.steps:
            for key, p in unique.items():
                p.grad = to_torch(by_leaf[key]).to(device)
            optimizer.step()
    return Training(losses=losses, final=final, **first)


def amplification(make_optimizer: Callable[..., torch.optim.Optimizer]) -> float:
    """How an optimizer multiplies relative rounding errors: β₂ = 0.999 enters as 1 - β₂, 1000 times less exact."""
    groups = make_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    settings = [jax.tree.leaves(value) for group in groups for key, value in group.items() if key != "params"]
    return max([1.0, *(1 / (1 - x) for values in settings for x in values if isinstance(x, float) and 0 < x < 1)])
