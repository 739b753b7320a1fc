"""Do a JAX model and a PyTorch model compute the same function?  If not, in which layer does the difference begin?"""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from bridge.proof.exact_jax import Lift
from bridge.proof.inputs import call_of, dotted, noted
from bridge.proof.judge import AS_IT_IS, CEILING, Runs, Values, item, judge, largest, layout, reduction, share
from bridge.proof.layers import Layers, exact_runs
from bridge.proof.metrics import compare, difference, kl_divergence, top_k_agreement
from bridge.proof.objective import Task, Training, amplification, default_optimizer, torch_names, train_jax, train_torch
from bridge.proof.precision import epsilon, full_matmul_precision, matmul_settings
from bridge.proof.record import (
    AMPLITUDES,
    Call,
    Noise,
    NoReferenceError,
    Programs,
    device_of,
    leaf_values,
    picked,
    sharing,
)
from bridge.proof.report import Report, Row
from bridge.proof.trees import floats, named_floats
from bridge.weights.arrays import to_numpy, to_torch
from bridge.weights.match import Link, match

_EXACT = "copied weights are equal bit for bit"
_DROPOUTS = (
    *(torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d),
    *(torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout),
)


def verify(
    jax_model: nnx.Module,
    torch_model: torch.nn.Module,
    inputs: Any,
    *,
    torch_inputs: Any = None,
    outputs: Mapping[str, str] | None = None,
    training: bool = True,
    loss: tuple[Callable[[Any], jax.Array], Callable[[Any], torch.Tensor]] | None = None,
    optimizer: tuple[optax.GradientTransformation, Callable[..., torch.optim.Optimizer]] | None = None,
    steps: int = 0,
    seed: int = 0,
) -> Report:
    """Compares two models of the same structure: weights, every layer, gradients and training steps.

    Neither model is changed. Dropout and other noise is off, batch statistics are tried in both modes, and products of
    float32 matrices are taken in float32, whatever the frameworks are set to (TF32, bfloat16). The verdict rests on
    runs of both in float64, in which casts inside the models are lifted.

    Args:
        jax_model, torch_model: models that `bridge.convert` could convert into each other.
        inputs: what the JAX model is called with: an array (numpy, jax or torch), a tuple of arguments, a dict of
            keyword arguments, or `bridge.Inputs(*args, **kwargs)`. Arguments may be trees of arrays; what is no array
            (None, True, a cache object) is passed as it is.
        torch_inputs: the torch model's, where they differ: images are channels first there.
        outputs: names of JAX results -> names of torch results to compare, such as {"": "logits"}; "" is a bare array,
            and "hidden.0" the first of the tuple `hidden`. By default all, by name or, where a side has none, in order.
        training: whether to compare gradients and optimizer steps of the whole model. Gradients of layers are compared
            without it, too, but for modules of more than 1 GiB of weights in float64 that consist of others.
        loss: (function of the JAX output, function of the torch output), each giving a scalar; by default half the mean
            square distance of the outputs from random targets.
        optimizer: (optax transformation, function of a list of parameters -> torch optimizer); by default AdamW with a
            learning rate of 1e-3 and a weight decay of 1e-2.
        steps: optimizer steps to take.
        seed: for targets, cotangents and the simulated rounding.

    Returns:
        A report that prints as a table and is truthy if its verdict is "EQUAL". `report.faults` names the modules in
        which differences begin, `report.unproved` says why equal figures are no proof.

    Raises:
        TypeError: the models are not one of each framework.
        ValueError: the models do not correspond leaf by leaf; `inputs` holds no array, or one that holds NaN, or
            float64 for models of less; `steps` is negative, or not 0 without `training`; the results do not correspond;
            a model differs from itself in two runs. Errors of the models themselves get a note of side and inputs.

    Example:
        >>> import numpy, torch
        >>> from flax import nnx
        >>> from bridge import convert
        >>> jax_model, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), numpy.ones((3, 4), "float32")
        >>> torch_model = convert(jax_model, torch.nn.Linear(4, 2))
        >>> verify(jax_model, torch_model, {"inputs": x}, torch_inputs={"input": x}).verdict
        'EQUAL'
    """
    if not (isinstance(jax_model, nnx.Module) and isinstance(torch_model, torch.nn.Module)):
        kinds = f"{type(jax_model).__name__} and {type(torch_model).__name__}"
        raise TypeError(f"jax_model and torch_model must be an nnx.Module and a torch.nn.Module, got {kinds}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if steps and not training:
        raise ValueError(f"steps={steps} needs training=True")
    jax_call = call_of(inputs, "inputs", torch_model)
    torch_call = jax_call if torch_inputs is None else call_of(torch_inputs, "torch_inputs", torch_model)
    run = _Verification(jax_model, torch_model, jax_call, torch_call, seed)
    header = _header(torch_model, seed)
    # Whatever noise a model makes is the same in each verification, and the caller's streams are as they were.
    with full_matmul_precision(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return run.report(header, outputs, loss, optimizer or default_optimizer(), steps if training else None)


class _Verification:
    """The runs of one call of `verify`, and the rows they give."""

    def __init__(
        self,
        jax_model: nnx.Module,
        torch_model: torch.nn.Module,
        jax_call: Call,
        torch_call: Call,
        seed: int,
    ) -> None:
        self.jax_model, self.torch_model = nnx.clone(jax_model), sharing(torch_model)
        self.jax_call, self.torch_call = jax_call, torch_call
        self.seed, self.programs = seed, Programs()
        self.match = match(self.jax_model, self.torch_model, own=True)
        self.eps = max((epsilon(p.dtype) for p in self.torch_model.parameters()), default=0.0)
        self.rows: list[Row] = []
        self.faults: dict[str, str] = {}
        self.notes = [
            f"{name} is an array without a counterpart, judged by what the model makes of it" for name in self.match.own
        ]
        self.unproved = [f"setting differs: {line}" for line in self.match.settings]
        self.unlifted: set[str] = set()
        self.logits: dict[str, float] = {}

    def report(self, header: dict[str, Any], names: Any, loss: Any, optimizer: Any, steps: int | None) -> Report:
        """The whole verification; without training if `steps` is None."""
        self.weights()
        reference = "float64, with casts inside the models lifted"
        alone: dict[str, str] = {}
        try:
            _set_mode(self.jax_model, self.torch_model, False)
            self.outputs(names)
            statistics = any(getattr(module, "track_running_stats", False) for module in self.torch_model.modules())
            for mode in [False, True] if statistics else [False]:
                _set_mode(self.jax_model, self.torch_model, mode)
                layers = Layers(
                    self.jax_model,
                    self.torch_model,
                    self.jax_call,
                    self.torch_call,
                    self.seed,
                    self.programs,
                    self.results,
                    steps is not None,
                )
                self.rows += layers.rows
                self.eps, self.reference_eps = max(self.eps, layers.eps), layers.reference_eps
                self.batch_norms, self.unlifted = layers.batch_norms, self.unlifted | layers.unlifted
                self.faults = layers.faults | self.faults
                alone, called = alone | layers.alone, layers.called
            if steps is not None:
                self.training(loss, optimizer, steps)
        except NoReferenceError as error:
            reference = f"none: {error}"
            self.unproved.append(f"there is no float64 reference: {error}")
        if self.unlifted:
            reference = f"float64, but for what cannot be lifted: {', '.join(sorted(self.unlifted))}"
            self.unproved.append(f"the reference is not all float64: cannot lift {', '.join(sorted(self.unlifted))}")
        jumps = [row for row in self.rows if not row.proved]
        if jumps:
            where = ", ".join(dict.fromkeys(f"{row.check} {row.path}".strip() for row in jumps[:3]))
            self.unproved.append(
                f"{len(jumps)} values are so sensitive to rounding that float64 does not tell {CEILING:.0e} of them: "
                f"{where}"
            )
        whole = [row for row in self.rows if not row.path]
        if self.faults and whole and all(row.ok for row in whole):
            self.notes.append(
                "for these inputs the models agree as wholes: the modules below may only divide the work otherwise, "
                "as a factor that is inside one of them here and outside of it there"
            )
        header = {**header, "reference": reference}
        if alone:
            header["layers not run alone"] = f"{len(alone)} of {called}: {_grouped(alone)}"
        return Report(header, self.rows, self.faults, self.notes, self.unproved, self.logits)

    def outputs(self, names: Mapping[str, str] | None) -> None:
        """Which results correspond, before any other work; and whether they are numbers."""
        ours, theirs = self._results()
        if names is None:
            names = _paired(list(ours), list(theirs))
        for chosen, found, side in ((list(names), ours, "jax_model"), (list(names.values()), theirs, "torch_model")):
            for name in chosen:
                if name not in found:
                    raise ValueError(f"outputs: {side} gives no floating-point result {name!r}, but {_listed(found)}")
        self.results = list(names), list(names.values())
        for i, (j, t) in enumerate(zip(picked(ours, self.results[0]), picked(theirs, self.results[1]), strict=True)):
            a, b = to_numpy(j), to_numpy(t)
            how = layout(a, b)
            if how is None:
                raise ValueError(
                    f"output {self.results[0][i]!r} of jax_model has shape {a.shape}, "
                    f"that of torch_model, {self.results[1][i]!r}, {b.shape}; "
                    "outputs={jax name: torch name} says which correspond"
                )
            if a.dtype != b.dtype:
                self.unproved.append(
                    f"output {i} is {a.dtype} in JAX and {b.dtype} in torch: one side computes in less precision"
                )
            if np.isnan(a).any() and np.isnan(b).any():
                self.unproved.append(f"output {i} holds NaN in both models: of those elements nothing is proved")
            elif np.isinf(a).any() and np.isinf(b).any():
                self.notes.append(f"output {i} holds infinity in both models")

    def weights(self) -> None:
        """Every leaf, bit by bit."""
        leaves = leaf_values(self.jax_model)
        by_name: dict[str, list[Link]] = {}
        for link in self.match.links:
            by_name.setdefault(link.torch.path, []).append(link)
        for name, links in by_name.items():  # one by one, for the memory
            ours = torch_names(links, leaves, {name: tuple(self.match.torch[name].shape)})[name]
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
        ours, theirs = (picked(found, names) for found, names in zip(self._results(), self.results, strict=True))
        outputs = [(to_numpy(j), to_numpy(t)) for j, t in zip(ours, theirs, strict=True)]
        layouts = [layout(j, t) or AS_IT_IS for j, t in outputs]
        rng = np.random.default_rng(self.seed)
        targets = tuple(rng.standard_normal(j.shape).astype(j.dtype) for j, _ in outputs)
        torch_targets = tuple(how[0](t) for how, t in zip(layouts, targets, strict=True))
        task = Task(self.jax_call, self.torch_call, *self.results, targets, torch_targets, loss, optimizer, steps)
        runs = self._trainings(task)
        truth = runs.torch64
        given = floats(self.torch_call.given)
        n = reduction(self.torch_model, given)
        total = max([n, *(x.size for x in given)])

        def values(path: str, of: Callable[[Training], np.ndarray]) -> Values:
            return runs.values(of, how=AS_IT_IS if path in self.match.torch else None)

        def row(check: str, path: str, values: Values, n: int, scale: float = 0.0) -> Row:
            self.rows.append(judge(check, path, self.jax_name(path), values, n, scale, self.eps, self.reference_eps))
            return self.rows[-1]

        moved = 0.0
        for i, (_, t) in enumerate(outputs):
            found = values(f"output {i}", item(attrgetter("outputs"), i))
            row("value", f"output {i}", found, n)
            moved = max(moved, found.rounded / found.size if found.size else 0.0)
            if t.ndim > 1:
                j, t, how = runs.jax.outputs[i], runs.torch.outputs[i], layouts[i]
                self.logits[f"output {i} as logits: KL divergence in nats"] = kl_divergence(how[0](j), t)
                for k in (1, 5):
                    self.logits[f"output {i} as logits: top-{k} agreement"] = top_k_agreement(how[0](j), t, k)
        for step in range(steps + 1):
            found = values("", item(attrgetter("losses"), step))
            found = replace(found, rounded=max(found.rounded, moved * found.size))
            row("loss", f"after {step} steps", found, total)
        scale = max([0.0, *(largest(g) for g in (*truth.gradients.values(), *truth.inputs))])
        by_inputs = {f"input {i}": item(attrgetter("inputs"), i) for i in range(len(truth.inputs))}
        # Of a tied weight that is one variable in JAX, the gradient is compared under one of its names.
        names = [name for name in truth.gradients if name in runs.jax.gradients]
        by_names = {name: item(attrgetter("gradients"), name) for name in names}
        gradients = share([values(path, of) for path, of in (by_inputs | by_names).items()])
        rounding = {
            path: row("gradient", path, value, total, scale).tolerance
            for path, value in zip(by_inputs | by_names, gradients, strict=True)
        }
        for name in (name for name in runs.jax.state if name not in truth.gradients):
            row("state", name, values(name, item(attrgetter("state"), name)), total)
        factor = amplification(optimizer[1])
        starts = {name: to_numpy(self.match.torch[name]).astype(np.float64) for name in runs.jax.final}
        longest = max((largest(truth.final[name] - start) for name, start in starts.items()), default=0.0)
        for name, start in starts.items():
            # An adaptive optimizer divides a gradient by its own size: where that is rounding alone, so is the step.
            loose = np.abs(truth.gradients[name]) <= rounding[name] if name in rounding else np.zeros(start.shape, bool)

            def final(run: Training, name: str = name, start: np.ndarray = start, loose: np.ndarray = loose) -> Any:
                found = run.final[name]
                still = loose & (difference(found, start) <= 2 * longest)
                return np.where(still, start, found).astype(found.dtype)

            scale = largest(start) + factor * largest(truth.final[name] - start)
            row(f"after {steps} steps", name, values(name, final), total, scale)
        worst = next((row for row in self.rows if not row.ok), None)
        if worst and not self.faults:
            self.faults[""] = f"every layer agrees alone, yet the {worst.check} of {worst.path} differs: {worst.why}"

    def _trainings(self, task: Task) -> Runs[Training]:
        """Every run of the whole model; running variances of JAX as torch would have them."""
        double = task.double()
        shapes = {name: tuple(leaf.shape) for name, leaf in self.match.torch.items()}
        noises = [Noise(self.torch_model, amplitude, self.seed + i) for i, amplitude in enumerate(AMPLITUDES)]

        def of_jax(lift: Lift | None) -> Training:
            run = train_jax(self.jax_model, task, self.match.links, shapes, lift)
            in_torch = self.batch_norms.in_torch
            return replace(run, state=in_torch(run.state, "", 1), final=in_torch(run.final, "", task.steps))

        runs, unlifted = exact_runs(
            of_jax,
            lambda exact, noise=None: train_torch(noise.model if noise else self.torch_model, double, exact, noise),
            noises,
            self.seed,
        )
        self.unlifted |= unlifted
        runs.jax, runs.torch = of_jax(None), train_torch(self.torch_model, task)
        return runs

    def _results(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The floating-point results of both models by name."""
        given = self.jax_call.map(jnp.asarray)
        jax_model, torch_model = nnx.clone(self.jax_model), sharing(self.torch_model)
        with noted("jax_model", self.jax_call, {id(m): dotted(p) for p, m in nnx.iter_modules(jax_model)}):
            ours = named_floats(jax_model(*given.args, **given.kwargs))
        device = device_of(self.torch_model)
        given = self.torch_call.map(lambda x: to_torch(x).to(device))
        places = {id(m): p for p, m in torch_model.named_modules()}
        with noted("torch_model", self.torch_call, places), torch.no_grad():
            return ours, named_floats(torch_model(*given.args, **given.kwargs))


def _paired(ours: list[str], theirs: list[str]) -> dict[str, str]:
    """Results by name or, where one side has only numbers for names, in order."""
    if set(ours) == set(theirs):
        return {name: name for name in ours}
    unnamed = any(all(name.replace(".", "").isdigit() or not name for name in names) for names in (ours, theirs))
    if len(ours) != len(theirs) or not unnamed:
        raise ValueError(
            f"jax_model gives {len(ours)} floating-point results ({_listed(ours)}), torch_model {len(theirs)} "
            f"({_listed(theirs)}): say which correspond, outputs={{jax name: torch name}}"
        )
    return dict(zip(ours, theirs, strict=True))


def _grouped(reasons: dict[str, str]) -> str:
    """Each reason once, with the first of the modules it holds for."""
    groups: dict[str, list[str]] = {}
    for path, why in reasons.items():
        groups.setdefault(why, []).append(path or "the model")
    texts = []
    for why, paths in groups.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        texts.append(f"{', '.join(paths[:3])}{more}: {why}")
    return "; ".join(texts)


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _set_mode(jax_model: nnx.Module, torch_model: torch.nn.Module, training: bool) -> None:
    """Training or evaluation mode, but without noise in both."""
    jax_model.train() if training else jax_model.eval()
    jax_model.set_attributes(deterministic=True, raise_if_not_found=False)
    torch_model.train(training)
    for module in torch_model.modules():
        if isinstance(module, _DROPOUTS) or any(getattr(module, name, False) for name in ("dropout", "stochastic")):
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
