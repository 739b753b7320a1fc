"""Lightning callback: clears the history before every batch and logs what the mixing layers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mhc_torch.lightning.packages import EitherTrainer
from mhc_torch.monitoring.connection import connections, idle
from mhc_torch.monitoring.diagnostics import (
    composite_gains,
    extract_mixing_weights,
    gradient_norms,
    history_columns,
    reset_history,
    row_figures,
)
from mhc_torch.monitoring.pictures import Drawing, log_picture, logger_kinds
from mhc_torch.options import check_type

try:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.utilities import rank_zero_warn
except ImportError as error:
    raise ImportError("MHCLightningCallback needs Lightning: pip install 'mhc-jax[lightning]'") from error

_PUBLISHED_ORDER = "; the mhc package's order is (log_mixing_weights, log_interval, prefix): give these by name"
_BACKENDS = ("tensorboard", "wandb", "mlflow", "comet", "clearml", "csv")


class MHCLightningCallback(Callback):
    """Reset the history and fill the stability dashboard.

    History is cleared at the start of every train, validation, test and predict batch. Before every
    ``log_interval``-th optimizer step (the first included), for every mixing layer
    (see :func:`~mhc_torch.monitoring.connection.connections`):

    - ``{prefix}/{layer}/alpha_{i}``: its live mixing weights, and ``{prefix}/mixing_weights``: one heatmap over all
      layers (``log_mixing_weights``, needs matplotlib). ``i`` is the column of the heatmap: the latest state has the
      same, highest index in every layer, and a layer that has not seen H states yet lacks the lowest indices. With
      them, for every MHCSequential, ``{prefix}/{container}/gain_forward`` and ``.../gain_backward``, the composite
      gain of its skips;
    - ``{prefix}/{layer}/entropy``: the Shannon entropy ``-Σ α log α`` in nats (``log_entropy``);
    - ``{prefix}/{layer}/grad_norm`` and ``.../logits_grad_norm``: the Euclidean norm of the gradient of the layer's
      parameters and of its mixing logits, unscaled and not yet clipped (``log_gradients``).

    The step of all of them is the number of optimizer steps taken before. Global rank 0 logs, to every logger of the
    Trainer, or to those of one ``logging_backend``. On every rank the latest numbers are in
    ``trainer.callback_metrics`` too, with or without a logger, so that ``EarlyStopping`` can monitor them. Heatmaps are
    drawn and sent by a thread; what goes wrong there is raised at the next of them, or at the end.

    After the first batch it warns, once, of a model without mixing layers, and of skips that no history reaches.

    Args:
        log_weights: another name of ``log_mixing_weights``.
        logging_backend: "tensorboard", "wandb", "mlflow", "comet", "clearml" or "csv"; None means all loggers.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``log_interval`` below 1, or an unknown backend.
        ImportError: Lightning is missing, or matplotlib is and ``log_mixing_weights`` is on.
    """

    def __init__(
        self,
        log_mixing_weights: bool = True,
        log_entropy: bool = True,
        log_gradients: bool = False,
        log_interval: int = 50,
        prefix: str = "mhc",
        logging_backend: str | None = None,
        *,
        log_weights: bool | None = None,
    ) -> None:
        switches = {"log_mixing_weights": log_mixing_weights, "log_entropy": log_entropy}
        switches |= {"log_gradients": log_gradients} | ({} if log_weights is None else {"log_weights": log_weights})
        for name, switch in switches.items():
            check_type(name, switch, bool, _PUBLISHED_ORDER)
        check_type("log_interval", log_interval, int, _PUBLISHED_ORDER)
        check_type("prefix", prefix, str, _PUBLISHED_ORDER)
        if log_interval < 1:
            raise ValueError(f"log_interval must be at least 1 step, got {log_interval}")
        if logging_backend is not None and logging_backend not in _BACKENDS:
            raise ValueError(f"logging_backend must be None or one of {', '.join(_BACKENDS)}, got {logging_backend!r}")
        self.log_mixing_weights = log_mixing_weights if log_weights is None else log_weights
        self.log_entropy = log_entropy
        self.log_gradients = log_gradients
        self.log_interval = log_interval
        self.prefix = prefix
        self.logging_backend = logging_backend
        self._looked = False
        self._drawing = Drawing()
        if self.log_mixing_weights:
            import mhc_torch.monitoring.heatmap  # noqa: F401  a missing matplotlib shows now, not hours into training

    def on_train_batch_start(self, trainer: EitherTrainer, pl_module: nn.Module, *args: Any, **kwargs: Any) -> None:
        reset_history(pl_module)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_train_start(self, trainer: EitherTrainer, pl_module: nn.Module) -> None:
        if self.logging_backend is not None and not self._loggers(trainer):
            rank_zero_warn(f"the Trainer has no {self.logging_backend} logger: there will be no mHC dashboard")

    def on_train_batch_end(self, trainer: EitherTrainer, pl_module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if self._looked:
            return
        self._looked = True
        if next(connections(pl_module), None) is None:
            rank_zero_warn(
                f"MHCLightningCallback found no mixing layer in {type(pl_module).__name__}, and will log nothing; it "
                "looks for those of mhc_torch, and for classes marked by @mhc_compatible that have logits"
            )
        elif names := idle(pl_module):
            rank_zero_warn(
                f"no state reached {', '.join(names)} in the first batch, so that they mix nothing: pass them the "
                "history, a list of past states, or put their layers into an MHCSequential"
            )

    def on_before_optimizer_step(self, trainer: EitherTrainer, pl_module: nn.Module, optimizer: Optimizer) -> None:
        step = trainer.global_step
        if step % self.log_interval:
            return
        # Every rank computes, since reading a sharded parameter is a collective; rank zero logs.
        weights = extract_mixing_weights(pl_module)
        metrics = self._metrics(weights, pl_module)
        # Not by `pl_module.log`, which would go through all of them again at every step.
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
        if not metrics or not trainer.is_global_zero:
            return
        loggers = self._loggers(trainer)
        for logger in loggers:
            logger.log_metrics(metrics, step=step)
        if self.log_mixing_weights and any(len(alpha) for alpha in weights.values()):
            self._drawing.start(partial(self._draw, weights, loggers, step))

    def on_train_end(self, trainer: EitherTrainer, pl_module: nn.Module) -> None:
        self._drawing.finish()

    def on_exception(self, trainer: EitherTrainer, pl_module: nn.Module, exception: BaseException) -> None:
        try:
            self._drawing.finish()
        except Exception as error:  # not in place of what ends the training
            rank_zero_warn(f"the last heatmap was not logged: {error!r}")

    def _draw(self, weights: Mapping[str, Tensor], loggers: Sequence[Any], step: int) -> None:
        from mhc_torch.monitoring.heatmap import mixing_picture

        picture = mixing_picture(weights)
        for logger in loggers:
            log_picture(logger, f"{self.prefix}/mixing_weights", picture, step)

    def _loggers(self, trainer: EitherTrainer) -> list[Any]:
        return [logger for logger in trainer.loggers if self.logging_backend in (None, *logger_kinds(logger))]

    def _metrics(self, weights: Mapping[str, Tensor], pl_module: nn.Module) -> dict[str, float]:
        metrics = gradient_norms(pl_module) if self.log_gradients else {}
        if self.log_mixing_weights:
            metrics |= composite_gains(pl_module)
            for layer, columns in history_columns(weights).items():
                values = zip(columns, weights[layer].tolist(), strict=True)
                metrics |= {f"{layer}/alpha_{i}": value for i, value in values}
        wanted = {"entropy": self.log_entropy, "identity_distance": self.log_mixing_weights}
        metrics |= {key: value for key, value in row_figures(pl_module).items() if wanted[key.rpartition("/")[2]]}
        return {f"{self.prefix}/{key}": value for key, value in metrics.items()}
