"""What a model is called with, as users give it."""

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bridge.proof.record import Call
from bridge.proof.trees import arrays, is_array, leaves
from bridge.weights.arrays import to_numpy


@dataclass(frozen=True, init=False)
class Inputs:
    """The arguments of one call of a model, positional and by keyword, for `bridge.verify`.

    Example:
        >>> import numpy
        >>> Inputs(numpy.ones((2, 3)), mask=None).kwargs
        {'mask': None}
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)


def call_of(inputs: Any, name: str, model: torch.nn.Module) -> Call:
    """The call that `inputs` means, its arrays as numpy arrays.

    Raises:
        ValueError: it holds no array, NaN, or float64 while no parameter of `model` is.
    """
    if is_array(inputs):
        inputs = (inputs,)
    if isinstance(inputs, Mapping):
        call = Call((), dict(inputs))
    elif isinstance(inputs, Inputs):
        call = Call(inputs.args, inputs.kwargs)
    elif isinstance(inputs, tuple):
        call = Call(inputs, {})
    else:
        raise ValueError(
            f"{name} must be an array, a tuple of arguments, a dict of keyword arguments or bridge.Inputs, "
            f"got {type(inputs).__name__}"
        )
    if not arrays(call.given):
        raise ValueError(f"{name} must hold an array, got {describe(call) or 'nothing'}")
    call = call.map(to_numpy)
    widest = max((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), default=8)
    for where, array in _named(call):
        if not is_array(array):
            continue
        if array.dtype.kind not in "iub" and np.isnan(array).any():  # infinity is a value: masks have it
            raise ValueError(f"{name}{where} holds NaN, of which equal outputs would prove nothing")
        if array.dtype == np.float64 and widest < 8:
            raise ValueError(f"{name}{where} is float64, and no parameter is: pass {name}.astype(numpy.float32)")
    return call


def describe(call: Call) -> str:
    """The arguments of a call in a line: shapes and dtypes of arrays, other things as they are."""
    texts = []
    for name, leaf in _named(call):
        texts.append(f"{name} {leaf.dtype}{list(leaf.shape)}" if is_array(leaf) else f"{name} {leaf!r:.40}")
    return ", ".join(texts)


@contextmanager
def noted(side: str, call: Call, places: Mapping[int, str]) -> Iterator[None]:
    """The models raise what they like: it helps to know which, in which layer, and what it was given.

    Args:
        places: id of each module of the model -> its path.
    """
    try:
        yield
    except Exception as error:
        frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
        inside = [module for module in frames if places.get(id(module))]
        where = f", and failed in {places[id(inside[-1])]} ({type(inside[-1]).__name__})" if inside else ""
        error.add_note(f"{side} was called with {describe(call)}{where}")
        raise


def dotted(path: Iterable[Any]) -> str:
    """The path of an nnx module, as `nnx.iter_modules` has it, as a dotted name."""
    return ".".join(map(str, path))


def _named(call: Call) -> list[tuple[str, Any]]:
    positional = [(f"[{name}]", leaf) for name, leaf in leaves(call.args)]
    return positional + [(f"[{name!r}]", leaf) for name, leaf in leaves(call.kwargs)]
