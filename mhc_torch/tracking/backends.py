"""The five backends: Lightning's loggers (and ours for ClearML), each behind an outbox, opened and closed."""

from __future__ import annotations

import netrc
import os
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CometLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from mhc_torch.lightning.clearml_logger import ClearMLLogger, flatten
from mhc_torch.lightning.settings import require
from mhc_torch.monitoring.logging import get_logger
from mhc_torch.monitoring.pictures import send_picture
from mhc_torch.tracking.outbox import Interrupts, Outbox, Refused

if TYPE_CHECKING:
    from PIL.Image import Image

_log = get_logger("mhc.tracking")


@dataclass(frozen=True)
class Run:
    """What a backend needs to know to open a run."""

    name: str
    project: str
    folder: Path
    api_key: str | None
    url: str | None


class Queued:
    """Mixed into a Lightning logger: whatever is logged goes through an outbox, and only ``stop`` ends the run.

    ``experiment`` is the backend's own object, as in any logger of that class; calls to it do not pass the outbox.
    """

    outbox: Outbox
    crashed = False
    # How the backend takes the entries of one call: all or none, or one after the other. Where one is refused, the
    # others must arrive, and none of them twice.
    all_or_none: frozenset[str] = frozenset()
    one_by_one: frozenset[str] = frozenset()

    def open(self, backend: str, unsent: Path, timeout: float) -> None:
        """Start the run, in this thread: what is wrong with the backend is raised here."""
        _ = self.experiment  # type: ignore[attr-defined]
        self.outbox = Outbox(backend, self._send, self.write, unsent, timeout)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self.outbox.inside:  # TensorBoardLogger.log_hyperparams logs a metric
            super().log_metrics(metrics, step)  # type: ignore[misc]
            return
        # Arrays are read now: they may change before they are sent.
        values = {key: _read(value) for key, value in metrics.items()}
        self.outbox.put("log_metrics", {"metrics": values, "step": step})

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        values = vars(params) if isinstance(params, Namespace) else params
        self.outbox.put("log_hyperparams", {"params": dict(values)})

    def log_picture(self, key: str, picture: Image, step: int) -> None:
        self.outbox.put("log_picture", {"key": key, "picture": picture, "step": step})

    def save(self) -> None:
        """Nothing to do: the outbox writes whenever it is empty."""

    def finalize(self, status: str) -> None:
        """The end of one fit or test, not of the run; after a crash, perhaps the last chance to write."""
        self.crashed = status == "failed"
        self.flush()

    def flush(self) -> None:
        """Wait until the backend has all that was logged, or hangs."""
        if not self.outbox.flush():
            _log.warning("%s hangs: not all of its metrics are written", self.outbox.backend)

    def stop(self, status: str, interrupts: Interrupts) -> None:
        """Send what waits and end the run, with status "success" or "failed", which the last training may have."""
        self.outbox.close("close", {"status": "failed" if self.crashed else status}, interrupts)

    def write(self) -> None:
        """Write what the backend holds in memory; in the outbox's thread."""

    def close(self, status: str) -> None:
        """End the run; in the outbox's thread."""
        raise NotImplementedError

    def _send(self, method: str, arguments: dict[str, Any]) -> None:
        """In the outbox's thread."""
        if method == "log_picture":
            send_picture(self, **arguments)
        elif method == "close":
            self.close(**arguments)
        elif method in self.one_by_one:
            self._send_each(method, arguments)
        else:
            try:
                self._send_whole(method, arguments)
            except Exception:
                if method not in self.all_or_none or len(_entries(arguments)[1]) == 1:
                    raise
                self._send_each(method, arguments)

    def _send_each(self, method: str, arguments: dict[str, Any]) -> None:
        field, values = _entries(arguments)
        refused: dict[str, Any] = {}
        for key, value in values.items():
            try:
                self._send_whole(method, arguments | {field: {key: value}})
            except Exception as error:
                refused[key], reason = value, error
        if refused:
            raise Refused(arguments | {field: refused}, reason)

    def _send_whole(self, method: str, arguments: dict[str, Any]) -> None:
        getattr(super(), method)(**arguments)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a tracked experiment cannot move to another process: use strategy='ddp', not a spawned one")


class _TensorBoard(Queued, TensorBoardLogger):
    one_by_one = frozenset({"log_metrics"})

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        # TensorBoard shows one table of a run, so each new one holds all that came before.
        self.hparams.update(vars(params) if isinstance(params, Namespace) else params)
        super().log_hyperparams(self.hparams)

    def write(self) -> None:
        self.experiment.flush()

    def close(self, status: str) -> None:
        TensorBoardLogger.save(self)  # hparams.yaml
        TensorBoardLogger.finalize(self, status)


