"""mhc_torch.tracking: real backends without a network, and what each of them wrote, read back from its own files."""

import base64
import io
import json
import logging
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import lightning as L
import numpy as np
import psutil
import pytest
import pytorch_lightning
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from mhc_torch import MHCLightningCallback
from mhc_torch.tracking import TrackingConfig, get_active_experiment, start_logging, stop_logging
from mhc_torch.tracking.backends import BACKENDS as BACKENDS_AND_MODULES
from mhc_torch.tracking.git import git_state
from mhc_torch.tracking.outbox import Interrupts, Outbox
from tests.mhc_torch import readers
from tests.mhc_torch.lightning_models import Classifier, loader, trainer

BACKENDS = ["mlflow", "wandb", "tensorboard", "clearml", "comet"]
HEATMAP = "mhc/mixing_weights"
SECRETS = ["WANDB_API_KEY", "COMET_API_KEY", "CLEARML_API_ACCESS_KEY", "CLEARML_API_HOST", "MLFLOW_TRACKING_URI"]


@pytest.fixture(autouse=True, scope="module")
def _no_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMET_INTERNAL_SENTRY_DSN", "")
        for name in SECRETS:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def _one_at_a_time():
    yield
    stop_logging()


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory, mlflow_database):
    """Makes folders with an empty MLflow database in them."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("runs")
        shutil.copy(mlflow_database, folder)
        return folder

    return make


def quiet(folder, **fields):
    return {"save_dir": str(folder), "track_system": False, "track_git": False} | fields


def events(folder, name="n", project="p"):
    return folder / "tensorboard" / project / name / "version_0"


def read(folder, experiment):
    """Scalars and pictures, and hyperparameters, by backend."""
    assert not [logger.outbox.unsent.read_text() for logger in experiment.loggers if logger.outbox.lost]
    uri = f"sqlite:///{folder}/mlflow.db"
    run_ids = [logger.run_id for logger in experiment.loggers if hasattr(logger, "run_id")]
    log_dir = events(folder, experiment.name, experiment.project)
    written, parameters = {}, {}
    for backend in BACKENDS:
        match backend:
            case "mlflow" if run_ids:
                written[backend] = readers.mlflow_store(uri, run_ids[0], folder)
                parameters[backend] = readers.mlflow_parameters(uri, run_ids[0])
            case "wandb" if (folder / "wandb").exists():
                written[backend] = readers.wandb_offline(folder, HEATMAP)
                parameters[backend] = readers.wandb_parameters(folder)
            case "tensorboard" if log_dir.exists():
                written[backend] = readers.tensorboard(log_dir)
                parameters[backend] = readers.tensorboard_parameters(log_dir)
            case "clearml" if (folder / "clearml").exists():
                written[backend] = readers.clearml_session(folder / "clearml", HEATMAP)
                parameters[backend] = readers.clearml_parameters(folder / "clearml")
            case "comet" if (folder / "comet").exists():
                written[backend] = readers.comet_archive(folder / "comet", HEATMAP)
                parameters[backend] = readers.comet_parameters(folder / "comet")
    return written, parameters


def logs_everything(base):
    """A module that logs in every way there is, on the LightningModule of either package."""

    class Module(base):
        def __init__(self, width: int = 6, note: str = "x" * 400):
            super().__init__()
            self.save_hyperparameters()
            self.net = Classifier().net

        def training_step(self, batch, batch_idx):
            loss = self.net(batch[0]).square().mean()
            self.log("train/loss", loss)
            self.log("train/both", loss * 2, on_step=True, on_epoch=True)
            self.log("train/epoch", torch.tensor(float(batch_idx)), on_step=False, on_epoch=True, reduce_fx="max")
            self.log_dict({"train/a": batch_idx, "train/b": loss.detach() - 1})
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.net(batch[0]).square().mean())

        def test_step(self, batch, batch_idx):
            self.log("test/loss", self.net(batch[0]).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module()


@pytest.fixture(scope="module")
def run(new_folder):
    """One experiment in all backends: fit and test, a CSVLogger beside it as the witness of what Lightning logs."""
    folder = new_folder()
    config = {"save_dir": str(folder), "metrics_interval": 0.2}
    experiment = start_logging("first run", "mhc tests", BACKENDS, config=config)
    callbacks = [MHCLightningCallback(log_gradients=True, log_interval=2)]
    settings = {"logger": CSVLogger(folder, "csv", ""), "max_epochs": 2, "log_every_n_steps": 2, "callbacks": callbacks}
    module, fitted = logs_everything(L.LightningModule), trainer(**settings)
    fitted.fit(module, loader(4), loader(2))
    fitted.test(module, loader(2), verbose=False)
    names = [type(logger).__name__ for logger in fitted.loggers]
    stop_logging()
    left = list(fitted.loggers)
    witness, _ = readers.csv_file(folder / "csv", HEATMAP)
    return experiment, *read(folder, experiment), witness, names, left


def test_real_lightning_loggers_join_the_trainer_and_leave_at_the_end(run):
    _, _, _, _, names, left = run
    assert [name.strip("_") for name in names] == ["CSVLogger", "MLflow", "Wandb", "TensorBoard", "ClearML", "Comet"]
    assert [type(logger) for logger in left] == [CSVLogger]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_metric_has_the_name_the_steps_and_the_values_that_lightning_gives_it(run, backend):
    _, written, _, witness, *_ = run
    scalars, _ = written[backend]
    assert {"train/loss", "train/both_step", "train/both_epoch", "train/epoch", "test/loss", "epoch"} <= witness.keys()
    for key, series in witness.items():
        assert scalars[key].keys() == series.keys(), key
        assert list(scalars[key].values()) == pytest.approx(list(series.values()), rel=1e-6), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_logged_that_lightning_does_not(run, backend):
    _, written, _, witness, *_ = run
    of_backends = ("system/", "_", HEATMAP, "hp_metric", "trainer/global_step")
    assert {key for key in written[backend][0] if not key.startswith(of_backends)} == witness.keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hyperparameters_of_module_and_trainer_and_git(run, backend):
    found = run[2][backend]
    assert int(found["width"]) == 6
    assert found["note"] == "x" * 400
    assert int(found["trainer/max_epochs"]) == 2
    assert found["trainer/precision"] == "32-true"
    # The values have a test of their own; this repository may get a commit while its tests run.
    assert {name for name in found if name.startswith("git/")} == git_state().keys()
    assert len(found.get("git/commit", "x" * 40)) == 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_system_metrics_count_their_samples(run, backend):
    scalars, _ = run[1][backend]
    for key in ("system/cpu_percent", "system/memory_percent", "system/process_memory_mib"):
        steps = sorted(scalars[key])
        assert steps == list(range(len(steps)))
    memory = max(scalars["system/process_memory_mib"].values())
    assert 0.1 < memory * 2**20 / psutil.Process().memory_info().rss < 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dashboard_comes_with_its_pictures(run, backend):
    _, pictures = run[1][backend]
    assert set(pictures) == {0, 2, 4, 6}
    np.testing.assert_array_equal(pictures[4], run[1]["tensorboard"][1][4])


def test_pytorch_lightning_is_tracked_too(new_folder):
    folder = new_folder()
    experiment = start_logging("pl", "p", ["tensorboard", "clearml"], config=quiet(folder))
    csv = pytorch_lightning.loggers.CSVLogger(folder, "csv", "")
    brief = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fitted = pytorch_lightning.Trainer(accelerator="cpu", max_epochs=1, logger=csv, log_every_n_steps=1, **brief)
    fitted.fit(logs_everything(pytorch_lightning.LightningModule), loader(3), loader(1))
    stop_logging()
    witness, _ = readers.csv_file(folder / "csv", HEATMAP)
    for scalars, _ in read(folder, experiment)[0].values():
        assert scalars.keys() - {"hp_metric"} == witness.keys()
        for key, series in witness.items():
            assert scalars[key] == pytest.approx(series, rel=1e-6)


segments = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,4}", fullmatch=True)
names = st.lists(segments, min_size=1, max_size=3).map("/".join).filter(lambda name: name != "epoch")
records = st.lists(
    st.dictionaries(names, st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), min_size=1
)


# Failures are not made smaller, since every try starts five backends.
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
@given(metrics=records, first=st.integers(0, 10**6))
def test_nothing_is_lost_at_stop(new_folder, metrics, first):
    folder = new_folder()
    expected: readers.Scalars = {}
    with start_logging("n", "p", BACKENDS, config=quiet(folder)) as experiment:
        for step, values in enumerate(metrics, start=first):
            experiment.log_metrics(values, step)
            for key, value in values.items():
                expected.setdefault(key, {})[step] = value
    for backend, (scalars, _) in read(folder, experiment)[0].items():
        # W&B counts rows and time in keys of its own; names here begin with no underscore.
        own = ("trainer/global_step", "_")
        found = {key: series for key, series in scalars.items() if not key.startswith(own)}
        assert found == expected, backend


def test_numbers_of_every_kind_arrive(tmp_path):
    with start_logging("n", "p", "tensorboard", config=quiet(tmp_path)) as experiment:
        values = {"python": 1, "torch": torch.tensor(2.0), "numpy": np.float32(3), "jax": jnp.float32(4), "bool": True}
        experiment.log_metrics(values, jnp.int32(7))
    scalars, _ = readers.tensorboard(events(tmp_path))
    assert scalars == {"python": {7: 1}, "torch": {7: 2}, "numpy": {7: 3}, "jax": {7: 4}, "bool": {7: 1}}


@pytest.mark.parametrize("value", ["high", None, 1j, torch.ones(2), np.ones(2), jnp.ones(2), [1.0]])
def test_what_is_no_number_is_refused_by_name(tmp_path, value):
    with (
        start_logging("n", "p", "tensorboard", config=quiet(tmp_path)) as experiment,
        pytest.raises(TypeError, match=r"metrics\['loss'\] must be a number"),
    ):
        experiment.log_metrics({"loss": value}, 0)


def test_values_that_are_not_finite_are_not_changed(new_folder):
    folder = new_folder()
    with start_logging("n", "p", ["tensorboard", "wandb", "clearml"], config=quiet(folder)) as experiment:
        experiment.log_metrics({"a": math.nan, "b": math.inf, "c": 1.0}, 3)
    written, _ = read(folder, experiment)
    assert math.isnan(written["tensorboard"][0]["a"][3])
    assert written["tensorboard"][0]["b"] == {3: math.inf}
    # ClearML would write 0; its log says what was left out.
    assert written["clearml"][0].keys() == {"c"}


def test_a_crash_still_writes_and_closes(new_folder):
    folder = new_folder()

    class Crashes(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise ZeroDivisionError("boom")

    experiment = start_logging("n", "p", ["tensorboard", "mlflow"], config=quiet(folder))
    with pytest.raises(ZeroDivisionError, match="boom"):
        trainer(max_epochs=3).fit(Crashes(), loader(4))
    # Written before anybody stopped the experiment.
    assert {0, 1} <= readers.tensorboard(events(folder))[0]["train_loss"].keys()
    stop_logging()
    for scalars, _ in read(folder, experiment)[0].values():
        assert {0, 1} <= scalars["train_loss"].keys()
    assert experiment.loggers[1].experiment.get_run(experiment.loggers[1].run_id).info.status == "FAILED"
    assert get_active_experiment() is None


def test_an_exception_in_a_block_ends_the_run_as_failed(new_folder):
    experiment = start_logging("n", "p", "mlflow", config=quiet(new_folder()))

    def block():
        with experiment:
            experiment.log_metrics({"loss": 1}, 0)
            raise KeyError

    with pytest.raises(KeyError):
        block()
    run = experiment.loggers[0].experiment.get_run(experiment.loggers[0].run_id)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"loss": 1}


def test_a_script_that_dies_writes_too(tmp_path):
    script = """
