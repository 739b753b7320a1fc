"""The dashboard of a JAX model under the keys that Lightning users know, for any object that logs metrics.

state, metrics = train_step(state, batch)                                 # of make_train_step(..., diagnose=diagnose)
log_dashboard(tracker, state.model, metrics["diagnostics"], step=0)       # mhc/<layer>/entropy, ...
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from mhc_jax.monitoring.connection import connections


@runtime_checkable
class Tracker(Protocol):
    """What a training loop logs to: a logger of Lightning, an `Experiment` of `mhc_torch.tracking`, or one's own."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_hyperparams(self, params: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Heatmaps(Protocol):
    """A tracker that also draws mixing weights."""

    def log_mixing_weights(self, key: str, weights: Mapping[str, Any], step: int) -> None: ...


def dashboard(
    model: nnx.Module, diagnostics: Mapping[str, Mapping[str, Any]], prefix: str = "mhc"
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The figures of `mhc_jax.monitoring.diagnostics.diagnose` as numbers with names, and the mixing weights by layer.

    A layer has the name that it has in the PyTorch model that the bridge pairs with this one: `net.skip_layers.3`.
    Names of the metrics are `{prefix}/{layer}/alpha_{i}` (live weights; i is the column of the heatmap, so that the
    latest state has the same, highest index in every layer), `.../entropy`, `.../grad_norm`, `.../logits_grad_norm`,
    and for a container `{prefix}/{container}/gain_forward` and `gain_backward`, without the middle part if it is the
    model itself. Reading them waits for the device.

    Args:
        model: the model that was diagnosed, for the kinds of its connections.
        diagnostics: what `diagnose` returned.

    Returns:
        Metrics by name, and live weights (K,) by layer, in order of depth.

    Example:
        >>> from mhc_jax.monitoring.diagnostics import diagnose
        >>> from mhc_jax.nn import MHCStack
        >>> stack = MHCStack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), depth=2, rngs=nnx.Rngs(0))
        >>> grads = nnx.grad(lambda stack: stack(jax.numpy.ones((2, 4))).sum())(stack)
        >>> metrics, weights = dashboard(stack, diagnose(stack, grads))
        >>> list(weights), round(metrics["mhc/gain_forward"], 3)
        (['skip_layers.0', 'skip_layers.1'], 1.0)
        >>> [key.removeprefix("mhc/skip_layers.") for key in metrics if "alpha" in key]
        ['0/alpha_1', '1/alpha_0', '1/alpha_1']
    """
    metrics: dict[str, float] = {}
    weights: dict[str, np.ndarray] = {}
    found = {"/".join(map(str, path)) or "model": (path, connection) for path, connection in connections(model)}
    for name, figures in jax.device_get(dict(diagnostics)).items():
        path, connection = found[name]
        holder = ".".join(map(str, path))
        shown = connection.shown(figures)
        rows = shown.layers | shown.weights
        named = {layer: ".".join(filter(None, (holder, layer))) or type(connection).__name__ for layer in rows}
        for layer, values in shown.layers.items():
            metrics |= {f"{prefix}/{named[layer]}/{key}": value for key, value in values.items()}
        metrics |= {"/".join(filter(None, (prefix, holder, key))): value for key, value in shown.whole.items()}
        weights |= {named[layer]: alpha for layer, alpha in shown.weights.items()}
    window = max(map(len, weights.values()), default=0)
    for layer, alpha in weights.items():
        first = window - len(alpha)
        metrics |= {f"{prefix}/{layer}/alpha_{i}": float(value) for i, value in enumerate(alpha, start=first)}
    return metrics, weights


def log_dashboard(
    tracker: Tracker, model: nnx.Module, diagnostics: Mapping[str, Mapping[str, Any]], step: int, prefix: str = "mhc"
) -> None:
    """Log `dashboard`, and the heatmap `{prefix}/mixing_weights` where the tracker draws (`Heatmaps`)."""
    metrics, weights = dashboard(model, diagnostics, prefix)
    if metrics:
        tracker.log_metrics(metrics, step)
    if weights and isinstance(tracker, Heatmaps):
        tracker.log_mixing_weights(f"{prefix}/mixing_weights", weights, step)