class _Wandb(Queued, WandbLogger):
    all_or_none = frozenset({"log_metrics", "log_hyperparams"})

    def close(self, status: str) -> None:
        self.experiment.finish(exit_code=0 if status == "success" else 1)


class _MLflow(Queued, MLFlowLogger):  # type: ignore[misc]
    all_or_none = frozenset({"log_metrics", "log_hyperparams"})

    def open(self, backend: str, unsent: Path, timeout: float) -> None:
        self._folder = str(unsent.parents[1])
        self._uri_before = os.environ.get("MLFLOW_TRACKING_URI")
        super().open(backend, unsent, timeout)

    def stop(self, status: str, interrupts: Interrupts) -> None:
        super().stop(status, interrupts)
        # The logger has set it, and the next experiment would go to the database of this one.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if self._uri_before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = self._uri_before

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(flatten(vars(params) if isinstance(params, Namespace) else params))

    def _send_whole(self, method: str, arguments: dict[str, Any]) -> None:
        if method == "log_hyperparams":
            self._params(arguments["params"])
        else:
            super()._send_whole(method, arguments)

    def _params(self, values: Mapping[str, Any]) -> None:
        """Whole values, where Lightning cuts them at 250 characters; a changed one, which MLflow refuses, as a tag."""
        from mlflow.entities import Param

        known = self.experiment.get_run(self.run_id).data.params
        new = [Param(key, str(value)) for key, value in values.items() if key not in known]
        for start in range(0, len(new), 100):  # as many as MLflow takes at once
            self.experiment.log_batch(run_id=self.run_id, params=new[start : start + 100])
        for key, value in values.items():
            if key in known and known[key] != str(value):
                _log.warning("mlflow: %s was %s and cannot change; its new value is a tag", key, known[key])
                self.experiment.set_tag(self.run_id, key, str(value))

    def close(self, status: str) -> None:
        MLFlowLogger.finalize(self, status)

    @property
    def save_dir(self) -> str:
        """Where Lightning puts checkpoints; its own answer for a database is None, the working directory."""
        return self._folder


class _Comet(Queued, CometLogger):
    def open(self, backend: str, unsent: Path, timeout: float) -> None:
        super().open(backend, unsent, timeout)
        # Comet would end the run by itself before `atexit` lets us send what waits.
        if (hook := getattr(self.experiment, "_atexit_hook", None)) is not None:
            hook.disable()

    def _send_whole(self, method: str, arguments: dict[str, Any]) -> None:
        if method == "log_metrics":
            # Lightning takes "epoch" out, and a record of nothing else would be lost.
            metrics, step = arguments["metrics"], arguments["step"]
            self.experiment.log_metrics(metrics, step=step, epoch=metrics.get("epoch"))
        elif method == "log_hyperparams":
            self.experiment.log_parameters(flatten(arguments["params"]))  # Comet joins keys by another sign
        else:
            super()._send_whole(method, arguments)

    def close(self, status: str) -> None:
        if status != "success":
            self.experiment.log_other("status", status)
            # Comet has no public way to say it; this is what its own hook for uncaught exceptions calls.
            if report := getattr(self.experiment, "_report_experiment_error", None):
                report("the run failed", has_crashed=True)
        self.experiment.end()


class _ClearML(Queued, ClearMLLogger):
    one_by_one = frozenset({"log_metrics"})

    def close(self, status: str = "success") -> None:
        ClearMLLogger.close(self, status)


def _tensorboard(run: Run) -> Queued:
    return _TensorBoard(str(run.folder / "tensorboard"), name=os.path.join(run.project, run.name))


def _wandb(run: Run) -> Queued:
    import wandb

    url = run.url or os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    key = run.api_key or os.environ.get("WANDB_API_KEY") or _netrc_password(url)
    offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun") or key is None
    if not offline:
        _reach("wandb", url, "WANDB_MODE=offline")
    # The experiment has its own system metrics, and the console is the user's.
    settings = wandb.Settings(x_disable_stats=True, console="off", quiet=True, base_url=url, api_key=key)
    mode = "offline" if offline else "online"
    return _Wandb(name=run.name, project=run.project, save_dir=str(run.folder), mode=mode, settings=settings)


def _mlflow(run: Run) -> Queued:
    uri = run.url or os.environ.get("MLFLOW_TRACKING_URI")
    artifacts = None
    if uri is None:
        uri = f"sqlite:///{(run.folder / 'mlflow.db').absolute()}"
        artifacts = (run.folder / "mlartifacts").absolute().as_uri()
    elif urlsplit(uri).scheme in ("http", "https"):
        _reach("mlflow", uri, "leave backend_url out")
    if uri.startswith("sqlite:"):
        _require_database(uri)
    return _MLflow(run.project, run_name=run.name, tracking_uri=uri, artifact_location=artifacts)


