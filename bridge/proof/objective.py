"""Loss, gradients and optimizer steps of a whole model, on either side, under the names of the torch side."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from bridge.proof.record import Noise, double, floats, gradients, is_float, leaf_values, split
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
        inputs, torch_inputs: positional arguments of the two models.
        targets, torch_targets: random values for the default loss, half the mean square distance from them.
        loss: functions (jax output -> scalar, torch output -> scalar) instead.
        optimizer: (optax transformation, function of parameters -> torch optimizer).
        steps: how many steps to take.
    """

    inputs: tuple[np.ndarray, ...]
    torch_inputs: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]
    torch_targets: tuple[np.ndarray, ...]
    loss: tuple[Callable[[Any], jax.Array], Callable[[Any], torch.Tensor]] | None
    optimizer: tuple[optax.GradientTransformation, Callable[..., torch.optim.Optimizer]]
    steps: int

    def double(self) -> "Task":
        """The same in float64."""
        return replace(
            self,
            inputs=tuple(map(double, self.inputs)),
            torch_inputs=tuple(map(double, self.torch_inputs)),
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


def train_jax(model: nnx.Module, task: Task, links: Sequence[Link], shapes: dict[str, tuple[int, ...]]) -> Training:
    """Runs the task on a copy of an nnx model, compiled as a whole."""
    graph, parameters, rest = split(nnx.clone(model))
    inputs = tuple(jnp.asarray(array) for array in task.inputs)
    targets = tuple(jnp.asarray(array) for array in task.targets)
    loss = None if task.loss is None else task.loss[0]
    optimizer = task.optimizer[0]

    def named(parameters: nnx.State, rest: nnx.State) -> dict[str, np.ndarray]:
        return torch_names(links, leaf_values(nnx.merge(graph, parameters, rest)), shapes)

    state = optimizer.init(parameters)
    losses = []
    for step in range(task.steps + 1):
        run = _loss_and_gradients(graph, parameters, rest, inputs, targets, loss)
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


@partial(jax.jit, static_argnames=("graph", "loss"))
def _loss_and_gradients(
    graph: nnx.GraphDef,
    parameters: nnx.State,
    rest: nnx.State,
    inputs: tuple[jax.Array, ...],
    targets: tuple[jax.Array, ...],
    loss: Callable[[Any], jax.Array] | None,
) -> tuple[jax.Array, list[jax.Array], nnx.State, nnx.State, list[jax.Array]]:
    places = [i for i, array in enumerate(inputs) if is_float(array)]

    def objective(
        parameters: nnx.State, sources: list[jax.Array]
    ) -> tuple[jax.Array, tuple[list[jax.Array], nnx.State]]:
        model = nnx.merge(graph, parameters, rest, copy=True)  # or its statistics belong to the trace outside
        full = list(inputs)
        for place, source in zip(places, sources, strict=True):
            full[place] = source
        output = model(*full)
        outputs = floats(output)
        if loss is not None:
            value = loss(output)
        else:
            value = sum((jnp.mean(jnp.square(o - t)) for o, t in zip(outputs, targets, strict=True)), jnp.zeros(())) / 2
        return value, (outputs, split(model)[2])

    run = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (value, (outputs, after)), (by_parameters, by_inputs) = run(parameters, [inputs[i] for i in places])
    return value, outputs, after, by_parameters, by_inputs


def train_torch(model: torch.nn.Module, task: Task, noise: Noise | None = None) -> Training:
    """Runs the task on a copy of a torch model, its inputs blurred by `noise`."""
    model = copy.deepcopy(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = [to_torch(array).to(device) for array in task.torch_inputs]
    inputs = [noise(x) if noise and is_float(x) else x for x in inputs]
    sources = [x.requires_grad_() for x in inputs if is_float(x)]
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
        output = model(*(x * 1 if is_float(x) else x for x in inputs))
        outputs = floats(output)
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
