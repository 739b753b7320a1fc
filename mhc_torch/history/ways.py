"""The four ways of a weighted sum of states, and which one a sum takes.

All give the same state and the same gradients, and bear the same hooks; they differ in what a backward pass costs.
"""

import enum

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn

from mhc_torch import _private, native
from mhc_torch.following import transformed


class Way(enum.Enum):
    """From the fastest to the one that is always open."""

    COMPILED = enum.auto()
    """In a stack: a node for each layer with one edge, to its latest state; in C++, `native/nodes.cpp`."""
    CHAINED = enum.auto()
    """The same in Python, `nodes.py`."""
    SEPARATE = enum.auto()
    """A sum on its own: a node with an edge to every state, `mixing.py`."""
    PLAIN = enum.auto()
    """Operations of torch, for whatever wants to follow each of them."""


def of_stack(x: Inexact[Tensor, "*shape"], weights: Float[Tensor, "L H"], *, alone: bool) -> Way | None:
    """The way of a stack that begins with `x`; None if each of its sums goes its own.

    Args:
        alone: whether x is the only state that the first layer mixes: a chain of latest states has one beginning.
    """
    # Chains read numbers, which other classes of tensors need not have, and conjugate nothing.
    readable = type(weights) is Tensor and type(x) in (Tensor, nn.Parameter) and x.is_floating_point()
    if not (alone and readable and torch.is_grad_enabled()) or transformed():
        return None
    if weights.device.type == "cpu" and native.nodes() is not None:
        return Way.COMPILED
    return Way.CHAINED if _private.PASSES_ARE_KNOWN else None


def of_sum(x: Tensor, of_one_dtype: bool) -> Way:
    """The way of one sum whose states have the dtype of `x`, or under autocast have not."""
    separate = of_one_dtype and x.is_floating_point() and not transformed() and not _private.holds_tensors(x)
    return Way.SEPARATE if separate else Way.PLAIN