def _comet(run: Run) -> Queued:
    os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # read when comet_ml is first imported
    import comet_ml

    url = run.url or "https://www.comet.com"
    key: Any = run.api_key or comet_ml.get_config("comet.api_key")
    offline = os.environ.get("COMET_START_ONLINE", "1").lower() in ("0", "false") or not key
    if not offline:
        _reach("comet", url, "COMET_START_ONLINE=0")
    # online=False of Lightning's logger would disable the experiment instead of keeping it here.
    variables = {"COMET_START_ONLINE": "0"} if offline else {"COMET_START_ONLINE": "1"}
    if run.url:
        variables["COMET_URL_OVERRIDE"] = run.url
    silent = {
        **{"log_code": False, "log_graph": False, "auto_param_logging": False, "auto_metric_logging": False},
        **{"auto_output_logging": False, "log_git_metadata": False, "log_git_patch": False},
        **{"log_env_details": False, "parse_args": False},
    }
    with _environment(variables):
        return _Comet(
            api_key=key,
            project=run.project,
            offline_directory=str(run.folder / "comet"),
            name=run.name,
            display_summary_level=0,
            **silent,  # type: ignore[arg-type]
        )


def _clearml(run: Run) -> Queued:
    url = run.url or os.environ.get("CLEARML_API_HOST")
    variables = {"CLEARML_API_HOST": url} if url is not None else {}
    if run.api_key is not None:
        access, found, secret = run.api_key.partition(":")
        if not found:
            raise ValueError("api_key of clearml must be '<access key>:<secret key>', got no ':'")
        variables |= {"CLEARML_API_ACCESS_KEY": access, "CLEARML_API_SECRET_KEY": secret}
    known = run.api_key or os.environ.get("CLEARML_API_ACCESS_KEY") or Path("~/clearml.conf").expanduser().exists()
    offline = os.environ.get("CLEARML_OFFLINE_MODE", "0").lower() in ("1", "true") or not known
    if not offline and url is not None:
        _reach("clearml", url, "CLEARML_OFFLINE_MODE=1")
    logger = _ClearML(run.project, run.name, save_dir=str(run.folder / "clearml"), offline=offline)
    with _environment(variables):
        _ = logger.experiment
    return logger


# Name of the backend (and of the extra): module to import, and how to open it.
BACKENDS: dict[str, tuple[str, Callable[[Run], Queued]]] = {
    "mlflow": ("mlflow", _mlflow),
    "wandb": ("wandb", _wandb),
    "tensorboard": ("tensorboard", _tensorboard),
    "clearml": ("clearml", _clearml),
    "comet": ("comet_ml", _comet),
}
# Those that know keys and servers; the others take none.
WITH_KEY = ("wandb", "clearml", "comet")
WITH_URL = ("mlflow", "wandb", "clearml", "comet")


def open_backend(backend: str, run: Run, timeout: float) -> Queued:
    """Start ``run`` in one of ``BACKENDS``.

    Raises:
        ImportError: its package is missing.
        ConnectionError: its server does not answer.
    """
    module, opener = BACKENDS[backend]
    require(module, backend)
    logger = opener(run)
    unsent = run.folder / "unsent" / f"{run.name.replace(os.sep, '_')}-{backend}-{os.getpid()}.jsonl"
    logger.open(backend, unsent, timeout)
    return logger


def _entries(arguments: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    (field,) = arguments.keys() & {"metrics", "params"}
    return field, arguments[field]


def _read(value: Any) -> Any:
    """A scalar array as a number, anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _reach(backend: str, url: str, otherwise: str) -> None:
    """One clear error now instead of retries during training; any answer of the server will do."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"{backend}: cannot reach {url} ({error}); check backend_url and the network, or stay offline: {otherwise}"
        ) from error


def _require_database(uri: str) -> None:
    """One clear error now, where MLflow would try again for minutes."""
    import sqlite3

    from sqlalchemy.engine import make_url

    path = make_url(uri).database
    try:
        database = sqlite3.connect(path or ":memory:", timeout=10, isolation_level=None)
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
        finally:
            database.close()
    except sqlite3.Error as error:
        raise ValueError(f"backend_url: cannot write to MLflow's database {path} ({error})") from error


def _netrc_password(url: str) -> str | None:
    try:
        found = netrc.netrc().authenticators(urlsplit(url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
