"""The loop around a training step, with an experiment tracker."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.monitoring.dashboard import Tracker, log_dashboard
from mhc_jax.training.step import Batch, TrainState


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]],
    batches: Iterable[Batch],
    *,
    tracker: Tracker | None = None,
    log_interval: int = 50,
    hyperparams: Mapping[str, Any] | None = None,
    after: Callable[[TrainState, int], None] | None = None,
) -> TrainState:
    """One update for each batch, logging on the way.

    At every `log_interval`-th update, the first included, the tracker gets the metrics of the step as
    `train/<name>` (nested ones as `train/<name>/<inner>`), and, from a step with `diagnose`, the dashboard of
    `mhc_jax.monitoring.dashboard` under the names that `MHCLightningCallback` uses. Their step is the number of
    updates made before. Only then does the loop wait for the device. With several processes the first one logs.

    Args:
        state: where to begin; donated, its arrays must not be used again.
        train_step: from `make_train_step`.
        batches: as many as updates.
        tracker: anything with `log_metrics(metrics, step)` and `log_hyperparams(params)`, such as an `Experiment` of
            `mhc_torch.tracking` or a logger of Lightning.
        log_interval: updates from one report to the next, at least 1.
        hyperparams: logged once, before the first update.
        after: called after every update with the state and the number of updates made, as for an evaluation or a
            checkpoint; the next update donates that state.

    Returns:
        The state after the last batch.

    Raises:
        ValueError: `log_interval` is less than 1, or a metric is no scalar.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from mhc_jax.training import TrainState, make_train_step
        >>> class Printer:
        ...     def log_metrics(self, metrics, step):
        ...         print(step, sorted(metrics))
        ...     def log_hyperparams(self, params):
        ...         print(params)
        >>> optimizer = optax.sgd(0.1)
        >>> state = TrainState.create(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optimizer)
        >>> train_step = make_train_step(lambda model, x: (jnp.mean(model(x) ** 2), {}), optimizer)
        >>> state = train(
        ...     state, train_step, [jnp.eye(2)] * 3, tracker=Printer(), log_interval=2, hyperparams={"lr": 0.1}
        ... )
        {'lr': 0.1}
        0 ['train/grad_norm', 'train/loss']
        2 ['train/grad_norm', 'train/loss']
    """
    if log_interval < 1:
        raise ValueError(f"log_interval must be at least 1 update, got {log_interval}")
    if jax.process_index() != 0:
        tracker = None
    if tracker is not None and hyperparams is not None:
        tracker.log_hyperparams(hyperparams)
    step = int(state.step)
    for batch in batches:
        state, metrics = train_step(state, batch)
        if tracker is not None and step % log_interval == 0:
            diagnostics = metrics.pop("diagnostics", {})
            tracker.log_metrics(_scalars(metrics), step)
            # The dashboard asks for the kinds of the layers only, not for their arrays.
            log_dashboard(tracker, nnx.eval_shape(lambda state: state.model, state), diagnostics, step)
        step += 1
        if after is not None:
            after(state, step)
    return state


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    scalars = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(dict(metrics))):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if jnp.size(leaf) != 1:
            raise ValueError(f"the metric {name!r} has shape {jnp.shape(leaf)}; a tracker takes scalars")
        scalars[f"train/{name}"] = float(leaf)
    return scalars