import sys
import threading
from mhc_torch.tracking import start_logging
experiment = start_logging("n", "p", "tensorboard", config={"save_dir": sys.argv[1], "track_git": False})
for step in range(50):
    experiment.log_metrics({"loss": step}, step)
raise SystemExit("out of ideas")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "out of ideas" in done.stderr
    scalars, _ = readers.tensorboard(events(tmp_path))
    assert scalars["loss"] == {step: step for step in range(50)}
    assert "system/cpu_percent" in scalars


def test_a_backend_that_hangs_neither_stops_training_nor_is_silent(new_folder, caplog):
    folder = new_folder()
    experiment = start_logging("n", "p", ["mlflow", "clearml"], config=quiet(folder, backend_timeout=0.3))
    # Another program holds MLflow's database, for ever as far as this one can tell.
    other = sqlite3.connect(folder / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        for step in range(5):
            experiment.log_metrics({"loss": step}, step)
        time.sleep(0.5)
        with caplog.at_level(logging.WARNING):
            fitted = trainer(max_epochs=1)
            fitted.fit(Classifier(), loader(2))
        assert fitted.global_step == 2
        assert "mlflow has taken nothing for" in caplog.text
        with pytest.warns(RuntimeWarning, match=r"mlflow did not take \d+ records; they are in .*n-mlflow"):
            stop_logging()
    finally:
        other.close()
    unsent = [json.loads(line) for line in experiment.loggers[0].outbox.unsent.read_text().splitlines()]
    assert [record["metrics"]["loss"] for record in unsent if "loss" in record.get("metrics", {})] == list(range(5))
    assert [record["step"] for record in unsent if "train_loss" in record.get("metrics", {})] == [0, 1]
    scalars, _ = readers.clearml_session(folder / "clearml", HEATMAP)
    assert scalars["loss"] == {step: step for step in range(5)}
    assert scalars["train_loss"].keys() == {0, 1}


def test_a_backend_that_refuses_a_record_gets_the_others(new_folder, caplog):
    folder = new_folder()
    experiment = start_logging("n", "p", "mlflow", config=quiet(folder))
    for name in ("good", "../bad", "fine"):  # MLflow takes no such path for a name
        experiment.log_metrics({name: 1.0}, 0)
    with pytest.warns(RuntimeWarning, match="mlflow did not take 1 records"):
        stop_logging()
    assert "mlflow: refused a record" in caplog.text
    logger = experiment.loggers[0]
    scalars, _ = readers.mlflow_store(f"sqlite:///{folder}/mlflow.db", logger.run_id, folder)
    assert scalars.keys() == {"good", "fine"}
    assert '"../bad": 1.0' in logger.outbox.unsent.read_text()


def test_records_keep_their_order_and_come_once():
    taken = []
    outbox = Outbox("list", lambda method, arguments: taken.append(arguments["i"]), lambda: None, Path("none"), 30)
    for i in range(2000):
        outbox.put("log", {"i": i})
    outbox.close("close", {"i": "end"}, Interrupts())
    assert taken == [*range(2000), "end"]
    with pytest.raises(RuntimeError, match="has been stopped"):
        outbox.put("log", {"i": 0})


def test_one_experiment_at_a_time_and_stopping_twice_is_fine(tmp_path):
    first = start_logging("a", "p", "tensorboard", config=quiet(tmp_path))
    assert get_active_experiment() is first
    with pytest.raises(RuntimeError, match=r"'a' is active; stop_logging\(\) ends it"):
        start_logging("b", "p", "tensorboard", config=quiet(tmp_path))
    stop_logging()
    stop_logging()
    assert first.stopped
    assert get_active_experiment() is None
    with pytest.raises(RuntimeError, match="has been stopped"):
        first.log_metrics({"x": 1}, 0)


def test_trainers_are_left_alone_when_asked_or_when_nothing_is_active(tmp_path):
    assert not [c for c in trainer().callbacks if "Attach" in type(c).__name__]
    experiment = start_logging("a", "p", "tensorboard", config=quiet(tmp_path, track_lightning=False))
    fitted = trainer()
    fitted.fit(Classifier(), loader(1))
    assert fitted.loggers == []
    explicit = trainer(logger=experiment.loggers)
    explicit.fit(Classifier(), loader(1))
    stop_logging()
    assert "train_loss" in readers.tensorboard(events(tmp_path, "a"))[0]


def test_the_same_trainer_moves_to_the_next_experiment(tmp_path):
    model = Classifier()
    start_logging("a", "p", "tensorboard", config=quiet(tmp_path))
    fitted = trainer()
    fitted.fit(model, loader(1))
    stop_logging()
    second = start_logging("b", "p", "tensorboard", config=quiet(tmp_path))
    fitted.fit_loop.max_epochs = 2
    fitted.fit(model, loader(1))
    assert fitted.loggers == second.loggers
    stop_logging()
    assert readers.tensorboard(events(tmp_path, "a"))[0]["train_loss"].keys() == {0}
    assert readers.tensorboard(events(tmp_path, "b"))[0]["train_loss"].keys() == {1}


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_other_ranks_log_nothing(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with start_logging("n", "p", ["tensorboard", "mlflow"], config={"save_dir": str(tmp_path)}) as experiment:
        experiment.log_metrics({"loss": 1.0}, 0)
        experiment.log_hyperparams({"lr": 0.1})
        experiment.flush()
        assert len(experiment.loggers) == 2
    assert list(tmp_path.iterdir()) == []


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.com", "-c", "init.defaultBranch=trunk"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_git_state_from_no_repository_to_a_detached_head(tmp_path):
    assert git_state(tmp_path) == {}
    git(tmp_path, "init")
    assert git_state(tmp_path) == {"git/branch": "trunk", "git/dirty": False}
    (tmp_path / "file").write_text("one")
    assert git_state(tmp_path)["git/dirty"] is True
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    state = git_state(tmp_path)
    assert state.keys() == {"git/commit", "git/branch", "git/dirty"}
    assert len(state["git/commit"]) == 40
    assert state["git/dirty"] is False
    git(tmp_path, "checkout", "--detach")
    assert git_state(tmp_path) == {"git/commit": state["git/commit"], "git/dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path)["git/dirty"] is True


def test_without_git_there_is_no_state(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == {}


DEAD = "http://127.0.0.1:9"  # the port "discard", where nobody listens


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "mlfow"}, ValueError, "one or several, each once, of mlflow, wandb.*got 'mlfow'"),
        ({"backend": ["mlflow", "mlflow"]}, ValueError, "each once"),
        ({"backend": []}, ValueError, "one or several"),
        ({"exp_name": ""}, ValueError, "exp_name and project must not be empty"),
        ({"config": {"metric_interval": 1}}, ValueError, "metric_interval"),
        ({"config": {"metrics_interval": 0}}, ValueError, "metrics_interval"),
        ({"backend": "tensorboard", "api_key": "k"}, ValueError, "api_key: 0 of the backends take one"),
        ({"backend": ["wandb", "comet"], "api_key": "k"}, ValueError, r"api_key: 2 .*\(wandb, comet\); give a mapping"),
        ({"backend": "wandb", "api_key": {"comet": "k"}}, ValueError, r"api_key is given for \['comet'\]"),
        ({"backend": "clearml", "api_key": "k"}, ValueError, "<access key>:<secret key>"),
        ({"backend": "mlflow", "backend_url": DEAD}, ConnectionError, f"mlflow: cannot reach {DEAD}"),
        ({"backend": "wandb", "api_key": "k" * 40, "backend_url": DEAD}, ConnectionError, "WANDB_MODE=offline"),
        ({"backend": "comet", "api_key": "k", "backend_url": DEAD}, ConnectionError, "COMET_START_ONLINE=0"),
        ({"backend": "clearml", "api_key": "k:s", "backend_url": DEAD}, ConnectionError, "CLEARML_OFFLINE_MODE=1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_training(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    given = {"exp_name": "n", "project": "p"} | arguments
    given["config"] = given.get("config", quiet(tmp_path))
    with pytest.raises(error, match=message):
        start_logging(**given)
    assert get_active_experiment() is None


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="save_dir: cannot write to"):
        start_logging("n", "p", "tensorboard", config=TrackingConfig(save_dir=str(tmp_path / "file" / "runs")))


def test_a_missing_package_names_its_extra(tmp_path):
    packages = {backend: module for backend, (module, _) in BACKENDS_AND_MODULES.items()}
    code = f"""
import sys
import threading
import lightning.pytorch, mhc_torch.tracking
for backend, module in {packages}.items():
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        del sys.modules[name]
    sys.modules[module] = None
    try:
        mhc_torch.tracking.start_logging("n", "p", backend)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    for line, backend in zip(done.stdout.splitlines(), packages, strict=True):
        assert f"pip install 'mhc-jax[{backend}]'" in line


def test_without_lightning_the_extra_is_named_too():
    code = "import sys; sys.modules['lightning'] = None; import mhc_torch.tracking"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'mhc-jax[lightning]'" in done.stderr


@pytest.mark.usefixtures("unchecked")  # 200000 calls, and the backend would be left behind after 60 s
def test_what_a_hung_backend_does_not_take_waits_on_disk_and_arrives_in_order(tmp_path):
    taken, free = [], threading.Event()

    def send(method, arguments):
        free.wait()
        taken.append(arguments)

    outbox = Outbox("slow", send, lambda: None, tmp_path / "unsent" / "n.jsonl", 60)
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    outbox.put("log_picture", {"key": "k", "picture": picture, "step": 0})
    before = psutil.Process().memory_info().rss
    for step in range(200_000):
        outbox.put("log_metrics", {"metrics": {"loss": step / 3, "nan": math.nan}, "step": step})
    outbox.put("log_hyperparams", {"params": {"pair": (1, 2)}})  # which JSON would make a list
    outbox.put("log_picture", {"key": "k", "picture": picture, "step": 1})
    assert psutil.Process().memory_info().rss - before < 50 * 2**20
    free.set()
    outbox.close("close", {}, Interrupts())
    assert [arguments["step"] for arguments in taken[1:200_001]] == list(range(200_000))
    assert all(arguments["metrics"]["loss"] == arguments["step"] / 3 for arguments in taken[1:200_001])
    assert taken[200_001] == {"params": {"pair": (1, 2)}}
    assert taken[200_002]["picture"].tobytes() == picture.tobytes()
    assert list((tmp_path / "unsent").iterdir()) == []


def test_what_was_sent_is_not_kept_where_writing_fails(tmp_path):
    def idle():
        raise OSError("no room")

    outbox = Outbox("full", lambda method, arguments: None, idle, tmp_path / "n.jsonl", 30)
    outbox.put("log", {"i": 0})
    assert outbox.flush()
    outbox.close("close", {}, Interrupts())
    assert outbox.lost == 0
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_are_not_sent_are_kept_whole(tmp_path):
    def send(method, arguments):
        raise ValueError("no")

    outbox = Outbox("b", send, lambda: None, tmp_path / "n.jsonl", 30)
    picture = Image.effect_noise((8, 8), 50)
    outbox.put("log_picture", {"key": "k", "picture": picture, "step": 0})
    outbox.close("close", {}, Interrupts())
    kept = json.loads((tmp_path / "n.jsonl").read_text())
    assert Image.open(io.BytesIO(base64.b64decode(kept["picture"]))).tobytes() == picture.tobytes()


def run_script(folder, script, variables=None):
    """A script of its own, with `folder` as sys.argv[1] and the working directory."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | (variables or {})
    command = [sys.executable, "-c", "import os, sys, time\n" + script, str(folder)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


START = """
from mhc_torch.tracking import start_logging, stop_logging
def start(*backends, **config):
    config = {"save_dir": sys.argv[1], "track_git": False, "track_system": False} | config
    return start_logging("n", "p", list(backends), config=config)
"""


def test_ctrl_c_in_the_last_flush_sends_or_keeps_everything_once(new_folder):
    folder = new_folder()
    script = (
        START
        + """
experiment = start("mlflow", backend_timeout=60)
for step in range(5000):
    experiment.log_metrics({"loss": step}, step)
print("stopping", experiment.loggers[0].run_id, flush=True)
stop_logging()
"""
    )
    process = run_script(folder, script)
    run_id = process.stdout.readline().split()[1]
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    (file,) = (folder / "unsent").iterdir()
    kept = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    scalars, _ = readers.mlflow_store(f"sqlite:///{folder}/mlflow.db", run_id, folder)
    assert len(kept) > 100, "it was all sent before it was interrupted"
    assert sorted(scalars["loss"]) + kept == list(range(5000))


def test_a_forked_child_says_so_and_ends(tmp_path):
    script = (
        START
        + """
experiment = start("tensorboard")
experiment.log_metrics({"loss": 0.0}, 0)
if (child := os.fork()) == 0:
    try:
        experiment.log_metrics({"loss": 1.0}, 1)
    except RuntimeError as error:
        print(error, flush=True)
    sys.exit(0)
os.waitpid(child, 0)
experiment.log_metrics({"loss": 2.0}, 2)
"""
    )
    process = run_script(tmp_path, script)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "is a fork of it, in which nothing can be logged" in output, errors
    assert readers.tensorboard(events(tmp_path))[0]["loss"] == {0: 0.0, 2: 2.0}


def test_a_full_disk_costs_what_has_no_room_and_is_said(new_folder):
    folder = new_folder()
    script = (
        START
        + """
import resource
experiment = start("mlflow")
experiment.log_metrics({"before": 1.0}, 0)
experiment.flush()
limit = os.path.getsize(sys.argv[1] + "/mlflow.db") + 2**20
def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
for step in range(3):
    room(0)  # for no file at all
    experiment.log_metrics({"../refused": 1.0}, step)
    experiment.flush()
room(resource.RLIM_INFINITY)
experiment.log_metrics({"after": 1.0}, 0)
print(experiment.loggers[0].run_id)
"""
    )
    process = run_script(folder, script)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    scalars, _ = readers.mlflow_store(f"sqlite:///{folder}/mlflow.db", output.strip(), folder)
    assert scalars.keys() == {"before", "after"}, errors
    (file,) = (folder / "unsent").iterdir()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]
    assert "records wait in memory" in errors


def test_one_refused_name_costs_only_itself(new_folder, caplog):
    folder = new_folder()
    experiment = start_logging("n", "p", "mlflow", config=quiet(folder))
    experiment.log_hyperparams({"good": 1, "bad?*": 2, "fine": {"deep": 3}})
    experiment.log_metrics({"good": 1.0, "../bad": 2.0, "fine": 3.0}, 0)
    with pytest.warns(RuntimeWarning, match="mlflow did not take 2 records"):
        stop_logging()
    logger = experiment.loggers[0]
    uri = f"sqlite:///{folder}/mlflow.db"
    assert readers.mlflow_parameters(uri, logger.run_id) == {"good": "1", "fine/deep": "3"}
    assert readers.mlflow_store(uri, logger.run_id, folder)[0] == {"good": {0: 1.0}, "fine": {0: 3.0}}
    kept = [json.loads(line) for line in logger.outbox.unsent.read_text().splitlines()]
    assert [(record.get("params"), record.get("metrics")) for record in kept] == [
        ({"bad?*": 2}, None),
        (None, {"../bad": 2.0}),
    ]


@pytest.mark.parametrize("end", ["raise ZeroDivisionError('boom')", "sys.exit(1)", "raise KeyboardInterrupt", "pass"])
def test_however_a_script_ends_every_backend_has_its_records(new_folder, end):
    folder = new_folder()
    script = (
        START
        + f"""
experiment = start("mlflow", "clearml", "comet")
for step in range(100):
    experiment.log_metrics({{"loss": step}}, step)
print("the run", experiment.loggers[0].run_id, flush=True)
{end}
"""
    )
    output, errors = run_script(folder, script).communicate(timeout=120)
    (run_id,) = [line.split()[2] for line in output.splitlines() if line.startswith("the run ")]
    expected = {step: step for step in range(100)}
    assert readers.mlflow_store(f"sqlite:///{folder}/mlflow.db", run_id, folder)[0]["loss"] == expected, errors
    assert readers.clearml_session(folder / "clearml", HEATMAP)[0]["loss"] == expected, errors
    assert readers.comet_archive(folder / "comet", HEATMAP)[0]["loss"] == expected, errors
    if "exit" not in end:  # its status is not to be had at exit
        failed = "raise" in end
        assert readers.mlflow_status(f"sqlite:///{folder}/mlflow.db", run_id) == ("FAILED" if failed else "FINISHED")
        assert readers.comet_failed(folder / "comet") == failed


def test_a_failed_run_is_failed_in_comet(tmp_path):
    experiment = start_logging("n", "p", "comet", config=quiet(tmp_path))
    experiment.stop("failed")
    assert readers.comet_failed(tmp_path / "comet")


def test_a_database_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"backend_url: cannot write to MLflow's database .*/folder"):
        start_logging("n", "p", "mlflow", backend_url=f"sqlite:///{tmp_path}/folder", config=quiet(tmp_path))


def test_checkpoints_lie_in_the_folder_of_the_experiment(new_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = new_folder()
    start_logging("n", "p", "mlflow", config=quiet(folder))
    trainer(enable_checkpointing=True).fit(Classifier(), loader(1))
    stop_logging()
    assert list(tmp_path.iterdir()) == []
    assert len(list(folder.glob("*/*/checkpoints/*.ckpt"))) == 1


def test_a_trainer_that_was_made_too_early_says_so(tmp_path):
    early = trainer()
    start_logging("a", "p", "tensorboard", config=quiet(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"made before the experiment 'a' .* experiment.attach\(trainer\)"):
        early.fit(Classifier(), loader(1))
    attached = trainer()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this Trainer was made before")
        attached.fit(Classifier(), loader(1))


DRIVER = """
// Stands for the driver of a GPU that knows its memory and not its utilization, as in MIG mode.
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { *d = (void *)1; return 0; }
int nvmlDeviceGetUtilizationRates(void *d, void *u) { return 3; }  // NVML_ERROR_NOT_SUPPORTED
int nvmlDeviceGetMemoryInfo(void *d, Memory *m) { m->total = m->free = m->used = 7ull << 20; return 0; }
const char *nvmlErrorString(int e) { return "Not Supported"; }
"""


def test_a_gpu_that_does_not_know_one_query_is_asked_the_others(tmp_path):
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    script = (
        START
        + """
with start("tensorboard", track_system=True, metrics_interval=0.1) as experiment:
    time.sleep(0.5)
"""
    )
    environment = {"LD_LIBRARY_PATH": str(tmp_path)}
    _, errors = run_script(tmp_path, script, variables=environment).communicate(timeout=120)
    scalars = readers.tensorboard(events(tmp_path))[0]
    assert len(scalars["system/cpu_percent"]) > 1, errors
    assert set(scalars["system/gpu_0/memory_used_mib"].values()) == {7}
    assert "system/gpu_0/utilization_percent" not in scalars
    assert errors.count("no system metric gpu_0/utilization_percent") == 1


def test_the_logger_that_lightning_makes_by_itself_comes_last(tmp_path):
    experiment = start_logging("a", "p", "tensorboard", config=quiet(tmp_path / "runs"))
    fitted = trainer(logger=True, default_root_dir=str(tmp_path))
    fitted.fit(Classifier(), loader(1))
    assert fitted.logger is experiment.loggers[0]
    assert len(fitted.loggers) == 2


def test_trainings_whose_steps_overlap_are_said(tmp_path):
    start_logging("a", "p", "tensorboard", config=quiet(tmp_path))
    first = trainer()
    first.fit(Classifier(), loader(2))
    first.fit_loop.max_epochs = 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this training starts")
        first.fit(Classifier(), loader(2))  # goes on
    with pytest.warns(RuntimeWarning, match="starts at step 0, .* up to step 4: their steps overlap"):
        trainer().fit(Classifier(), loader(1))
