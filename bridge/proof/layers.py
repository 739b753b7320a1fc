"""Compares two models layer by layer: free-running, and each layer alone on the JAX side's input (teacher-forced)."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import mhc_torch
from bridge.proof.batch_norm import BatchNorms
from bridge.proof.judge import Layout, Values, epsilon, judge, largest, layout, reduction
from bridge.proof.objective import torch_names
from bridge.proof.record import (
    AMPLITUDES,
    Call,
    Noise,
    Pull,
    Recording,
    double,
    floats,
    is_float,
    jax_float64,
    pull_jax,
    pull_torch,
    watch_jax,
    watch_torch,
)
from bridge.proof.report import Row
from bridge.proof.unroll import unrolled
from bridge.weights.arrays import to_numpy, to_torch
from bridge.weights.leaves import submodule
from bridge.weights.match import Link, ModulePair, match


class Layers:
    """The layers of one pair of models, in the mode (training or not) that they are in.

    Attributes:
        rows: every comparison: "layer value" is free-running, "layer alone" is teacher-forced.
        faults: torch path of each module where a difference is born -> what is wrong.
        notes: what could not be compared.
        reference_eps: precision that the float64 runs really had, where some of their steps are fixed to less.
        batch_norms: how the statistics of one side become those of the other.
    """

    def __init__(
        self,
        jax_model: nnx.Module,
        torch_model: torch.nn.Module,
        jax_inputs: Sequence[np.ndarray],
        torch_inputs: Sequence[np.ndarray],
        seed: int,
    ) -> None:
        self.jax = unrolled(jax_model)
        self.torch = copy.deepcopy(torch_model)
        self.torch64 = copy.deepcopy(torch_model).double()
        self.noises = [Noise(self.torch64, amplitude, seed + i) for i, amplitude in enumerate(AMPLITUDES)]
        found = match(self.jax, self.torch)
        self.links = found.links
        self.pairs = {pair.torch: pair for pair in reversed(found.modules) if not pair.index}
        # A value may come from coarser ones.
        self.eps = max((epsilon(to_numpy(p).dtype) for p in self.torch.parameters()), default=0.0)
        self.reference_eps = 0.0  # what the float64 runs really had
        self.rng = np.random.default_rng(seed)
        self.rows: list[Row] = []
        self.faults: dict[str, str] = {}
        self.notes: list[str] = []
        with jax.enable_x64(True):
            self.jax64 = jax_float64(self.jax)
            self.jax_calls64 = self._record_jax(self.jax64, [double(x) for x in jax_inputs])
        self.jax_calls = self._record_jax(self.jax, jax_inputs)
        self.torch_calls = self._record_torch(self.torch, torch_inputs)
        doubles = [double(x) for x in torch_inputs]
        self.torch_calls64 = self._record_torch(self.torch64, doubles)
        self.noisy_calls = [self._record_torch(noise.model, doubles, noise) for noise in self.noises]
        self.batch_norms = BatchNorms(self.jax, self.torch, self.pairs.values(), self.torch_calls)
        self._compare()

    def _record_jax(self, model: nnx.Module, inputs: Sequence[np.ndarray]) -> Recording:
        model = nnx.clone(model)  # a call may change statistics
        with watch_jax({path: submodule(model, pair.jax) for path, pair in self.pairs.items()}) as recording:
            model(*map(jnp.asarray, inputs))
        return recording

    def _record_torch(
        self, model: torch.nn.Module, inputs: Sequence[np.ndarray], noise: Noise | None = None
    ) -> Recording:
        model = copy.deepcopy(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        tensors = [to_torch(x).to(device) for x in inputs]
        with watch_torch({path: model.get_submodule(path) for path in self.pairs}) as recording, torch.no_grad():
            model(*(noise(x) if noise and is_float(x) else x for x in tensors))
        return recording

    def _compare(self) -> None:
        failed: dict[str, str] = {}
        calls = list(self._matched_calls())
        for path, jax_call, torch_call, _ in calls:
            for row in self._alone(path, jax_call, torch_call):
                self.rows.append(row)
                if not row.ok:
                    what = row.path.removeprefix(path).lstrip(".")
                    failed.setdefault(path, f"{row.check.removeprefix('layer alone: ')} {what}: {row.why}")
        for path, _, _, index in calls:
            self._free(path, index)
        for path, text in failed.items():
            if not any(other != path and _below(other, path) for other in failed):
                self.faults[path] = text + self._place(path)

    def _matched_calls(self) -> Iterator[tuple[str, Call, Call, int]]:
        """The calls of each pair of modules in the order in which they return, inner ones first."""
        order = sorted(
            ((call.left, path, i) for path, calls in self.torch_calls.calls.items() for i, call in enumerate(calls))
        )
        for path in self.pairs:
            name = path or "the model"
            on_jax, on_torch = (len(r.calls.get(path, [])) for r in (self.jax_calls, self.torch_calls))
            if path in self.jax_calls.traced:
                self.notes.append(f"{name} runs inside a JAX transformation and is judged as part of what calls it")
            elif on_jax != on_torch:
                self.notes.append(f"{name} is called {on_jax} times by JAX and {on_torch} times by torch")
        for _, path, i in order:
            jax_calls = self.jax_calls.calls.get(path, [])
            if i < len(jax_calls):
                yield path, jax_calls[i], self.torch_calls.calls[path][i], i

    def _seen(self, path: str, index: int, pick: Any) -> list[Values]:
        """Arrays of one call as every free run saw them: `pick` chooses those that went in or came out."""
        every = [self.jax_calls, self.torch_calls, self.jax_calls64, self.torch_calls64, *self.noisy_calls]
        found = [[to_numpy(x) for x in floats(pick(r.calls[path][index]))] for r in every]
        layouts = _layouts(found[2], found[3])
        return [] if layouts is None else list(_values(layouts, found))

    def _free(self, path: str, index: int) -> None:
        n = reduction(self.torch, [to_numpy(x) for x in floats(self.torch_calls.calls[path][index].args)])
        for value in self._seen(path, index, lambda call: call.output):
            self.rows.append(
                judge(
                    "layer value", path, self.pairs[path].jax, value, n, eps=self.eps, reference_eps=self.reference_eps
                )
            )

    def _alone(self, path: str, jax_call: Call, torch_call: Call) -> Iterator[Row]:
        """One layer forward and back, both sides on the JAX side's input and one cotangent."""
        pair = self.pairs[path]
        given = [to_numpy(x) for x in floats((jax_call.args, jax_call.kwargs))]
        theirs = [to_numpy(x) for x in floats((torch_call.args, torch_call.kwargs))]
        outputs = [to_numpy(x) for x in floats(jax_call.output)]
        torch_outputs = [to_numpy(x) for x in floats(torch_call.output)]
        into, out = _layouts(given, theirs), _layouts(outputs, torch_outputs)
        if into is None or out is None:
            self.notes.append(f"{path or 'the model'} takes or gives other arrays in JAX than in torch: not run alone")
            return
        cotangents = [self.rng.standard_normal(o.shape).astype(o.dtype) for o in outputs]
        runs = self._pulls(pair, jax_call, torch_call, given, cotangents, into, out)
        yield from self._judge_alone(pair, runs, given, into, out)

    def _pulls(
        self,
        pair: ModulePair,
        jax_call: Call,
        torch_call: Call,
        given: list[np.ndarray],
        cotangents: list[np.ndarray],
        into: Sequence[Layout],
        out: Sequence[Layout],
    ) -> list[Pull]:
        torch_given = [how[0](x) for how, x in zip(into, given, strict=True)]
        torch_cotangents = [how[0](c) for how, c in zip(out, cotangents, strict=True)]
        doubles, torch_doubles = [double(x) for x in given], [double(x) for x in torch_given]
        with jax.enable_x64(True):
            jax64 = pull_jax(submodule(self.jax64, pair.jax), jax_call, doubles, cotangents, traced=True)
        return [
            pull_jax(submodule(self.jax, pair.jax), jax_call, given, cotangents),
            pull_torch(self.torch.get_submodule(pair.torch), torch_call, torch_given, torch_cotangents),
            jax64,
            pull_torch(self.torch64.get_submodule(pair.torch), torch_call, torch_doubles, torch_cotangents),
            *(
                pull_torch(
                    noise.model.get_submodule(pair.torch),
                    torch_call,
                    [to_numpy(noise(to_torch(x))) for x in torch_doubles],
                    torch_cotangents,
                )
                for noise in self.noises
            ),
        ]

    def _judge_alone(
        self, pair: ModulePair, runs: list[Pull], given: list[np.ndarray], into: Sequence[Layout], out: Sequence[Layout]
    ) -> Iterator[Row]:
        j, t, j64, t64, *noisy = runs
        module = self.torch.get_submodule(pair.torch)
        n = reduction(module, given)
        total = max([n, *(x.size for x in given)])
        eps = max(epsilon(x.dtype) for x in [*given, *t.outputs, *t.parameters.values(), *j.outputs])
        reference_eps = max(j64.precision, t64.precision)
        self.reference_eps = max(self.reference_eps, reference_eps)
        for value in _values(out, [run.outputs for run in runs]):
            yield judge("layer alone: value", pair.torch, pair.jax, value, n, 0.0, eps, reference_eps)

        scale = max([0.0, *(largest(g) for g in (*t64.inputs, *t64.parameters.values()))])
        for value in _values(into, [run.inputs for run in runs]):
            yield judge("layer alone: gradient of input", pair.torch, pair.jax, value, total, scale, eps, reference_eps)

        if isinstance(module, mhc_torch.MHCSkip | mhc_torch.MatrixMHCSkip):
            # The logits' gradient is a difference of inner products of cotangent and states, which nearly cancel where
            # one weight is close to 1: what counts is the rounding of those products, not the size of what is left.
            products = np.linalg.norm(t64.inputs[0]) * max(np.linalg.norm(double(x)) for x in given)
            scale = max(scale, float(products / np.sqrt(total)))
        links = list(_links_below(self.links, pair))
        shapes = {name: tuple(leaf.shape) for name, leaf in module.state_dict().items()}
        for kind in ("parameters", "state"):
            mapped, mapped64 = (torch_names(links, getattr(run, kind), shapes) for run in (j, j64))
            if kind == "state":
                mapped, mapped64 = (
                    self.batch_norms.in_torch(found, pair.torch, int(module.training)) for found in (mapped, mapped64)
                )
            for name, theirs in getattr(t, kind).items():
                if name in mapped:
                    rest = [getattr(run, kind)[name] for run in noisy]
                    value = Values(mapped[name], theirs, mapped64[name], getattr(t64, kind)[name], rest)
                    check = "layer alone: gradient of" if kind == "parameters" else "layer alone: state"
                    full = f"{pair.torch}.{name}" if pair.torch else name
                    size = scale if kind == "parameters" else 0.0
                    yield judge(check, full, pair.jax, value, total, size, eps, reference_eps)

    def _place(self, path: str) -> str:
        """Where inside a container, whose layers all agree alone, its free run first goes wrong."""
        events = []
        for child, calls in self.jax_calls.calls.items():
            if child != path and _below(child, path):
                for i, call in enumerate(calls[: len(self.torch_calls.calls.get(child, []))]):
                    events.append((call.entered, "at the input of", child, i, lambda c: (c.args, c.kwargs)))
                    events.append((call.left, "at the output of", child, i, lambda c: c.output))
        for _, what, child, i, pick in sorted(events, key=lambda event: event[0]):
            for value in self._seen(child, i, pick):
                if not judge("", "", "", value, reduction(self.torch, []), 0.0, self.eps, self.reference_eps).ok:
                    return f"; first seen {what} {child}"
        return "; after the last layer in it" if events else ""


