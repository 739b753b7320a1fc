"""Nodes: the mixes of a stack as nodes of the graph that share the work of a backward pass.

With G_l = dL/dx_l, a layer's window of states becomes, on the way back, a window of cotangents:

    G_l = (df_l/dx)^T G_{l+1} + sum_j weights[j, l] G_{j+1},    dL/dweights[j, l] = <G_{j+1}, x_l>,    l <= j < l + H

so one node a layer, with an edge to its latest state alone, does all there is to do with x_l in two matrix-vector
products over the last H cotangents. Nodes for every state apart would take four times as many operations.

`native/nodes.cpp` is the same for the CPU, in one pass over the window each way; so are the kernels for a GPU.
"""

from collections.abc import MutableMapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch import _private
from mhc_torch.history.mixing import accumulate, autocasts, check_window, in_single
from mhc_torch.kernels import history_mix as kernels


class Nodes:
    """Those of one forward of L layers.

    Args:
        weights: of the states in each layer's window, the latest last.
    """

    def __init__(self, weights: Float[Tensor, "L H"]) -> None:
        self.weights = weights
        values = weights.detach().flatten()
        # On the host, numbers: they are faster to multiply with than tensors. On a GPU, reading them would wait.
        self.rows: Sequence[Any] = values.tolist() if values.device.type == "cpu" else values.unbind()
        # Of those that run now; a pass that fails must not keep its graph alive.
        self.passes: MutableMapping[int, _Pass] = WeakValueDictionary()

    def mix(
        self, branch: Float[Tensor, "*shape"], layer: int, window: Sequence[Tensor]
    ) -> Float[Tensor, "*shape"] | None:
        """The state that `layer` makes; None if the dtypes of branch and latest state differ.

        Raises:
            ValueError, TypeError: as check_window.
        """
        latest = window[-1]
        if not check_window((latest,), branch):
            return None
        end = (layer + 1) * self.weights.shape[1]
        row = self.rows[end - len(window) : end]
        return _ChainedSum.apply(branch, latest, self.weights, self, layer, window, row)


class _Pass:
    """The last H cotangents of one backward pass, and the inner products that it has found."""

    def __init__(self, weights: Float[Tensor, "L H"], like: Tensor) -> None:
        depth, width = weights.shape
        self.products: list[Tensor | None] = [None] * depth
        # What is summed of float16 would leave its range.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.cotangents = like.new_zeros(width, like.numel(), dtype=dtype)
        self.slots = self.cotangents.view(width, *like.shape).unbind()
        self.columns = _by_slot(weights).to(dtype).unbind()

    def put(self, layer: int, cotangent: Tensor) -> None:
        """The cotangent of `layer`'s output comes into its slot."""
        slot = layer % len(self.slots)
        if torch.is_grad_enabled() or _private.transforms_are_active():
            # Second derivatives and batches of cotangents cannot follow a write in place.
            rows = list(self.cotangents)
            rows[slot] = cotangent.reshape(-1).to(self.cotangents.dtype)
            self.cotangents = torch.stack(rows)
        else:
            self.slots[slot].copy_(cotangent)

    def gradient_of_weights(self) -> Float[Tensor, "L H"]:
        found = next(row for row in self.products if row is not None)
        return _by_layer(torch.stack([torch.zeros_like(found) if row is None else row for row in self.products]))


# A Function without the search for transforms of torch.func, which takes as long as an operation; a tape has ruled them
# out.
class _ChainedSum(_private.SingleLevelFunction):
    """One layer's mix. Backward, it passes on the gradient of all mixes of its latest state, its own among them.

    The first layer, whose turn comes last, passes on the gradient of all weights. Nodes hold the one object of class
    Nodes, which must not hold a node in turn: a graph in a cycle would wait for the garbage collector.
    """

    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        latest: Tensor,
        weights: Tensor,
        nodes: Nodes,
        layer: int,
        window: Sequence[Tensor],
        row: Sequence[Any],
    ) -> Tensor:
        ctx.nodes, ctx.layer = nodes, layer
        ctx.save_for_backward(latest)
        return accumulate(branch, window, row)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        device = gradient.device.type
        if autocasts(device):  # it would round the products below
            with torch.autocast(device, enabled=False):
                return _ChainedSum.backward(ctx, gradient)
        nodes, layer = ctx.nodes, ctx.layer
        (latest,) = ctx.saved_tensors
        # Layers that come later have been here before, unless this pass does not reach them. The engine's callback
        # owns what they left, and is gone when the pass ends or fails.
        task = _private.graph_task()
        past = nodes.passes.get(task)
        if past is None:
            past = nodes.passes[task] = _Pass(nodes.weights, gradient)
            _private.queue_callback(partial(_end, past))
        past.put(layer, gradient)
        _, wants_latest, wants_weights, *_ = ctx.needs_input_grad
        of_latest = of_weights = None
        column = past.columns[layer]
        both = wants_latest and wants_weights and not torch.is_grad_enabled()
        if both and kernels.mixes(latest, (), column):
            of_latest, past.products[layer] = kernels.window_backward(past.cotangents, column[0], latest)
        else:
            if wants_latest:
                of_latest = torch.mm(column, past.cotangents).view_as(latest).to(latest.dtype)
            if wants_weights:
                past.products[layer] = torch.mv(past.cotangents, in_single(latest.reshape(-1)))
        if wants_weights and layer == 0:
            of_weights = past.gradient_of_weights()
        return gradient, of_latest, of_weights, None, None, None, None


def _end(past: _Pass) -> None:
    """What the engine calls when a pass has ended."""


def _by_slot(weights: Float[Tensor, "L H"]) -> Float[Tensor, "rows 1 H"]:
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
