"""What a connection tells of itself. A module with these methods shows on the dashboard, in plots and in reports."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.nn.compatible import is_mhc_compatible
from mhc_torch.projections import project_simplex

# Parameters of skips that scale the mixed history as a whole.
_NO_LOGITS = ("gate_logit", "gain")


@runtime_checkable
class Connection(Protocol):
    """History or streams around a branch. Names of rows are relative to the layer: "" is the layer itself."""

    def weight_rows(self) -> dict[str, Tensor]:
        """Vectors of weights by name: of the live states, the latest last, or of the streams."""

    def row_figures(self) -> dict[str, dict[str, float]]:
        """What else there is to know of each row, and under "" of the layer: entropies, distances."""

    def gradient_groups(self) -> dict[str, Iterable[nn.Parameter]]:
        """The parameters whose gradients have one norm, by the name of that norm."""


@runtime_checkable
class Container(Protocol):
    """Layers in a row, whose skips alone amplify a signal and a gradient by a gain."""

    def residual_maps(self) -> Float[Tensor, "L n n"]:
        """What each layer does to the window of states, or to the streams, without its branch, in float64."""


def connections(model: nn.Module) -> Iterator[tuple[str, Connection]]:
    """The connections in ``model`` and their names, in order of registration.

    Beside the modules that are a `Connection`, these are the modules of a class that is marked by ``@mhc_compatible``
    and has a method ``mixing_weights()``: the library's skips, and those of a user who wants them on the dashboard. Of
    a class that has only ``logits``, a tensor (..., K), the weights are their softmax, a row for each vector.
    """
    for name, module in model.named_modules():
        # Of the class, which is remembered: of the instance, Python would ask for every method again, each time.
        if issubclass(type(module), Connection):
            yield name, module
        elif is_mhc_compatible(module) and (hasattr(module, "mixing_weights") or _has_logits(module)):
            yield name, _Marked(module)


def idle(model: nn.Module) -> list[str]:
    """The names of the skips that no state reached in their last forward.

    Skips of injected modules are not among them: the first of its width has no past state by design.
    """
    return [
        name
        for name, module in model.named_modules()
        if is_mhc_compatible(module) and getattr(module, "live", None) == 0 and not hasattr(module, "history_buffer")
    ]


def _has_logits(module: nn.Module) -> bool:
    logits = getattr(module, "logits", None)
    return isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim > 0


class _Marked:
    """A skip as a connection: one row, the weights of its live states; of bare logits a row for each vector."""

    def __init__(self, skip: Any) -> None:
        self._skip = skip

    def weight_rows(self) -> dict[str, Tensor]:
        if hasattr(self._skip, "mixing_weights"):
            return {"": whole(self._skip.mixing_weights())}
        weights = project_simplex(whole(self._skip.logits))
        return {"": weights} if weights.ndim == 1 else {str(i): row for i, row in enumerate(weights.flatten(0, -2))}

    def row_figures(self) -> dict[str, dict[str, float]]:
        return {row: {"entropy": entropy(weights).item()} for row, weights in self.weight_rows().items()}

    def gradient_groups(self) -> dict[str, Iterable[nn.Parameter]]:
        own = self._skip.named_parameters(recurse=False)
        return {"logits_grad_norm": [parameter for name, parameter in own if name not in _NO_LOGITS]}


def whole(tensor: Tensor) -> Tensor:
    """Gathered from all ranks, if it is a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def entropy(weights: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows"]:
    """Shannon entropy ``-Σ α log α`` in nats with ``0 log 0 = 0``: from 0 to ``log K`` where the weights sum to 1."""
    return torch.special.entr(weights).sum(-1)


def shares(weights: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows k"]:
    """``|w_k| / Σ |w_k|``: weights that do not sum to 1, or are negative, as a distribution whose entropy exists."""
    return weights.abs() / weights.abs().sum(-1, keepdim=True)
