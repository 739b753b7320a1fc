"""The report's charts, each drawn by matplotlib and returned as an SVG that stands inside the page."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demo.record import Run

INK, MUTED, GRID = "#1d2733", "#6b7785", "#e3e8ee"
COLOURS = {
    "mHC (JAX)": "#2563c9",
    "mHC (PyTorch)": "#e07b00",
    "residual (JAX)": "#2f9e72",
    "plain (JAX)": "#8b95a1",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "svg.fonttype": "none",  # text stays text: sharp, selectable, and it takes the page's font
    "svg.hashsalt": "mhc",
}


def _draw(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _svg(figure: Figure) -> str:
    page = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(page, format="svg", transparent=True, metadata={"Date": None})
    drawing = page.getvalue()
    return drawing[drawing.index("<svg") :]


def _line(run: Run) -> dict[str, Any]:
    # The two frameworks' curves lie on each other: the dashes let both be seen.
    return {"color": COLOURS[run.name], "linestyle": "--" if "PyTorch" in run.name else "-", "linewidth": 1.8}


def _smooth(values: Float[np.ndarray, "steps"], span: int = 15) -> Float[np.ndarray, "steps"]:
    """Running mean over the last `span` steps: single batches are too noisy to compare by eye."""
    totals = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - span, 0)
    return (totals[ends] - totals[starts]) / (ends - starts)


def learning(runs: Sequence[Run]) -> str:
    """Training loss by step, and held-out accuracy by epoch."""
    figure, (loss, accuracy) = _draw(9.6, 3.5, panels=2)
    for run in runs:
        line = _line(run)
        loss.semilogy(_smooth(run.losses), label=run.name, **line)
        accuracy.plot(np.arange(1, len(run.accuracies) + 1), 100 * run.accuracies, label=run.name, **line)
    loss.set(xlabel="optimizer step", ylabel="training loss (mean of 15 steps)")
    accuracy.set(xlabel="epoch", ylabel="held-out accuracy, %", ylim=(0, 102))
    figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs), frameon=False)
    return _svg(figure)


def gradients(runs: Sequence[Run]) -> str:
    """Gradient norm of each layer at the first step, on a logarithmic scale: flat is healthy."""
    figure, (axes,) = _draw(9.6, 3.0)
    for run in runs:
        line = _line(run)
        axes.semilogy(np.arange(1, len(run.gradient_norms) + 1), run.gradient_norms, label=run.name, **line)
    axes.set(xlabel="layer (1 is next to the input)", ylabel="gradient norm at the first step")
    axes.legend(frameon=False, ncols=2)
    return _svg(figure)


def heatmaps(runs: Sequence[Run]) -> str:
    """The learned weights over the window, one row a layer: what every layer chose to look at."""
    figure, panels = _draw(9.6, 5.4, panels=len(runs))
    # The first layers have few states to choose from, so their weights say little and would take the whole scale.
    top = max(run.weights[run.weights.shape[1] :].max() for run in runs if run.weights is not None)
    for axes, run in zip(panels, runs, strict=True):
        if run.weights is None:
            raise ValueError(f"run {run.name!r} has no mixing weights to draw")
        depth, window = run.weights.shape
        live = np.arange(window) >= window - np.minimum(np.arange(depth) + 1, window)[:, None]
        shown = axes.imshow(
            np.where(live, run.weights, np.nan), aspect="auto", cmap="magma", vmin=0, vmax=top, interpolation="nearest"
        )
        axes.set(
            title=run.name,
            xlabel="state in the window",
            ylabel="layer",
            xticks=range(window),
            xticklabels=[f"{window - 1 - i} back" if i < window - 1 else "latest" for i in range(window)],
            yticks=[0, *range(9, depth, 10)],
            yticklabels=[1, *range(10, depth + 1, 10)],
        )
        axes.grid(False)
    figure.colorbar(shown, ax=panels, label="weight", shrink=0.8, extend="max")
    return _svg(figure)


def entropies(runs: Sequence[Run], window: int) -> str:
    """Entropy of the weights over training, of the layers with a whole window: their mean, lowest and highest."""
    figure, (axes,) = _draw(9.6, 3.0)
    for run in runs:
        if run.entropy is None or run.entropy_steps is None:
            raise ValueError(f"run {run.name!r} has no entropy to draw")
        line = _line(run)
        whole = run.entropy[:, window - 1 :]
        axes.fill_between(run.entropy_steps, whole.min(1), whole.max(1), color=line["color"], alpha=0.10, linewidth=0)
        axes.plot(run.entropy_steps, whole.mean(1), label=run.name, **line)
    axes.axhline(np.log(window), color=MUTED, linewidth=0.8, linestyle=":")
    axes.annotate(f"log {window}: all equal", (0, np.log(window)), (4, 3), textcoords="offset points", color=MUTED)
    axes.set(xlabel="optimizer step", ylabel="entropy, nats")
    axes.legend(frameon=False)
    return _svg(figure)