def _layouts(jax_values: Sequence[np.ndarray], torch_values: Sequence[np.ndarray]) -> list[Layout] | None:
    """The layout of each array, if they correspond one to one."""
    if len(jax_values) != len(torch_values):
        return None
    found = [layout(a, b) for a, b in zip(jax_values, torch_values, strict=True)]
    return None if None in found else [how for how in found if how]


def _values(layouts: Sequence[Layout], runs: Sequence[Sequence[np.ndarray]]) -> Iterator[Values]:
    """The arrays of JAX, torch, both in float64, and torch with noise, brought into the torch layout."""
    for how, j, t, j64, t64, *noisy in zip(layouts, *runs, strict=True):
        yield Values(how[0](j), t, how[0](j64), t64, noisy)


def _below(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(f"{other}.")


def _links_below(links: Sequence[Link], pair: ModulePair) -> Iterator[Link]:
    """The links between the leaves of two modules, under names relative to them."""
    for link in links:
        if _below(link.jax.path, pair.jax) and _below(link.torch.path, pair.torch):
            yield replace(
                link,
                jax=replace(link.jax, path=link.jax.path.removeprefix(pair.jax).lstrip(".")),
                torch=replace(link.torch, path=link.torch.path.removeprefix(pair.torch).lstrip(".")),
            )
