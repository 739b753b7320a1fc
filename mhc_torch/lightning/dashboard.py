"""Lightning callback: clears the history before every batch and logs what the mixing layers do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mhc_torch.lightning.either import EitherTrainer
from mhc_torch.monitoring.diagnostics import (
    composite_gains,
    extract_mixing_weights,
    gradient_norms,
    reset_history,
    row_figures,
)
from mhc_torch.monitoring.pictures import log_picture, logger_kinds

try:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.utilities import rank_zero_warn
except ImportError as error:
    raise ImportError("MHCLightningCallback needs Lightning: pip install 'mhc-jax[lightning]'") from error

_BACKENDS = ("tensorboard", "wandb", "mlflow", "comet", "clearml", "csv")


class MHCLightningCallback(Callback):
    """Reset the history and fill the stability dashboard.

    History is cleared at the start of every train, validation, test and predict batch. Before every
    ``log_interval``-th optimizer step (the first included), for every mixing layer
    (see :func:`~mhc_torch.monitoring.connection.connections`):

    - ``{prefix}/{layer}/alpha_{i}``: its live mixing weights, oldest state first, and ``{prefix}/mixing_weights``: one
      heatmap over all layers (``log_mixing_weights``, needs matplotlib); with them, for every MHCSequential,
      ``{prefix}/{container}/gain_forward`` and ``.../gain_backward``, the composite gain of its skips;
    - ``{prefix}/{layer}/entropy``: the Shannon entropy ``-Σ α log α`` in nats (``log_entropy``);
    - ``{prefix}/{layer}/grad_norm`` and ``.../logits_grad_norm``: the Euclidean norm of the gradient of the layer's
      parameters and of its mixing logits, unscaled and not yet clipped (``log_gradients``).

    The step of all of them is the number of optimizer steps taken before. Global rank 0 logs, to every logger of the
    Trainer, or to those of one ``logging_backend``.

    Args:
        log_weights: another name of ``log_mixing_weights``.
        logging_backend: "tensorboard", "wandb", "mlflow", "comet", "clearml" or "csv"; None means all loggers.

    Raises:
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
        if self.log_mixing_weights:
            import mhc_torch.monitoring.dashboard  # noqa: F401  a missing matplotlib shows now, not hours into training

    def on_train_batch_start(self, trainer: EitherTrainer, pl_module: nn.Module, *args: Any, **kwargs: Any) -> None:
        reset_history(pl_module)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_train_start(self, trainer: EitherTrainer, pl_module: nn.Module) -> None:
        if self.logging_backend is not None and not self._loggers(trainer):
            rank_zero_warn(f"the Trainer has no {self.logging_backend} logger: there will be no mHC dashboard")

    def on_before_optimizer_step(self, trainer: EitherTrainer, pl_module: nn.Module, optimizer: Optimizer) -> None:
        step = trainer.global_step
        if step % self.log_interval:
            return
        # Every rank computes, since reading a sharded parameter is a collective; rank zero logs.
        weights = extract_mixing_weights(pl_module)
        metrics = self._metrics(weights, pl_module)
        if not metrics or not trainer.is_global_zero:
            return
        loggers = self._loggers(trainer)
        for logger in loggers:
            logger.log_metrics(metrics, step=step)
        if self.log_mixing_weights:
            from mhc_torch.monitoring.dashboard import mixing_picture

            picture = mixing_picture(weights)
            for logger in loggers:
                log_picture(logger, f"{self.prefix}/mixing_weights", picture, step)

    def _loggers(self, trainer: EitherTrainer) -> list[Any]:
        return [logger for logger in trainer.loggers if self.logging_backend in (None, *logger_kinds(logger))]

    def _metrics(self, weights: Mapping[str, Tensor], pl_module: nn.Module) -> dict[str, float]:
        metrics = gradient_norms(pl_module) if self.log_gradients else {}
        if self.log_mixing_weights:
            metrics |= composite_gains(pl_module)
            for layer, alpha in weights.items():
                metrics |= {f"{layer}/alpha_{i}": value for i, value in enumerate(alpha.tolist())}
        wanted = {"entropy": self.log_entropy, "identity_distance": self.log_mixing_weights}
        metrics |= {key: value for key, value in row_figures(pl_module).items() if wanted[key.rpartition("/")[2]]}
        return {f"{self.prefix}/{key}": value for key, value in metrics.items()}
