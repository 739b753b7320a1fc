"""Do a JAX model and a PyTorch model compute the same function?  If not, in which layer does the difference begin?"""

import copy
import os
import platform
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from bridge.proof.judge import AS_IT_IS, Layout, Values, judge, largest, layout, reduction
from bridge.proof.layers import Layers
from bridge.proof.metrics import compare, difference, kl_divergence, top_k_agreement
from bridge.proof.objective import Task, Training, amplification, default_optimizer, torch_names, train_jax, train_torch
from bridge.proof.precision import epsilon, full_matmul_precision, matmul_settings
from bridge.proof.record import AMPLITUDES, Noise, floats, jax_float64, leaf_values
from bridge.proof.report import Report, Row
from bridge.weights.arrays import to_numpy, to_torch
from bridge.weights.match import match

_EXACT = "copied weights are equal bit for bit"


def verify(
    jax_model: nnx.Module,
    torch_model: torch.nn.Module,
    inputs: Any,
    *,
    torch_inputs: Any = None,
    loss: tuple[Callable[[Any], jax.Array], Callable[[Any], torch.Tensor]] | None = None,
    optimizer: tuple[optax.GradientTransformation, Callable[..., torch.optim.Optimizer]] | None = None,
    steps: int = 0,
    seed: int = 0,
) -> Report:
    """Compares two models of the same structure: weights, every layer, gradients and training steps.

    Neither model is changed. Dropout and other noise is off, batch statistics are tried in both modes, and products of
    float32 matrices are taken in float32, whatever the frameworks are set to (TF32, bfloat16).

    Args:
        jax_model, torch_model: models that `bridge.convert` could convert into each other.
        inputs: the JAX model's input array (numpy, jax or torch), or a tuple of several.
        torch_inputs: the torch model's, where they differ: images are channels first there.
        loss: (function of the JAX output, function of the torch output), each giving a scalar; by default half the mean
            square distance of the outputs from random targets.
        optimizer: (optax transformation, function of a list of parameters -> torch optimizer); by default AdamW with a
            learning rate of 1e-3 and a weight decay of 1e-2.
        steps: optimizer steps to take.
        seed: for targets, cotangents and the simulated rounding.

    Returns:
        A report that prints as a table and is truthy if all is equal. `report.faults` names the modules in which
        differences begin.

    Raises:
        TypeError: the models are not one of each framework.
        ValueError: the models do not correspond leaf by leaf; `inputs` holds no array, or one that holds NaN, or
            float64 for models of less; `steps` is negative. Errors of the models themselves get a note of the inputs.
    """
    if not (isinstance(jax_model, nnx.Module) and isinstance(torch_model, torch.nn.Module)):
        kinds = f"{type(jax_model).__name__} and {type(torch_model).__name__}"
        raise TypeError(f"jax_model and torch_model must be an nnx.Module and a torch.nn.Module, got {kinds}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    jax_args = _as_inputs(inputs, "inputs", torch_model)
    torch_args = jax_args if torch_inputs is None else _as_inputs(torch_inputs, "torch_inputs", torch_model)
    run = _Verification(jax_model, torch_model, jax_args, torch_args, seed)
    header = _header(torch_model, seed)
    try:
        with full_matmul_precision():
            return run.report(header, loss, optimizer or default_optimizer(), steps)
    except Exception as error:  # the models raise what they like: it helps to know what they were given
        for name, given in (("inputs", jax_args), ("torch_inputs", torch_args)):
            error.add_note(f"{name}: " + ", ".join(f"{x.dtype}{list(x.shape)}" for x in given))
        raise


def _as_inputs(inputs: Any, name: str, model: torch.nn.Module) -> tuple[np.ndarray, ...]:
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    if not given or not all(isinstance(x, (np.ndarray, jax.Array, torch.Tensor)) for x in given):
        kinds = ", ".join(type(x).__name__ for x in given) or "nothing"
        raise ValueError(f"{name} must be an array or a tuple of arrays, got {kinds}")
    arrays = tuple(to_numpy(x) for x in given)
    widest = max((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), default=8)
    for i, array in enumerate(arrays):
        if np.isnan(array).any():  # infinity is a value: masks have it
            raise ValueError(f"{name}[{i}] holds NaN, of which equal outputs would prove nothing")
        if array.dtype == np.float64 and widest < 8:
            raise ValueError(f"{name}[{i}] is float64, and no parameter is: pass {name}.astype(numpy.float32)")
    return arrays


class _Verification:
    """The runs of one call of `verify`, and the rows they give."""

    def __init__(
        self,
        jax_model: nnx.Module,
        torch_model: torch.nn.Module,
        jax_inputs: tuple[np.ndarray, ...],
        torch_inputs: tuple[np.ndarray, ...],
        seed: int,
    ) -> None:
        self.jax_model, self.torch_model = nnx.clone(jax_model), copy.deepcopy(torch_model)
        self.jax_inputs, self.torch_inputs = jax_inputs, torch_inputs
        self.seed = seed
        self.match = match(self.jax_model, self.torch_model)
        self.eps = max((epsilon(p.dtype) for p in self.torch_model.parameters()), default=0.0)
        self.rows: list[Row] = []
        self.faults: dict[str, str] = {}
        self.notes = [f"setting differs: {line}" for line in self.match.settings]
        self.logits: dict[str, float] = {}

    def report(self, header: dict[str, Any], loss: Any, optimizer: Any, steps: int) -> Report:
        self.weights()
        modes = [False, True] if any(_has_statistics(m) for m in self.torch_model.modules()) else [False]
        for training in modes:
            _set_mode(self.jax_model, self.torch_model, training)
            layers = Layers(self.jax_model, self.torch_model, self.jax_inputs, self.torch_inputs, self.seed)
            self.rows += layers.rows
            self.reference_eps, self.batch_norms = layers.reference_eps, layers.batch_norms
            self.faults = layers.faults | self.faults
            self.notes += [note for note in layers.notes if note not in self.notes]
        self.training(loss, optimizer, steps)
        return Report(header, self.rows, self.faults, self.notes, self.logits)

    def weights(self) -> None:
        """Every leaf, bit by bit."""
        shapes = {name: tuple(t.shape) for name, t in self.match.torch.items()}
        for name, ours in torch_names(self.match.links, leaf_values(self.jax_model), shapes).items():
            theirs = to_numpy(self.match.torch[name])
            common = ours.dtype if ours.dtype == theirs.dtype else np.dtype(np.float64)
            figures = compare(ours.astype(common), theirs.astype(common))
            ok = figures.max_abs == 0 and figures.nan[0] == figures.nan[1]
            row = Row("weights", name, self.jax_name(name), ours.shape, str(theirs.dtype), figures, ok=ok, why=_EXACT)
            self.rows.append(row)
            if not ok:
                text = f"weights differ: {name}{list(figures.index)} is {figures.a!r} in JAX and {figures.b!r} in torch"
                self.faults.setdefault(name.rpartition(".")[0], text)

    def jax_name(self, torch_name: str) -> str:
        return next((str(link.jax) for link in self.match.links if link.torch.path == torch_name), "")

    def training(self, loss: Any, optimizer: Any, steps: int) -> None:
        """The whole model as it will really run: output, loss, gradients, steps."""
        _set_mode(self.jax_model, self.torch_model, True)
        outputs = self._outputs()
        layouts = [layout(j, t) for j, t in outputs]
        for (j, t), how in zip(outputs, layouts, strict=True):
            if how is None:
                raise ValueError(f"the output of jax_model has shape {j.shape}, that of torch_model {t.shape}")
        for i, (j, t) in enumerate(outputs):
            if not (np.isfinite(j).all() or np.isfinite(t).all()):
                self.notes.append(
                    f"output {i} holds NaN or infinity in both models: of those elements nothing is proved"
                )
        rng = np.random.default_rng(self.seed)
        targets = tuple(rng.standard_normal(j.shape).astype(j.dtype) for j, _ in outputs)
        torch_targets = tuple(how[0](t) for how, t in zip(layouts, targets, strict=True) if how)
        task = Task(self.jax_inputs, self.torch_inputs, targets, torch_targets, loss, optimizer, steps)
        runs = self._trainings(task)
        truth = runs[3]
        n = reduction(self.torch_model, self.torch_inputs)
        total = max(n, *(x.size for x in self.torch_inputs))

        def row(check: str, path: str, found: list[np.ndarray], n: int, scale: float = 0.0) -> Row:
            j, t, j64, t64, *noisy = found
            how: Layout = AS_IT_IS if path in self.match.torch else layout(j64, t64) or AS_IT_IS
            values = Values(how[0](j), t, how[0](j64), t64, noisy)
            self.rows.append(judge(check, path, self.jax_name(path), values, n, scale, self.eps, self.reference_eps))
            return self.rows[-1]

        for i, (j, t) in enumerate(outputs):
            row("value", f"output {i}", [run.outputs[i] for run in runs], n)
            how = layouts[i]
            if how is not None and t.ndim > 1:
                self.logits[f"output {i} as logits: KL divergence in nats"] = kl_divergence(how[0](j), t)
                for k in (1, 5):
                    self.logits[f"output {i} as logits: top-{k} agreement"] = top_k_agreement(how[0](j), t, k)
        for step in range(steps + 1):
            row("loss", f"after {step} steps", [run.losses[step] for run in runs], total)
        scale = max([0.0, *(largest(g) for g in (*truth.gradients.values(), *truth.inputs))])
        for i in range(len(truth.inputs)):
            row("gradient", f"input {i}", [run.inputs[i] for run in runs], total, scale)
        rounding = {
            name: row("gradient", name, [run.gradients[name] for run in runs], total, scale).tolerance
            for name in truth.gradients
        }
        states = self._statistics([run.state for run in runs], 1)
        for name in (name for name in runs[0].state if name not in truth.gradients):
            row("state", name, [state[name] for state in states], total)
        factor = amplification(optimizer[1])
        finals = self._statistics([run.final for run in runs], steps)
        starts = {name: to_numpy(self.match.torch[name]).astype(np.float64) for name in runs[0].final}
        longest = max((largest(truth.final[name] - start) for name, start in starts.items()), default=0.0)
        for name, start in starts.items():
            # An adaptive optimizer divides a gradient by its own size: where that is rounding alone, so is the step.
            loose = np.abs(truth.gradients[name]) <= rounding[name] if name in rounding else np.zeros(start.shape, bool)
            final = [
                np.where(loose & (difference(found[name], start) <= 2 * longest), start, found[name]).astype(
                    found[name].dtype
                )
                for found in finals
            ]
            scale = largest(start) + factor * largest(truth.final[name] - start)
            row(f"after {steps} steps", name, final, total, scale)
        worst = next((row for row in self.rows if not row.ok), None)
        if worst and not self.faults:
            self.faults[""] = f"every layer agrees alone, yet the {worst.check} of {worst.path} differs: {worst.why}"

    def _trainings(self, task: Task) -> list[Training]:
        """JAX, torch, both in float64, and torch in float64 with simulated rounding."""
        task64 = task.double()
        shapes = {name: tuple(leaf.shape) for name, leaf in self.match.torch.items()}
        torch64 = copy.deepcopy(self.torch_model).double()
        noises = [Noise(torch64, amplitude, self.seed + i) for i, amplitude in enumerate(AMPLITUDES)]
        with jax.enable_x64(True):
            jax64 = train_jax(jax_float64(self.jax_model), task64, self.match.links, shapes)
        return [
            train_jax(self.jax_model, task, self.match.links, shapes),
            train_torch(self.torch_model, task),
            jax64,
            train_torch(torch64, task64),
            *(train_torch(noise.model, task64, noise) for noise in noises),
        ]

    def _statistics(self, states: list[dict[str, np.ndarray]], updates: int) -> list[dict[str, np.ndarray]]:
        """The states of all runs, those of JAX (first and third) with running variances as torch would have them."""
        return [
            self.batch_norms.in_torch(state, "", updates) if i in (0, 2) else state for i, state in enumerate(states)
        ]

    def _outputs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        j = floats(nnx.clone(self.jax_model)(*map(jnp.asarray, self.jax_inputs)))
        device = next((p.device for p in self.torch_model.parameters()), torch.device("cpu"))
        with torch.no_grad():
            t = floats(copy.deepcopy(self.torch_model)(*(to_torch(x).to(device) for x in self.torch_inputs)))
        if len(j) != len(t):
            raise ValueError(f"jax_model gives {len(j)} floating-point results, torch_model {len(t)}")
        return [(to_numpy(a), to_numpy(b)) for a, b in zip(j, t, strict=True)]


def _has_statistics(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.track_running_stats


def _set_mode(jax_model: nnx.Module, torch_model: torch.nn.Module, training: bool) -> None:
    """Training or evaluation mode, but without noise in both."""
    jax_model.train() if training else jax_model.eval()
    jax_model.set_attributes(deterministic=True, raise_if_not_found=False)
    torch_model.train(training)
    for module in torch_model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) or any(
            getattr(module, name, False) for name in ("dropout", "stochastic")
        ):
            module.training = False


def _header(torch_model: torch.nn.Module, seed: int) -> dict[str, Any]:
    device = next((str(p.device) for p in torch_model.parameters()), "cpu")
    return {
        "python": platform.python_version(),
        "versions": f"jax {jax.__version__}, flax {flax.__version__}, torch {torch.__version__}",
        "devices": f"jax {jax.devices()[0].device_kind}, torch {device}",
        "matmul precision": f"float32 here, set to: {matmul_settings()}",
        "x64 in jax": jax.config.values["jax_enable_x64"],
        "threads": f"torch {torch.get_num_threads()}, cores {os.cpu_count()}",
        "seed": seed,
    }
