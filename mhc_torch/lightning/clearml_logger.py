"""A Lightning logger for ClearML, which Lightning does not have."""

from __future__ import annotations

import io
import math
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from mhc_torch.lightning.settings import require, require_writable

if TYPE_CHECKING:
    from clearml import Task
    from PIL.Image import Image

# We log what the user logs, and nothing that ClearML would find by patching other libraries.
_FRAMEWORKS = {
    **{"matplotlib": False, "tensorflow": False, "tensorboard": False, "pytorch": False, "xgboost": False},
    **{"scikit": False, "fastai": False, "lightgbm": False, "hydra": False, "detect_repository": False},
    **{"tfdefines": False, "joblib": False, "megengine": False, "catboost": False, "gradio": False},
}


class ClearMLLogger(Logger):
    """Metrics, hyperparameters and pictures of a ClearML task, with title and series both the metric's whole name.

    ClearML stores 0 in place of a value that is not finite; here it is left out, and said in the task's console log.

    Args:
        project, name: of the task.
        save_dir: where an offline session is kept, as ``save_dir/offline/<id>.zip``; None is ClearML's cache.
        offline: keep everything on this machine. ``clearml-data`` or ``Task.import_offline_session`` uploads it later.

    Raises:
        ImportError: clearml is not installed.
        ValueError: ``save_dir`` cannot be written to.
    """

    def __init__(
        self, project: str = "lightning_logs", name: str = "run", save_dir: str | None = None, offline: bool = False
    ) -> None:
        super().__init__()
        require("clearml", "clearml")
        if save_dir is not None:
            require_writable("save_dir", save_dir)
        self._project, self._name, self._save_dir, self._offline = project, name, save_dir, offline
        self._task: Task | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Task:
        """The ``clearml.Task``, made at first use."""
        if self._task is None:
            self._task = self._start()
        return self._task

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._task.id if self._task is not None else self._name

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        report = self.experiment.get_logger()
        for key, value in metrics.items():
            if math.isfinite(value):
                report.report_scalar(key, key, value=float(value), iteration=step or 0)
            else:
                report.report_text(f"{key} = {value} at step {step}")

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        values = vars(params) if isinstance(params, Namespace) else params
        self.experiment.update_parameters({f"General/{key}": value for key, value in flatten(values).items()})

    @rank_zero_only
    def log_image(self, key: str, images: list[Image], step: int | None = None) -> None:
        """Pictures as they are; ClearML's own ``report_image`` would make lossy ones of them."""
        for number, image in enumerate(images):
            stream = io.BytesIO()
            image.save(stream, format="png")
            stream.seek(0)
            series = key if len(images) == 1 else f"{key}/{number}"
            self.experiment.get_logger().report_media(
                key, series, iteration=step or 0, stream=stream, file_extension="png"
            )

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what was reported. The task goes on: ``close`` ends it."""
        if self._task is not None:
            self._task.flush(wait_for_uploads=True)

    @rank_zero_only
    def close(self, status: str = "success") -> None:
        """End the task, as failed unless ``status`` is "success"."""
        if self._task is None:
            return
        # After a crash, Ctrl-C or sys.exit ClearML's own close does not wait for what was reported.
        self._task.flush(wait_for_uploads=True)
        if status != "success" and not self._offline:
            self._task.mark_failed()
        self._task.close()
        # ClearML leaves its mode and the task there: processes started later would take themselves for parts of it.
        for name in _variables() - self._variables_before:
            del os.environ[name]

    def _start(self) -> Task:
        from clearml import Task
        from clearml.utilities.process.mp import BackgroundMonitor

        # By default ClearML forks a process to report, which deadlocks where JAX has started its threads.
        Task._report_subprocess_enabled = False  # type: ignore[assignment]
        self._variables_before = _variables()
        Task.set_offline(self._offline)
        with _cache_dir(self._save_dir):
            task: Task = Task.init(
                project_name=self._project,
                task_name=self._name,
                reuse_last_task_id=False,
                auto_connect_arg_parser=False,
                auto_connect_frameworks=_FRAMEWORKS,
                auto_resource_monitoring=False,
                auto_connect_streams=False,
            )
            task.get_offline_mode_folder()
        # Offline the reporter is made late and its thread never started: nothing would be written before the end.
        getattr(task, "_reporter", None)
        BackgroundMonitor.start_all(task)
        return task


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by "/"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _variables() -> set[str]:
    return {name for name in os.environ if name.startswith(("CLEARML_", "TRAINS_"))}


@contextmanager
def _cache_dir(folder: str | None) -> Iterator[None]:
    """ClearML takes the folder of offline sessions from the environment only."""
    if folder is None:
        yield
        return
    before = os.environ.get("CLEARML_CACHE_DIR")
    os.environ["CLEARML_CACHE_DIR"] = os.path.abspath(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CLEARML_CACHE_DIR"]
        else:
            os.environ["CLEARML_CACHE_DIR"] = before
