"""What the connections of a network do at this moment: weights, entropy, gains, gradients, by layer name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.history.window import clear_history
from mhc_torch.monitoring.connection import Container, connections


@torch.no_grad()
def extract_mixing_weights(model: nn.Module) -> dict[str, Float[Tensor, "k"]]:
    """The weights that each layer gives to its live states, oldest first, or to its streams.

    A layer that has run with fewer states than its window holds has that many weights. Of a matrix skip it is the last
    row, the one that makes the output. A layer of streams has the rows ``{layer}.pre``, ``{layer}.post`` and
    ``{layer}.res.{i}``, the weights of the old streams in the new stream i; where the maps depend on the token, those
    of the bias alone, around which the others lie. Names are those of ``model.named_modules()`` without what
    ``torch.compile`` adds to them; a model that is itself a layer has the name of its class.

    Returns:
        float tensors ``(K,)`` on the CPU by name, which later steps leave alone; empty when there is no connection.
    """
    return {
        _row(model, name, row): weights.detach().to("cpu", torch.float32, copy=True)
        for name, connection in connections(model)
        for row, weights in connection.weight_rows().items()
    }


def history_columns(weights: Mapping[str, Float[Tensor, "_"]]) -> dict[str, range]:
    """Where each layer's weights stand in the heatmap, and under which index ``alpha_{i}`` they are logged.

    The longest row has the columns 0, 1, ...; shorter ones end where it ends, so that all layers have their latest
    state in the last column, under the same name.
    """
    window = max(map(len, weights.values()), default=0)
    return {name: range(window - len(alpha), window) for name, alpha in weights.items()}


@torch.no_grad()
def row_figures(model: nn.Module) -> dict[str, float]:
    """Further figures: ``{layer}/entropy``; of streams ``{layer}.res.{i}/entropy``, ``{layer}/identity_distance``."""
    return {
        f"{_row(model, name, row)}/{key}": value
        for name, connection in connections(model)
        for row, figures in connection.row_figures().items()
        for key, value in figures.items()
    }


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norms of the gradients now in ``.grad``, by layer and group.

    ``{layer}/logits_grad_norm`` of a skip and ``{layer}/maps_grad_norm`` of streams are those of its own parameters,
    ``{layer}/grad_norm`` that of the branch: the modules that the connection names, or the one that it follows in a
    container, elsewhere the module that holds it. Parameters without gradient count as zero.
    """
    norms: dict[str, float] = {}
    for name, connection in connections(model):
        branch = (parameter for module in _branch_of(model, name) for parameter in module.parameters())
        groups = {"grad_norm": branch} | connection.gradient_groups()
        norms |= {f"{_row(model, name, '')}/{key}": _gradient_norm(group) for key, group in groups.items()}
    return norms


@torch.no_grad()
def composite_gains(model: nn.Module) -> dict[str, float]:
    """By how much the skips alone can amplify a signal and a gradient through all layers of each container.

    ``{container}/gain_forward`` and ``{container}/gain_backward``: the largest absolute row and column sum of the
    product of the layers' residual maps, gates included; the "Amax gain magnitude" of arXiv 2512.24880, section 3.1. A
    model that is itself a container has no first part.
    """
    gains = {}
    for name, module in model.named_modules():
        if not issubclass(type(module), Container):
            continue
        container: Any = module
        if not len(maps := container.residual_maps().cpu()):
            continue
        product = torch.eye(maps.shape[-1], dtype=torch.float64)
        for step in maps:
            product = step @ product
        start = f"{holder}/" if (holder := without_compile_prefix(name)) else ""
        gains[f"{start}gain_forward"] = product.abs().sum(1).max().item()
        gains[f"{start}gain_backward"] = product.abs().sum(0).max().item()
    return gains


def reset_history(model: nn.Module) -> None:
    """Empty every HistoryBuffer in ``model``, and call ``clear_history()`` of the modules that define their own."""
    clear_history(model)
    for module in model.modules():
        own = getattr(type(module), "clear_history", None)
        if own is not None and own is not clear_history:
            own(module)


def without_compile_prefix(name: str) -> str:
    """``name`` of a module or parameter without the parts that ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _row(model: nn.Module, name: str, row: str) -> str:
    return ".".join(filter(None, (without_compile_prefix(name) or type(model).__name__, row)))


def _branch_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that this connection names, or the one that a container says it follows, or the one that holds it."""
    holder, _, position = name.rpartition(".")
    connection = model.get_submodule(name)
    if names := getattr(connection, "branch_names", ()):
        return [model.get_submodule(holder).get_submodule(beside) for beside in names]
    container = model.get_submodule(holder.rpartition(".")[0])
    branch_of = getattr(container, "branch_of", None)
    branch = branch_of(connection) if branch_of and position.isdecimal() else None
    return [model.get_submodule(holder) if branch is None else branch]


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    return nn.utils.get_total_norm([p.grad.float() for p in parameters if p.grad is not None]).item()
