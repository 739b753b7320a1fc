"""When are two values the same but for rounding?

Both models run as they are and in float64. Between the two float64 runs hardly any rounding is left, so what they
differ by is a difference of the functions; how far each model is from its own float64 run is its rounding error. Both
are judged against a tolerance that is derived, not chosen:

    tolerance = 8 · sqrt(n) · eps · (|value| + sensitivity) + n · tiny

eps is the precision of the coarsest dtype involved and n the longest sum. 8·sqrt(n)·eps bounds the relative error of a
sum of n terms but for a probability of 2·exp(-8²/2) < 3e-14 (N. J. Higham and T. Mary, SIAM J. Sci. Comput. 41, 2019).
The sensitivity is how far the value moves when every weight, input and layer output is off by a small relative amount,
divided by that amount; it is measured, in float64 (Monte Carlo arithmetic, D. S. Parker 1997; see `Noise`). Below
tiny, the smallest normal number, XLA on CPU puts zero for every term where PyTorch keeps subnormal numbers.

The float64 runs are judged likewise with the eps of float64. A program may hold constants that are rounded to float32,
as `x.astype(float32) * 0.1` does; what one more rounding of them moves is measured too, and allowed four times. One
draw of such roundings may leave a single number nearly where it was: so gradients count what moves the most among them,
and a loss moves at least as much, relatively, as the outputs that it is taken of.

Sensitivity has a ceiling: where it allows the float64 runs to differ by more than 1e-6 of the value, as at a jump,
nothing is proved. So sensitivity never hides more than a millionth, whatever the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from operator import attrgetter, itemgetter
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from bridge.proof.metrics import compare, difference
from bridge.proof.precision import epsilon
from bridge.proof.record import AMPLITUDES
from bridge.proof.report import Row

_CONFIDENCE = 8.0
_ROUNDED = 4.0
CEILING = 1e-6
# Layouts that nothing but the values tells are looked for among arrays of so many axes. The right one leaves this much
# of the values over at the most, and so much less than the next one: two arrays without a relation leave 1.4 of it.
_AXES, _NEAR, _NEARER = 5, 0.7, 0.6

T = TypeVar("T")

Layout = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]
AS_IT_IS: Layout = (lambda array: array, lambda array: array)
CHANNELS: Layout = (lambda array: np.moveaxis(array, -1, 1), lambda array: np.moveaxis(array, 1, -1))


def layout(jax_value: np.ndarray, torch_value: np.ndarray) -> Layout | None:
    """How to bring a JAX activation into the torch layout, and back: as it is, or with its channels first.

    Where both fit the shapes, the one that brings the values closer. None if neither does.
    """
    options = [AS_IT_IS] if jax_value.shape == torch_value.shape else []
    if jax_value.ndim > 2 and CHANNELS[0](jax_value).shape == torch_value.shape:
        options.append(CHANNELS)
    return min(options, key=lambda o: float(difference(o[0](jax_value), torch_value).sum()), default=None)


def arranged(jax_value: np.ndarray, torch_value: np.ndarray) -> Layout | None:
    """The same for what goes between layers, whose axes may also be merged or in another order: heads, channels.

    Where only that fits the shapes, the values have to show it, and to show one way only: but for a fault in front of
    the layer they are the same.
    """
    found = layout(jax_value, torch_value)
    if found or jax_value.size != torch_value.size or max(jax_value.ndim, torch_value.ndim) > _AXES:
        return found
    options = [_permuted(order, jax_value.shape, torch_value.shape) for order in _orders(jax_value)]
    options += [(b, a) for a, b in (_permuted(o, torch_value.shape, jax_value.shape) for o in _orders(torch_value))]
    places = np.arange(jax_value.size).reshape(jax_value.shape)
    distinct = list({turn(places).tobytes(): (turn, back) for turn, back in options}.values())
    distances = [norm(difference(turn(jax_value), torch_value)) for turn, _ in distinct]
    best = int(np.argmin(distances))
    nearest = distances.pop(best)
    clear = nearest <= _NEAR * norm(torch_value) and all(nearest < _NEARER * other for other in distances)
    return distinct[best] if clear else None


@dataclass(frozen=True)
class Partners:
    """An array of the JAX side and its counterpart in torch, by their places, and how to turn one into the other."""

    jax: int
    torch: int
    how: Layout


def partners(jax_values: Sequence[np.ndarray], torch_values: Sequence[np.ndarray]) -> list[Partners] | None:
    """The arrays that both sides have: in order where that fits, or else by their values.

    By values an array of the longer list may be left over, as a rotary table that the other side makes inside. None if
    an array of the shorter list has no partner.
    """
    if len(jax_values) == len(torch_values):
        in_order = [arranged(a, b) for a, b in zip(jax_values, torch_values, strict=True)]
        if None not in in_order:
            return [Partners(i, i, how) for i, how in enumerate(in_order) if how]
    candidates: list[tuple[float, Partners]] = []
    for i, a in enumerate(jax_values):
        for j, b in enumerate(torch_values):
            how = arranged(a, b)
            if how and (distance := norm(difference(how[0](a), b))) <= _NEAR * norm(b):
                candidates.append((distance, Partners(i, j, how)))
    found: list[Partners] = []
    for _, near in sorted(candidates, key=itemgetter(0)):
        if all(near.jax != other.jax and near.torch != other.torch for other in found):
            found.append(near)
    complete = len(found) == min(len(jax_values), len(torch_values))
    return sorted(found, key=attrgetter("jax")) if complete else None


def _orders(array: np.ndarray) -> list[tuple[int, ...]]:
    return list(permutations(range(array.ndim)))


def _permuted(order: Sequence[int], shape: Sequence[int], other: Sequence[int]) -> Layout:
    """An array of one shape with its axes in this order, as one of the other shape, and back."""
    inner, back = [shape[i] for i in order], np.argsort(order)
    return (
        lambda array: array.transpose(order).reshape(other),
        lambda array: array.reshape(inner).transpose(back),
    )


@dataclass
class Values:
    """One quantity as each run gave it, in the torch layout; `rounded` has what a rounding of constants moved."""

    jax: np.ndarray
    torch: np.ndarray
    jax64: np.ndarray
    torch64: np.ndarray
    noisy: Sequence[np.ndarray]
    rounded: float = 0.0

    @property
    def size(self) -> float:
        """The largest magnitude in the float64 runs."""
        return max(largest(self.jax64), largest(self.torch64))


@dataclass
class Runs(Generic[T]):
    """What each run of a pair gave.

    Attributes:
        jax, torch: as they are.
        jax64, torch64: in float64.
        noisy: torch in float64 with simulated rounding.
        jax_rounded, torch_rounded: in float64 with constants off by one more rounding; None where there are none.
    """

    jax: T
    torch: T
    jax64: T
    torch64: T
    noisy: list[T]
    jax_rounded: T | None = None
    torch_rounded: T | None = None

    def values(
        self,
        ours: Callable[[T], np.ndarray],
        theirs: Callable[[T], np.ndarray] | None = None,
        how: Layout | None = None,
    ) -> Values:
        """One quantity of them all, `ours` of the JAX runs and `theirs` (by default likewise) of those of torch."""
        theirs = theirs or ours
        j, j64, t, t64 = ours(self.jax), ours(self.jax64), theirs(self.torch), theirs(self.torch64)
        moved = [0.0]
        if self.jax_rounded is not None:
            moved.append(largest(difference(ours(self.jax_rounded), j64)))
        if self.torch_rounded is not None:
            moved.append(largest(difference(theirs(self.torch_rounded), t64)))
        turn = (how or layout(j64, t64) or AS_IT_IS)[0]
        return Values(turn(j), t, turn(j64), t64, [theirs(run) for run in self.noisy], max(moved))


def judge(
    check: str,
    path: str,
    jax_path: str,
    values: Values,
    n: int,
    scale: float = 0.0,
    eps: float = 0.0,
    reference_eps: float = 0.0,
) -> Row:
    """The row of one quantity.

    Args:
        check, path, jax_path: what the quantity is, for the report.
        n: length of the longest sum behind it.
        scale: the size of what it was summed from, where that is known to be larger than the value.
        eps: precision of the coarsest dtype that took part, if it is coarser than the value's own.
        reference_eps: precision that the float64 runs really had, where a step of them could not be lifted.
    """
    dtype = values.jax.dtype if epsilon(values.jax.dtype) >= epsilon(values.torch.dtype) else values.torch.dtype
    eps = max(eps, epsilon(dtype))
    figures = compare(values.jax.astype(dtype), values.torch.astype(dtype))
    size = max(scale, values.size)
    moved = [largest(difference(noisy, values.torch64)) for noisy in values.noisy]
    sensitivity = max(distance / amplitude for distance, amplitude in zip(moved, AMPLITUDES, strict=True))
    bound = _CONFIDENCE * np.sqrt(n) * (size + sensitivity)
    # A float16 is computed with as a float32, which has all its subnormal numbers.
    tiny = np.finfo(np.float64 if dtype == np.float64 else np.float32).tiny
    tolerance = float(bound * eps + n * tiny + _ROUNDED * values.rounded)
    tolerance64 = float(bound * max(epsilon(np.float64), min(reference_eps, eps)) + _ROUNDED * values.rounded / 2)
    gap = largest(difference(values.jax64, values.torch64))
    jax_error, torch_error = (
        largest(difference(v, v64)) for v, v64 in ((values.jax, values.jax64), (values.torch, values.torch64))
    )
    problems = []
    if gap > 2 * tolerance64:
        problems.append("the functions differ: so do their float64 runs")
    for name, error in (("jax", jax_error), ("torch", torch_error)):
        if error > tolerance:
            problems.append(f"{name} is further from its float64 run than rounding explains")
    if figures.nan[0] != figures.nan[1]:
        problems.append("only one side has NaN")
    proved = bool(2 * bound * epsilon(np.float64) <= CEILING * size)
    origin = f"8·sqrt({n})·eps·(largest value {size:.3g} + sensitivity {sensitivity:.3g}) + {n}·tiny"
    if values.rounded:
        origin += f" + 4·{values.rounded:.3g} for rounded constants"
    if not proved:
        origin = f"so sensitive to rounding that nothing is proved to {CEILING:.0e} of its size; {origin}"
    return Row(
        check=check,
        path=path,
        jax_path=jax_path,
        shape=values.torch.shape,
        dtype=str(dtype),
        figures=figures,
        jax_error=jax_error,
        torch_error=torch_error,
        float64_gap=gap,
        tolerance=tolerance,
        float64_tolerance=2 * tolerance64,
        why="; ".join([*problems, f"tolerance {origin}"]),
        ok=not problems,
        proved=proved,
    )


def share(values: Sequence[Values]) -> list[Values]:
    """The same values, each with the largest movement by a rounding of constants of them all."""
    most = max((value.rounded for value in values), default=0.0)
    return [replace(value, rounded=most) for value in values]


def item(of: Callable[[T], Any], key: Any) -> Callable[[T], np.ndarray]:
    """The function of a run that gives `of(run)[key]`."""
    return lambda run: of(run)[key]


def largest(array: np.ndarray) -> float:
    """Largest magnitude in an array, 0 if it is empty."""
    return float(np.max(np.abs(array), initial=0.0))


def norm(array: np.ndarray) -> float:
    """Euclidean length of an array."""
    return float(np.linalg.norm(array.astype(np.float64)))


def reduction(module: torch.nn.Module, inputs: Sequence[np.ndarray]) -> int:
    """The longest sum in a forward pass: over a row of a weight, or over all that one sample brings in."""
    rows = [p[0].numel() if p.ndim > 1 else p.numel() for p in module.parameters() if p.numel()]
    samples = [x[0].size if x.ndim > 1 else x.size for x in inputs if x.size]
    return max([1, *rows, *samples])
