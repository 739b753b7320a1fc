"""Tape: the states of a stack mixed layer by layer, as nodes of the graph that share the work of a backward pass.

With G_l = dL/dx_l, a layer's window of states becomes, on the way back, a window of cotangents:

    G_l = (df_l/dx)^T G_{l+1} + sum_j weights[j, l] G_{j+1},    dL/dweights[j, l] = <G_{j+1}, x_l>,    l <= j < l + H

so one node a layer, with an edge to its latest state alone, does all there is to do with x_l in two matrix-vector
products over the last H cotangents. Nodes for every state apart would take four times as many operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# torch.autograd.Function without the search for transforms of torch.func, which takes as long as an operation; a tape
# has ruled them out.
from torch.autograd.function import _SingleLevelFunction

from mhc_torch.layers.mixing import accumulate, check_window, mix


class Tape:
    """One forward of a stack of L layers, whose states begin with `x`.

    Args:
        x: the state that the first layer reads.
        weights: of the states in each layer's window, the latest last; 0 where there is no state yet.
        alone: whether x is the only state that the first layer mixes. If not, layers mix one by one.
    """

    def __init__(self, x: Float[Tensor, "*shape"], weights: Float[Tensor, "L H"], *, alone: bool) -> None:
        self.depth, self.width = weights.shape
        self.weights = weights
        self.layer = 0
        # The states follow upon each other: what a layer calls its latest state is what the layer before it made.
        self.unbroken = alone and not (
            torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled()
        )
        self.latest: Tensor | None = x
        self.rows: Sequence[Any]
        if self.unbroken:
            values = weights.detach()
            # On the host, numbers: they are faster to multiply with than tensors. On a GPU, reading them would wait.
            self.rows = values.flatten().tolist() if values.device.type == "cpu" else values.flatten().unbind()
            self.backward: _Backward | None = None
        else:
            self.rows = weights.flatten().unbind()

    def mix(self, branch: Float[Tensor, "*shape"], window: Sequence[Tensor]) -> Float[Tensor, "*shape"]:
        """The next state: `branch`, the output of the next layer, and the weighted sum of the states in `window`.

        Raises:
            ValueError, TypeError: as check_window.
        """
        end = (self.layer + 1) * self.width
        row = self.rows[end - len(window) : end]
        # A hook may have put another tensor in place of a state, and autocast another dtype; from there on, every
        # state gets its gradient by an edge of its own.
        latest = window[-1]
        if self.unbroken and latest is self.latest and check_window((latest,), branch):
            mixed = _Mix.apply(branch, latest, self.weights, self, self.layer, window, row)  # type: ignore[attr-defined]
        else:
            if self.unbroken:
                self.unbroken, self.rows = False, self.weights.flatten().unbind()
                row = self.rows[end - len(window) : end]
            mixed = mix(branch, window, row)
        self.layer += 1
        # Nodes hold the tape, so in the end it must not hold a node: a graph in a cycle would wait for the garbage
        # collector.
        self.latest = mixed if self.layer < self.depth else None
        return mixed


class _Backward:
    """The last H cotangents of one backward pass, and the inner products that it has found."""

    def __init__(self, task: int, tape: Tape, like: Tensor) -> None:
        self.task = task
        self.products: list[Tensor | None] = [None] * tape.depth
        self.cotangents = like.new_zeros(tape.width, like.numel())
        self.slots = self.cotangents.view(tape.width, *like.shape).unbind()
        self.columns = _by_slot(tape.weights).to(like.dtype).unbind()

    def put(self, layer: int, cotangent: Tensor) -> None:
        """The cotangent of `layer`'s output comes into its slot."""
        slot = layer % len(self.slots)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            # Second derivatives and batches of cotangents cannot follow a write in place.
            rows = list(self.cotangents)
            rows[slot] = cotangent.reshape(-1)
            self.cotangents = torch.stack(rows)
        else:
            self.slots[slot].copy_(cotangent)

    def gradient_of_weights(self) -> Float[Tensor, "L H"]:
        found = next(row for row in self.products if row is not None)
        return _by_layer(torch.stack([torch.zeros_like(found) if row is None else row for row in self.products]))


class _Mix(_SingleLevelFunction):
    """One layer's mix. Backward, it passes on the gradient of all mixes of its latest state, its own among them.

    The first layer, whose turn comes last, passes on the gradient of all weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        latest: Tensor,
        weights: Tensor,
        tape: Tape,
        layer: int,
        window: Sequence[Tensor],
        row: Sequence[Any],
    ) -> Tensor:
        ctx.tape, ctx.layer = tape, layer
        ctx.save_for_backward(latest)
        return accumulate(branch, window, row)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tape, layer = ctx.tape, ctx.layer
        (latest,) = ctx.saved_tensors
        # Layers that come later have been here before, unless this pass does not reach them; an earlier pass does not
        # count.
        task = torch._C._current_graph_task_id()
        past = tape.backward
        if past is None or past.task != task:
            past = tape.backward = _Backward(task, tape, gradient)
        past.put(layer, gradient)
        _, wants_latest, wants_weights, *_ = ctx.needs_input_grad
        of_latest = of_weights = None
        if wants_latest:
            of_latest = torch.mm(past.columns[layer], past.cotangents).view_as(latest)
        if wants_weights:
            past.products[layer] = torch.mv(past.cotangents, latest.reshape(-1))
        if layer == 0:
            of_weights = past.gradient_of_weights() if wants_weights else None
            tape.backward = None
        return gradient, of_latest, of_weights, None, None, None, None


def _by_slot(weights: Float[Tensor, "L H"]) -> Float[Tensor, "L+ 1 H"]:
    """Row l holds the weight of state l in layer j, for each j that mixes it, at j's slot among the cotangents.

    These are weights[l + i, H - 1 - i], in slot (l + i) mod H: of the row written twice, the H entries that begin
    l mod H before the second time. Rows beyond the last layer, and weights in layers beyond it, have no meaning.
    """
    depth, width = weights.shape
    turns = -(-depth // width)
    padded = nn.functional.pad(weights, (0, 0, 0, turns * width - depth + width - 1))
    skew = padded.as_strided((turns * width, width), (width, width - 1), width - 1)
    twice = torch.cat((skew, skew), dim=1)
    return twice.as_strided((turns, width, width), (2 * width**2, 2 * width - 1, 1), width).reshape(-1, 1, width)


def _by_layer(products: Float[Tensor, "L H"]) -> Float[Tensor, "L H"]:
    """The other way round: row j holds the inner products of layer j's cotangent and the states in its window.

    These are products[j - (H - 1 - c), j mod H].
    """
    depth, width = products.shape
    turns = -(-depth // width)
    padded = nn.functional.pad(products, (0, 0, width - 1, turns * width - depth))
    return padded.as_strided((turns, width, width), (width**2, width + 1, width)).reshape(-1, width)[:depth]
