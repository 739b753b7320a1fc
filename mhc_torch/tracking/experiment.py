"""One experiment, in one or several backends."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex
from weakref import WeakSet

import torch
from lightning.pytorch.loggers.logger import Logger

from mhc_torch.lightning.packages import EitherLogger
from mhc_torch.tracking.backends import Queued
from mhc_torch.tracking.outbox import Interrupts
from mhc_torch.tracking.system import SystemMonitor

if TYPE_CHECKING:
    from PIL.Image import Image


class Experiment:
    """A run in every backend that it was started with; made by :func:`start_logging`.

    What is logged is handed to a thread for each backend, so that no call waits for one. It can be given to anything
    that logs metrics, the JAX training loop of ``mhc_jax.training`` among others. As a context manager it stops at the
    end, as failed after an exception.

    Attributes:
        name, project: as given.
        loggers: a Lightning logger for each backend, in the order given. ``Trainer(logger=experiment.loggers)`` is the
            explicit way to track a Trainer. On other ranks than zero they do nothing.
        stopped: whether it has ended.
        trained_to: the highest step that a Trainer has reached in it.
        process: the id of the process it belongs to; in a fork of it nothing can be logged.
    """

    def __init__(self, name: str, project: str, loggers: Sequence[Logger]) -> None:
        self.name, self.project = name, project
        self.loggers = list(loggers)
        self.stopped = False
        self.process = os.getpid()
        self.trained_to = 0
        self._monitor: SystemMonitor | None = None
        self._trainers: WeakSet[Any] = WeakSet()

    def log_metrics(self, metrics: Mapping[str, Any], step: SupportsIndex) -> None:
        """Log numbers, under their names as they are.

        Args:
            metrics: numbers, or scalar arrays of PyTorch, JAX or NumPy, which are read at once.
            step: what to plot them over, such as the number of optimizer steps taken before; an integer of any of them.

        Raises:
            TypeError: a value is not a number, or the step not an integer.
            RuntimeError: the experiment has been stopped, or this process is a fork of the one that started it.
        """
        values = {key: _number(key, value) for key, value in metrics.items()}
        for logger in self.loggers:
            logger.log_metrics(values, operator.index(step))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log settings; nested mappings become names joined by "/" wherever the backend has no nesting."""
        for logger in self.loggers:
            logger.log_hyperparams(dict(params))

    def log_picture(self, key: str, picture: Image, step: int) -> None:
        """Log a PIL image."""
        for logger in self.loggers:
            logger.log_picture(key, picture, step)  # type: ignore[attr-defined]

    def log_mixing_weights(self, key: str, weights: Mapping[str, Any], step: int) -> None:
        """Log mixing weights as the heatmap of the dashboard.

        Args:
            weights: by layer, in order of depth: those of the live states, oldest first, as arrays (K,).

        Raises:
            ImportError: matplotlib is not installed.
        """
        from mhc_torch.monitoring.heatmap import mixing_picture

        tensors = {layer: torch.tensor([float(value) for value in alpha]) for layer, alpha in weights.items()}
        self.log_picture(key, mixing_picture(tensors), operator.index(step))

    def monitor(self, interval: float) -> None:
        """Log the use of the machine every ``interval`` seconds until the end."""
        if self._queued():
            self._monitor = SystemMonitor(self.log_metrics, interval)

    def attach(self, trainer: Any) -> None:
        """Add the loggers to a Trainer, of ``lightning`` or ``pytorch_lightning``, until the end of the experiment.

        A Trainer made while the experiment is active does that by itself.
        """
        given = [logger for logger in trainer.loggers if logger not in self.loggers]
        # What nobody asked for must not be `self.logger` and the folder of checkpoints.
        default = [logger for logger in given if _is_default(logger, trainer.default_root_dir)]
        trainer.loggers = [logger for logger in given if logger not in default] + self.loggers + default
        self._trainers.add(trainer)

    def flush(self) -> None:
        """Wait until the backends have all that was logged; for a hung one no longer than its timeout."""
        for logger in self._queued():
            logger.flush()

    def stop(self, status: str = "success") -> None:
        """Send what waits, end the run in every backend and detach the loggers from their Trainers.

        Args:
            status: "success" or "failed".

        At Ctrl-C what was not sent goes to a file, and KeyboardInterrupt is raised at the end. In a forked child
        nothing is done.

        Warns:
            RuntimeWarning: a backend did not take everything; the file that holds the rest is named.
        """
        if self.stopped or os.getpid() != self.process:  # in a fork there is nothing to end
            return
        with Interrupts() as interrupts:
            self.stopped = True
            if self._monitor is not None:
                self._monitor.stop()
            for trainer in self._trainers:
                trainer.loggers = [logger for logger in trainer.loggers if logger not in self.loggers]
            for logger in self._queued():
                logger.stop(status, interrupts)
        for outbox in (logger.outbox for logger in self._queued()):
            if outbox.lost:
                message = f"{outbox.backend} did not take {outbox.lost} records; they are in {outbox.unsent}"
                if outbox.gone:
                    message += f", but for the last {outbox.gone}, for which there was no room: they are lost"
                warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _queued(self) -> list[Queued]:
        """The loggers that lead somewhere: on other ranks than zero, none."""
        return [logger for logger in self.loggers if isinstance(logger, Queued)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop("success" if error is None else "failed")

    def __repr__(self) -> str:
        state = "stopped" if self.stopped else "active"
        return f"Experiment({self.name!r}, {self.project!r}, {len(self.loggers)} backends, {state})"


def _is_default(logger: EitherLogger, folder: str) -> bool:
    """Whether it is, or equals, the one that Lightning makes where no logger was given."""
    kind = type(logger)
    lightning = kind.__module__.startswith(("lightning.", "pytorch_lightning."))
    default = lightning and kind.__name__ in ("TensorBoardLogger", "CSVLogger") and logger.name == "lightning_logs"
    return default and logger.save_dir == folder


def _number(key: str, value: Any) -> float:
    try:
        value = value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError, TypeError) as error:  # NumPy, PyTorch and JAX differ
        raise TypeError(f"metrics[{key!r}] must be a number or a scalar, got an array of {value.shape}") from error
    if not isinstance(value, Real):
        raise TypeError(f"metrics[{key!r}] must be a number or a scalar, got {value!r}")
    return float(value)
