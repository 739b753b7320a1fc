"""The experiment that is active in this process."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from pydantic import Field
from torch import nn

from mhc_torch.lightning.packages import EitherTrainer
from mhc_torch.lightning.settings import Settings, require, require_writable
from mhc_torch.monitoring.logging import get_logger
from mhc_torch.tracking.backends import BACKENDS, WITH_KEY, WITH_URL, Queued, Run, open_backend
from mhc_torch.tracking.experiment import Experiment
from mhc_torch.tracking.git import git_state
from mhc_torch.tracking.outbox import Interrupts

_active: Experiment | None = None
_tracks_lightning = False


class TrackingConfig(Settings):
    """What an experiment records by itself, and where.

    Args:
        track_lightning: add the experiment's loggers to every Trainer that is made while it is active.
        track_system: log the use of CPU, memory and NVIDIA GPUs.
        track_git: log commit, branch and whether there are changes, as hyperparameters ``git/...``.
        metrics_interval: seconds between two samples of the system.
        save_dir: folder of whatever stays on this machine.
        backend_timeout: seconds after which a backend that has not taken a record counts as hung.
    """

    track_lightning: bool = True
    track_system: bool = True
    track_git: bool = True
    metrics_interval: float = Field(10.0, gt=0)
    save_dir: str = "runs"
    backend_timeout: float = Field(30.0, gt=0)


def start_logging(
    exp_name: str,
    project: str = "mhc",
    backend: str | Sequence[str] = "tensorboard",
    api_key: str | Mapping[str, str] | None = None,
    backend_url: str | Mapping[str, str] | None = None,
    config: TrackingConfig | Mapping[str, Any] | None = None,
) -> Experiment:
    """Start an experiment: from now on Trainers log to it, until :func:`stop_logging`.

    Everything that ``self.log`` sends to a logger, and the hyperparameters that ``save_hyperparameters`` saves, arrive
    with Lightning's own names, steps and reductions. A Trainer that was made before is left alone, and
    warns when it is used; ``attach`` adds it.

    A backend that has credentials (here, or in its own configuration) logs to its server, any other to ``save_dir``.
    Under DDP with one process a device (``strategy="ddp"``, ``torchrun``) rank zero logs, and the others do nothing.

    Args:
        exp_name: name of the run.
        project: what the run belongs to: project, experiment (MLflow) or folder (TensorBoard).
        backend: one or several of "mlflow", "wandb", "tensorboard", "clearml", "comet".
        api_key: of W&B, Comet, or ClearML (``"<access key>:<secret key>"``); by backend where several take one.
        backend_url: of the server, or of MLflow's database; by backend where several take one.
        config: a TrackingConfig or its fields.

    Raises:
        ValueError: an unknown backend or field, a key or URL for a backend that takes none, a ``save_dir`` or a
            database that cannot be written to.
        ImportError: a backend is not installed; the message names the extra to install.
        ConnectionError: a server does not answer.
        RuntimeError: an experiment is active already.
    """
    global _active, _tracks_lightning
    if (active := get_active_experiment()) is not None:
        raise RuntimeError(f"the experiment {active.name!r} is active; stop_logging() ends it")
    if not exp_name or not project:
        raise ValueError(f"exp_name and project must not be empty, got {exp_name!r} and {project!r}")
    backends = [backend] if isinstance(backend, str) else list(backend)
    if not backends or len(set(backends)) < len(backends) or not set(backends) <= BACKENDS.keys():
        raise ValueError(f"backend must be one or several, each once, of {', '.join(BACKENDS)}, got {backend!r}")
    settings = config if isinstance(config, TrackingConfig) else TrackingConfig.model_validate(dict(config or {}))
    keys = _by_backend("api_key", api_key, [name for name in backends if name in WITH_KEY])
    urls = _by_backend("backend_url", backend_url, [name for name in backends if name in WITH_URL])
    for name in backends:
        require(BACKENDS[name][0], name)
    require_writable("save_dir", settings.save_dir)

    if _is_rank_zero():
        runs = {
            name: Run(exp_name, project, Path(settings.save_dir).absolute(), keys.get(name), urls.get(name))
            for name in backends
        }
        experiment = Experiment(exp_name, project, _open(runs, settings.backend_timeout))
    else:
        experiment = Experiment(exp_name, project, [DummyLogger() for _ in backends])
    if settings.track_git and (state := git_state()):
        experiment.log_hyperparams(state)
    if settings.track_system:
        experiment.monitor(settings.metrics_interval)
    if settings.track_lightning:
        _check_entry_point()
        _warn_late_trainers(experiment)
    _active, _tracks_lightning = experiment, settings.track_lightning
    # Flushes where the script ends, or dies of an exception, without stop_logging.
    atexit.register(_stop_at_exit)
    return experiment


def stop_logging() -> None:
    """End the active experiment, see :meth:`Experiment.stop`; without one, do nothing."""
    if _active is not None:
        _active.stop()
    atexit.unregister(_stop_at_exit)


def _stop_at_exit() -> None:
    # The interpreter leaves there what it dies of; in an interactive session, what some line failed with.
    died = getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1")
    if _active is not None:
        _active.stop("failed" if died else "success")


def get_active_experiment() -> Experiment | None:
    """The experiment that was started in this process and not yet stopped."""
    return None if _active is None or _active.stopped or _active.process != os.getpid() else _active


class AttachExperiment(Callback):
    """Adds the loggers of the active experiment to the Trainer in which ``mhc_torch.entry_points`` puts it."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def setup(self, trainer: EitherTrainer, pl_module: nn.Module, stage: str) -> None:
        if trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]  # neither logs
            return
        if os.getpid() != self.process:
            raise RuntimeError(
                "the experiment was started in another process than this one, which trains: use strategy='ddp', "
                "which starts the script again in each process, instead of one that spawns or forks"
            )
        if (experiment := get_active_experiment()) is not None:
            experiment.attach(trainer)
            if stage == "fit":
                experiment.log_hyperparams({"trainer": trainer_settings(trainer)})

    def on_train_start(self, trainer: EitherTrainer, pl_module: nn.Module) -> None:
        experiment = get_active_experiment()
        if experiment is not None and trainer.global_step < experiment.trained_to:
            warnings.warn(
                f"this training starts at step {trainer.global_step}, and {experiment.name!r} has one up "
                f"to step {experiment.trained_to}: their steps overlap; start an experiment for each",
                RuntimeWarning,
                stacklevel=2,
            )

    def on_train_end(self, trainer: EitherTrainer, pl_module: nn.Module) -> None:
        if (experiment := get_active_experiment()) is not None:
            experiment.trained_to = max(experiment.trained_to, trainer.global_step)


