"""TrainerConfig: every field reaches a real Trainer; what is wrong is refused before training."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from pydantic import ValidationError

from mhc_torch.lightning import (
    CSVLoggerConfig,
    EarlyStoppingConfig,
    EMAConfig,
    MHCLightningCallback,
    MLFlowLoggerConfig,
    ModelCheckpointConfig,
    TensorBoardLoggerConfig,
    TrainerConfig,
    WandbLoggerConfig,
)
from tests.mhc_torch.lightning_models import Classifier, loader

QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


def brief(**fields):
    return TrainerConfig(**{"accelerator": "cpu", "additional_trainer_kwargs": QUIET} | fields)


REACHES = {
    "accelerator": ("cpu", lambda t: type(t.accelerator).__name__ == "CPUAccelerator"),
    "strategy": ("ddp", lambda t: type(t.strategy).__name__ == "DDPStrategy"),
    "num_nodes": (2, lambda t: t.num_nodes == 2),
    "devices": (2, lambda t: t.num_devices == 2),
    "precision": ("bf16-mixed", lambda t: t.precision == "bf16-mixed"),
    "deterministic": (True, lambda t: torch.are_deterministic_algorithms_enabled()),
    "max_epochs": (7, lambda t: t.max_epochs == 7),
    "min_epochs": (2, lambda t: t.min_epochs == 2),
    "max_steps": (11, lambda t: t.max_steps == 11),
    "min_steps": (3, lambda t: t.min_steps == 3),
    "max_time": ({"minutes": 5}, lambda t: any(getattr(c, "_duration", None) == 300 for c in t.callbacks)),
    "val_check_interval": (0.5, lambda t: t.val_check_interval == 0.5),
    "check_val_every_n_epoch": (3, lambda t: t.check_val_every_n_epoch == 3),
    "log_every_n_steps": (9, lambda t: t.log_every_n_steps == 9),
    "gradient_clip_val": (0.25, lambda t: t.gradient_clip_val == 0.25),
    "gradient_clip_algorithm": ("value", lambda t: t.gradient_clip_algorithm == "value"),
    "checkpoint": ({"save_last": True}, lambda t: t.checkpoint_callback and t.checkpoint_callback.save_last),
    "early_stopping": ({"monitor": "loss"}, lambda t: [c.monitor for c in t.early_stopping_callbacks] == ["loss"]),
    "ema": ({"decay": 0.9}, lambda t: any(isinstance(c, EMAWeightAveraging) for c in t.callbacks)),
    "loggers": (["csv"], lambda t: [type(logger) for logger in t.loggers] == [CSVLogger]),
    "additional_trainer_kwargs": ({"accumulate_grad_batches": 4}, lambda t: t.accumulate_grad_batches == 4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _keep_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def test_no_field_is_left_out():
    assert REACHES.keys() == TrainerConfig.model_fields.keys()


@pytest.mark.parametrize("field", REACHES)
def test_every_field_reaches_the_trainer(field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, reached = REACHES[field]
    assert not (field != "accelerator" and reached(TrainerConfig(accelerator="cpu").create_trainer()))
    assert reached(TrainerConfig(**{"accelerator": "cpu"} | {field: value}).create_trainer())


def test_nothing_is_logged_or_kept_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    brief(max_epochs=1).create_trainer().fit(Classifier(), loader(1))
    assert list(tmp_path.iterdir()) == []


def test_checkpointing_and_early_stopping_in_a_real_run(tmp_path):
    class Flat(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val/forces_mae", 1.0)

    checkpoint = ModelCheckpointConfig(
        monitor="val/forces_mae", dirpath=str(tmp_path / "checkpoints"), filename="best-model", save_top_k=1, mode="min"
    )
    stopping = EarlyStoppingConfig(monitor="val/forces_mae", patience=2, mode="min")
    trainer = brief(max_epochs=20, checkpoint=checkpoint, early_stopping=stopping).create_trainer()
    trainer.fit(Flat(), loader(1), loader(1))
    assert trainer.current_epoch == 3, "the first epoch is the best, two more are waited for"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best-model.ckpt"]
    assert isinstance(checkpoint.create_callback(), ModelCheckpoint)
    assert isinstance(stopping.create_callback(), EarlyStopping)


def test_moving_average_in_a_real_run():
    models = []
    for ema in (None, EMAConfig(decay=1.0)):
        models.append(Classifier())
        brief(max_epochs=1, ema=ema).create_trainer().fit(models[-1], loader(3))
    initial = Classifier()
    moved, averaged = (model.head.weight for model in models)
    assert not torch.equal(moved, initial.head.weight)
    # The first update copies the weights after one step; with decay 1 they stay there.
    assert not torch.equal(averaged, moved)


@pytest.mark.parametrize(
    ("precision", "weights", "states"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_precision_in_a_real_run(precision, weights, states):
    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.head.register_forward_hook(lambda *call: setattr(self, "seen", call[-1].dtype))

    watch, model = Watch(), Classifier()
    brief(max_epochs=1, precision=precision).create_trainer(callbacks=watch).fit(model, loader(1))
    assert watch.seen == states
    assert model.head.weight.dtype == weights


def test_overrides_replace_and_callbacks_add(tmp_path):
    config = brief(max_epochs=5, loggers=["csv"], early_stopping={"monitor": "val_loss"})
    mine = MHCLightningCallback()
    trainer = config.create_trainer(max_epochs=1, logger=TensorBoardLogger(tmp_path), callbacks=[mine])
    assert trainer.max_epochs == 1
    assert [type(logger) for logger in trainer.loggers] == [TensorBoardLogger]
    assert mine in trainer.callbacks
    assert trainer.early_stopping_callback is not None


CONFIG = TrainerConfig(
    accelerator="cpu",
    max_epochs=3,
    gradient_clip_val=1.0,
    early_stopping=EarlyStoppingConfig(monitor="val/loss", patience=2),
    loggers=["csv", TensorBoardLoggerConfig(name="mine")],
)
TOML = """
accelerator = "cpu"
max_epochs = 3
gradient_clip_val = 1.0
loggers = ["csv", {type = "tensorboard", name = "mine"}]
[early_stopping]
monitor = "val/loss"
patience = 2
"""
YAML = """
accelerator: cpu
max_epochs: 3
gradient_clip_val: 1.0
loggers: [csv, {type: tensorboard, name: mine}]
early_stopping: {monitor: val/loss, patience: 2}
"""


@pytest.mark.parametrize(("name", "text"), [("run.toml", TOML), ("run.yaml", YAML), ("run.yml", YAML)])
def test_files_say_the_same_as_python(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert TrainerConfig.from_file(tmp_path / name) == CONFIG


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="path must end in"):
        TrainerConfig.from_file(tmp_path / "run.ini")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_epoch": 1}, "max_epoch"),
        ({"loggers": ["tensorbord"]}, "tensorbord"),
        ({"loggers": [{"type": "csv", "folder": "x"}]}, "folder"),
        ({"precision": "8-bit"}, "precision"),
        ({"checkpoint": {"mode": "least"}}, "mode"),
        ({"early_stopping": {}}, "monitor"),
        ({"num_nodes": 0}, "num_nodes"),
        ({"additional_trainer_kwargs": {"max_epochs": 3}}, "max_epochs.*fields of their own"),
        ({"additional_trainer_kwargs": {"turbo": True}}, "turbo.*unknown to the Trainer"),
    ],
)
def test_what_is_wrong_is_refused_by_name(fields, message):
    with pytest.raises(ValidationError, match=message):
        TrainerConfig(**fields)


@pytest.mark.parametrize("config", [CSVLoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig])
def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, config):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="save_dir: cannot write to"):
        TrainerConfig(loggers=[config(save_dir=str(tmp_path / "file" / "logs"))]).create_trainer()


def test_checkpoints_into_such_a_folder_too(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="dirpath: cannot write to"):
        ModelCheckpointConfig(dirpath=str(tmp_path / "file" / "checkpoints")).create_callback()


def test_timedeltas_and_lists_of_devices_are_kept():
    config = TrainerConfig(max_time=timedelta(hours=1), devices=[0, 1], check_val_every_n_epoch=None)
    assert config.max_time == timedelta(hours=1)
    assert config.devices == [0, 1]


def test_a_missing_backend_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("mhc_torch.lightning.settings.find_spec", lambda module: None)
    with pytest.raises(ImportError, match=r"pip install 'mhc-jax\[mlflow\]'"):
        MLFlowLoggerConfig().create_logger()
