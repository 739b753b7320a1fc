"""Tape: the states of a stack, mixed layer by layer."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch import _private, native
from mhc_torch.history.mixing import mix, transformed
from mhc_torch.history.nodes import Nodes


class Tape:
    """One forward of a stack of L layers, whose states begin with `x`.

    Args:
        x: the state that the first layer reads.
        weights: of the states in each layer's window, the latest last; 0 where there is no state yet.
        alone: whether x is the only state that the first layer mixes. If not, layers mix one by one.
    """

    def __init__(self, x: Float[Tensor, "*shape"], weights: Float[Tensor, "L H"], *, alone: bool) -> None:
        self.weights = weights
        self.layer = 0
        # The states follow upon each other: what a layer calls its latest state is what the layer before it made.
        self.latest = x
        self.nodes: Any = None
        self.rows: Sequence[Tensor] | None = None
        # Nodes read numbers, which other classes of tensors need not have, and conjugate nothing.
        readable = type(weights) is Tensor and type(x) in (Tensor, nn.Parameter) and x.is_floating_point()
        if alone and readable and torch.is_grad_enabled() and not transformed():
            compiled = native.nodes() if weights.device.type == "cpu" else None
            if compiled is not None:
                self.nodes = compiled.Nodes(weights)
            elif _private.PASSES_ARE_KNOWN:
                self.nodes = Nodes(weights)

    def mix(self, branch: Float[Tensor, "*shape"], window: Sequence[Tensor]) -> Float[Tensor, "*shape"]:
        """The next state: `branch`, the output of the next layer, and the weighted sum of the states in `window`.

        Raises:
            ValueError, TypeError: as check_window.
        """
        mixed = None
        if self.nodes is not None and window[-1] is self.latest:
            mixed = self.nodes.mix(branch, self.layer, window)
        if mixed is None:
            # A hook may have put another tensor in place of a state, and autocast another dtype; from there on, every
            # state gets its gradient by an edge of its own.
            self.nodes = None
            if self.rows is None:
                self.rows = self.weights.flatten().unbind()
            end = (self.layer + 1) * self.weights.shape[1]
            mixed = mix(branch, window, self.rows[end - len(window) : end])
        self.layer += 1
        self.latest = mixed
        return mixed
