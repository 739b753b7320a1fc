"""Every example of "PyTorch Lightning Integration" (of Tracelet), word for word, runs with `mhc_torch.tracking`.

Filled in is only what the document leaves open: models, data, metrics, an end to training. GPUs are CPUs here.
"""
# The documents have a style of their own.

import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

import mhc_torch.tracking as tracelet
from tests.mhc_torch import readers
from tests.mhc_torch.lightning_models import Classifier, loader


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    tracelet.stop_logging()


BRIEF = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


class Model(pl.LightningModule):
    """What every example needs and none shows."""

    learning_rate, batch_size = 0.1, 4

    def __init__(self):
        super().__init__()
        self.net = Classifier().net

    def forward(self, x):
        return self.net(x)

    def compute_loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def compute_accuracy(self, batch):
        return (self(batch[0]).argmax(-1) == batch[1]).float().mean()

    def compute_custom_metric(self, predictions, batch):
        return predictions.abs().max()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.compute_loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Logging(Model):
    def training_step(self, batch, batch_idx):
        loss = self.compute_loss(batch)
        self.log("train/loss", loss)
        return loss


def fit(model, **settings):
    settings = BRIEF | {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | settings
    trainer = Trainer(**settings)
    trainer.fit(model, loader(3), loader(2))
    return trainer


def tracked(experiment):
    """The scalars that the experiment's TensorBoard files hold."""
    tracelet.stop_logging()
    return readers.tensorboard(Path("runs/tensorboard", experiment.project, experiment.name, "version_0"))[0]


@pytest.fixture
def _database(tmp_path, mlflow_database):
    (tmp_path / "runs").mkdir()
    shutil.copy(mlflow_database, tmp_path / "runs")


@pytest.mark.usefixtures("_database")
def test_basic_usage(tmp_path):
    train_dataloader, val_dataloader = loader(3), loader(2)
    # fmt: off
    # Start Tracelet before creating trainer
    tracelet.start_logging(
        exp_name="lightning_experiment",
        project="my_project",
        backend="mlflow"
    )
    # fmt: on
    (logger,) = tracelet.get_active_experiment().loggers

    # fmt: off
    # Define your LightningModule as usual
    class MyModel(Model):
        def training_step(self, batch, batch_idx):
            loss = self.compute_loss(batch)

            # All these metrics are automatically captured by Tracelet
            self.log('train/loss', loss)
            self.log('train/accuracy', self.compute_accuracy(batch))

            return loss

        def validation_step(self, batch, batch_idx):
            val_loss = self.compute_loss(batch)
            val_acc = self.compute_accuracy(batch)

            # Validation metrics are also captured
            self.log('val/loss', val_loss)
            self.log('val/accuracy', val_acc)

    # Train your model - metrics automatically tracked
    model = MyModel()
    trainer = Trainer(max_epochs=10, **BRIEF)
    trainer.fit(model, train_dataloader, val_dataloader)

    # Stop tracking
    tracelet.stop_logging()
    # fmt: on
    scalars, _ = readers.mlflow_store(f"sqlite:///{tmp_path}/runs/mlflow.db", logger.run_id, tmp_path)
    for key in ("train/loss", "train/accuracy"):
        assert scalars[key].keys() == set(range(30))
    for key in ("val/loss", "val/accuracy"):
        assert scalars[key].keys() == {3 * epoch - 1 for epoch in range(1, 11)}
    assert {"system/cpu_percent", "system/memory_percent"} <= scalars.keys()


@pytest.mark.usefixtures("_database")
def test_advanced_configuration(tmp_path):
    # fmt: off
    # Configure Lightning-specific tracking
    tracelet.start_logging(
        exp_name="advanced_lightning",
        backend=["mlflow", "wandb"],  # Multi-backend logging
        config={
            "track_lightning": True,        # Enable Lightning integration
            "track_system": True,           # Monitor system resources
            "track_git": True,              # Track git information
            "metrics_interval": 10.0,       # System metrics every 10 seconds
        }
    )
    # fmt: on
    mlflow, _ = tracelet.get_active_experiment().loggers
    fit(Logging())
    tracelet.stop_logging()
    ours, _ = readers.mlflow_store(f"sqlite:///{tmp_path}/runs/mlflow.db", mlflow.run_id, tmp_path)
    theirs, _ = readers.wandb_offline(tmp_path / "runs", "")
    assert ours["train/loss"] == theirs["train/loss"]
    assert "system/cpu_percent" in ours
    assert "system/cpu_percent" in theirs


def test_metric_naming():
    accuracy, f1 = 0.5, 0.25

    class Named(Model):
        # fmt: off
        def training_step(self, batch, batch_idx):
            loss = self.compute_loss(batch)
            # Good: Hierarchical naming
            self.log('train/loss', loss)
            self.log('train/accuracy', accuracy)
            self.log('train/f1_score', f1)

            # Also good: Phase-specific metrics
            self.log('metrics/train_loss', loss)
            self.log('metrics/train_acc', accuracy)
            # fmt: on
            return loss

    experiment = tracelet.start_logging("naming")
    fit(Named())
    scalars = tracked(experiment)
    assert scalars["train/f1_score"] == {0: 0.25, 1: 0.25, 2: 0.25}
    assert scalars["metrics/train_loss"] == scalars["train/loss"]
    assert scalars["metrics/train_acc"] == scalars["train/accuracy"]


def test_logging_frequency():
    seen = []

    class Often(Model):
        # fmt: off
        def training_step(self, batch, batch_idx):
            loss = self.compute_loss(batch)

            # Log every step
            self.log('train/loss', loss, on_step=True, on_epoch=False)

            # Log epoch averages
            self.log('train/epoch_loss', loss, on_step=False, on_epoch=True)

            # Log both
            self.log('train/loss_detailed', loss, on_step=True, on_epoch=True)
            # fmt: on
            seen.append(loss.item())
            return loss

    experiment = tracelet.start_logging("frequency")
    fit(Often())
    scalars = tracked(experiment)
    mean = sum(seen) / 3
    assert list(scalars["train/loss"].values()) == pytest.approx(seen)
    assert scalars["train/loss_detailed_step"] == scalars["train/loss"]
    assert scalars["train/epoch_loss"] == {2: pytest.approx(mean)}
    assert scalars["train/loss_detailed_epoch"] == {2: pytest.approx(mean)}
    assert "train/epoch_loss_step" not in scalars


def test_custom_metrics():
    class Custom(Model):
        # fmt: off
        def on_train_start(self):
            # Log hyperparameters
            self.logger.log_hyperparams({
                'learning_rate': self.learning_rate,
                'batch_size': self.batch_size,
                'model_name': self.__class__.__name__
            })

        def training_step(self, batch, batch_idx):
            # Custom metrics
            predictions = self.forward(batch[0])
            custom_metric = self.compute_custom_metric(predictions, batch)

            self.log('custom/my_metric', custom_metric)
            # fmt: on
            return self.compute_loss(batch)

    experiment = tracelet.start_logging("custom")
    fit(Custom())
    assert len(tracked(experiment)["custom/my_metric"]) == 3
    parameters = readers.tensorboard_parameters(Path(experiment.loggers[0].log_dir))
    assert parameters["learning_rate"] == 0.1
    assert parameters["model_name"] == "Custom"


def test_multi_gpu_support():
    experiment = tracelet.start_logging("gpus")
    if torch.cuda.device_count() >= 4:
        trainer = Trainer(accelerator="gpu", devices=4, strategy="ddp")
        assert trainer.world_size == 4
    else:
        with pytest.raises(MisconfigurationException):
            # fmt: off
            # Works with DDP, DDP2, etc.
            Trainer(
                accelerator='gpu',
                devices=4,
                strategy='ddp'
            )
            # fmt: on
    # Two processes on CPUs: test_tracking_ddp.
    try:
        fit(Logging(), strategy="ddp", devices=1)
    finally:
        torch.distributed.destroy_process_group()  # Lightning keeps it to the end of the process
    assert tracked(experiment)["train/loss"].keys() == {0, 1, 2}


def test_integration_with_callbacks(tmp_path):
    # fmt: off
    tracelet.start_logging("lightning_with_callbacks", backend="clearml")

    trainer = Trainer(
        callbacks=[
            ModelCheckpoint(monitor='val/loss'),
            EarlyStopping(monitor='val/loss', patience=3)
        ],
        max_epochs=100, **BRIEF
    )
    # fmt: on

    class Worse(Logging):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

    trainer.fit(Worse(), loader(1), loader(1))
    tracelet.stop_logging()
    scalars, _ = readers.clearml_session(tmp_path / "runs/clearml", "")
    assert scalars["val/loss"] == {0: 0, 1: 1, 2: 2, 3: 3}
    assert trainer.checkpoint_callback.best_model_score == 0


def test_troubleshooting_a_logger_beside_the_experiment_sees_the_same(tmp_path):
    experiment = tracelet.start_logging("both")
    csv = pl.loggers.CSVLogger(tmp_path / "csv", "", "")
    fit(Logging(), logger=csv)
    scalars = tracked(experiment)
    assert readers.csv_file(tmp_path / "csv", "")[0]["train/loss"] == pytest.approx(scalars["train/loss"])
