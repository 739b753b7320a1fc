"""FinetuneModuleBase and FinetuneDataModule under a real Trainer."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from mhc_torch import MHCSequential
from mhc_torch.lightning import (
    DatasetsConfig,
    FinetuneDataModule,
    FinetuneModuleBase,
    MHCLightningCallback,
    ModelCheckpointConfig,
    OptimizerConfig,
    TrainerConfig,
    create_optimizer,
)
from tests.mhc_torch import readers
from tests.mhc_torch.lightning_models import trainer


class Energies(FinetuneModuleBase):
    """Regression of one number."""

    def __init__(self, depth: int = 2, optimizer: dict | None = None, batch_size: int = 32):
        super().__init__(optimizer, batch_size)
        self.save_hyperparameters({"depth": depth})
        torch.manual_seed(0)
        self.net = nn.Sequential(MHCSequential([nn.Linear(3, 3) for _ in range(depth)]), nn.Linear(3, 1))

    def forward(self, batch):
        return {"predicted_properties": self.net(batch[0]).squeeze(-1)}

    def batch_to_labels(self, batch):
        return batch[1]

    def _compute_loss(self, predictions, labels):
        return F.mse_loss(predictions, labels)


class Synthetic(DatasetsConfig):
    samples: int = 10
    splits: tuple[str, ...] = ("train", "validation", "test", "predict")

    def create_datasets(self):
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.samples, 3, generator=generator)
        return {split: TensorDataset(x) if split == "predict" else TensorDataset(x, x.sum(1)) for split in self.splits}


def test_every_stage_logs_its_loss_as_the_mean_over_samples(tmp_path):
    module = Energies(optimizer={"name": "SGD", "lr": 1e-9}, batch_size=4)
    data, t = FinetuneDataModule(Synthetic()), trainer(logger=CSVLogger(tmp_path, "", ""))
    t.fit(module, data)
    t.test(module, data, verbose=False)
    scalars, _ = readers.csv_file(tmp_path, "")
    x, y = data.datasets["train"].tensors
    expected = float(np.mean((module.net(x).squeeze(-1).detach().numpy() - y.numpy()) ** 2))
    for stage in ("val", "test"):
        assert list(scalars[f"{stage}/loss"].values()) == pytest.approx([expected], rel=1e-4)
    assert len(scalars["train/loss"]) == 3


def test_fine_tuning_learns_and_predicts():
    module = Energies(optimizer=OptimizerConfig(name="Adam", lr=0.05), batch_size=5)
    data, t = FinetuneDataModule(Synthetic()), trainer(max_epochs=40)
    before = t.validate(module, data, verbose=False)[0]["val/loss"]
    t.fit(module, data)
    assert t.validate(module, data, verbose=False)[0]["val/loss"] < 0.1 * before
    predictions = torch.cat(t.predict(module, data))
    x = data.datasets["predict"].tensors[0]
    torch.testing.assert_close(predictions, module.net(x).squeeze(-1).detach())


def test_training_batches_are_shuffled_and_the_others_are_not():
    module, data = Energies(batch_size=10), FinetuneDataModule(Synthetic())
    trainer().fit(module, data)
    x = data.datasets["train"].tensors[0]
    assert not torch.equal(next(iter(data.train_dataloader()))[0], x)
    for other in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.equal(next(iter(other))[0], x)


def test_checkpoints_restore_the_module_with_its_settings(tmp_path):
    module = Energies(depth=3, optimizer={"name": "Adam", "lr": 0.01, "kwargs": {"betas": (0.8, 0.9)}}, batch_size=5)
    callback = ModelCheckpointConfig(dirpath=str(tmp_path)).create_callback()
    trainer(callbacks=[callback], enable_checkpointing=True).fit(module, FinetuneDataModule(Synthetic()))
    restored = Energies.load_from_checkpoint(callback.best_model_path)
    assert restored.hparams.optimizer == {"name": "Adam", "lr": 0.01, "kwargs": {"betas": (0.8, 0.9)}}
    assert restored.hparams.depth == 3
    assert restored.configure_optimizers().defaults["betas"] == (0.8, 0.9)
    for name, value in module.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)


def test_no_validation_split_means_no_validation():
    t = trainer()
    t.fit(Energies(), FinetuneDataModule(Synthetic(splits=("train",))))
    assert "val/loss" not in t.callback_metrics
    assert "train/loss" in t.callback_metrics


def test_splits_that_are_missing_or_unknown_are_named():
    with pytest.raises(ValueError, match=r"splits \['valid'\]; known are train, validation"):
        trainer().fit(Energies(), FinetuneDataModule(Synthetic(splits=("train", "valid"))))
    with pytest.raises(ValueError, match="no 'test' split"):
        trainer().test(Energies(), FinetuneDataModule(Synthetic(splits=("train",))), verbose=False)


def test_what_a_subclass_must_define_is_named():
    with pytest.raises(NotImplementedError, match=r"FinetuneModuleBase must define batch_to_labels"):
        FinetuneModuleBase().training_step(None, 0)


def test_frozen_parameters_are_left_to_themselves():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = create_optimizer({"name": "SGD", "lr": 0.5, "kwargs": {"momentum": 0.9}}, model.parameters())
    assert optimizer.param_groups[0]["params"] == list(model[1].parameters())
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["lr"] == 0.5


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"name": "Adamw"}, ValueError, "'Adamw'"),
        ({"name": "lr_scheduler"}, ValueError, "class of torch.optim"),
        ({"lr": 0}, ValueError, "lr"),
        ({"learning_rate": 1}, ValueError, "learning_rate"),
        ({"kwargs": {"speed": 1}}, TypeError, "speed"),
    ],
)
def test_wrong_optimizers_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        create_optimizer(config, nn.Linear(2, 2).parameters())


class SyntheticData(FinetuneDataModule):
    def __init__(self, config: Synthetic):
        super().__init__(config)


def test_it_all_comes_from_the_command_line_too(tmp_path):
    arguments = {
        "model.depth": 3,
        "model.optimizer": '{"name": "SGD", "lr": 0.01}',
        "model.batch_size": 2,
        "data.config.samples": 6,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": str(tmp_path),
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "mhc_torch.lightning.MHCLightningCallback",
        "trainer.callbacks.log_interval": 2,
    }
    cli = LightningCLI(
        Energies, SyntheticData, args=["fit", *(f"--{name}={value}" for name, value in arguments.items())]
    )
    assert len(cli.model.net[0].wrapped_modules) == 3
    assert cli.model.hparams["optimizer"] == {"name": "SGD", "lr": 0.01, "kwargs": {}}
    assert cli.trainer.global_step == 3
    assert next(c for c in cli.trainer.callbacks if isinstance(c, MHCLightningCallback)).log_interval == 2


def from_config(config: TrainerConfig) -> Trainer:
    return config.create_trainer()


COMMAND_LINE = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "precision": "bf16-mixed",
    "deterministic": "warn",
    "max_epochs": 2,
    "min_epochs": 1,
    "max_steps": 3,
    "min_steps": 1,
    "max_time": "00:01:00:00",
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 1,
    "gradient_clip_val": 0.5,
    "gradient_clip_algorithm": "norm",
    "checkpoint.monitor": "val/loss",
    "checkpoint.filename": "best",
    "early_stopping.monitor": "val/loss",
    "early_stopping.patience": 4,
    "ema.decay": 0.9,
    "loggers": '[{"type": "csv"}]',
    "additional_trainer_kwargs": '{"enable_progress_bar": false, "enable_model_summary": false}',
}


def test_a_whole_trainer_config_comes_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {name.partition(".")[0] for name in COMMAND_LINE} == TrainerConfig.model_fields.keys()
    arguments = [f"--trainer.config.{name}={value}" for name, value in COMMAND_LINE.items()]
    try:
        settings = {"trainer_class": from_config, "save_config_callback": None}
        cli = LightningCLI(Energies, SyntheticData, **settings, args=["fit", *arguments])
    finally:
        torch.use_deterministic_algorithms(False)
    trained = cli.trainer
    assert (trained.max_epochs, trained.max_steps, trained.global_step) == (2, 3, 2)
    assert (trained.precision, trained.gradient_clip_val) == ("bf16-mixed", 0.5)
    assert trained.checkpoint_callback.best_model_path.endswith("best.ckpt")
    assert [callback.patience for callback in trained.early_stopping_callbacks] == [4]
    assert any(isinstance(callback, EMAWeightAveraging) for callback in trained.callbacks)
    assert "val/loss" in readers.csv_file(tmp_path / "lightning_logs/version_0", "")[0]


def test_an_unknown_field_on_the_command_line_is_named(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Energies, SyntheticData, trainer_class=from_config, args=["fit", "--trainer.config.turbo=1"])
    assert "turbo" in capsys.readouterr().err
