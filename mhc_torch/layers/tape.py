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
from torch import Tensor

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
            self.columns = _by_slot(values).unbind()
            self.token: Tensor | None = _Weights.apply(weights, self)
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
        if self.unbroken and window[-1] is self.latest and check_window(window[-1:], branch):
            self.latest = _Mix.apply(branch, window[-1], self.token, self, self.layer, window, row)
        else:
            if self.unbroken:
                self.unbroken, self.rows = False, self.weights.flatten().unbind()
                row = self.rows[end - len(window) : end]
            self.latest = mix(branch, window, row)
        mixed = self.latest
        self.layer += 1
        if self.layer == self.depth:
            # Nodes hold the tape, so it must not hold nodes: a graph in a cycle would wait for the garbage collector.
            self.latest = self.token = None
        return mixed


class _Backward:
    """The last H cotangents of one backward pass, and the inner products that it has found."""

    def __init__(self, task: int, tape: Tape, like: Tensor) -> None:
        self.task = task
        self.products: list[Tensor | None] = [None] * tape.depth
        self.cotangents = like.new_zeros(tape.width, like.numel())
        self.slots = self.cotangents.view(tape.width, *like.shape).unbind()
        # Second derivatives need the weights with their graph.
        self.columns = _by_slot(tape.weights).unbind() if torch.is_grad_enabled() else tape.columns

    def add(self, layer: int, cotangent: Tensor) -> Tensor:
        """All cotangents, with the one of `layer`'s output in its slot."""
        slot = layer % len(self.slots)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            # Second derivatives and batches of cotangents cannot follow a write in place.
            rows = list(self.cotangents)
            rows[slot] = cotangent.reshape(-1)
            self.cotangents = torch.stack(rows)
        else:
            self.slots[slot].copy_(cotangent)
        return self.cotangents


class _Mix(torch.autograd.Function):
    """One layer's mix. Backward, it passes on the gradient of all mixes of its latest state, its own among them."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        latest: Tensor,
        token: Tensor,
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
        if tape.backward is None or tape.backward.task != task:
            tape.backward = _Backward(task, tape, gradient)
        cotangents = tape.backward.add(layer, gradient)
        _, wants_latest, wants_weights, *_ = ctx.needs_input_grad
        if wants_weights:
            tape.backward.products[layer] = torch.mv(cotangents, latest.reshape(-1))
        mixed = None
        if wants_latest:
            column = tape.backward.columns[layer].to(cotangents.dtype)
            mixed = torch.mv(cotangents.t(), column).view(latest.shape)
        return gradient, mixed, None, None, None, None, None


class _Weights(torch.autograd.Function):
    """Stands before the layers, so that the gradient of all weights is put together when the last layer is done.

    The token has no value; it is the edge along which layers reach the weights.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, tape: Tape) -> Tensor:
        ctx.tape = tape
        return weights.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        tape = ctx.tape
        products = tape.backward.products
        tape.backward = None
        found = next(row for row in products if row is not None)
        rows = [torch.zeros_like(found) if row is None else row for row in products]
        return _by_layer(torch.stack(rows)).to(tape.weights.dtype), None


def _by_slot(weights: Float[Tensor, "L H"]) -> Float[Tensor, "L H"]:
    """Row l holds the weight of state l in layer j, for each j that mixes it, at j's slot among the cotangents."""
    depth, width = weights.shape
    state = torch.arange(depth, device=weights.device)[:, None]
    layer = state + (torch.arange(width, device=weights.device) - state) % width
    column = width - 1 - (layer - state)
    return torch.where(layer < depth, weights[layer.clamp(max=depth - 1), column], 0)


def _by_layer(products: Float[Tensor, "L H"]) -> Float[Tensor, "L H"]:
    """The other way round: row j holds the inner products of layer j's cotangent and the states in its window."""
    depth, width = products.shape
    layer = torch.arange(depth, device=products.device)[:, None]
    state = layer - torch.arange(width - 1, -1, -1, device=products.device)
    return torch.where(state >= 0, products[state.clamp(min=0), layer % width], 0)
