"""Compares two models layer by layer: free-running, and each layer alone on the JAX side's input (teacher-forced)."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from bridge.proof import precision
from bridge.proof.batch_norm import BatchNorms
from bridge.proof.exact_jax import Lift
from bridge.proof.exact_torch import Exact
from bridge.proof.inputs import describe
from bridge.proof.judge import (
    AS_IT_IS,
    Layout,
    Partners,
    Runs,
    Values,
    epsilon,
    item,
    judge,
    largest,
    partners,
    reduction,
    share,
)
from bridge.proof.metrics import difference
from bridge.proof.objective import torch_names
from bridge.proof.record import (
    AMPLITUDES,
    Call,
    Noise,
    NoReferenceError,
    Programs,
    Pull,
    Seen,
    as_pull,
    evaluated,
    picked,
    pull_program,
    pull_torch,
    record_exact,
    record_jax,
    record_torch,
    seen,
    sharing,
    told_float64,
    wide_bytes,
)
from bridge.proof.report import Row
from bridge.proof.trees import double, floats, is_float, named_floats
from bridge.proof.unroll import taken, unrolled
from bridge.weights.arrays import to_numpy, to_torch
from bridge.weights.leaves import join, submodule
from bridge.weights.match import Link, ModulePair, match
from bridge.weights.rules import terms
from mhc_torch.retrofitting import around_ends, called_otherwise

_FLOAT32 = epsilon(np.float32)


@dataclass(frozen=True)
class Alone:
    """One call of a layer, as both sides run it alone.

    Attributes:
        index: which call of the layer it is.
        given: what the JAX layer was given, as numpy arrays in the order of the call.
        into, out: which array of torch is which of JAX, of what goes in, and of what comes out.
        names: of the outputs, in the order of `out`, on either side.
        cotangents: of the outputs, as JAX has them, in the order of `out`.
    """

    pair: ModulePair
    index: int
    jax_call: Call
    torch_call: Call
    given: list[np.ndarray]
    into: Sequence[Partners]
    out: Sequence[Partners]
    names: tuple[list[str], list[str]]
    cotangents: list[np.ndarray]

    @property
    def layouts(self) -> list[Layout]:
        """How each output of JAX is laid out in torch."""
        return [x.how for x in self.out]


class Layers:
    """The layers of one pair of models, in the mode (training or not) that they are in.

    Attributes:
        rows: every comparison: "layer value" is free-running, "layer alone" is teacher-forced.
        faults: torch path of each module where a difference is born -> what is wrong.
        alone: torch path of each module that was not run alone -> why.
        called: how many modules were called.
        eps: precision of the coarsest dtype in which both sides compute.
        reference_eps: precision that the float64 runs really had, where a step of them could not be lifted.
        unlifted: what could not be lifted.
        batch_norms: how the statistics of one side become those of the other.
    """

    def __init__(
        self,
        jax_model: nnx.Module,
        torch_model: torch.nn.Module,
        jax_call: Call,
        torch_call: Call,
        seed: int,
        programs: Programs,
        results: tuple[list[str], list[str]],
        training: bool,
    ) -> None:
        self.jax, self.jax64 = unrolled(jax_model), told_float64(unrolled(jax_model))
        self.torch, self.training = sharing(torch_model), training
        self.noises = [Noise(self.torch, amplitude, seed + i) for i, amplitude in enumerate(AMPLITUDES)]
        self.programs, self.results = programs, results
        found = match(self.jax, self.torch, own=True)
        self.links = found.links
        self.pairs = {pair.torch: pair for pair in reversed(found.modules) if not pair.index}
        self.stacked = {pair.torch: pair for pair in reversed(found.modules) if pair.torch not in self.pairs}
        # A value may come from coarser ones.
        self.eps = max((epsilon(p.dtype) for p in self.torch.parameters()), default=0.0)
        self.reference_eps = 0.0
        self.unlifted: set[str] = set()
        self.rng, self.seed = np.random.default_rng(seed), seed
        self.rows: list[Row] = []
        self.faults: dict[str, str] = {}
        self.alone: dict[str, str] = {}
        self.forward: set[str] = set()
        others = called_otherwise(self.torch)
        self.plain = {path for path in self.pairs if self.torch.get_submodule(path) in others}
        around = around_ends(self.torch)
        self.open = {path for path in self.pairs if self.torch.get_submodule(path) in around}
        self._record(jax_call, torch_call)
        self.batch_norms = BatchNorms(
            self.jax, self.torch, [*self.pairs.values(), *self.stacked.values()], self.torch_calls
        )
        self._compare()

    def _record(self, jax_call: Call, torch_call: Call) -> None:
        paths, keys = {path: pair.jax for path, pair in self.pairs.items()}, [*self.pairs, *self.stacked]
        ours = record_jax(self.jax, paths, jax_call)
        theirs = record_torch(self.torch, keys, torch_call)
        _same_twice("jax_model", ours.calls, record_jax(_reseeded(self.jax), paths, jax_call).calls, self.jax, paths)
        again = record_torch(self.torch, keys, torch_call)
        _same_twice("torch_model", theirs.calls, again.calls, self.torch, {path: path for path in keys})
        doubles = torch_call.double()

        def jax_run(lift: Lift) -> Seen:
            return record_exact(self.programs, self.jax64, self.jax, paths, jax_call, lift)

        def torch_run(exact: Exact, noise: Noise | None = None) -> Seen:
            return seen(record_torch(noise.model if noise else self.torch, keys, doubles, exact, noise))

        self.jax_calls, self.torch_calls = ours, theirs
        self.called = len(theirs.calls.keys() | ours.calls.keys())
        self.runs = self._exact(jax_run, torch_run)
        self.runs.jax, self.runs.torch = seen(ours), seen(theirs)

    def _exact(
        self, of_jax: Callable[[Lift], Any], of_torch: Callable[..., Any], rounded: tuple[bool, bool] = (False, False)
    ) -> Runs[Any]:
        runs, unlifted = exact_runs(of_jax, of_torch, self.noises, self.seed, rounded)
        self.unlifted |= unlifted
        self.reference_eps = max(self.reference_eps, _FLOAT32 if unlifted else 0.0)
        return runs

    def _compare(self) -> None:
        failed: dict[str, str] = {}
        calls = list(self._matched_calls())
        self.forward = {path for path, *_ in calls if not self.training and self._is_large(path)}
        for path, jax_call, torch_call, index in calls:
            for row in self._alone(path, jax_call, torch_call, index):
                self.rows.append(row)
                if not row.ok:
                    what = row.path.removeprefix(path).lstrip(".")
                    failed.setdefault(path, f"{row.check.removeprefix('layer alone: ')} {what}: {row.why}")
            if 4 * wide_bytes(self.torch.get_submodule(path)) > precision.LARGEST:
                gc.collect()  # Flax and hooks of torch leave cycles, in which a large layer would wait
        for path, _, _, index in calls:
            if path in self.pairs:
                self._free(path, index)
        for path, text in failed.items():
            if not any(other != path and _below(other, path) for other in failed):
                self.faults[path] = text + self._place(path)

    def _is_large(self, path: str) -> bool:
        """Whether gradients of a module that consists of others, in float64, need more memory than one layer should."""
        inside = (other for other in self.torch_calls.calls if other != path and _below(other, path))
        return wide_bytes(self.torch.get_submodule(path)) > precision.LARGEST and any(inside)

    def _matched_calls(self) -> Iterator[tuple[str, Call, Call, int]]:
        """The calls of each pair of modules in the order in which they return, inner ones first."""
        order = sorted(
            ((call.left, path, i) for path, calls in self.torch_calls.calls.items() for i, call in enumerate(calls))
        )
        for path in self.pairs:
            on_jax, on_torch = (len(r.calls.get(path, [])) for r in (self.jax_calls, self.torch_calls))
            if path in self.jax_calls.traced:
                self.alone[path] = "it runs inside a JAX transformation"
            elif on_jax != on_torch:
                self.alone[path] = f"it is called {on_jax} times by JAX and {on_torch} times by torch"
        for _, path, i in order:
            torch_call, jax_calls = self.torch_calls.calls[path][i], self.jax_calls.calls.get(path, [])
            if path in self.stacked:
                if (called := self._inside(self.stacked[path], torch_call)) is not None:
                    yield path, called, torch_call, i
            elif i < len(jax_calls):
                yield path, jax_calls[i], torch_call, i

    def _inside(self, pair: ModulePair, torch_call: Call) -> Call | None:
        """A call of one layer of a stack, which JAX calls inside a transformation, with what torch calls it with."""
        try:
            given = torch_call.map(lambda x: jax.numpy.asarray(to_numpy(x)))
            given.output = taken(self.jax, pair)(*given.args, **given.kwargs)
        except Exception as error:
            text = str(error).partition("\n")[0]
            self.alone[pair.torch] = (
                f"it runs inside a JAX transformation, and cannot be called as torch calls it: {text:.80}"
            )
            return None
        return given

    def _seen(self, path: str, index: int, coming_in: bool) -> list[Values]:
        """Arrays of one call as every free run saw them: those that went in, or those that came out."""

        raw = self.jax_calls.calls[path][index], self.torch_calls.calls[path][index]
        ours, theirs = (list(named_floats(call.given if coming_in else call.output)) for call in raw)
        if not (path or coming_in):
            ours, theirs = self.results

        def pick(name: str) -> Callable[[Seen], np.ndarray]:
            return lambda calls: calls[path][index][0 if coming_in else 1][name]

        same = partners([pick(j)(self.runs.jax64) for j in ours], [pick(t)(self.runs.torch64) for t in theirs])
        return [self.runs.values(pick(ours[x.jax]), pick(theirs[x.torch]), x.how) for x in same or []]

    def _free(self, path: str, index: int) -> None:
        n = reduction(self.torch, [to_numpy(x) for x in floats(self.torch_calls.calls[path][index].given)])
        for value in self._seen(path, index, False):
            self.rows.append(
                judge(
                    "layer value", path, self.pairs[path].jax, value, n, eps=self.eps, reference_eps=self.reference_eps
                )
            )

    def _pair(self, path: str) -> ModulePair:
        return self.pairs.get(path) or self.stacked[path]

    def _alone(self, path: str, jax_call: Call, torch_call: Call, index: int) -> Iterator[Row]:
        """One layer forward and back, both sides on the JAX side's input and one cotangent.

        What one side takes and the other does not, such as a rotary table, it gets as its own run of the model made it.
        """
        pair = self._pair(path)
        if path in self.open:
            self.alone[path] = "a branch of the block around it begins or ends in it"
            return
        given = [to_numpy(x) for x in floats(jax_call.given)]
        names = list(named_floats(jax_call.output)), list(named_floats(torch_call.output))
        if not path:
            names = self.results
        outputs = [to_numpy(x) for x in picked(jax_call.output, names[0])]
        into = partners(given, [to_numpy(x) for x in floats(torch_call.given)])
        out = partners(outputs, [to_numpy(x) for x in picked(torch_call.output, names[1])])
        if into is None or out is None or (not out and any(names)):
            what = "takes" if into is None else "gives"
            self.alone[path] = f"it {what} other arrays in JAX than in torch"
            return
        names = [names[0][x.jax] for x in out], [names[1][x.torch] for x in out]
        cotangents = [self.rng.standard_normal(outputs[x.jax].shape).astype(outputs[x.jax].dtype) for x in out]
        alone = Alone(pair, index, jax_call, torch_call, given, into, out, names, cotangents)
        try:
            runs = self._pulls(alone)
        except NoReferenceError as error:
            self.alone[path] = str(error)
            return
        except Exception as error:
            error.add_note(
                f"torch {path or 'model'} or jax {pair.jax or 'model'} was run alone, forward and back, with "
                f"{describe(jax_call)} (jax), {describe(torch_call)} (torch)"
            )
            raise
        yield from self._judge_alone(alone, runs)

    def _pulls(self, alone: Alone) -> Runs[Pull]:
        pair, index, jax_call, torch_call = alone.pair, alone.index, alone.jax_call, alone.torch_call
        given, cotangents, names = alone.given, alone.cotangents, alone.names
        torch_given = [to_numpy(x) for x in floats(torch_call.given)]
        doubles = {x.jax: double(given[x.jax]) for x in alone.into}
        torch_doubles = {x.torch: x.how[0](doubles[x.jax]) for x in alone.into}
        for place, array in torch_doubles.items():
            torch_given[place] = array.astype(torch_given[place].dtype)
        torch_cotangents = [how[0](c) for how, c in zip(alone.layouts, cotangents, strict=True)]

        def jax_given(run: Seen) -> list[np.ndarray]:
            return _given(run, pair, index, jax_call, doubles)

        plainly, back = pair.torch in self.plain, pair.torch not in self.forward
        module = taken(self.jax, pair)
        plain = pull_program(module, jax_call, given, cotangents, names[0], back)
        with jax.enable_x64(True):
            wide = taken(self.jax64, pair)
            exactly = pull_program(
                wide, jax_call, jax_given(self.runs.jax64), [double(c) for c in cotangents], names[0], back
            )
        widest = self.programs.widest(exactly, plain)

        def jax_run(lift: Lift) -> Pull:
            *others, values, wide_cotangents = exactly[2:]
            if lift.seed is not None and self.runs.jax_rounded is not None:
                values = jax_given(self.runs.jax_rounded)
            found = evaluated(widest, lift, *others, values, wide_cotangents)
            with jax.enable_x64(True):
                return as_pull(wide, found)

        def torch_run(exact: Exact, noise: Noise | None = None) -> Pull:
            model, run, forced = self.torch, self.runs.torch64, torch_doubles
            if exact.blur is not None and self.runs.torch_rounded is not None:
                run = self.runs.torch_rounded
            if noise:
                model, run = noise.model, self.runs.noisy[self.noises.index(noise)]
                forced = {place: to_numpy(noise(to_torch(x))) for place, x in torch_doubles.items()}
            inputs = _given(run, pair, index, torch_call, forced)
            wide_cotangents = [double(c) for c in torch_cotangents]
            submodel = model.get_submodule(pair.torch)
            given = torch_call.map(_double)
            return pull_torch(
                submodel, given, inputs, wide_cotangents, names[1], exact, noise, alone=plainly, back=back
            )

        runs = self._exact(
            jax_run,
            torch_run,
            (
                len(doubles) < len(given) and self.runs.jax_rounded is not None,
                len(torch_doubles) < len(torch_given) and self.runs.torch_rounded is not None,
            ),
        )
        program = self.programs.of(*plain)
        runs.jax = as_pull(module, program(*plain[2:]), program.coarsest())
        submodel = self.torch.get_submodule(pair.torch)
        runs.torch = pull_torch(submodel, torch_call, torch_given, torch_cotangents, names[1], alone=plainly, back=back)
        return runs

    def _judge_alone(self, alone: Alone, runs: Runs[Pull]) -> Iterator[Row]:
        pair, given, into = alone.pair, alone.given, alone.into
        t, t64 = runs.torch, runs.torch64
        module = self.torch.get_submodule(pair.torch)
        n = reduction(module, given)
        total = max([n, *(x.size for x in given)])
        inside = min(runs.jax.precision, t.precision)  # coarser steps on one side only are a fault of that side
        self.eps = max(self.eps, inside)
        eps = max(
            [inside, *(epsilon(x.dtype) for x in [*given, *t.outputs, *t.parameters.values(), *runs.jax.outputs])]
        )
        reference_eps = self.reference_eps

        for i, how in enumerate(alone.layouts):
            value = runs.values(item(attrgetter("outputs"), i), how=how)
            yield judge("layer alone: value", pair.torch, pair.jax, value, n, 0.0, eps, reference_eps)

        if pair.torch in self.forward:
            size = precision.LARGEST / 2**30
            self.alone[pair.torch] = f"forward only, since it has more than {size:.3g} GiB of weights in float64"
            return
        links = list(_links_below(self.links, pair))
        shapes = {name: tuple(leaf.shape) for name, leaf in module.state_dict().items()}

        def parameters(run: Pull) -> dict[str, np.ndarray]:
            return torch_names(links, run.parameters, shapes)

        def state(run: Pull) -> dict[str, np.ndarray]:
            return self.batch_norms.in_torch(torch_names(links, run.state, shapes), pair.torch, int(module.training))

        scale = max([0.0, *(largest(g) for g in (*t64.inputs, *t64.parameters.values()))])
        cancelling = terms(
            module,
            [x.how[0](double(given[x.jax])) for x in into],
            [how[0](double(c)) for how, c in zip(alone.layouts, alone.cotangents, strict=True)],
        )
        names = [name for name in parameters(runs.jax) if name in t.parameters]
        inputs = attrgetter("inputs")
        by_inputs = [runs.values(item(inputs, x.jax), item(inputs, x.torch), x.how) for x in into]
        by_names = [
            runs.values(item(parameters, name), item(attrgetter("parameters"), name), AS_IT_IS) for name in names
        ]
        gradients = share([*by_inputs, *by_names])
        for value in gradients[: len(into)]:
            yield judge("layer alone: gradient of input", pair.torch, pair.jax, value, total, scale, eps, reference_eps)
        for name, value in zip(names, gradients[len(into) :], strict=True):
            path, size = join(pair.torch, name), max(scale, cancelling)
            yield judge("layer alone: gradient of", path, pair.jax, value, total, size, eps, reference_eps)

        for name in state(runs.jax):
            if name in t.state:
                value = runs.values(item(state, name), item(attrgetter("state"), name), AS_IT_IS)
                path = join(pair.torch, name)
                yield judge("layer alone: state", path, pair.jax, value, total, 0.0, eps, reference_eps)

    def _place(self, path: str) -> str:
        """Where inside a container, whose layers all agree alone, its free run first goes wrong."""
        events = []
        for child, calls in self.jax_calls.calls.items():
            if child != path and _below(child, path):
                for i, call in enumerate(calls[: len(self.torch_calls.calls.get(child, []))]):
                    events.append((call.entered, "at the input of", child, i, True))
                    events.append((call.left, "at the output of", child, i, False))
        for _, what, child, i, coming_in in sorted(events, key=lambda event: event[0]):
            for value in self._seen(child, i, coming_in):
                if not judge("", "", "", value, reduction(self.torch, []), 0.0, self.eps, self.reference_eps).ok:
                    return f"; first seen {what} {child}"
        return "; after the last layer in it" if events else ""


def exact_runs(
    of_jax: Callable[[Lift], Any],
    of_torch: Callable[..., Any],
    noises: Sequence[Noise],
    seed: int,
    rounded: tuple[bool, bool] = (False, False),
) -> tuple[Runs[Any], set[str]]:
    """The float64 runs of both sides, and what could not be lifted in them.

    Where a program holds rounded constants it also runs with these off by a rounding. The runs as the models are, `jax`
    and `torch`, are for the caller to fill in.

    Args:
        rounded: whether what each side is given was made with rounded constants.
    """
    lift, exact = Lift(), Exact()
    ours = of_jax(lift)
    try:
        theirs = of_torch(exact)
    except Exception as error:
        raise NoReferenceError(f"torch_model cannot be run in float64: {type(error).__name__}: {error}") from error
    runs = Runs(
        ours,
        theirs,
        ours,
        theirs,
        [of_torch(Exact(), noise) for noise in noises],
        of_jax(Lift(seed)) if lift.rounded or rounded[0] else None,
        of_torch(Exact(np.random.default_rng(seed))) if exact.rounded or rounded[1] else None,
    )
    return runs, {f"jax {name}" for name in lift.unlifted} | {f"torch {name}" for name in exact.unlifted}


def _given(run: Seen, pair: ModulePair, index: int, call: Call, forced: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """What a module is given: `forced` by place, and what is not as a run of the whole model made it."""
    names = list(named_floats(call.given))
    if len(forced) < len(names):
        made = run[pair.torch][index][0]
        forced = {place: forced.get(place, made[name]) for place, name in enumerate(names)}
    return [forced[place] for place in range(len(names))]


def _double(x: Any) -> Any:
    return x.double() if is_float(x) else x


def _reseeded(model: nnx.Module) -> nnx.Module:
    """A copy whose streams of random numbers have moved on."""
    model = nnx.clone(model)
    nnx.update(model, jax.tree.map(lambda count: count + 1, nnx.state(model, nnx.RngCount)))
    return model


def _same_twice(side: str, first: Any, second: Any, model: Any, paths: dict[str, str]) -> None:
    """Refuses a model that differs from itself, and names the module: the first to return with another result."""
    order = sorted((call.left, key, i) for key, calls in first.items() for i, call in enumerate(calls))
    for _, key, i in order:
        again = second.get(key, [])
        one, two = (named_floats(c.output) for c in (first[key][i], again[i] if i < len(again) else Call(())))
        for name, array in one.items():
            a, b = to_numpy(array), to_numpy(two[name]) if name in two else None
            noise = np.inf if b is None else largest(difference(a, b))
            if noise > np.sqrt(epsilon(a.dtype)) * largest(np.nan_to_num(a.astype(np.float64))):
                module = submodule(model, paths[key]) if isinstance(model, nnx.Module) else model.get_submodule(key)
                where = (
                    f"in {paths[key]} ({type(module).__name__})" if paths[key] else f"in {type(module).__name__} itself"
                )
                raise ValueError(
                    f"{side} differs from itself by {noise:.3g} in two runs on the same inputs, first {where}: "
                    "turn its noise off"
                )


def _below(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(f"{other}.")


def _links_below(links: Sequence[Link], pair: ModulePair) -> Iterator[Link]:
    """The links between the leaves of two modules, under names relative to them."""
    for link in links:
        if _below(link.jax.path, pair.jax) and _below(link.torch.path, pair.torch):
            yield replace(
                link,
                jax=replace(
                    link.jax,
                    path=link.jax.path.removeprefix(pair.jax).lstrip("."),
                    index=link.jax.index[len(pair.index) :],
                ),
                torch=replace(link.torch, path=link.torch.path.removeprefix(pair.torch).lstrip(".")),
            )
