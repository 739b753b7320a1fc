"""What a connection tells of itself. A module with these two methods shows in `diagnose` and on the dashboard."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jaxtyping import Array


class Shown(NamedTuple):
    """What the dashboard shows of a connection. Names are relative to it: "" stands for the connection itself.

    Attributes:
        layers: figures by name, for each layer.
        whole: figures of all layers together.
        weights: vectors of weights by name, for the heatmap, in order of depth; the dashboard numbers them.
    """

    layers: dict[str, dict[str, float]]
    whole: dict[str, float]
    weights: dict[str, np.ndarray]


@runtime_checkable
class Connection(Protocol):
    """How layers are connected: history or streams around a branch, or a stack of such layers."""

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `diagnose` reports, given the gradients of this module's parameters."""

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of these figures, under the names of the PyTorch model that is paired with it."""


def connections(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The outermost connections of a model and their paths: a container reports the layers inside it.

    But what `retrofit` put into a layer is of no container: such a connection has `reports_alone` set.
    """
    found: list[tuple[Any, ...]] = []
    for path, module in sorted(nnx.iter_modules(model), key=lambda item: len(item[0])):
        inside = any(path[: len(outer)] == outer for outer in found) and not getattr(module, "reports_alone", False)
        if isinstance(module, Connection) and not inside:
            found.append(path)
            yield path, module


def show_history(figures: Mapping[str, np.ndarray], live: Mapping[str, int], *, container: bool) -> Shown:
    """What the dashboard shows of layers that mix a window of past states.

    Args:
        figures: of `mhc_jax.monitoring.figures.history_figures`, and what of gradients there is.
        live: name of each layer, in order of depth -> how many states its window holds.
        container: whether the gain of all layers together is of interest.
    """
    layers, weights = {}, {}
    for depth, (name, count) in enumerate(live.items()):
        weights[name] = figures["weights"][depth, -count:]
        keys = ("entropy", "logits_grad_norm", "grad_norm")
        layers[name] = {key: float(figures[key][depth]) for key in keys if key in figures}
    gains = ("gain_forward", "gain_backward") if container else ()
    return Shown(layers, {key: float(figures[key]) for key in gains}, weights)