class LateTrainer(Callback):
    """In a Trainer that was made before the experiment: says that it is not tracked, when it is used."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def setup(self, trainer: EitherTrainer, pl_module: nn.Module, stage: str) -> None:
        if self.experiment is get_active_experiment() and not set(trainer.loggers) & set(self.experiment.loggers):
            warnings.warn(
                f"this Trainer was made before the experiment {self.experiment.name!r} was started, so it is not "
                "tracked: call start_logging first, or experiment.attach(trainer)",
                RuntimeWarning,
                stacklevel=2,
            )


def _warn_late_trainers(experiment: Experiment) -> None:
    names = ("lightning.pytorch", "pytorch_lightning")
    kinds = tuple(sys.modules[name].Trainer for name in names if hasattr(sys.modules.get(name), "Trainer"))
    for trainer in [found for found in gc.get_objects() if issubclass(type(found), kinds)]:
        trainer.callbacks.append(LateTrainer(experiment))


def attachments() -> list[Callback]:
    """The callbacks for a new Trainer: one while an experiment that tracks Lightning is active."""
    return [AttachExperiment()] if get_active_experiment() is not None and _tracks_lightning else []


def trainer_settings(trainer: EitherTrainer) -> dict[str, Any]:
    """What of a Trainer belongs to the hyperparameters of a run."""
    names = ["max_epochs", "max_steps", "precision", "num_devices", "num_nodes"]
    names += ["accumulate_grad_batches", "gradient_clip_val"]
    settings = {name: getattr(trainer, name) for name in names}
    return settings | {
        "accelerator": type(trainer.accelerator).__name__,
        "strategy": type(trainer.strategy).__name__,
    }


def _open(runs: Mapping[str, Run], timeout: float) -> list[Any]:
    """All backends, or none: where one fails the others are closed again."""
    opened: list[Queued] = []
    try:
        for name, run in runs.items():
            opened.append(open_backend(name, run, timeout))
    except BaseException:
        with Interrupts() as interrupts:
            for logger in opened:
                logger.stop("failed", interrupts)
        raise
    return opened


def _by_backend(argument: str, value: str | Mapping[str, str] | None, takers: list[str]) -> Mapping[str, str]:
    """One value for each backend that takes it; a bare one is for the only one that does."""
    if value is None:
        return {}
    if isinstance(value, str):
        if len(takers) != 1:
            raise ValueError(
                f"{argument}: {len(takers)} of the backends take one ({', '.join(takers)}); give a mapping by backend"
            )
        return {takers[0]: value}
    if unknown := sorted(value.keys() - set(takers)):
        raise ValueError(f"{argument} is given for {unknown}; of the backends of this run {takers} take one")
    return value


def _is_rank_zero() -> bool:
    """By the variables that launchers set, since no process group is there yet."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]) == 0
    ranks = ("NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    return all(int(os.environ.get(name, 0)) == 0 for name in ranks)


def _check_entry_point() -> None:
    found = entry_points(group="lightning.pytorch.callbacks_factory")
    if not any(point.value.startswith("mhc_torch.") for point in found):
        get_logger("mhc.tracking").warning(
            "mhc-jax is not installed in this environment, or an older version is, so that Lightning does not find it: "
            "give Trainers the loggers yourself, Trainer(logger=experiment.loggers), or install it again"
        )
