"""Pictures of what a network does with its history: mixing weights, gradient flow, training curves.

Every function returns the matplotlib ``Figure`` and needs no display; ``save_path`` also writes it to a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'mhc-jax[viz]'") from error

from mhc_torch.monitoring.connection import Container, connections
from mhc_torch.monitoring.diagnostics import extract_mixing_weights, without_compile_prefix
from mhc_torch.monitoring.heatmap import LEGEND, PRUNED, colour_scale, colours, heat_cells, scale_ticks
from mhc_torch.monitoring.probe import dummy_input, probe


def plot_mixing_weights(
    model: nn.Module,
    save_path: str | os.PathLike[str] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str = "viridis",
) -> Figure:
    """Heatmap of the mixing weights of every history layer (see :func:`draw_mixing_weights`).

    Raises:
        ValueError: ``model`` has no history layer.
    """
    weights = extract_mixing_weights(model)
    figure = plt.figure(figsize=figsize or heatmap_size(len(weights)), layout="constrained")
    draw_mixing_weights(figure, weights, cmap)
    return _saved(figure, save_path)


def heatmap_size(layers: int) -> tuple[float, float]:
    """Width and height in inches of the heatmap of that many layers: saved, no higher than a screen of 1080 pixels."""
    return 8.0, min(max(3.0, 1.5 + 0.2 * layers), 7.2)


def draw_mixing_weights(figure: Figure, weights: Mapping[str, Tensor], cmap: str = "viridis") -> None:
    """Draw mixing weights as a heatmap: depth downwards, history index to the right, oldest state first.

    Colours go from the smallest weight to the largest, on a logarithmic scale, or a linear one where there are negative
    weights. A weight of exactly zero is black whatever the colour map: the projection has pruned that path. Early
    layers have fewer states than the window is long; the cells they do not have are grey, so that the latest state is
    always in the last column.

    Args:
        figure: an empty figure.
        weights: the live weights ``(K,)`` of each layer by name, in order of depth; ``K`` may differ.

    Raises:
        ValueError: ``weights`` is empty.
    """
    cells = heat_cells(weights)
    norm, window = colour_scale(cells), cells.shape[1]
    axes = figure.add_subplot()
    placed: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(cells, cmap=colours(cmap), norm=norm, **placed)
    axes.imshow(np.where(cells == 0, 0, np.nan), cmap=ListedColormap([PRUNED]), **placed)
    bar = figure.colorbar(image, ax=axes, label="mixing weight α", ticks=scale_ticks(norm), format="%.2g")
    bar.minorticks_off()
    meaning = f"history index (0 oldest, {window - 1} latest), or stream"
    axes.set(title="Mixing weights", xlabel=meaning, ylabel="layer depth")
    axes.set_xticks(range(window))
    _label_layers(axes.set_yticks, list(weights), most=50)
    legend = [Patch(facecolor=colour, label=meaning) for meaning, colour in LEGEND.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def plot_gradient_flow(
    model: nn.Module,
    input_data: Any = None,
    target: Any = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    save_path: str | os.PathLike[str] | None = None,
    figsize: tuple[float, float] = (10, 6),
) -> Figure:
    """Gradient norm and variance of each block, in order of depth: a flat line is a healthy network.

    A block has one point, whatever it is made of: the elements of a ``ModuleList`` or ``Sequential`` that has two of
    one class with modules inside, and the branches of connections. Elsewhere each module with parameters has its own.
    Mixing logits are left out: their gradients live on another scale (the Lightning callback logs them).

    With ``input_data`` the gradients are those of ``loss_fn(model(input_data), target)``, or of the mean of the output
    when there is no ``loss_fn``. Without, they are the gradients that the parameters hold, or, when they hold none,
    those of the mean output on a made-up input. The ``.grad`` of the model and its buffers are left as they were.

    Args:
        input_data: one argument of the model, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        ValueError: ``target`` without ``loss_fn``, ``loss_fn`` without ``input_data``, no parameter got a gradient,
            or no input could be made up.
    """
    if loss_fn is not None and input_data is None:
        raise ValueError("loss_fn needs input_data to be evaluated on; pass input_data")
    if target is not None and loss_fn is None:
        raise ValueError("target needs a loss_fn to be compared with; pass loss_fn, or leave target out")
    parameters = dict(_layer_parameters(model))
    gradients: Sequence[Tensor | None] = [p.grad for p in parameters.values()]
    if input_data is not None or not any(gradient is not None for gradient in gradients):
        output = probe(model, dummy_input(model) if input_data is None else input_data)
        loss = output.mean() if loss_fn is None else loss_fn(output, target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    blocks = _blocks(model)
    by_layer: dict[str, list[Tensor]] = {}
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            block = next((block for block in blocks if name.startswith(f"{block}.")), name.rpartition(".")[0] or name)
            by_layer.setdefault(block, []).append(gradient.detach().flatten().double())
    if not by_layer:
        raise ValueError("model: none of its layers got a gradient")
    values = [torch.cat(parts) for parts in by_layer.values()]

    figure = plt.figure(figsize=figsize, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, label, series in (
        (top, "gradient norm", [v.norm().item() for v in values]),
        (bottom, "gradient variance", [v.var(unbiased=False).item() for v in values]),
    ):
        axes.plot(series, marker="o", markersize=3)
        # A vanished gradient has no place on a logarithmic axis, and must be seen.
        axes.set_yscale("symlog", linthresh=1e-12) if min(series) == 0 else axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    top.set_title("Gradient flow")
    _label_layers(bottom.set_xticks, list(by_layer), most=50, rotation=90)
    bottom.set_xlabel("block")
    return _saved(figure, save_path)


def _layer_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    groups = [group for _, connection in connections(model) for group in connection.gradient_groups().items()]
    mixing = {id(parameter) for key, group in groups if key != "grad_norm" for parameter in group}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in mixing:
            yield without_compile_prefix(name), parameter


def _blocks(model: nn.Module) -> list[str]:
    """Names of the outermost blocks: see `plot_gradient_flow`."""
    rows: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList) or any(f"{name}.".startswith(row) for row in rows):
            continue
        built = [type(child) for child in module if any(True for _ in child.children())]
        holder = model.get_submodule(name.rpartition(".")[0])
        if len(set(built)) < len(built) or issubclass(type(holder), Container):
            rows.append(f"{name}." if name else "")
    return [
        without_compile_prefix(f"{row}{child}")
        for row in rows
        for child, _ in model.get_submodule(row.rstrip(".")).named_children()
    ]


def plot_history_contribution(
    alphas: Tensor | Sequence[float],
    layer_name: str = "MHCSkip",
    save_path: str | os.PathLike[str] | None = None,
    figsize: tuple[float, float] = (8, 5),
) -> Figure:
    """Bars of one layer's mixing weights ``alphas`` ``(K,)``, oldest state first, the latest one in another colour.

    Raises:
        ValueError: ``alphas`` is not a vector of at least one weight.
    """
    alpha = torch.as_tensor(alphas, dtype=torch.float64, device="cpu").detach()
    if alpha.ndim != 1 or not len(alpha):
        raise ValueError(f"alphas must be a vector of at least one weight, got shape {tuple(alpha.shape)}")
    figure = plt.figure(figsize=figsize, layout="constrained")
    axes = figure.add_subplot()
    ages = [f"t-{age}" if age else "t" for age in reversed(range(len(alpha)))]
    bars = axes.bar(ages, alpha.tolist(), color=["steelblue"] * (len(alpha) - 1) + ["coral"])
    axes.bar_label(bars, [f"{a:.1%}" for a in alpha.tolist()])
    axes.set(title=f"History contribution: {layer_name}", xlabel="state (oldest first)", ylabel="mixing weight α")
    axes.set_ylim(0, 1.08)
    return _saved(figure, save_path)


def create_training_dashboard(
    metrics_dict: Mapping[str, Any],
    save_path: str | os.PathLike[str] | None = None,
    figsize: tuple[float, float] | None = None,
) -> Figure:
    """One panel per metric, over the steps at which it was recorded.

    Args:
        metrics_dict: series by name. A series of numbers ``(T,)`` is one line (``loss``, ``accuracy``, ...); a series
            of vectors ``(T, K)`` is one line per history index (``mixing_weights_history``).

    Raises:
        ValueError: no metric, or one that is empty or neither ``(T,)`` nor ``(T, K)``.
    """
    if not metrics_dict:
        raise ValueError("metrics_dict is empty: give at least one series, for example {'loss': [...]}")
    series = {name: _series(name, values) for name, values in metrics_dict.items()}
    columns = min(2, len(series))
    rows = math.ceil(len(series) / columns)
    figure = plt.figure(figsize=figsize or (7.5 * columns, 4 * rows), layout="constrained")
    figure.suptitle("mHC training dashboard")
    for position, (name, values) in enumerate(series.items(), start=1):
        axes = figure.add_subplot(rows, columns, position)
        lines = axes.plot(values)
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if values.ndim == 2:
            axes.legend(lines, [f"α_{i}" for i in range(values.shape[1])], title="history index, 0 oldest")
    return _saved(figure, save_path)


def _series(name: str, values: Any) -> np.ndarray:
    rows = [torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().numpy() for value in values]
    if not rows or rows[0].ndim > 1 or any(row.shape != rows[0].shape for row in rows):
        raise ValueError(f"metrics_dict[{name!r}] must be a series of numbers (T,) or of equal vectors (T, K), T > 0")
    return np.stack(rows)


def _label_layers(set_ticks: Callable[..., Any], names: list[str], most: int, **style: Any) -> None:
    """Name every layer, or every second, third, ... where there are more than ``most``."""
    ticks = range(0, len(names), math.ceil(len(names) / most))
    set_ticks(ticks, [names[i] for i in ticks], fontsize=8 if len(ticks) <= 30 else 7, **style)


def _saved(figure: Figure, save_path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure in the format of the path's ending; a reader never meets half a file."""
    if save_path is not None:
        path = Path(save_path)
        unfinished = path.with_name(f".{path.name}.part")
        figure.savefig(unfinished, format=path.suffix.lstrip(".") or "png", dpi=150)
        os.replace(unfinished, path)
    return figure
